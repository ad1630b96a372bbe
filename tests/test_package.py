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
    "rotary", "llama", "formats", "checkpoint", "paged", "prefix", "request", "scheduler", "engines", "int8", "float16", "quantized", "speculative", "peers", "processes", "longtext", "cut", "parallel", "hardware", "planner",
    "measure.profiling", "measure.apart", "measure.static", "measure.contestants", "measure.drawing", "measure.rungs", "measure.ladder", "measure.program",
]  # fmt: skip
SCRIPT = """
import importlib, json, sys
import kvcache_lib
bare = "torch" not in sys.modules and bool(kvcache_lib.__doc__)
seen = {}
for name in %r:
    importlib.import_module("kvcache_lib." + name)
    seen[name] = [m for m in sys.modules if m.startswith("kvcache_lib.") or m in ("matplotlib", "ipywidgets", "IPython")]

from kvcache_lib import GPT, GPT_fast, GPT_kv, GPTConfig, KVBuffer, KVCache, Trainer, stream
import kvcache_lib.fast as fast, kvcache_lib.mingpt as mingpt
had = fast.KVBuffer is KVBuffer and GPT_fast is fast.GPT_fast and mingpt.Trainer is Trainer and set(kvcache_lib.__all__) <= set(dir(kvcache_lib))
try: kvcache_lib.GPT_slow
except AttributeError as e: unknown = str(e)

from kvcache_lib.checks import check_attention
check_attention(kvcache_lib.attention.CausalSelfAttention_kv)
print(json.dumps([kvcache_lib.__version__, seen, bare, had, unknown, "torch._dynamo" in sys.modules]))
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


def test_the_models_are_had_from_the_package(imported):
    "By name, imported when asked for; the package itself imports nothing."
    bare, had, unknown = imported[2:5]
    assert bare and had and "GPT_slow" in unknown


def test_a_check_brings_no_compiler_along(imported):
    "To import PyTorch's takes longer than to check."
    assert not imported[5]
