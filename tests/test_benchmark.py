"""The benchmark's file, its errors and what survives an interruption. Not one test looks at a time."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from kvcache_lib import benchmark
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPT

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
        assert no_kv().shape == (1, benchmark.VOCAB_SIZE) and not kv().requires_grad
        torch.testing.assert_close(kv(), no_kv(), rtol=1e-9, atol=1e-9)


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
    times = benchmark.interleaved(
        lambda: (order.append("a"), time.sleep(0.02)),
        lambda: (order.append("b"), time.sleep(0.02)),
        seconds=0.01,
        min_rounds=3,
    )
    turns = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert turns == "ab" * 4  # the warm-up, then three rounds
    assert all(len(t) >= 3 for t in times)


def test_summary_is_median_and_quartiles():
    assert benchmark.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "runs": 5}


def test_the_committed_results_belong_together():
    from pathlib import Path

    root = Path(__file__).parents[1]
    result = json.loads((root / "benchmark_results.json").read_text())
    assert (root / "benchmark_results.txt").read_text() == benchmark.format_results(result)
    assert [m["model_type"] for m in result["models"]] == list(benchmark.MODELS)
    for model in result["models"]:
        assert [r["T"] for r in model["rows"]] == list(benchmark.CONTEXTS)
        assert all(
            r[side]["q1"] <= r[side]["median"] <= r[side]["q3"]
            for r in model["rows"]
            for side in ("no_kv", "kv")
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
        (["--out", "missing/r.txt"], "expected a file that can be written, got missing/r.txt"),
        (["--out", "."], "expected a file that can be written, got ."),
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


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ValueError, match="expected a file that can be written, got .*missing"):
        benchmark.write_whole({tmp_path / "a.txt": "new", tmp_path / "missing" / "b.txt": "new"})
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_run_leaves_the_old_file(tmp_path):
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
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; r.txt is as it was" in err and out == ""
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"r.txt": "old", "r.json": "old"}
