"""The package says what its functions take and return, and a type checker agrees.

PyTorch's own types are skipped here, since reading them takes minutes. With them: `mypy --disable-error-code override -p kvcache_lib`.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("named", "config", "arguments", "trainer", "weights", "mingpt", "attention", "block", "prompts", "gpt", "buffer", "ragged", "fast", "sort", "cost", "corpus", "text", "kept", "rotary", "llama", "formats", "checkpoint", "paged", "prefix", "request", "scheduler", "engines", "longtext", "hardware", "planner")  # fmt: skip
# A layer with a cache returns the cache too, where the baseline's returns a tensor: the exercises' contract.
SETTINGS = """
[mypy]
disable_error_code = override
[mypy-torch.*,matplotlib.*,numpy.*,transformers.*,tqdm.*,IPython.*,ipywidgets.*,PIL.*,fastcore.*]
follow_imports = skip
"""


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_are_typed(room):
    tree, bare = ast.parse((ROOT / "kvcache_lib" / f"{room}.py").read_text(encoding="utf-8")), []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in [tree, *classes]:
        for f in owner.body:
            if isinstance(f, ast.FunctionDef) and (not f.name.startswith("_") or f.name == "__init__"):
                a = f.args
                arguments = [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
                untyped = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
                if untyped or (f.returns is None and f.name != "__init__"):
                    bare.append((f.name, untyped))
    assert bare == []


def test_a_type_checker_agrees(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    program = ROOT / "tests" / "user_program.py"
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from kvcache_lib import GPTConfig, KVBuffer\nKVBuffer(GPTConfig()).crop('three')\n")
    rooms = [ROOT / "kvcache_lib" / f"{room}.py" for room in ("__init__", *ROOMS)]
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache"]
    ran = subprocess.run([*command, "--follow-imports", "silent", *rooms, program, wrong], cwd=ROOT, capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and "wrong.py:2" in lines[0] and '"crop"' in lines[0], ran.stdout + ran.stderr


def test_the_users_program_runs():
    ran = subprocess.run(
        [sys.executable, "-m", "tests.user_program"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "kvcache_lib" / "py.typed").exists() and "py.typed" in (ROOT / "setup.py").read_text(encoding="utf-8")
