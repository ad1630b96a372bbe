"""The benchmark's file, its errors and how it ends. Not one test looks at a time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvcache_lib import benchmark
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.measure import subjects, timing
from kvcache_lib.mingpt import GPT

ROOT = Path(__file__).parents[1]
QUICK = ["--device", "cpu", "--models", "gpt-nano", "--contexts", "2", "16", "--seconds", "0.01"]


def row(T, no_kv, kv):
    return {"T": T, "no_kv": {"median": no_kv}, "kv": {"median": kv}, "speedup": no_kv / kv}


def test_the_file_has_exactly_this_form():
    rows = [row(64, 4.42, 1.4), row(1536, 12345.678, 23.456)]
    models = [
        {"model_type": "gpt-mini", "params": 3_112_512, "rows": rows},
        {"model_type": "gpt2", "params": 86_800_000, "rows": rows[:1]},
    ]
    assert benchmark.format_results({"device": "cpu", "models": models}) == (
        "device: cpu\n"
        "\n"
        "gpt-mini  (3.1M params)\n"
        " Context T    no KV (ms)       KV (ms)    speedup\n"
        "--------------------------------------------------\n"
        "        64          4.42          1.40      3.16x\n"
        "      1536      12345.68         23.46    526.33x\n"
        "\n"
        "gpt2  (86.8M params)\n"
        " Context T    no KV (ms)       KV (ms)    speedup\n"
        "--------------------------------------------------\n"
        "        64          4.42          1.40      3.16x\n"
        "\n"
    )


def test_both_sides_predict_the_same():
    plain, cached = benchmark.model_pair("gpt-nano")
    plain, cached = plain.double(), cached.double()
    for T in (2, 7, 64):
        no_kv, kv = benchmark.step_pair(plain, cached, T)
        assert no_kv().shape == (1, subjects.VOCAB_SIZE) and not kv().requires_grad
        torch.testing.assert_close(kv(), no_kv(), rtol=1e-9, atol=1e-9)


def test_the_fused_side_predicts_the_same_without_a_cache():
    plain, fused = (model.double() for model in subjects.same_weights("gpt-nano", "cpu", GPT, subjects.GPT_fused))
    for T in (2, 7, 64):
        want, got = (benchmark.whole_step(model, T)() for model in (plain, fused))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    encoded = []
    fused.transformer.h[0].register_forward_hook(lambda module, args, out: encoded.append(args[0].size(1)))
    benchmark.whole_step(fused, 20)()
    assert encoded == [20]


def test_the_cached_side_encodes_one_token_and_the_other_all():
    plain, cached = benchmark.model_pair("gpt-nano")
    no_kv, kv = benchmark.step_pair(plain, cached, T=20)
    counts = []
    for model in (plain, cached):
        model.transformer.h[0].register_forward_hook(lambda module, args, out: counts.append(args[0].size(1)))
    no_kv(), kv(), kv()
    assert counts == [20, 1, 1]


def test_sides_take_turns():
    order = []
    times = timing.interleaved(
        lambda: (order.append("a"), time.sleep(0.02)),
        lambda: (order.append("b"), time.sleep(0.02)),
        seconds=0.01,
        min_rounds=3,
    )
    turns = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert turns == "ab" * 4  # the warm-up, then three rounds
    assert all(len(t) >= 3 for t in times)


def test_where_times_are_not_read_each_is_run_twice(monkeypatch):
    monkeypatch.setenv("KVCACHE_QUICK", "1")
    ran = []
    here, there = timing.interleaved(lambda: ran.append(1), Elsewhere([]), seconds=60, min_rounds=9)
    assert len(ran) == len(here) == 2 and all(0 <= t < 1000 for t in here) and there == [3.0, 3.0]
    with pytest.raises(ValueError, match="min_rounds ≥ 1"):
        timing.interleaved()


def test_what_takes_long_is_its_own_turn_and_short_runs_come_in_numbers(monkeypatch):
    now, ran = [0.0], {"long": 0, "short": 0}
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    class Many:
        times = [0.001, 0.002]

        def __init__(self, *args, **kwargs): ...

        def blocked_autorange(self, min_run_time):
            return self

    monkeypatch.setattr(timing, "Timer", Many)

    def step(name, seconds):
        ran[name] += 1
        now[0] += seconds

    long, short = timing.interleaved(lambda: step("long", timing.LONG), lambda: step("short", timing.LONG / 2), seconds=0, min_rounds=3)
    assert long == [250.0] * 3 and short == [1.0, 2.0] * 3 and ran == {"long": 4, "short": 4}  # one warms up


def test_disturbed_rounds_are_taken_again_for_a_minute_at_most(monkeypatch):
    for patience, rounds in ((60, 6), (0, 3)):
        monkeypatch.setattr(timing, "PATIENCE", patience)
        ran = []
        assert len(timing.interleaved(Elsewhere(ran), seconds=0, min_rounds=3, steady=lambda: False)[0]) == 3 and len(ran) == rounds


class Elsewhere:
    "A contestant in another process."

    def __init__(self, ran):
        self.ran = ran

    def __call__(self): ...

    def times(self):
        self.ran.append(1)
        return [3.0]


def test_median_and_quartiles():
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "runs": 5}


def test_no_times_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="the times of two runs or more, got \\[1.0\\]"):
        timing.quartiles([1.0])
    with pytest.raises(ValueError, match="expected functions and min_rounds ≥ 1, got 0 and 5"):
        timing.interleaved()
    with pytest.raises(ValueError, match="got 1 and 0"):
        timing.interleaved(lambda: None, min_rounds=0)


@pytest.mark.parametrize("folder", [ROOT, *sorted((ROOT / "gpu_results").iterdir())], ids=lambda folder: folder.name)
def test_the_committed_results_belong_together(folder):
    result = json.loads((folder / "benchmark_results.json").read_text())
    assert (folder / "benchmark_results.txt").read_text() == benchmark.format_results(result)
    assert (result["device"] == "cuda") == (folder != ROOT)
    assert [m["model_type"] for m in result["models"]] == list(subjects.MODELS)
    for model in result["models"]:
        assert [r["T"] for r in model["rows"]] == list(subjects.CONTEXTS)
        assert all(
            r[side]["q1"] <= r[side]["median"] <= r[side]["q3"]
            for r in model["rows"]
            for side in ("no_kv", "fused", "kv")
        )


def test_command_writes_both_files_and_says_so(tmp_path, capsys):
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "r.txt")]) == 0
    text, result = (tmp_path / "r.txt").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert text == benchmark.format_results(result)
    assert result["threads"] == torch.get_num_threads() and result["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert text in said and "threads" in said and "r.json" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.txt"]


def test_other_classes_can_be_measured():
    class Mine(GPT_kv):
        pass

    built = []
    Mine.__init__ = lambda self, config: (built.append(1), GPT_kv.__init__(self, config))[1]
    result = benchmark.measure(("gpt-nano",), (4,), "cpu", 0.01, GPT, Mine)
    assert built and result["models"][0]["rows"][0]["T"] == 4


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--models", "gpt3"], "unknown model 'gpt3', expected one of"),
        (["--contexts", "1"], "contexts from 2 to 2048 tokens, got 1"),
        (["--contexts", "64", "2049"], "contexts from 2 to 2048 tokens, got 2049"),
        (["--device", "abacus"], "expected device to be one of cpu.*got 'abacus'"),
        (["--seconds", "0"], "seconds > 0"),
        (["--seconds", "nan"], "seconds > 0, got nan"),
        (["--seconds", "inf"], "seconds > 0, got inf"),
        (["--out", "missing/r.txt"], "expected a file that can be written, got missing/r.txt"),
        (["--out", "."], "expected a file that can be written, got .: it is a folder"),
        (["--out", ""], "expected a file that can be written, got .: it is a folder"),
        (["--out", "r.json"], "not to end on .json"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "model_pair", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(SystemExit) as e:
        benchmark.main([*QUICK, *arguments])
    assert e.value.code == 2
    assert re.search(says, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given,says",
    [
        (dict(models="gpt2"), "expected models to be a list or tuple such as .*, got 'gpt2'"),
        (dict(contexts=64), "expected contexts to be a list or tuple such as .*, got 64"),
        (dict(models=()), r"expected models to be .*, got \(\)"),
        (dict(contexts=(64.0,)), "contexts from 2 to 2048 tokens, got 64.0"),
        (dict(contexts=("64",)), "contexts from 2 to 2048 tokens, got '64'"),
        (dict(device=None), "expected device to be one of cpu.*got None"),
        (dict(device=["cpu"]), "expected device to be one of cpu.*got"),
        (dict(seconds="1"), "expected seconds > 0, got '1'"),
    ],
)
def test_measure_refuses_what_it_cannot_measure(given, says, monkeypatch):
    monkeypatch.setattr(benchmark, "model_pair", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=says):
        benchmark.measure(**given)


posix = pytest.mark.skipif(os.name != "posix", reason="a process cannot be sent these signals elsewhere")
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


@posix
@pytest.mark.parametrize("number", NAMES)
def test_a_stopped_run_leaves_the_old_files_and_says_so_in_a_line(number, tmp_path):
    (tmp_path / "r.txt").write_text("old")
    (tmp_path / "r.json").write_text("old")
    arguments = [*QUICK, "--seconds", "60", "--out", "r.txt"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kvcache_lib.benchmark", *arguments],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    while "T = 2" not in said:  # the bar shows what is being measured
        assert process.poll() is None, said
        said += process.stderr.read(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and out == "" and "Traceback" not in err
    assert err.endswith(f"\n{NAMES[number]}; r.txt is as it was\n")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"r.txt": "old", "r.json": "old"}


EARLY = """
import os, runpy, sys

