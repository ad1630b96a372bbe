"""`kvcache-benchmark --serve`: its requests, its ways of serving, its files. Not one test looks at a time."""

import json
import math
import re
from pathlib import Path

import pytest

from kvcache_lib import benchmark
from kvcache_lib.fast import GPT_fast
from kvcache_lib.measure import serving
from kvcache_lib.measure.arrivals import Arrival, Arrivals, draw_requests, serve, spread, waits
from kvcache_lib.measure.servers import Continuous, InTurn, Memory, missing_batching, peer_model, peer_serve
from kvcache_lib.measure.subjects import same_weights

ROOT = Path(__file__).parents[1]
QUICK = ["--serve", "--device", "cpu", "--models", "gpt-nano", "--requests", "3", "--rounds", "1"]
SMALL = Arrivals(requests=6, shared=32, prompt=(2, 20), new=(2, 9))


def test_requests_are_those_of_the_seed_and_of_the_stated_distribution():
    how = Arrivals(requests=4000, seed=3)
    found = draw_requests(how, 128, alone=2.0)
    assert found == draw_requests(how, 128, alone=2.0) != draw_requests(Arrivals(requests=4000, seed=4), 128, alone=2.0)
    own = [len(r.prompt) - how.shared * (i % 2) for i, r in enumerate(found)]
    for lengths, (least, most) in ((own, how.prompt), ([r.new_tokens for r in found], how.new)):
        assert (min(lengths), max(lengths)) == (least, most)
        middle = sorted(lengths)[len(lengths) // 2]
        assert abs(math.log(middle) - math.log(least * most) / 2) < 0.1  # log-uniform
    assert len({tuple(r.prompt[: how.shared]) for r in found[1::2]}) == 1
    gaps = [b.time - a.time for a, b in zip(found, found[1:])]
    mean = sum(gaps) / len(gaps)
    assert abs(mean / (2.0 / how.load) - 1) < 0.1  # exponential: the deviation is as large as the mean
    assert abs((sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean - 1) < 0.1
    assert "seed 3" in how.said() and "4000 requests" in how.said()


@pytest.fixture(scope="module")
def model():
    (model,) = same_weights("gpt-nano", "cpu", GPT_fast)
    return model.double()


def test_every_way_of_serving_writes_the_same_texts(model):
    requests = draw_requests(SMALL, 128, alone=0.001)
    servers = [InTurn(model, 1), InTurn(model, 4), Continuous(model, requests, 4, 32), Continuous(model, requests, 4, 32, 16, prefix=True)]
    runs = [serve(requests, server) for server in servers]
    want = [model.generate_kv([r.prompt], r.new_tokens)[0][len(r.prompt) :].tolist() for r in requests]
    assert all(run.texts == want for run in runs)
    for run, server in zip(runs, servers):
        assert [len(times) for times in run.times] == [r.new_tokens for r in requests]
        assert all(times == sorted(times) and times[0] >= r.time for times, r in zip(run.times, requests))
        assert 0 <= server.memory.wasted < 1 and server.memory.most
    if not missing_batching():
        assert peer_serve(peer_model(model), requests, 4, 32).texts == want


def test_what_is_measured_is_counted_right():
    requests = [Arrival(0.0, [1], 2), Arrival(1.0, [1], 3)]
    got = waits(requests, [[1.0, 2.0], [4.0, 4.5, 8.0]])
    assert (got["tokens_per_second"], got["tokens"], got["seconds"]) == (5 / 8, 5, 8.0)
    assert got["first"] == {"median": 2.0, "p95": 3.0} and got["between"] == {"median": 1.0, "p95": 3.5}
    assert got["curve"][0] == 1.0 and got["curve"][-1] == 8.0 and len(got["curve"]) == 60
    assert spread(list(range(1, 101))) == {"median": 50.5, "p95": 95}
    memory = Memory()
    memory.note(10, 5), memory.note(20, 19)
    assert (memory.most, memory.wasted) == (20, 1 - 24 / 30)


def test_the_command_writes_three_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "Arrivals", lambda requests: Arrivals(requests, shared=16, prompt=(2, 9), new=(2, 6)))
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "s.txt")]) == 0
    text, result = (tmp_path / "s.txt").read_text(), json.loads((tmp_path / "s.json").read_text())
    assert text == serving.format_serving(result) and text in capsys.readouterr().out
    assert (tmp_path / "s.svg").read_text().count("</svg>") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.svg", "s.txt"]
    names = [row["name"] for row in result["models"][0]["rows"]]
    assert names == [serving.ALONE, serving.STATIC, serving.CONTINUOUS, serving.PAGED, *([] if missing_batching() else [serving.PEER])]


def test_without_transformers_its_row_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "missing_batching", lambda: "transformers is not installed")
    monkeypatch.setattr(serving, "Arrivals", lambda requests: Arrivals(requests, shared=16, prompt=(2, 5), new=(2, 3)))
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "s.txt")]) == 0
    said = capsys.readouterr()
    assert "transformers is not installed: its rows are left out" in said.err
    assert "left out, since" in said.out and "transformers none" in said.out


def test_a_peer_that_cannot_serve_here_costs_nobody_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "Arrivals", lambda requests: Arrivals(requests, shared=16, prompt=(2, 5), new=(2, 3)))
    monkeypatch.setattr(serving, "missing_batching", lambda: "")
    monkeypatch.setattr(serving, "peer_model", lambda model: None)
    monkeypatch.setattr(serving, "peer_serve", lambda *args: (_ for _ in ()).throw(RuntimeError("no kernel for this device")))
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "s.txt")]) == 0
    assert f"{serving.PEER}, cannot serve here and is left out: no kernel for this device" in capsys.readouterr().err
    rows = json.loads((tmp_path / "s.json").read_text())["models"][0]["rows"]
    assert [row["name"] for row in rows] == [serving.ALONE, serving.STATIC, serving.CONTINUOUS, serving.PAGED]
    monkeypatch.setattr(serving.InTurn, "step", lambda self: (_ for _ in ()).throw(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        benchmark.main([*QUICK, "--out", str(tmp_path / "s.txt")])


@pytest.mark.parametrize(
    "arguments,says",
    [
        ([*QUICK, "--ladder"], "--serve without --ladder"),
        ([*QUICK, "--contexts", "64"], "--serve without --ladder, --contexts"),
        ([*QUICK, "--out", "s.svg"], "not to end on .svg"),
        ([*QUICK, "--models", "gpt3"], "unknown model 'gpt3'"),
        ([*QUICK[:-3], "0"], "requests ≥ 1, a whole number, got 0"),
        ([*QUICK[:-1], "0"], "rounds ≥ 1"),
        (QUICK[1:], "--requests together with --serve"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "one_model", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert re.search(says, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [ROOT, *sorted((ROOT / "gpu_results").iterdir())], ids=lambda folder: folder.name)
def test_the_committed_results_belong_together(folder):
    result = json.loads((folder / "serve_results.json").read_text())
    assert (folder / "serve_results.txt").read_text() == serving.format_serving(result)
    for model in result["models"]:
        assert [row["same_texts"] for row in model["rows"]][0] == result["arrivals"]["requests"]
