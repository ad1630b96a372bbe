"""The README keeps its promises."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_in_order_from_another_folder(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) == 2
    subprocess.run([sys.executable, "-c", "\n".join(examples)], cwd=tmp_path, check=True)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_numbered_notebook_is_listed():
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        assert f"](nbs/{path.name})" in README


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in re.findall(r"make ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert command in targets, command
