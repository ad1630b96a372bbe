"""On a GPU every kind of cache gives what the CPU gives without one. KVCACHE_DEVICE=cpu tries the tests themselves without a GPU."""

import copy
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import make_pair

from kvcache_lib import benchmark
from kvcache_lib.buffer import KVBuffer
from kvcache_lib.checkpoint import load, save
from kvcache_lib.cost import measure_machine
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.measure import static
from kvcache_lib.measure.capacity import here
from kvcache_lib.measure.profiling import peak_bytes
from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.paged import PagePool
from kvcache_lib.quantized import quantized
from kvcache_lib.ragged import generate_packed
from kvcache_lib.scheduler import Scheduler
from kvcache_lib.sort import SortDataset
from kvcache_lib.speculative import DraftModel, EarlyExit, PromptLookup, generate_speculative
from kvcache_lib.trainer import Trainer, TrainerConfig

DEVICE = os.environ.get("KVCACHE_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA GPU")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can do this")
CLOSE = dict(rtol=1e-10, atol=1e-10)
SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=11, block_size=48)


def llama(**more):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**SIZES, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return model.double()


MODELS = {
    "GPT_kv": lambda: make_pair(block_size=48, cached_class=GPT_kv)[0],
    "GPT_fast": lambda: make_pair(block_size=48, cached_class=GPT_fast)[0],
    "Llama": lambda: llama(n_kv_head=2, qk_norm=True),
    "Llama, window": lambda: llama(n_kv_head=1, window=6, sinks=2),
}
WHOLE = ("GPT_fast", "Llama")


def both(name):
    "A model on the CPU and its copy on the device."
    model = MODELS[name]()
    return model, copy.deepcopy(model).to(DEVICE)


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=1):
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_at_every_position_over_random_cuts(name):
    model, moved = both(name)
    idx = tokens(3, 40)
    want = model(idx)[0]
    for seed in range(5):
        r = random.Random(seed)
        cuts = sorted(r.sample(range(1, 40), r.randint(0, 9))) + [40]
        cache, P = [None] * 2 if name == "GPT_kv" else moved.new_buffer(3), 0
        for t in cuts:
            logits, _, cache = moved(idx[:, :t].to(DEVICE), kv_cache=cache)
            assert logits.device.type == torch.device(DEVICE).type
            torch.testing.assert_close(logits[:, P - t :].cpu(), want[:, P:t], **CLOSE)
            P = t


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_the_cpu_and_drawn_ones_those_without_a_cache(name):
    model, moved = both(name)
    idx = tokens(2, 7)
    assert torch.equal(moved.generate_kv(idx.to(DEVICE), 45).cpu(), model.generate(idx, 45))
    drawn = dict(do_sample=True, temperature=1.5, top_k=7)
    got, want = (f(idx.to(DEVICE), 45, **drawn, generator=generator()) for f in (moved.generate_kv, moved.generate))
    assert torch.equal(got, want)
    assert not torch.equal(got, moved.generate_kv(idx.to(DEVICE), 45, **drawn, generator=generator(2)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_small_floats_stay_near(kind):
    model, moved = both("GPT_fast")
    idx = tokens(2, 30)
    with torch.no_grad():
        want = model(idx)[0][:, -1]
        moved.to(kind)
        buffer = moved.new_buffer(2)
        moved.step(idx[:, :29].to(DEVICE), buffer)
        got = moved(idx.to(DEVICE), kv_cache=buffer)[0][:, -1]
    assert got.dtype == buffer.data.dtype == kind
    error = (got.double().cpu() - want).norm() / want.norm()
    assert 0 < error < {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-5}[kind]


def test_a_buffer_lies_where_the_model_lies_and_copies_go_on_alike():
    _, moved = both("GPT_fast")
    idx = tokens(2, 20).to(DEVICE)
    with torch.no_grad():
        buffer = moved.new_buffer(2, capacity=4)
        assert buffer.data.device == moved.lm_head.weight.device
        moved.step(idx[:, :12], buffer)
        whole = moved(idx, kv_cache=buffer.fork())[0]
        buffer.crop(5)
        torch.testing.assert_close(moved(idx, kv_cache=buffer)[0][:, 7:], whole, **CLOSE)
        there_and_back = buffer.to("cpu").to(DEVICE)
        torch.testing.assert_close(there_and_back.data[..., :20, :], buffer.data[..., :20, :], rtol=0, atol=0)


@needs_cuda
def test_what_does_not_fit_is_said_before_it_is_tried():
    config = GPTConfig(n_layer=96, n_head=96, n_embd=12288, vocab_size=11, block_size=1_000_000)
    with pytest.raises(MemoryError, match="a buffer of shape"):
        KVBuffer(config, 64, device="cuda")
    (free, total), held = torch.cuda.mem_get_info(), torch.cuda.memory_allocated()
    filled = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device="cuda")  # fits in all, but not beside this
    try:
        with pytest.raises(MemoryError, match="no room on cuda:0 for a buffer of shape"):
            KVBuffer(GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=11, block_size=2048), 32, device="cuda")
    finally:
        del filled
        torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize("name", WHOLE)
