"""What importing the package brings along. One fresh process imports the modules in reading order."""

import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

MODELS = [
    "files", "measure", "measure.machines", "measure.command", "named", "config", "arguments", "trainer", "folders", "weights", "mingpt", "attention", "block", "prompts", "gpt", "sort",
    "measure.timing", "measure.reading", "measure.subjects", "benchmark", "rounding", "cost", "buffer", "kernels", "direct", "ragged", "fast", "corpus", "text", "kept",
    "rotary", "llama", "formats", "checkpoint", "paged", "prefix", "request", "scheduler", "engines", "int8", "quantized", "speculative", "peers", "processes", "longtext", "cut", "parallel", "hardware", "planner",
    "measure.profiling", "measure.apart", "measure.static", "measure.contestants", "measure.drawing", "measure.rungs", "measure.ladder", "measure.program",
]  # fmt: skip
SCRIPT = """
import importlib, json, sys
import kvcache_lib
seen = {}
for name in %r:
    importlib.import_module("kvcache_lib." + name)
    seen[name] = [m for m in sys.modules if m.startswith("kvcache_lib.") or m in ("matplotlib", "ipywidgets", "IPython")]
print(json.dumps([kvcache_lib.__version__, seen]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "The version, and for each module what is loaded when it has been imported, after those before it."
    command = [sys.executable, "-c", SCRIPT % MODELS]
    ran = subprocess.run(command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def test_a_models_module_imports_no_plots_and_no_widgets(imported):
    loaded = imported[1][MODELS[-1]]
    assert [m for m in loaded if not m.startswith("kvcache_lib.")] == []


def test_imports_run_one_way(imported):
    "The baseline knows nothing of the cache; each module knows only those before it."
    for i, name in enumerate(MODELS):
        assert set(imported[1][name]) <= {f"kvcache_lib.{m}" for m in MODELS[: i + 1]}


def test_version_is_that_of_the_settings(imported):
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(Path(__file__).parents[1] / "settings.ini")
    assert imported[0] == settings["DEFAULT"]["version"]


def test_the_models_are_had_from_the_package(tmp_path):
    "By name, imported when asked for; the package itself imports nothing."
    code = (
        "import sys, kvcache_lib\n"
        "assert 'torch' not in sys.modules and kvcache_lib.__doc__\n"
        "from kvcache_lib import GPT, GPT_fast, GPT_kv, GPTConfig, KVBuffer, KVCache, Trainer, stream\n"
        "import kvcache_lib.fast as fast, kvcache_lib.mingpt as mingpt\n"
        "assert fast.KVBuffer is KVBuffer and GPT_fast is fast.GPT_fast and mingpt.Trainer is Trainer\n"
        "assert set(kvcache_lib.__all__) <= set(dir(kvcache_lib))\n"
        "try: kvcache_lib.GPT_slow\n"
        "except AttributeError as e: assert 'GPT_slow' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
