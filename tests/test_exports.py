"""The exported modules are what the notebooks say, and the notebooks are clean. Nothing in the working tree is touched."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
MODULES = sorted(p.relative_to(ROOT) for p in (ROOT / "kvcache_lib").rglob("*.py"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project whose notebooks were exported and cleaned once more."
    copy = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=ignore)
    (copy / "kvcache_lib").mkdir()
    shutil.copy(ROOT / "kvcache_lib" / "__init__.py", copy / "kvcache_lib")
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True)
    return copy


def test_no_module_is_missing_or_left_over(copy):
    assert MODULES == sorted(p.relative_to(copy) for p in (copy / "kvcache_lib").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_is_what_its_notebook_exports(copy, path):
    same = (ROOT / path).read_text() == (copy / path).read_text()
    assert same, f"{path} differs from its notebook. Edit the notebook, then run: make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebook_is_clean(copy, path):
    same = (ROOT / path).read_text() == (copy / path).read_text()
    assert same, f"{path} is not clean. Run: .venv/bin/nbdev_clean"
