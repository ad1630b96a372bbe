"""The ladder's contestants, its ratios, its files. Not one test looks at a time."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvcache_lib import benchmark
from kvcache_lib.cost import cache_bytes, step_cost
from kvcache_lib.fast import GPT_fast
from kvcache_lib.measure import apart, command, contestants, ladder, machines, reading, static, subjects
from kvcache_lib.measure.drawing import draw_ladder
from kvcache_lib.measure.profiling import operation_times, peak_bytes
from kvcache_lib.measure.timing import Probe, interleaved

ROOT = Path(__file__).parents[1]
QUICK = ["--ladder", "--device", "cpu", "--models", "gpt-nano", "--contexts", "16", "--seconds", "0.01"]
KEPT = machines.kept_ladders(ROOT / machines.FOLDER)
WHOLE = next(result for result in KEPT.values() if "ended_early" not in result)


@pytest.fixture
def lean(monkeypatch):
    "Two rounds of three new tokens, and nothing in another process."
    monkeypatch.setattr(ladder, "ROUNDS", 2)
    monkeypatch.setattr(ladder, "NEW_TOKENS", 3)
    monkeypatch.setattr(contestants, "missing_apart", lambda: "not asked")
    monkeypatch.setattr(ladder, "Probe", lambda device: Probe(device, size=16))


@pytest.fixture(scope="module")
def models():
    "The contestants in float64, without those in fewer bits."
    models = contestants.Contestants("gpt-nano")
    for model in filter(None, (models.plain, models.kv, models.fast, models.peer)):
        model.double()
    models.half = models.float16 = models.int8 = None
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
    for B in (1, 2):
        want = models.plain.generate(models.tokens(B, 16), 30)
        steps = contestants.generations(models, B, 30)
        assert ("GPT_fast, prompt lookup" in steps) == (B == 1)
        for name, step in steps.items():
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


def test_the_command_writes_three_files(tmp_path, lean, capsys):
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 0
    text, result = (tmp_path / "l.txt").read_text(), json.loads((tmp_path / "l.json").read_text())
    assert text == ladder.format_ladder(result) and text in capsys.readouterr().out
    assert (tmp_path / "l.svg").read_text().count("</svg>") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.json", "l.svg", "l.txt"]
    groups = [(g["kind"], g["batch"]) for g in result["groups"]]
    assert groups == [(kind, B) for kind in ("decode", "prefill", "generate") for B in (1, 8)]


def without_transformers(name):
    raise apart.PackageNotFoundError(name)


def test_whether_transformers_can_take_part(monkeypatch):
    for version, says in (
        (without_transformers, "transformers is not installed"),
        (lambda name: "4.57.1", "transformers 4.57.1 is too old, 5.0 is needed"),
        (lambda name: "5.0.0", ""),
        (lambda name: "10.1", ""),
    ):
        monkeypatch.setattr(apart, "version", version)
        assert contestants.missing_peer() == says


def test_a_missing_peer_is_named_before_the_run_and_in_the_text(tmp_path, monkeypatch, lean, capsys):
    monkeypatch.setattr(apart, "version", without_transformers)
    real = ladder.measure_ladder

    def measured(*args, **kwargs):
        said = capsys.readouterr().err  # by now
        assert "transformers is not installed: its rows" in said and "ctranslate2 is not installed: its rows" in said
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
    assert ladder.left_out(result) == ["transformers, generate", "CTranslate2, float32", "CTranslate2, int8"]
    for kept in KEPT.values():
        assert not any("transformers" in name for name in ladder.left_out(kept))


def test_a_picture_that_fails_loses_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "measure_ladder", lambda *args, **kwargs: WHOLE)
    monkeypatch.setattr(ladder, "draw_ladder", lambda result: 1 / 0)
    (tmp_path / "l.svg").write_text("old")
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 1
    text, result = (tmp_path / "l.txt").read_text(), json.loads((tmp_path / "l.json").read_text())
    assert text == ladder.format_ladder(result) and (tmp_path / "l.svg").read_text() == "old"
    said = capsys.readouterr()
    assert "l.svg" not in said.out.splitlines()[-1] and "l.json" in said.out.splitlines()[-1]
    assert "l.svg could not be made and is as it was, so not of this run: ZeroDivisionError" in said.err


def test_a_run_that_breaks_shows_what_it_has_and_leaves_whole_files_alone(tmp_path, monkeypatch, lean, capsys):
    real, prepared = ladder.decode_steps, []

    def breaks(models, B, T, **kwargs):
        prepared.append(T)
        if len(prepared) == 2:
            raise RuntimeError("CUDA error: out of memory\nand a long explanation")
        return real(models, B, T, **kwargs)

    monkeypatch.setattr(ladder, "decode_steps", breaks)
    (tmp_path / "l.txt").write_text("of a whole run")
    assert benchmark.main([*QUICK, "--out", str(tmp_path / "l.txt")]) == 1
    said = capsys.readouterr()
    assert "decode, one step at context T, T = 16" in said.out and said.out.count("\nGPT_kv ") == 1 and said.out.endswith("written: nothing\n")
    assert "gpt-nano, decode, batch 8, T = 16: CUDA error: out of memory" in said.err and "explanation" not in said.err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("l.txt", "of a whole run")]
    monkeypatch.setattr(ladder, "decode_steps", real)
    build = ladder.Contestants
    monkeypatch.setattr(ladder, "Contestants", lambda name, *args, **more: build(name, *args, **more) if name == "gpt-nano" else breaks(build, 0, 0))
    prepared[:] = [0]
    assert ladder.measure_ladder(("gpt-nano", "gpt-micro"), (16,), "cpu", 0.01, batches=(1,))["ended_early"] == "gpt-micro: CUDA error: out of memory"
    monkeypatch.setattr(ladder, "decode_steps", lambda *args, **kwargs: 1 / 0)  # a mistake of ours is none of the machine's
    with pytest.raises(ZeroDivisionError):
        ladder.measure_ladder(("gpt-nano",), (16,), "cpu", 0.01)


def test_too_many_tokens_at_once_are_left_out(monkeypatch, lean):
    monkeypatch.setattr(ladder, "AT_ONCE", 16)
    monkeypatch.setattr(ladder, "NO_CACHE", 16)
    result = ladder.measure_ladder(("gpt-nano",), (8, 12), "cpu", 0.01, batches=(2,))
    names = {(g["kind"], g["T"]): [row["name"] for row in g["rows"]] for g in result["groups"]}
    assert list(names) == [("decode", 8), ("decode", 12), ("prefill", 8), ("generate", 3)]
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


@pytest.mark.parametrize("machine", KEPT)
def test_the_committed_results_belong_together(machine):
    result, folder = KEPT[machine], ROOT / machines.FOLDER
    assert (folder / f"{machine}.txt").read_text() == ladder.format_ladder(result)
    assert (folder / f"{machine}.svg").is_file() and result.get("machine", machine) == machine
    decoded = [(g["model_type"], g["batch"], g["T"]) for g in result["groups"] if g["kind"] == "decode"]
    models = dict.fromkeys(model for model, *_ in decoded)
    assert decoded == [(m, B, T) for m in models for B in ladder.BATCHES for T in subjects.CONTEXTS] and "gpt-mini" in models
    assert {row["name"] for g in result["groups"] for row in g["rows"]} >= {
        "GPT_fast",
        contestants.PEER,
        contestants.FLOOR,
    }


# Machines


def test_the_default_files_carry_the_machines_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "machine_name", lambda device: "abacus-2")
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--models", "gpt3"])
    assert not list(tmp_path.iterdir())  # no empty folder is left
    monkeypatch.setattr(ladder, "measure_ladder", lambda *args, **kwargs: WHOLE)
    assert benchmark.main(QUICK) == 0
    assert sorted(p.name for p in (tmp_path / machines.FOLDER).iterdir()) == ["abacus-2.json", "abacus-2.svg", "abacus-2.txt"]
    assert "abacus-2.json" in capsys.readouterr().out


def test_a_folder_that_was_empty_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / machines.FOLDER).mkdir()
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--models", "gpt3"])
    assert [p.name for p in tmp_path.iterdir()] == [machines.FOLDER]


def test_kept_results_are_this_machines_or_the_first(tmp_path):
    for name in ("b-2", "a-4"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"groups": [], "name": name}))
    assert list(machines.kept_ladders(tmp_path)) == ["a-4", "b-2"]
    assert machines.kept_ladder(tmp_path, "b-2") == ("b-2", {"groups": [], "name": "b-2"})
    assert machines.kept_ladder(tmp_path, "c-8")[0] == "a-4"
    with pytest.raises(FileNotFoundError, match="expected results of the ladder in"):
        machines.kept_ladders(tmp_path / "none")


def test_machines_side_by_side_show_what_each_has():
    def result(**medians):
        rows = [{"name": {"fast": "GPT_fast", "peer": contestants.PEER}[name], "median": ms} for name, ms in medians.items()]
        return {"groups": [{"model_type": "m", "kind": "decode", "batch": 1, "T": 64, "rows": rows}, {"model_type": "m", "kind": "prefill", "batch": 1, "T": 64, "rows": []}]}

    table = machines.side_by_side({"a": result(fast=1.0, peer=4.0), "b": result(fast=3.0), "c": {"groups": []}})
    assert table == [{"model": "m", "B": 1, "S": 64, "a": 1.0, "a: ratio": 0.25, "b": 3.0, "b: ratio": None, "c": None, "c: ratio": None}]


@pytest.mark.parametrize("name, sizes", [("gpt2", ("gpt2", 128, False)), ("gpt2-50257", ("gpt2", 50257, True)), ("gpt2-xl", ("gpt2-xl", 128, False)),
                                         ("gpt3-50257", ("gpt3-50257", 128, False)), ("gpt2-1e5", ("gpt2-1e5", 128, False))])  # fmt: skip
def test_a_models_name_may_carry_its_vocabulary(name, sizes):
    assert subjects.sizes_named(name) == sizes


def test_the_head_is_tied_for_all_who_take_part():
    models = contestants.Contestants("gpt-nano-300")
    for model in filter(None, (models.plain, models.kv, models.fast, models.half, models.peer)):
        assert model.lm_head.weight is model.transformer.wte.weight and len(model.lm_head.weight) == 300
    idx = models.tokens(2, 20)
    assert idx.max() >= 128
    with torch.no_grad():
        want = models.plain(idx)[0][:, -1]
        for name, step in contestants.decode_steps(models, 2, 20).items():
            if name not in (contestants.PRODUCTS, contestants.FLOOR):
                torch.testing.assert_close(step().float(), want, rtol=0, atol=5e-2 if "16" in name or "int8" in name else 1e-5)


def test_the_int8_step_that_is_timed_rounds_no_group():
    rounding = contestants.Contestants("gpt-nano").int8.rounding
    assert all(rounding.rounded(T) == rounding.rounded(T - 1) > 0 for T in subjects.CONTEXTS if T > rounding.full_rows)
    assert rounding.rounded(2048) > rounding.rounded(64) == rounding.rounded(63) == 0


@pytest.mark.parametrize("capability, there", [("AVX2", False), ("AVX512", True)])
def test_bfloat16_takes_part_where_a_processor_computes_in_it(monkeypatch, capability, there):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(contestants, "missing_peer", lambda: "not asked")
    names = contestants.Contestants("gpt-nano").fasts()
    assert ("GPT_fast, bfloat16" in names) == there and contestants.has_bfloat16("cuda")
    assert {"GPT_fast", "GPT_fast, float16 weights", "GPT_fast, int8"} <= set(names)


# Rounds


def test_each_round_has_an_order_of_its_own_and_a_disturbed_one_is_taken_again():
    import random

    ran, heard = [], []

    class Told:
        def __init__(self, name):
            self.name = name

        def __call__(self):
            pass

        def times(self):
            ran.append(self.name)
            return [float(len(ran))]

    def steady():
        heard.append(len(ran))
        return len(heard) != 2  # the second round is disturbed

    times = interleaved(*map(Told, "ABCD"), seconds=0, min_rounds=4, order=random.Random(0), steady=steady)
    rounds = ["".join(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    assert len(rounds) == 5 and len(set(rounds)) > 1 and {"".join(sorted(r)) for r in rounds} == {"ABCD"}
    kept = [r for i, r in enumerate(rounds) if i != 1]
    for name, got in zip("ABCD", times):
        assert got == [4 * i + rounds[i].index(name) + 1.0 for i in (0, 2, 3, 4)] and len(got) == len(kept)
    ran.clear()
    assert len(interleaved(Told("A"), seconds=0, min_rounds=3, steady=lambda: False)[0]) == 3 and len(ran) == 6  # it ends


def test_the_probe_sees_a_neighbour(monkeypatch):
    probe = Probe(size=8)
    probe.times[:] = [1.0]
    for ms, steady in ((1.2, True), (1.3, False), (0.5, True), (0.7, False)):
        monkeypatch.setattr(probe, "time", lambda ms=ms: probe.times.append(ms) or ms)
        assert probe() == steady
    assert probe.disturbed == 2


# Another process


needs_ctranslate2 = pytest.mark.skipif(bool(apart.missing_apart()), reason=apart.missing_apart() or "it is there")


@needs_ctranslate2
def test_what_runs_apart_computes_the_same():
    (model,) = subjects.same_weights("gpt-nano-300", "cpu", GPT_fast)
    idx = subjects.some_texts(model, 2, 20)
    with torch.no_grad():
        want = model(idx)[0][:, -1]
    peers = apart.Apart(model, threads=1)
    try:
        steps = peers.steps(idx)
        for name, atol in (("CTranslate2, float32", 1e-5), ("CTranslate2, int8", 0.2)):
            torch.testing.assert_close(steps[name](), want, rtol=0, atol=atol)
            assert len(steps[name].times()) == apart.STEPS - 1
        peers.processes[0].terminate()
        peers.processes[0].join()
        with pytest.raises(RuntimeError, match="the process of CTranslate2, float32 has ended"):
            steps["CTranslate2, float32"].times()
    finally:
        peers.close()
    assert not any(process.is_alive() for process in peers.processes) and not Path(peers.folder.name).exists()


# A GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_what_a_gpu_replays_gives_the_same_as_far_as_it_goes_here(models):
    idx = models.tokens(3, 40)
    with torch.no_grad():
        want = models.plain(idx)[0][:, -1]
        steps = contestants.gpu_steps(models, idx)
        assert {"static cache, CUDA graph", "GPT_fast, math attention"} <= set(steps)
        for step in steps.values():
            for _ in range(2):
                torch.testing.assert_close(step(), want, rtol=1e-9, atol=1e-9)


def test_a_static_step_reads_its_place_from_memory(models):
    idx = models.tokens(2, 12)
    step = static.StaticStep(models.fast, 2, capacity=16)
    step.begin(idx[:, :1])
    addresses = [z.data_ptr() for z in (step.cache, step.position, step.token)]
    for t in range(1, 12):
        with torch.no_grad():
            torch.testing.assert_close(step(), models.plain(idx[:, :t])[0][:, -1], rtol=1e-9, atol=1e-9)
        step.position += 1
        step.token.copy_(idx[:, t : t + 1])
    assert addresses == [z.data_ptr() for z in (step.cache, step.position, step.token)]


@needs_gpu
def test_the_ladder_on_a_gpu(lean):
    result = ladder.measure_ladder(("gpt-nano",), (16, 40), "cuda", 0.01)
    for group in result["groups"]:
        names = {row["name"]: row for row in group["rows"]}
        if group["kind"] == "decode":
            assert {"static cache, CUDA graph", "static cache, CUDA graph, bfloat16"} <= set(names)
            assert (static.GPT_FASTS_WAY in names) == (group["batch"] == 1)
            assert all(row["error"] < (0.05 if "bfloat16" in name else 1e-3) for name, row in names.items() if row["error"] is not None)
