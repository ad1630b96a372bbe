"""The planner: against its own parts, against what was measured, and with input that makes no sense."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

from kvcache_lib.cost import cache_bytes, floors, step_cost
from kvcache_lib.cut import part_cache_bytes, part_config
from kvcache_lib.fast import GPT_fast
from kvcache_lib.formats import settings_of
from kvcache_lib.hardware import HARDWARE, MODELS, Hardware, find_hardware, find_model, parameters
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.config import GPTConfig, resolved
from kvcache_lib.measure import capacity, machines, pace
from kvcache_lib.measure.arrivals import Arrival, serve
from kvcache_lib.planner import TYPES, plan, step_parts, whole_step

ROOT = Path(__file__).parents[1]
H100 = HARDWARE["H100"]


def results():
    return [json.loads((ROOT / "benchmark_results.json").read_text()), machines.kept_ladder(ROOT / machines.FOLDER)[1]]


def test_parameters_are_those_of_the_models():
    sizes = dict(n_layer=2, n_embd=16, vocab_size=11, block_size=9)
    for config in (GPTConfig(n_head=2, **sizes), LlamaConfig(n_head=4, n_kv_head=2, n_hidden=24, **sizes),
                   LlamaConfig(n_head=2, n_hidden=24, head_size=6, qkv_bias=True, qk_norm=True, tied=True, **sizes)):  # fmt: skip
        config = resolved(config)
        model = (Llama if isinstance(config, LlamaConfig) else GPT_fast)(config)
        tied = 0 if isinstance(config, LlamaConfig) else model.lm_head.weight.numel()  # GPT-2's checkpoints hold it once
        assert parameters(config) == sum(p.numel() for p in set(model.parameters())) - tied


@pytest.mark.parametrize("name", MODELS)
def test_users_are_the_most_that_fit(name):
    r = random.Random(name)
    config = MODELS[name]
    for _ in range(8):
        gpu, cache, weights, n = r.choice(list(HARDWARE.values())), r.choice(list(TYPES)), r.choice(list(TYPES)), r.choice((1, 2, 4))
        try:
            part_config(config, n)
        except ValueError:
            continue
        context, share = r.randint(1, config.block_size), r.uniform(0.5, 1)
        p = plan(config, gpu, context, processes=n, weights=weights, cache=cache, share=share)
        own = part_cache_bytes(config, n, context, itemsize=TYPES[cache])
        assert p.text_bytes == n * own and p.weight_bytes == parameters(config) * TYPES[weights]
        room = share * gpu.memory - p.weight_bytes / n
        assert p.users == 0 if room < own else p.users * own <= room < (p.users + 1) * own
        assert (p.binds == "memory") == (p.users == 0) and (p.tokens_per_second > 0) == (p.users > 0)


def test_one_gpu_of_one_number_type_has_the_floors_of_cost():
    config = MODELS["Llama-3.1-8B"]
    for new, seq, batch in ((1, 8192, 1), (1, 100, 64), (2000, 2000, 1)):
        parts = step_parts(config, H100, new, seq, batch)
        want = floors(step_cost(config, new, seq, batch, 2), H100.machine(2))
        assert parts["arithmetic"] == want["arithmetic"] and parts["links"] == 0
        assert parts["weights"] + parts["cache"] + parts["rest"] == pytest.approx(want["memory"])
        assert whole_step(parts) == pytest.approx(max(want.values()))


def test_what_binds():
    llama, small = MODELS["Llama-3.1-8B"], MODELS["gpt2"]
    assert plan(llama, H100, 8192).binds == "cache" and plan(llama, HARDWARE["T4"], 512).binds == "memory"
    assert plan(MODELS["Llama-2-7B"], HARDWARE["A100-40GB"], 4096).binds == "cache"
    assert plan(llama, HARDWARE["RTX 4090"], 16384).binds == "weights" and plan(llama, HARDWARE["B200"], 32).binds == "arithmetic"
    assert plan(small, HARDWARE["L4"], 1, processes=12).binds == "links"


def test_more_of_anything_is_no_worse():
    config = MODELS["Llama-3.1-70B"]
    few, many = (plan(config, H100, 4096, processes=n) for n in (4, 8))
    assert many.users > 2 * few.users and many.alone < few.alone and many.first < few.first
    window = plan(MODELS["Mistral-7B-v0.1"], H100, 32768)
    assert window.text_bytes == plan(MODELS["Mistral-7B-v0.1"], H100, 4096).text_bytes
    assert cache_bytes(MODELS["Mistral-7B-v0.1"], 32768, itemsize=2) == window.text_bytes
    assert window.users == plan(MODELS["Mistral-7B-v0.1"], H100, 4096).users and window.first > plan(MODELS["Mistral-7B-v0.1"], H100, 4096).first


def test_measured_decode_rows_are_within_a_factor_of_1_5():
    found = [p for p in pace.predictions(pace.measured_rows(*results())) if p.row.ms > 1]
    assert len(found) > 150  # all codes, both models, both batches
    sometimes = {"GPT_fast, compiled", "GPT_fast, bfloat16"}  # there if the run was asked to compile, and if the processor computes in it
    assert {p.row.code for p in found} | sometimes == set(pace.CODES)
    for some in (found, [p for p in found if not p.probe]):
        assert sum(p.factor <= 1.5 for p in some) >= 0.9 * len(some)


def test_a_prediction_knows_only_the_probes():
    "Other times between the shortest and the longest text change no prediction."
    rows = [row for row in pace.measured_rows(*results()) if row.code == "GPT_fast" and row.kind == "decode"]
    before = pace.predictions(rows)
    ends = {p.row for p in before if p.probe}
    assert {row.T for row in ends} == {64, 1536}
    after = pace.predictions([row if row in ends else row._replace(ms=100 * row.ms) for row in rows])
    assert [p.ms for p in before] == pytest.approx([p.ms for p in after], rel=1e-9)
    assert max(p.factor for p in after) > 50


def test_a_pace_is_found_again():
    true = pace.Pace(0.0, 3e-8, 5e-8, 1e-8)  # nothing for a layer: a bound of the fit
    steps = [(*row.costs()[0], true.ms(*row.costs()[0])) for row in pace.measured_rows(*results()) if row.kind == "decode"]
    assert pace.fitted(steps) == pytest.approx(true, rel=1e-6, abs=1e-9)
    with pytest.raises(ValueError, match="at least 4 steps"):
        pace.fitted(steps[:3])


def test_servers_are_replayed():
    "By a pace of seconds a step, so that no request waits for another's arrival: all counts are known."
    requests = [Arrival(0.0, [1] * 5, 3), Arrival(0.0, [1] * 9, 2), Arrival(0.0, [1] * 2, 4)]
    config = GPTConfig(model_type="gpt-nano", vocab_size=9, block_size=64)

    def ends(most, budget):
        server = pace.Replayed(pace.Pace(1e3 / 3, 0, 0, 0), config, most, budget)  # a second for a step of three layers
        return serve(requests, server, lambda: server.now, lambda seconds: None).times

    assert ends(1, None) == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert ends(3, None) == [[1, 2, 3], [1, 2], [1, 2, 3, 4]]
    assert ends(3, 8) == [[1, 2, 3], [2, 3], [3, 4, 5, 6]]  # 5 + 3 of 9, then 1 + 6, then 1 + 1 + 2
    assert ends(2, 100) == [[1, 2, 3], [1, 2], [3, 4, 5, 6]]


def test_measured_servers_are_near():
    rows = [row for row in pace.measured_rows(*results()) if (row.source, row.code) == ("ladder", "GPT_fast") and row.kind != "generate"]
    found = pace.served(json.loads((ROOT / "serve_results.json").read_text()), pace.fitted([(*row.costs()[0], row.ms) for row in rows]))
    large = [row["factor"] for row in found if row["model"] == "gpt2"]  # a small model's steps are mostly calls, which are not known; of a batch's calls only one text's are
    assert len(found) == 8 and len(large) == 4 and max(large) <= 1.75 and all(row["predicted"] > 0 for row in found)


@pytest.mark.parametrize("settings", [
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_parameters": {"rope_type": "yarn"}}, {},
], ids=["llama3", "yarn", "plain"])  # fmt: skip
def test_a_config_json_is_read_however_its_positions_are_scaled(tmp_path, settings):
    import torch

    file = tmp_path / "Meta-Llama" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(settings_of(MODELS["Llama-3.1-8B"], False, torch.bfloat16) | settings))
    for path in (file, file.parent):
        name, config = find_model(path)
        assert name == "Meta-Llama" and config.cache_sizes() == (8, 128, None, 0) and parameters(config) == parameters(MODELS["Llama-3.1-8B"])


def test_a_model_of_very_many_layers_takes_no_longer(tmp_path, capsys):
    sizes = {"n_layer": 2**31 - 1, "n_head": 2, "n_embd": 4, "vocab_size": 9, "n_positions": 9}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    assert capacity.main([str(tmp_path), "--machine", "H100"]) == 0
    assert "no room for a text" in capsys.readouterr().out


BAD = {  # arguments after the command: words of the one line
    ("Llama-9",): "expected a model among",
    ("gpt2", "--context", "0"): "context",
    ("gpt2", "--context", "-5"): "context",
    ("gpt2", "--context", "2000"): "at most 1024 tokens",
    ("gpt2", "--prompt", "0"): "prompt",
    ("mistral-7b-v0.1", "--context", "1" + 400 * "0"): "context",
    ("gpt2", "--gpus", "5"): "divide",
    ("gpt2", "--gpus", "0"): "processes",
    ("gpt2", "--weights", "int3"): "number type",
    ("gpt2", "--cache", "bits"): "number type",
    ("gpt2", "--machine", "H1000"): "expected a machine among",
    ("gpt2", "--share", "1.5"): "share",
    ("gpt2", "--share", "nan"): "share",
    ("gpt2", "--machine", "here", "--gpus", "2"): "links",
}  # fmt: skip
FILES = {
    "[]": "settings by name", "{": "expected JSON", "{}": "model_type", '{"model_type": "bert"}': "model_type",
    '{"model_type": "llama"}': "lacks", "": "expected JSON",
    '{"model_type": "gpt2", "n_layer": "two", "n_head": 2, "n_embd": 4, "vocab_size": 9, "n_positions": 9}': "n_layer",
    '{"model_type": "gpt2", "n_layer": -2, "n_head": 2, "n_embd": 4, "vocab_size": 9, "n_positions": 9}': "n_layer",
    '{"model_type": ["gpt2"]}': "describes no model",
}  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=lambda a: " ".join(a)[:40])
def test_bad_arguments_are_one_line(arguments, capsys):
    assert capacity.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("kvcache-plan: ") and BAD[arguments] in err


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_model_is_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "config.json"):
        assert capacity.main([str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and FILES[text] in err


def test_the_command_prints_a_table(capsys):
    assert capacity.main(["llama-3.1-8b", "--machine", "h100", "--machine", "rtx4090", "--cache", "fp8", "--context", "32768"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "32,768 tokens" in lines[0] and len(lines) == 5 and lines[3].startswith("H100 ") and lines[4].startswith("RTX 4090")
    p = plan(MODELS["Llama-3.1-8B"], H100, 32768, cache="fp8")
    assert f" {p.users} " in lines[3] and f"{round(p.tokens_per_second):,}" in lines[3]
    assert capacity.main(["gpt2", "--gpus", "4"]) == 0  # all machines
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(HARDWARE)


def test_who_stops_reading_sees_no_traceback(monkeypatch, capsys):
    end, start = os.pipe()
    os.close(end)
    with open(start, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert capacity.main(["gpt2"]) == 0
    assert capsys.readouterr().err == ""


def test_this_machine_is_measured(monkeypatch, capsys):
    from kvcache_lib.cost import Machine

    monkeypatch.setattr(capacity, "measure_machine", lambda device, dtype: Machine("a test's", 1e10, 1e11))
    monkeypatch.setattr(capacity, "best_device", lambda: "cpu")
    assert capacity.main(["gpt2", "--machine", "here", "--weights", "float32"]) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.startswith("here: a test's") and "cache" in line


def test_sliders_without_a_kernel_and_with_one(monkeypatch):
    monkeypatch.setenv("KVCACHE_STATIC", "1")
    still = capacity.sliders("gpt2", log_context=10)._repr_html_()
    assert "<table>" in still and 'alt="gpt2 on H100' in still
    monkeypatch.delenv("KVCACHE_STATIC")
    box = capacity.sliders("gpt2", log_context=10)
    boxes, shown = box.children
    context = next(c for column in boxes.children for c in column.children if c.description.startswith("context"))
    context.value = 9
    assert "512 tokens" in shown.value and "<img" in shown.value
    context.value = 15
    assert "at most 1024 tokens" in shown.value and "<table>" not in shown.value


def test_names_do_not_mind_capitals_and_spaces():
    assert find_hardware("rtx4090") is HARDWARE["RTX 4090"] and find_model("QWEN3-8b")[0] == "Qwen3-8B"
    assert isinstance(H100, Hardware) and all(gpu.source and gpu.year > 2015 for gpu in HARDWARE.values())