def test_many_texts_at_once(name):
    model, moved = both(name)
    prompts = [tokens(1, n, seed=n)[0] for n in (1, 5, 17, 30)]
    want = [model.generate(p[None], 18)[0] for p in prompts]
    packed = generate_packed(moved, [p.to(DEVICE) for p in prompts], 18)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(packed, want))
    loop = Scheduler(moved, PagePool.like(moved, 14, page_size=4), budget=16)  # too few pages for all: some are preempted
    names = [loop.add(p.tolist(), 18) for p in prompts * 2]
    done = loop.run()
    assert all(torch.equal(torch.as_tensor(done[n]).cpu(), b) for n, b in zip(names, want * 2))


@pytest.mark.parametrize("draft", [PromptLookup, lambda: EarlyExit(1), lambda: DraftModel(both("GPT_fast")[1])], ids=["lookup", "early", "model"])
@pytest.mark.parametrize("name", WHOLE)
def test_guessing_ahead(name, draft):
    model, moved = both(name)
    idx = tokens(1, 6)
    assert torch.equal(generate_speculative(moved, draft(), idx.to(DEVICE), 35, k=4).cpu(), model.generate(idx, 35))
    drawn = generate_speculative(moved, draft(), idx.to(DEVICE), 35, k=4, do_sample=True, generator=generator())
    assert drawn.shape == (1, 41) and drawn.max() < 11


@pytest.mark.parametrize("cache", ["int8", "int4"])
@torch.no_grad()
def test_rounded_caches_hold_what_the_cpu_holds(cache):
    model, moved = both("GPT_fast")
    idx = tokens(2, 48)
    ours, theirs = (quantized(m, cache=cache) for m in (moved, model))
    want = theirs(idx, kv_cache=theirs.new_buffer(2))[0]
    for cuts in ((48,), (7, 8, 30, 31, 48), range(1, 49)):
        buffer, P = ours.new_buffer(2), 0
        for t in cuts:
            logits = ours(idx[:, :t].to(DEVICE), kv_cache=buffer)[0]
            torch.testing.assert_close(logits[:, P - t :].cpu(), want[:, P:t], rtol=1e-8, atol=1e-8)
            P = t


@pytest.mark.parametrize("weights", ["int8", "float16"])
@torch.no_grad()
def test_rounded_weights(weights):
    model, moved = both("GPT_fast")
    idx = tokens(2, 30)
    ours, theirs = quantized(moved, weights=weights), quantized(model, weights=weights)
    torch.testing.assert_close(ours(idx.to(DEVICE))[0].cpu(), theirs(idx)[0], rtol=1e-6, atol=1e-6)


def test_it_learns_there():
    data = SortDataset("train", length=4, num_digits=3)
    config = GPTConfig(model_type="gpt-nano", vocab_size=data.get_vocab_size(), block_size=data.get_block_size())
    model, losses = GPT(config), []
    trainer = Trainer(TrainerConfig(max_iters=60, learning_rate=5e-4, device=DEVICE, num_workers=0), model, data)
    trainer.set_callback("on_batch_end", lambda t: losses.append(t.loss.item()))
    trainer.run()
    assert next(model.parameters()).device.type == DEVICE and losses[-1] < 0.7 * losses[0]


def test_a_checkpoint_is_loaded_and_moved(tmp_path):
    model = MODELS["Llama"]().float()
    save(model, tmp_path / "saved")
    moved, idx = load(tmp_path / "saved").model.to(DEVICE), tokens(1, 9)
    assert torch.equal(moved.generate_kv(idx.to(DEVICE), 20).cpu(), model.generate(idx, 20))


