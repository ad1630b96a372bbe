"""Heads over processes: the same numbers as in one, what is sent and held, checkpoints in parts, and what may go wrong.

Each process loads torch, which takes seconds. So four processes serve most of the tests, and the last of these kills one.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
import torch.distributed as dist
from conftest import long

from kvcache_lib.benchmark import main
from kvcache_lib.checkpoint import layout, save
from kvcache_lib.config import GPTConfig, resolved
from kvcache_lib.cost import cache_bytes, step_cost
from kvcache_lib.cut import check_cut, handed_over, on_paper, part_cache_bytes, part_config, part_cost
from kvcache_lib.hardware import H100, LINKS
from kvcache_lib.llama import LlamaConfig
from kvcache_lib.measure.processes import decode_times, format_processes
from kvcache_lib.measure.subjects import BLOCK_SIZE, VOCAB_SIZE
from kvcache_lib.parallel import cut, shares
from kvcache_lib.peers import Peers
from kvcache_lib.processes import ProcessFailed, Processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def gone(pids):
    "Whether no such process is there, or only what is left of one until its parent asks."
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        if state != "Z":
            return False
    return True


@pytest.fixture(scope="module")
def four():
    with Processes(4, timeout=20) as group:
        yield group


@pytest.mark.parametrize("name", cases.MODELS)
def test_logits_and_caches_are_those_of_one_process(four, name):
    for rank, found in enumerate(four.run(cases.equal_everywhere, name)):
        assert set(found) == {size for size in cases.MODELS[name][1] if size > rank}
        for logits, caches, counted, predicted, same in found.values():
            assert logits <= 1e-12 and caches <= 1e-12
            assert counted == predicted
            assert same


def test_pytorchs_own_way_gives_the_same(four):
    assert max(four.run(cases.pytorchs_own_way)) <= 1e-12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Checkpoints, by name."
    place = tmp_path_factory.mktemp("stored")
    made = {name: save(cases.whole_model(name), place / name) for name in ("GPT", "fewer heads of keys than processes")}
    tied = cases.whole_model("GPT")
    tied.lm_head.weight = tied.transformer.wte.weight
    return made | {"GPT, tied": save(tied, place / "tied"), "other": save(cases.whole_model("GPT", seed=1), place / "other")}


@pytest.mark.parametrize("name", ["GPT", "GPT, tied", "fewer heads of keys than processes"])
def test_each_process_reads_its_own_rows(four, folders, name):
    config = resolved(cases.MODELS[name.removesuffix(", tied")][0])
    tied = name == "GPT, tied" or getattr(config, "tied", False)
    parts = {stored: part for stored, part in layout(config).items() if not (tied and stored == "lm_head.weight")}
    sample = 8 * sum(math.prod(part.shape[1:]) for part in parts.values())  # one row of each, float64
    whole = 8 * sum(math.prod(part.shape) for part in parts.values())
    for worst, read, weights, names in four.run(cases.read_in_parts, str(folders[name])):
        assert worst <= 1e-12
        assert read == weights + sample
        assert weights < 0.5 * whole
        assert names == set(parts)


@pytest.mark.parametrize("case, what", [
    (cases.other_prompt, "tokens"), (cases.other_weights, "weights"), (cases.other_checkpoint, "weights")], ids=lambda z: getattr(z, "__name__", z))
def test_who_was_given_something_else_is_named(four, folders, case, what):
    more = ([str(folders["GPT"]), str(folders["other"])],) if case is cases.other_checkpoint else ()
    with pytest.raises(ProcessFailed, match=f"expected the same {what} in all processes: rank 2 has other {what} than rank 0"):
        four.run(case, 2, *more)
    assert len(four.pids) == 4  # all said the same, and go on


def test_what_the_benchmark_counts(four):
    "One short measurement: what was sent and is held is what cost predicts, and there are times of all three ways."
    for rank, found in enumerate(four.run(decode_times, "gpt-micro", 16, 0.01)):
        config = GPTConfig(model_type="gpt-micro", vocab_size=VOCAB_SIZE, block_size=BLOCK_SIZE)
        assert found["sent"] == handed_over(config, 4) and found["cache_bytes"] == part_cache_bytes(config, 4, 16)
        assert all(bool(times) == (rank == 0 or name == "together") for name, times in found["times"].items())


def test_the_kept_results_are_of_one_run():
    root = Path(__file__).parents[1]
    kept = json.loads((root / "processes_results.json").read_text())
    assert format_processes(kept) == (root / "processes_results.txt").read_text()
    for row in (row for model in kept["models"] for row in model["rows"]):
        assert set(row["sent"]) == {row["sent_predicted"]} and set(row["cache_bytes"]) == {row["cache_bytes_predicted"]}


@pytest.mark.parametrize("given, words", [
    (["--processes", "5", "--models", "gpt-mini"], "5 processes divide, got n_head = 6"), (["--processes", "1"], "processes ≥ 2"),
    (["--processes", "--serve"], "without --ladder and --serve"), (["--processes", "--contexts", "1"], "contexts from 2")])
def test_what_the_benchmark_refuses(given, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcache_lib.processes.start_method", lambda: pytest.fail("a process was to be started"))
    with pytest.raises(SystemExit):
        main([*given, "--out", str(tmp_path / "out.txt")])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves(four):
    "All are gone within the limit, and the error says who and why. After this there are no four processes any more."
    pids = four.pids
    with pytest.raises(ProcessFailed, match="rank 3 was ended by SIGKILL") as e:
        four.run(cases.dies_in_the_middle, 3, limit=15)
    assert e.value.rank == 3 and four.pids == [] and gone(pids)
    with pytest.raises(ValueError, match="start others"):
        four.run(cases.sleeps)


def test_who_stands_still_is_named():
    with Processes(2, timeout=3) as group:
        pids = group.pids
        with pytest.raises(ProcessFailed, match="rank 1 gave no answer in time; rank 0 waited for it in vain"):
            group.run(cases.stands_still, 1, limit=15)
        assert gone(pids)


def test_nothing_stays_after_an_interrupt():
    with Processes(1) as group:
        pids = group.pids
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            group.run(cases.sleeps)
        assert gone(pids) and group.pids == []


def test_a_taken_port_and_other_refusals_start_no_process(monkeypatch):
    monkeypatch.setattr("kvcache_lib.processes.start_method", lambda: pytest.fail("a process was to be started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match="expected a free port, got .*taken"):
            Processes(2, port=taken.getsockname()[1])
    for given, words in (((0,), "size ≥ 1"), ((2, 0), "threads ≥ 1"), ((2, 1, 0.0), "timeout > 0"), ((2, 1, 1.0, 0, "tpu"), "auto, cpu or cuda")):
        with pytest.raises(ValueError, match=re.escape(words)):
            Processes(*given)


@pytest.mark.parametrize("name, processes, words", [
    ("GPT", 5, "n_head = 12, the MLP's width = 192"), ("grouped heads", 4, "n_kv_head = 6 (nor is 4 a multiple of it)"), ("GPT", 0, "processes ≥ 1")])
def test_sizes_that_processes_do_not_divide(name, processes, words):
    config = cases.MODELS[name][0]
    for call in (check_cut, part_config, lambda c, N: shares(c, 0, N), handed_over):
        with pytest.raises(ValueError, match=re.escape(words)):
            call(config, processes)


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_number_is_somebodys(name):
    "The shares of all processes cover each parameter, and overlap only where heads of keys are held by several."
    config, counts = cases.MODELS[name]
    shapes = {p: z.shape for p, z in cases.whole_model(name).named_parameters()} | {"lm_head.weight": torch.Size([29, 48])}
    for N in counts:
        each = [shares(config, rank, N) for rank in range(N)]
        for p in each[0]:
            if p not in shapes:
                assert p.endswith("bias")
                continue
            rows = [row for own in each for run in own[p].runs for row in run]
            assert set(rows) == set(range(shapes[p][each[0][p].dim]))
            assert len(rows) == len(set(rows)) or ("c_attn" in p and N > config.cache_sizes().n_head)


def test_alone_it_is_the_same_model():
    model = cases.whole_model("GPT")
    part = cut(model, Peers())
    text = torch.arange(9)[None]
    torch.testing.assert_close(part(text)[0], model(text)[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(part.generate(text, 5), model.generate_kv(text, 5))
    with pytest.raises(TypeError, match="expected a KVBuffer"):
        part(text, kv_cache=[None, None])
    with pytest.raises(TypeError, match="expected a GPT_fast or a Llama"):
        cut(part)
    with pytest.raises(ValueError, match="expected tokens from 0 to 28, got 0 to 29"):
        part(torch.tensor([[0, 29]]))


def test_what_cost_says_of_parts():
    llama = LlamaConfig(n_layer=2, n_head=8, n_kv_head=2, n_embd=64, vocab_size=100, block_size=64)
    for config in (cases.MODELS["GPT"][0], llama):
        assert part_cache_bytes(config, 1, 20) == cache_bytes(config, 20) == 2 * part_cache_bytes(config, 2, 20)
        assert part_cost(config, 1, 1, 20) == step_cost(config, 1, 20)
        whole, half = step_cost(config, 1, 20), part_cost(config, 2, 1, 20)
        assert whole.attention_macs == 2 * half.attention_macs and whole.linear_macs == 2 * half.linear_macs
    assert part_cache_bytes(llama, 4, 20) == part_cache_bytes(llama, 2, 20)  # two heads of keys: held twice
    assert handed_over(llama, 1) == 0
    rows = on_paper(llama, H100, LINKS[-1], 20)
    assert [row["processes"] for row in rows] == [1, 2, 4, 8] and rows[0]["link"] == 0 < rows[1]["link"] < rows[3]["link"]


def agent(machines, port, *more):
    "A torchrun of one of one or two machines, which are this one; two processes in all."
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc-per-node", str(2 // machines), "--rdzv-backend", "c10d", "--rdzv-id", "test",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "-m", "kvcache_lib.parallel", "--tokens", "5", *more]  # fmt: skip
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("machines", [1, pytest.param(2, marks=long)])
def test_machines_by_torchrun(machines):
    "One agent with two processes, or two that meet at the loopback address with one each, write what one process writes."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = [agent(machines, port, "--check") for _ in range(machines)]
    try:
        said = [a.communicate(timeout=100) for a in agents]
    finally:
        for a in agents:
            a.kill()
    assert not any(a.returncode for a in agents), said
    out, err = "".join(o for o, _ in said), "".join(e for _, e in said)
    assert out.startswith("The cache") and out.count("The cache") >= 1
    assert "2 processes, 5 tokens" in err and "one process alone writes the same" in err
