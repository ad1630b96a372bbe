"""What importing the package brings along."""

import subprocess
import sys

import pytest

MODELS = ("named", "mingpt", "attention", "block", "gpt", "sort", "benchmark")


def python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("module", MODELS)
def test_a_models_module_imports_no_plots_and_no_widgets(module, tmp_path):
    code = f"import sys, kvcache_lib.{module}; print(*(m for m in ('matplotlib', 'ipywidgets', 'IPython') if m in sys.modules))"
    assert python(code, tmp_path) == []


def test_imports_run_one_way(tmp_path):
    "The baseline knows nothing of the cache; each exercise knows only those before it."
    for i, module in enumerate(MODELS[:5]):
        later = [f"kvcache_lib.{m}" for m in MODELS[i + 1 :]]
        code = f"import sys, kvcache_lib.{module}; print(*(m for m in {later!r} if m in sys.modules))"
        assert python(code, tmp_path) == []


def test_version_is_that_of_the_settings(tmp_path):
    from configparser import ConfigParser
    from pathlib import Path

    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(Path(__file__).parents[1] / "settings.ini")
    assert python("import kvcache_lib; print(kvcache_lib.__version__)", tmp_path) == [
        settings["DEFAULT"]["version"]
    ]