@needs_cuda
def test_a_process_with_a_gpu_of_its_own_writes_what_one_writes_alone():
    "NCCL with one process: as many GPUs as there are on most desks."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "kvcache_lib.parallel"]
    done = subprocess.run([*command, "--device", "cuda", "--tokens", "12", "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# --- what is captured ---


@torch.no_grad()
def step_of(model, idx, capacity=24):
    step = static.StaticStep(model, len(idx), capacity)
    step.begin(idx.to(DEVICE))
    return step


@pytest.mark.parametrize("way", [static.captured, pytest.param(static.compiled, marks=needs_cuda)], ids=["captured", "compiled"])
@torch.no_grad()
def test_a_replay_follows_the_numbers_in_memory(way):
    torch._dynamo.reset()
    model, moved = both("GPT_fast")
    idx = tokens(2, 20)
    step = step_of(moved, idx[:, :5])
    run = way(step)
    for t in (6, 7, 8, 20, 9, 20, 6):  # there and back: what lies beyond the position is not looked at
        for P in range(5, t):
            step.position.fill_(P)
            step.token.copy_(idx[:, P : P + 1])
            got = run()
        torch.testing.assert_close(got.cpu(), model(idx[:, :t])[0][:, -1], **CLOSE)


@needs_cuda
@torch.no_grad()
def test_the_compiled_step_is_a_graph_too():
    "Else it would start its kernels one by one, and the comparison with gpt-fast's way would be unfair."
    torch._dynamo.reset()
    step = step_of(both("GPT_fast")[1].float(), tokens(2, 5))
    run = static.compiled(step)
    for _ in range(4):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    names = [e.name for e in profile.events()]
    assert any("cudaGraphLaunch" in name for name in names) and not any("aten::addmm" in name for name in names)


@needs_cuda
@torch.no_grad()
def test_graphs_of_both_kinds_live_beside_each_other():
    "What one graph gives back, another must not need: else it reads memory that is no longer there."
    torch._dynamo.reset()
    _, moved = both("GPT_fast")
    idx = tokens(2, 5)
    want = moved(idx.to(DEVICE))[0][:, -1]
    for _ in range(3):
        first, second = (static.captured(step_of(moved, idx)) for _ in range(2))
        first()
        del first
        fast = static.compiled(step_of(moved, idx))
        for run in (fast, fast, fast, second, fast):
            torch.cuda.empty_cache()
            torch.testing.assert_close(run(), want, **CLOSE)
        torch._dynamo.reset()


@needs_cuda
@torch.no_grad()
def test_every_attention_that_can_run_computes_the_same():
    moved = make_pair(block_size=48, n_embd=32, cached_class=GPT_fast)[0].to(DEVICE, torch.float16)
    idx, buffer = tokens(2, 30).to(DEVICE), moved.new_buffer(2)
    moved.step(idx[:, :29], buffer)

    def step():
        buffer.crop(29)
        return moved(idx, kv_cache=buffer)[0][:, -1]

    steps = static.backend_steps("GPT_fast", step)
    assert {"GPT_fast, math attention", "GPT_fast, efficient attention", "GPT_fast, flash attention"} <= set(steps)
    want = step()
    for name, run in steps.items():
        assert (run() - want).norm() < 1e-2 * want.norm(), name


# --- what is measured ---


@needs_cuda
def test_memory_is_counted_on_the_device():
    x = torch.rand(512, 512, device="cuda")
    assert 3 * x.nbytes <= peak_bytes(lambda: [x + 1 for _ in range(3)], "cuda") < 4 * x.nbytes


def test_the_device_is_measured():
    machine = measure_machine(DEVICE, seconds=0.05)
    assert machine.bandwidth > 0 and machine.rate > 0
    if DEVICE == "cuda":
        assert here().memory == torch.cuda.get_device_properties(0).total_memory


def test_the_benchmark_and_the_server_run_there(tmp_path):
    out = tmp_path / "b.txt"
    assert benchmark.main(["--device", DEVICE, "--models", "gpt-nano", "--contexts", "16", "--seconds", "0.01", "--out", str(out)]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["device"] == DEVICE
    served = ["--serve", "--device", DEVICE, "--models", "gpt-nano", "--requests", "3", "--rounds", "1", "--out", str(tmp_path / "s.txt")]
    assert benchmark.main(served) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["models"][0]["rows"]
    assert all(row["same_texts"] == 3 for row in rows)
