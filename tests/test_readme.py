"""The README keeps its promises."""

import json
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


def test_minutes_are_those_of_the_notebooks():
    for name, minutes in re.findall(r"(?m)^\| \[\d\d\]\(nbs/(\S+)\) .*\| (\d+) \|$", README):
        text = (ROOT / "nbs" / name).read_text(encoding="utf-8")
        assert re.search(r"\*\*Time:\*\* about (\d+) minutes", text)[1] == minutes, name


def test_the_speedup_that_it_leads_with_is_the_fair_one():
    for model in json.loads((ROOT / "benchmark_results.json").read_text())["models"]:
        row = model["rows"][-1]
        fair = row["fused"]["median"] / row["kv"]["median"]
        assert f"{model['model_type']}'s step {fair:.0f} times as fast" in README and f"T = {row['T']:,}" in README
