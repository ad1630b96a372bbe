"""The ladder's contestants, its ratios, its files. Not one test looks at a time."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvcache_lib import benchmark
from kvcache_lib.cost import cache_bytes, step_cost
from kvcache_lib.measure import contestants, ladder, reading, subjects
from kvcache_lib.measure.drawing import draw_ladder
from kvcache_lib.measure.profiling import operation_times, peak_bytes

ROOT = Path(__file__).parents[1]
QUICK = ["--ladder", "--device", "cpu", "--models", "gpt-nano", "--contexts", "16", "--seconds", "0.01"]


@pytest.fixture(scope="module")
def models():
    "The contestants in float64, without the one in bfloat16."
    models = contestants.Contestants("gpt-nano")
    for model in filter(None, (models.plain, models.kv, models.fast, models.peer)):
        model.double()
    models.half = None
    return models


@pytest.mark.parametrize("B,T", [(1, 2), (3, 40)])
def test_all_who_decode_predict_the_same_again_and_again(models, B, T):
    steps = contestants.decode_steps(models, B, T)
    want = models.plain(models.tokens(B, T))[0][:, -1].detach()
    compared = [name for name in steps if name not in (contestants.PRODUCTS, contestants.FLOOR)]
    assert len(compared) == (6 if not contestants.missing_peer() else 4)
    for name in compared:
        for _ in range(3):  # each leaves its cache as it was
            with torch.no_grad():
                torch.testing.assert_close(steps[name](), want, rtol=1e-9, atol=1e-9)


def test_all_who_prefill_predict_the_same(models, monkeypatch):
    monkeypatch.setattr(models, "half", models.fast)
    want = models.plain(models.tokens(2, 30))[0][:, -1].detach()
    for name, step in contestants.prefill_steps(models, 2, 30).items():
        if name not in (contestants.PRODUCTS, contestants.FLOOR):
            with torch.no_grad():
                torch.testing.assert_close(step(), want, rtol=1e-9, atol=1e-9)


def test_all_who_generate_write_the_same(models, monkeypatch):
    monkeypatch.setattr(models, "half", models.fast)
    want = models.plain.generate(models.tokens(2, 16), 30)
    for name, step in contestants.generations(models, 2, 30).items():
        assert torch.equal(step(), want), name


@pytest.mark.parametrize("B,T,rows", [(1, 50, 1), (3, 20, 20)])
@pytest.mark.parametrize("reader", reading.READERS)
def test_the_floor_reads_every_byte_and_the_products_multiply_every_weight(models, B, T, rows, reader, monkeypatch):
    monkeypatch.setattr(contestants, "fastest_reader", lambda x, seconds: (reader, 1.0))
    config, read = models.kv.config, []
    products, floor = contestants.floor_steps(models.kv, B, T, rows).values()
    cost = step_cost(config, rows, T, B, itemsize=8, all_logits=True)
    if reader != "product with a vector":  # which multiplies to read
        with FlopCounterMode(display=False) as counter:
            products()
        assert counter.get_total_flops() == 2 * (cost.linear_macs + cost.logits_macs)

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.sum, torch.ops.aten.amax, torch.ops.aten.mv):
                read.append(args[0].nbytes)
            return func(*args, **(kwargs or {}))

    with Reads():
        products(), floor()
    cache = cache_bytes(config, T, B, itemsize=8)
    assert len(read) == 2
    for got, want in zip(read, (cache, cost.weight_bytes + cache)):
        assert want <= got < want + 4096  # whole pages


def test_ratios_are_those_of_the_medians():
    compared = {"vs_transformers": contestants.PEER, "vs_products": contestants.PRODUCTS, "vs_floor": contestants.FLOOR}
    steps = {name: lambda: torch.zeros(1) for name in ("GPT_kv", "GPT_fast", *compared.values())}
    steps["other"] = lambda: torch.zeros(2)
    steps["GPT_fast"] = lambda: torch.full((1,), 0.5)
    rows = {row["name"]: row for row in ladder.group(steps, seconds=0.01, device="cpu")}
    for row in rows.values():
        assert all(row[key] == row["median"] / rows[name]["median"] for key, name in compared.items())
    assert (rows["GPT_fast"]["error"], rows["GPT_kv"]["error"], rows["other"]["error"]) == (0.5, 0.0, None)


def test_a_floor_that_something_undercuts_says_so_in_its_row(monkeypatch):
    names = ("no cache, fused attention", "GPT_kv", "GPT_fast", "GPT_fast, bfloat16", contestants.FLOOR)
    monkeypatch.setattr(ladder, "interleaved", lambda *steps, **_: [[ms, ms] for ms in (1.0, 3.0, kept, 1.0, 2.0)])
    for kept, beaten in ((1.9, ["GPT_fast"]), (2.1, [])):
        rows = ladder.group({name: lambda: torch.zeros(1) for name in names}, 0.01, "cpu")
        assert [row["beaten_by"] for row in rows] == [None, None, None, None, beaten]
        group = {"model_type": "gpt-nano", "kind": "decode", "batch": 1, "T": 16, "rows": rows}
        result = {"groups": [group], **dict.fromkeys(("device", "hardware", "threads", "torch", "transformers", "python", "system"), "x")}
        said = [line for line in ladder.format_ladder(result).splitlines() if "no floor here" in line]
        assert len(said) == bool(beaten) and all(line.startswith("floor:") and line.endswith("faster: GPT_fast") for line in said)
        picture = draw_ladder(result)
        assert ("something lies" in picture.alt) == bool(beaten)
        crosses = [line for line in picture.axes[0].get_lines() if line.get_marker() == "x"]
        assert len(crosses) == bool(beaten)


def test_memory_and_operations_are_counted():
    x, kept = torch.rand(100, 100), []
    for step, tensors in (
        (lambda: [x + 1 for _ in range(3)], 3),
        (lambda: [None for _ in range(3) if (x + 1) is None], 1),  # each is given back before the next
        (lambda: kept.append(x + 1), 1),
    ):
        assert (
            tensors * x.nbytes <= peak_bytes(step) < tensors * x.nbytes + 100
        )  # PyTorch's own scalars
    replaced = [x + 1]
    assert (
        peak_bytes(lambda: replaced.__setitem__(0, x + 1)) < 2 * x.nbytes
    )  # the old one is given back
    ran = []
    assert peak_bytes(lambda: ran.append(1), device="mps") is None and ran == [1]
    calls = {name: n for name, (n, _) in operation_times(lambda: (x @ x) + x + x).items()}
    assert (calls["aten::mm"], calls["aten::add"]) == (1, 2)


def test_the_command_writes_three_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "NEW_TOKENS", 3)
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 0
    text, result = (tmp_path / "l.txt").read_text(), json.loads((tmp_path / "l.json").read_text())
    assert text == ladder.format_ladder(result) and text in capsys.readouterr().out
    assert (tmp_path / "l.svg").read_text().count("</svg>") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.json", "l.svg", "l.txt"]
    groups = [(g["kind"], g["batch"]) for g in result["groups"]]
    assert groups == [(kind, B) for kind in ("decode", "prefill", "generate") for B in (1, 8)]


def without_transformers(name):
    raise contestants.PackageNotFoundError(name)


def test_whether_transformers_can_take_part(monkeypatch):
    for version, says in (
        (without_transformers, "transformers is not installed"),
        (lambda name: "4.57.1", "transformers 4.57.1 is too old, 5.0 is needed"),
        (lambda name: "5.0.0", ""),
        (lambda name: "10.1", ""),
    ):
        monkeypatch.setattr(contestants, "version", version)
        assert contestants.missing_peer() == says


def test_a_missing_peer_is_named_before_the_run_and_in_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contestants, "version", without_transformers)
    monkeypatch.setattr(ladder, "NEW_TOKENS", 3)
    real = ladder.measure_ladder

    def measured(*args, **kwargs):
        assert "transformers is not installed: its rows" in capsys.readouterr().err  # said by now
        return real(*args, batches=(1,), **kwargs)

    monkeypatch.setattr(ladder, "measure_ladder", measured)
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 0
    text, result = (tmp_path / "l.txt").read_text(), json.loads((tmp_path / "l.json").read_text())
    rows = [row for g in result["groups"] for row in g["rows"]]
    assert rows and not any("transformers" in row["name"] for row in rows)
    assert result["transformers"] is None and all(row["vs_transformers"] is None for row in rows)
    assert "transformers none" in text and "left out" in text and contestants.PEER in text and "GPT_fast" in text


def test_a_run_in_which_all_took_part_leaves_nothing_out():
    result = {"groups": [{"rows": [{"name": name} for name in contestants.PEERS[:2]]}]}
    assert ladder.left_out(result) == ["transformers, generate"]
    assert ladder.left_out(json.loads((ROOT / "ladder_results.json").read_text())) == []


def test_a_picture_that_fails_loses_no_run(tmp_path, monkeypatch, capsys):
    results = json.loads((ROOT / "ladder_results.json").read_text())
    monkeypatch.setattr(ladder, "measure_ladder", lambda *args, **kwargs: results)
    monkeypatch.setattr(ladder, "draw_ladder", lambda result: 1 / 0)
    (tmp_path / "l.svg").write_text("old")
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 1
    text, result = (tmp_path / "l.txt").read_text(), json.loads((tmp_path / "l.json").read_text())
    assert text == ladder.format_ladder(result) and (tmp_path / "l.svg").read_text() == "old"
    said = capsys.readouterr()
    assert "l.svg" not in said.out.splitlines()[-1] and "l.json" in said.out.splitlines()[-1]
    assert "l.svg could not be made and is as it was, so not of this run: ZeroDivisionError" in said.err


def test_too_many_tokens_at_once_are_left_out(monkeypatch):
    monkeypatch.setattr(ladder, "AT_ONCE", 16)
    monkeypatch.setattr(ladder, "NEW_TOKENS", 2)
    result = ladder.measure_ladder(("gpt-nano",), (8, 12), "cpu", 0.01, batches=(2,))
    names = {(g["kind"], g["T"]): [row["name"] for row in g["rows"]] for g in result["groups"]}
    assert list(names) == [("decode", 8), ("decode", 12), ("prefill", 8), ("generate", 2)]
    assert names["decode", 8][0].startswith("no cache") and names["decode", 12][0] == "GPT_kv"


@pytest.mark.parametrize("batches", [(), (0,), (1, True), (2.0,)])
def test_bad_batches_are_refused_before_any_work(batches, monkeypatch):
    monkeypatch.setattr(ladder, "Contestants", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="expected batches of 1 text or more, got"):
        ladder.measure_ladder(("gpt-nano",), (8,), "cpu", 0.01, batches)


@pytest.mark.parametrize(
    "arguments,says",
    [
        ([*QUICK, "--out", "l.svg"], "not to end on .svg"),
        ([*QUICK, "--out", "l.json"], "not to end on .json"),
        ([*QUICK, "--models", "gpt3"], "unknown model 'gpt3'"),
        ([*QUICK, "--contexts", "2049"], "contexts from 2 to 2048 tokens, got 2049"),
        (QUICK[1:] + ["--compiled"], "--compiled together with --ladder"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "Contestants", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert re.search(says, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_committed_results_belong_together():
    result = json.loads((ROOT / "ladder_results.json").read_text())
    assert (ROOT / "ladder_results.txt").read_text() == ladder.format_ladder(result)
    decoded = [(g["model_type"], g["batch"], g["T"]) for g in result["groups"] if g["kind"] == "decode"]
    assert decoded == [
        (m, B, T) for m in subjects.MODELS for B in ladder.BATCHES for T in subjects.CONTEXTS
    ]
    assert {row["name"] for g in result["groups"] for row in g["rows"]} >= {
        "GPT_fast",
        contestants.PEER,
        contestants.FLOOR,
    }
