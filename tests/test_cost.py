"""The costs against what PyTorch counts and what the real tensors weigh; the floors; errors. Not one test looks at a time."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kvcache_lib import cost
from kvcache_lib.cost import (
    Machine, Sizes, StepCost, balanced_batch, cache_bytes, count_operations, floors, measure_machine, predicted_seconds, step_cost,
)  # fmt: skip
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.measure import reading
from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.named import layer_cost

CONFIGS = [
    GPTConfig(n_layer=2, n_head=3, n_embd=12, vocab_size=11, block_size=32),
    GPTConfig(model_type="gpt-nano", vocab_size=7, block_size=32),
]
GPT2 = GPTConfig(model_type="gpt2", vocab_size=50257, block_size=1024)
STEPS = [(1, 1, 1), (20, 20, 1), (20, 20, 3), (1, 20, 1), (1, 20, 3), (4, 20, 2)]  # new, seq, batch
TEN = Machine("ten", bandwidth=10.0, rate=20.0, overhead=0.5)


def run(config, new, seq, batch, dtype=torch.float32, watched_by=None):
    "Run the real model on the `new` last tokens; return it and the cache that comes back."
    model = GPT_kv(config).eval().to(dtype)
    idx = torch.zeros(batch, seq, dtype=torch.long)
    kv_cache = [None] * model.config.n_layer
    with torch.no_grad():
        if new < seq:
            _, _, kv_cache = model(idx[:, : seq - new], kv_cache=kv_cache)
        if watched_by is None:
            return model, model(idx, kv_cache=kv_cache)[2]
        with watched_by:
            return model, model(idx, kv_cache=kv_cache)[2]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("new,seq,batch", STEPS)
def test_multiply_adds_are_those_that_pytorch_counts(config, new, seq, batch):
    counter = FlopCounterMode(display=False)
    run(config, new, seq, batch, watched_by=counter)
    assert counter.get_total_flops() == 2 * step_cost(config, new, seq, batch, all_logits=True).macs


def test_logits_of_one_position_or_of_all():
    config = CONFIGS[0]
    model = GPT(config).eval()
    with FlopCounterMode(display=False) as head:
        model.lm_head(torch.zeros(3, 1, 12)), model.lm_head(torch.zeros(3, 5, 12))
    last, every = (step_cost(config, 5, 5, batch=3, all_logits=choice) for choice in (False, True))
    assert head.get_total_flops() == 2 * (last.logits_macs + every.logits_macs)
    assert (last.logits_bytes, every.logits_bytes) == (3 * 11 * 4, 3 * 5 * 11 * 4)
    assert every.activation_bytes - last.activation_bytes == 3 * 4 * 12 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_weights_and_cache_are_those_of_the_tensors(dtype, batch):
    for config in CONFIGS:
        model, kv_cache = run(config, 2, 9, batch, dtype)
        weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
        held = sum(tensor.nbytes for layer in kv_cache for tensor in layer)
        counted = step_cost(config, 2, 9, batch, dtype.itemsize)
        assert counted.weight_bytes == weights
        assert counted.cache_bytes == cache_bytes(config, 9, batch, dtype.itemsize) == held


class Traffic(TorchDispatchMode):
    "The bytes that computing operations read and write of the scores, and of keys and values of the whole text."

    def __init__(self, config, new, seq):
        super().__init__()
        self.scores, self.columns = config.n_head * seq * new, config.n_embd
        self.seq, self.score_bytes, self.cache_bytes = seq, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        moves = name in ("cat", "bmm", "div", "masked_fill", "_softmax", "mul", "add", "copy_", "clone", "where")
        if not moves:
            assert name in (
                "view", "transpose", "t", "slice", "expand", "_unsafe_view", "split", "select",  # move nothing
                "embedding", "arange", "native_layer_norm", "addmm", "mm", "pow", "tanh", "eq",  # no scores, no cache
            ), name  # fmt: skip
        tensors = args[0] if name == "cat" else [a for a in args if isinstance(a, torch.Tensor)]
        for x in [*tensors, out] if moves else ():
            self.score_bytes += x.nbytes * (x.numel() == self.scores and x.dtype.is_floating_point)
            self.cache_bytes += x.nbytes * (name == "cat" or x.numel() == self.seq * self.columns)
        return out


@pytest.mark.parametrize("new,seq", [(1, 29), (3, 29)])
def test_passes_over_scores_and_cache_are_those_of_the_exercise(new, seq):
    config = CONFIGS[0]
    traffic = Traffic(config, new, seq)
    run(config, new, seq, 1, watched_by=traffic)
    counted = step_cost(config, new, seq, cache_passes=3, score_passes=8)
    assert (traffic.score_bytes, traffic.cache_bytes) == (counted.score_bytes, counted.cache_bytes)


def test_it_is_the_count_of_notebook_00_for_all_layers():
    for new in (1, 7, 100):
        step, layer = step_cost(GPT2, new, 100, itemsize=2, score_passes=2), layer_cost(100, new, 768, 12, itemsize=2)
        assert step.linear_macs + step.attention_macs == 12 * (layer.linear_macs + layer.attention_macs)
        last = 2 * (768 * 50257 + 768 + 50257)  # the last layer: its weights, what goes in and what comes out
        assert step.bytes == 12 * (layer.linear_bytes + layer.attention_bytes) + last


@pytest.mark.parametrize("new,seq,batch", STEPS)
def test_five_sizes_cost_what_their_configuration_costs(new, seq, batch):
    for config in CONFIGS:
        five = GPT(config).config
        five = Sizes(five.n_layer, five.n_head, five.n_embd, five.vocab_size, five.block_size)
        for sizes in (five, tuple(five), list(five)):
            assert step_cost(sizes, new, seq, batch, 8) == step_cost(config, new, seq, batch, 8)
            assert cache_bytes(sizes, seq, batch) == cache_bytes(config, seq, batch)


def test_layers_without_a_last_linear_one_cost_nothing_for_it():
    step, layer = step_cost(Sizes(3, 2, 8, 0, 20), 5, 20, score_passes=2, all_logits=True), layer_cost(20, 5, 8, 2)
    assert step.macs == 3 * (layer.linear_macs + layer.attention_macs)
    assert step.bytes == 3 * (layer.linear_bytes + layer.attention_bytes)
    assert step.logits_bytes == step.logits_macs == 0


def test_a_batch_shares_the_weights_and_nothing_else():
    one, eight = (step_cost(GPT2, 3, 64, batch, cache_passes=3, score_passes=8) for batch in (1, 8))
    for part in StepCost.__dataclass_fields__:
        assert getattr(eight, part) == getattr(one, part) * (1 if part == "weight_bytes" else 8), part


def test_sums_and_intensity():
    step = StepCost(*(2**n for n in range(8)))
    assert (step.macs, step.bytes, step.intensity) == (7, 248, 7 / 248)


def test_floors():
    step = StepCost(30, 20, 10, 40, 30, 20, 9, 1)  # 60 multiply-adds, 100 bytes
    assert floors(step, TEN, operations=4) == {"memory": 10.0, "arithmetic": 3.0, "operations": 2.0}
    assert (predicted_seconds(step, TEN), predicted_seconds(step, TEN, operations=100)) == (10.0, 50.0)
    assert TEN.ridge == 2.0


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 10, 100, 500, 1024])
@pytest.mark.parametrize("ridge", [0.2, 0.25, 0.5, 1, 3.5, 150])
def test_balanced_batch_is_the_first_that_is_not_bound_by_memory(itemsize, seq, ridge):
    machine = Machine("any", 1e9, ridge * 1e9)
    passes = dict(cache_passes=3, score_passes=8)

    def bound_by_memory(batch):
        step = step_cost(GPT2, 1, seq, batch, itemsize, **passes)
        return floors(step, machine)["memory"] > floors(step, machine)["arithmetic"]

    batch = balanced_batch(GPT2, seq, machine, itemsize, **passes)
    if batch is None:
        assert bound_by_memory(10**12)
    else:
        assert not bound_by_memory(batch) and (batch == 1 or bound_by_memory(batch - 1))


def test_balanced_batch_falls_on_both_sides():
    machine = Machine("any", 1e9, 3.5e9)
    assert balanced_batch(GPT2, 64, machine) > 1 and balanced_batch(GPT2, 1024, machine) is None


@pytest.mark.parametrize("slow,widths,rate", [(False, [1024, 2048], 2048**3 / 60e-3), (True, [1024], 1024**3 / 8.0)], ids=["quick", "slow"])
def test_a_machine_is_measured_in_bytes_and_multiply_adds_a_second(monkeypatch, slow, widths, rate):
    "Each by itself, and the best of its runs counts. A large product is left out where a small one takes so long."
    timed, times = [], {1024: [9.0, 8.0], 2048: [70.0, 60.0]}

    def fake(product, nothing, **_):
        timed.extend(count_operations(step) for step in (product, nothing))
        return [1000 * t if slow else t for t in times[len(product())]], [0.006, 0.005]

    monkeypatch.setattr(cost, "interleaved", fake)
    monkeypatch.setattr(cost, "read_rates", lambda device, seconds: [(10, 8.0), (40, 2.0)])
    machine = measure_machine("cpu")
    assert (machine.bandwidth, machine.reads, machine.overhead) == (2.0, ((10, 8.0), (40, 2.0)), 5e-6)
    assert machine.rate == pytest.approx(rate) and timed == [1, 1] * len(widths)


def test_a_real_machine_is_measured(monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 2**24)  # the test's sake: little memory
    monkeypatch.setattr(reading, "processor_cache", lambda: None)
    machine = measure_machine("cpu", torch.float64, seconds=0.01)
    assert all(0 < x < math.inf for x in (machine.bandwidth, machine.rate, machine.overhead, machine.ridge))
    assert [size for size, _ in machine.reads] == [2**20, 2**22, 2**24] and machine.reads[-1][1] == machine.bandwidth
    assert "x86" in machine.name or "arm" in machine.name or "aarch" in machine.name


@pytest.mark.parametrize("size", [1, 4096, 5000, 2**20])
def test_every_reader_goes_over_all_bytes(size):
    x = reading.memory_of(size)
    assert size <= x.nbytes < size + 4096 and bool((x == 1).all())
    for name, read in reading.READERS.items():
        before = read(x)
        for place in (0, x.numel() // 2 + 1, x.numel() - 1):
            changed = x.clone()
            changed[place] = 7.0
            assert not torch.equal(read(changed), before), name


def test_the_fastest_reader_is_found_and_one_that_cannot_is_left_out(monkeypatch):
    def broken(x):
        raise RuntimeError("no such numbers here")

    monkeypatch.setattr(reading, "READERS", {"broken": broken, "slow": lambda x: 1, "quick": lambda x: 2})
    monkeypatch.setattr(reading, "interleaved", lambda *steps, **_: [[5.0, 3.0, 9.0], [4.0, 2.0, 8.0]][: len(steps)])
    assert reading.fastest_reader(torch.ones(1)) == ("quick", 2.0)


def test_the_size_of_a_cache_is_read_where_it_is_told(tmp_path):
    assert reading.processor_cache(str(tmp_path / "none")) is None
    for n, text in enumerate(("32K", "480M\n", "1024", "", "odd")):
        (tmp_path / f"index{n}").mkdir()
        (tmp_path / f"index{n}" / "size").write_text(text)
    assert reading.processor_cache(str(tmp_path)) == 480 * 2**20


def test_more_is_read_than_any_cache_holds_and_never_more_than_2_gib():
    for cache in (None, 0, 2**20, 2**25, 2**28, 480 * 2**20, 2**29):
        sizes = reading.read_sizes(cache)
        assert sizes[0] == 2**20 and 2**30 <= sizes[-1] <= 2**31 and sizes[-1] >= 4 * (cache or 0)
        assert all(a < b <= 4 * a for a, b in zip(sizes, sizes[1:]))
    assert reading.read_sizes(2**40)[-1] == 2**31


def test_a_floor_is_only_as_high_as_the_reading_of_so_many_bytes_was_slow():
    machine = Machine("cached", 10.0, 1e9, reads=((10, 50.0), (40, 5.0), (100, 20.0)))
    rates = {1: 50.0, 10: 50.0, 39: 50.0, 40: 20.0, 99: 20.0, 100: 20.0, 1000: 20.0}
    assert {size: machine.fastest_read(size) for size in rates} == rates
    step = StepCost(0, 0, 0, 30, 0, 0, 9, 0)
    assert floors(step, machine)["memory"] == 39 / 50
    assert Machine("plain", 10.0, 1.0).fastest_read(5) == 10.0


def test_operations_are_counted_and_views_are_not():
    x, ran = torch.ones(2, 3), []
    assert count_operations(lambda: ran.append(1)) == 0 and ran == [1]
    assert count_operations(lambda: x.T[0].view(2).expand(4, 2)) == 0
    assert count_operations(lambda: x.clone().add_(1)) == 2  # in place, so it aliases, but it computes
    assert count_operations(lambda: torch.zeros(2, 4, 3) @ torch.zeros(3, 5)) == 3
    with pytest.raises(ZeroDivisionError):
        count_operations(lambda: 1 / 0)


def test_operations_grow_with_the_layers_and_not_with_the_width():
    def operations(n_layer, n_embd):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=1, n_embd=n_embd, vocab_size=5, block_size=4)).eval()
        return count_operations(lambda: model(torch.zeros(1, 4, dtype=torch.long)))

    one, two, three = (operations(n, 4) for n in (1, 2, 3))
    assert two - one == three - two > 10
    assert operations(2, 64) == two


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: step_cost(GPT2, 2, 1), ValueError, "expected new ≤ seq, got new=2 and seq=1"),
        (lambda: step_cost(GPT2, 0, 1), ValueError, "expected new ≥ 1, got 0"),
        (lambda: step_cost(GPT2, 1.0, 1), TypeError, "expected new to be a whole number, got 1.0"),
        (lambda: step_cost(GPT2, 1, 1025), ValueError, "at most 1024 tokens, the block size, got 1025"),
        (lambda: step_cost(GPT2, 1, 1, batch=0), ValueError, "expected batch ≥ 1, got 0"),
        (lambda: step_cost(GPT2, 1, 1, itemsize=0), ValueError, "expected itemsize ≥ 1, got 0"),
        (lambda: step_cost(GPT2, 1, 1, cache_passes=-1), ValueError, "expected cache_passes ≥ 0, got -1"),
        (lambda: step_cost(GPT2, 1, 1, score_passes="8"), TypeError, "expected score_passes to be a whole number"),
        (lambda: step_cost(GPTConfig(model_type="gpt9"), 1, 1), ValueError, "unknown model_type 'gpt9'"),
        (lambda: cache_bytes(GPT2, -1), ValueError, "expected tokens ≥ 0, got -1"),
        (lambda: step_cost((1, 1, 8, 5), 1, 1), ValueError, "expected n_layer, .*block_size, got \\(1, 1, 8, 5\\)"),
        (lambda: step_cost(Sizes(1, 1, 8, -1, 4), 1, 1), ValueError, "expected vocab_size ≥ 0, got -1"),
        (lambda: step_cost(Sizes(1, 1, 8.0, 5, 4), 1, 1), TypeError, "expected n_embd to be a whole number, got 8.0"),
        (lambda: cache_bytes(Sizes(1, 1, 8, 5, 4), 5), ValueError, "expected at most 4 tokens, the block size, got 5"),
        (lambda: balanced_batch(GPT2, 0, TEN), ValueError, "expected new ≤ seq, got new=1 and seq=0"),
        (lambda: Machine("still", 0, 1), ValueError, "expected bandwidth > 0"),
        (lambda: Machine("lost", 1, float("nan")), ValueError, "rate > 0"),
        (lambda: Machine("early", 1, 1, -1), ValueError, "overhead ≥ 0"),
        (lambda: Machine("empty", 1, 1, reads=((4, 0.0),)), ValueError, "bandwidth > 0"),
    ],
)
def test_errors_say_what_was_expected(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    "arguments,says",
    [
        (dict(device="abacus"), "expected device to be one of cpu.*got 'abacus'"),
        (dict(device="cpu", dtype=torch.int32), "expected a floating-point dtype, got torch.int32"),
        (dict(device="cpu", dtype="float32"), "expected a floating-point dtype, got float32"),
        (dict(device="cpu", seconds=0), "seconds > 0"),
    ],
)
def test_a_bad_measurement_is_refused_before_any_work(arguments, says, monkeypatch):
    monkeypatch.setattr(cost.torch, "ones", lambda *args, **kwargs: pytest.fail("memory was asked for"))
    with pytest.raises(ValueError, match=says):
        measure_machine(**arguments)