class WhileTorchIsLoaded:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, WhileTorchIsLoaded())
{start}
"""
STARTS = {
    "script": "from kvcache_lib.measure.program import main; sys.exit(main())",
    "python -m": "runpy.run_module('kvcache_lib.benchmark', run_name='__main__')",
}


@posix
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", NAMES)
def test_a_signal_while_torch_is_loaded_is_one_line(number, start, tmp_path):
    code = EARLY.format(number=int(number), start=STARTS[start])
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.stderr.strip() == f"kvcache-benchmark: {NAMES[number]}; nothing was written"
    assert ran.returncode == 128 + number and ran.stdout == "" and not list(tmp_path.iterdir())


@posix
def test_a_signal_between_two_files_waits_for_the_second(tmp_path, monkeypatch, capsys):
    real = os.replace

    def replace(*names):
        real(*names)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "r.txt").write_text("old")
    (tmp_path / "r.json").write_text("old")
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "r.txt")]) == 130
    text, result = (tmp_path / "r.txt").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert text == benchmark.format_results(result)
    assert "interrupted; the results are written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_results_that_cannot_be_written_are_shown(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    real = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda *args: (folder.rmdir(), real(*args))[1])
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--out", str(folder / "r.txt")])
    said = capsys.readouterr()
    assert "gpt-nano  (0." in said.out and "expected a file that can be written" in said.err
