"""The product with the weights that is chosen: by an injected clock, once, with F.linear where nothing is to be chosen."""

import importlib.util
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvcache_lib import direct, kernels
from kvcache_lib.fast import GPT_fast
from kvcache_lib.mingpt import GPTConfig

WIDE = (512, 768)  # in, out: above the bound
STANDINS = kernels.STANDINS
needs_onednn = pytest.mark.skipif(kernels._onednn_linear is None, reason="PyTorch without oneDNN")
here = [name for name in kernels.KERNELS if name != "onednn" or kernels._onednn_linear is not None]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "Each test begins with nothing chosen, and measures, whatever the environment says, over little memory."
    monkeypatch.setattr(kernels, "STANDINS", 2**22)
    monkeypatch.setattr(kernels, "BURST", 1)  # one product at a time
    with kernels.use("measured"):
        kernels.forget()
        yield
    kernels.forget()
    kernels._memory.clear()


@pytest.fixture
def race(monkeypatch):
    "Products that do F.linear's work and take as long as a test says: seconds by name, a function of the call's number."
    now, calls = [0.0], []

    def set_up(**seconds):
        def made(name, duration):
            def kernel(x, w, bias):
                calls.append((name, tuple(x.shape), tuple(w.shape), w.data_ptr(), torch.get_num_threads()))
                n = sum(call[0] == name for call in calls)
                now[0] += duration(n) if callable(duration) else duration
                return F.linear(x, w, bias)

            return kernel

        monkeypatch.setattr(kernels, "KERNELS", {name.replace("_", " "): made(name, s) for name, s in seconds.items()})
        monkeypatch.setattr(kernels, "clock", lambda: now[0])
        return calls

    return set_up


def layer(bias=True, size=WIDE):
    return nn.Linear(*size, bias=bias)


def chosen():
    return [row["kernel"] for row in kernels.kernels()]


@torch.no_grad()
def ask(linear, rows=1):
    x = torch.randn(1, rows, linear.in_features)
    torch.testing.assert_close(direct.linear(x, linear), linear(x), rtol=1e-4, atol=1e-5)


# --- the choice ---


@pytest.mark.parametrize(
    "seconds, want",
    [
        (dict(plain=1.0, weights_first=0.8), "weights first"),
        (dict(plain=1.0, weights_first=0.8, other=0.6), "other"),
        (dict(plain=1.0, weights_first=0.96), "plain"),  # by less than the margin
        (dict(plain=1.0, weights_first=1.5), "plain"),
        (dict(plain=1.0), "plain"),
        # it wins in the median, but not in two rounds of seven: n = 1 is the warm-up
        (dict(plain=1.0, weights_first=lambda n: 1.2 if n in (5, 7) else 0.5), "plain"),
        (dict(plain=1.0, weights_first=lambda n: 9.0 if n == 5 else 0.5), "weights first"),  # disturbed once
        (dict(plain=lambda n: 9.0 if n == 5 else 1.0, weights_first=0.96), "plain"),
        # plain was disturbed in all rounds but one: its best tells
        (dict(plain=lambda n: 1.0 if n == 5 else 3.0, weights_first=1.0), "plain"),
        # it is slow only after another one: the first call of a turn is not timed
        (dict(plain=1.0, weights_first=lambda n: 5.0 if n % 2 == 0 else 0.5), "weights first"),
    ],
)  # fmt: skip
def test_a_product_is_preferred_only_by_a_clear_margin(race, seconds, want):
    race(**seconds)
    ask(layer())
    assert chosen() == [want]


def test_it_is_measured_once_in_turns_over_weights_that_are_not_in_the_cache(race, monkeypatch):
    monkeypatch.setattr(kernels, "STANDINS", STANDINS)
    calls = race(plain=1.0, weights_first=0.5)
    linear = layer()
    ask(linear)
    probes = calls[2:-1]  # without two warm-ups and the call itself
    assert len(probes) == 4 * kernels.ROUNDS and [p[0] for p in probes[::2]] == [p[0] for p in probes[1::2]]
    probes = probes[1::2]  # the first call of each turn wakes threads
    pairs = [{probes[i][0], probes[i + 1][0]} for i in range(0, len(probes), 2)]
    assert all(pair == {"plain", "weights_first"} for pair in pairs)
    assert len({probes[i][0] for i in range(0, len(probes), 2)}) == 2  # now one goes first, now the other
    places = [probe[3] for probe in probes]
    size = 4 * WIDE[0] * WIDE[1]
    assert len(set(places)) == len(places) and max(places) - min(places) >= (len(places) - 1) * size
    assert linear.weight.data_ptr() not in places
    assert 4 * STANDINS // size * size >= 60 * 2**20  # what passes by before one has its turn again
    del calls[:]
    ask(layer())  # another layer of the same shape
    assert [call[0] for call in calls] == ["weights_first"] and kernels._memory == []  # and the memory is given back


def test_small_products_are_timed_several_in_a_row(race, monkeypatch):
    monkeypatch.setattr(kernels, "BURST", 3 * WIDE[0] * WIDE[1])
    for rows, timed in ((1, 3), (2, 1)):
        calls = race(plain=1.0, weights_first=0.5)
        kernels.forget()
        del calls[:]
        ask(layer(), rows)
        names = [call[0] for call in calls[2:-1]]
        turns = [names[i : i + 1 + timed] for i in range(0, len(names), 1 + timed)]
        assert len(turns) == 2 * kernels.ROUNDS and all(len(set(turn)) == 1 and len(turn) == 1 + timed for turn in turns)
        assert kernels.kernels()[0]["against plain"] == 0.5


def test_many_rows_are_probed_with_less_of_the_weights(race):
    calls = race(plain=1.0, other=0.5)
    ask(layer(size=(512, 3000)), rows=200)
    assert {call[1:3] for call in calls[:-1]} == {((1, kernels.MANY, 512), (size, 512)) for size in (1024, 256)} and chosen() == ["other"]


def test_a_loser_is_dropped_early(race):
    calls = race(plain=1.0, weights_first=1.1, other=0.5)
    ask(layer())
    names = [call[0] for call in calls]
    assert names.count("weights_first") == 1 + 2 * kernels.FIRST_ROUNDS and names.count("plain") == 1 + 2 * kernels.ROUNDS


def test_of_a_large_matrix_a_part_is_probed(race, monkeypatch):
    monkeypatch.setattr(kernels, "STANDINS", 2**19)
    monkeypatch.setattr(kernels, "PIECE", 2**17)
    calls = race(plain=1.0, weights_first=0.5)
    linear = layer(bias=True, size=(512, 1100))
    ask(linear)
    assert {call[2] for call in calls[:-1]} == {(256, 512), (64, 512)} and calls[-1][2] == (1100, 512)
    first, last = linear.weight.data_ptr(), linear.weight.data_ptr() + linear.weight.nbytes
    assert all(first <= call[3] < last for call in calls)  # its own numbers: nothing is allocated
    assert kernels._memory == []


def test_each_shape_rows_bias_and_thread_count_has_its_own_choice(race):
    race(plain=1.0, weights_first=0.5)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 200):
        ask(layer(), rows)
    assert [row["rows"] for row in kernels.kernels()] == ["1", "2", "4", "8", "16", "> 16"]
    assert chosen() == ["weights first"] * 5 + ["plain"]  # which is for a few rows only
    ask(layer(bias=False))
    ask(layer(size=(768, 512)))
    assert len(chosen()) == 8
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        ask(layer())
    finally:
        torch.set_num_threads(before)
    assert len(chosen()) == 9 and {row["threads"] for row in kernels.kernels()} == {before, before + 1}


def test_a_product_that_refuses_is_left_out(race, monkeypatch):
    race(plain=1.0, other=0.5)

    def refuses(x, w, bias):
        raise RuntimeError("not here")

    monkeypatch.setitem(kernels.KERNELS, "refuses", refuses)
    ask(layer())
    assert chosen() == ["other"]


def test_of_two_threads_that_measure_the_first_decides(race):
    race(plain=1.0, weights_first=0.5)
    threads = [threading.Thread(target=ask, args=(layer(),)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(chosen()) == 1


# --- what the products compute ---


@pytest.mark.parametrize("name", here)
@pytest.mark.parametrize("shape", [(1, 1), (1,), (), (3, 1), (2, 7), (16,), (40,)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_product_computes_what_the_layer_computes(name, shape, bias):
    linear, x = layer(bias), torch.randn(*shape, WIDE[0])
    want = linear.double()(x.double()).detach().float()
    linear.float()
    with torch.no_grad(), kernels.use(name):
        got = direct.linear(x, linear)
        assert got.is_contiguous() and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        strided = x.expand(2, *x.shape).transpose(0, -1).contiguous().transpose(0, -1)
        torch.testing.assert_close(direct.linear(strided, linear)[0], want, rtol=1e-5, atol=1e-5)
        assert torch.equal(direct.linear(x, linear), got)  # a fixed choice: the same bits


def test_the_products_are_really_used(monkeypatch):
    used = []
    for name, kernel in [*kernels.KERNELS.items()]:
        monkeypatch.setitem(kernels.KERNELS, name, lambda *args, name=name, kernel=kernel: (used.append(name), kernel(*args))[1])
    for name in here:
        with kernels.use(name):
            ask(layer())
            ask(layer(), rows=3)
            ask(layer(), rows=30)
    most = {"vector": 1, "weights first": 16}
    assert used == [name if rows <= most.get(name, 99) else "plain" for name in here for rows in (1, 3, 30)]
    assert kernels.kernels() == []  # nothing was measured


@pytest.mark.parametrize("name", here)
def test_a_model_writes_the_same_with_every_product(name):
    model = GPT_fast(GPTConfig(n_layer=2, n_head=8, n_embd=512, vocab_size=600, block_size=64)).eval()
    text = torch.randint(600, (2, 12))
    with kernels.use("plain"):
        want = model.generate_kv(text, 10)
    with kernels.use(name):
        assert torch.equal(model.generate_kv(text, 10), want)
        logits = [model.step(text, model.new_buffer(2))[0] for _ in range(2)]
    assert torch.equal(*logits)


@needs_onednn
def test_onednn_can_still_be_switched_off():
    linear, x = layer(), torch.randn(1, WIDE[0])
    before = torch.backends.mkldnn.enabled
    with torch.no_grad(), kernels.use("onednn"):
        direct.linear(x, linear)
        torch.backends.mkldnn.enabled = False
        try:
            assert torch.equal(direct.linear(x, linear), linear(x))
        finally:
            torch.backends.mkldnn.enabled = before


# --- where F.linear is taken ---


class Tagged(torch.Tensor):
    pass


def transposed():
    linear = nn.Linear(*WIDE)
    linear.weight = nn.Parameter(torch.randn(*WIDE).t())
    return linear


REFUSED = {
    "gradients": lambda: (layer(), torch.randn(1, 512), torch.enable_grad()),
    "autocast": lambda: (layer(), torch.randn(1, 512), torch.autocast("cpu", torch.bfloat16)),
    "float64": lambda: (layer().double(), torch.randn(1, 512).double(), torch.no_grad()),
    "bfloat16": lambda: (layer().bfloat16(), torch.randn(1, 512).bfloat16(), torch.no_grad()),
    "meta": lambda: (layer().to("meta"), torch.randn(1, 512, device="meta"), torch.no_grad()),
    "no row": lambda: (layer(), torch.randn(0, 512), torch.no_grad()),
    "small weights": lambda: (nn.Linear(64, 64), torch.randn(1, 64), torch.no_grad()),
    "weights that lie across": lambda: (transposed(), torch.randn(1, 512), torch.no_grad()),
    "a subclass of Tensor": lambda: (layer(), torch.randn(1, 512).as_subclass(Tagged), torch.no_grad()),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("how", ["measured", "weights first"])
def test_f_linear_is_taken(monkeypatch, case, how):
    linear, x, mode = REFUSED[case]()
    used = []
    monkeypatch.setitem(kernels.KERNELS, "weights first", lambda *args: used.append(1))
    with kernels.use(how), torch.no_grad(), mode:
        got, want = direct.linear(x, linear), linear(x)
    assert type(got) is type(want) and got.dtype == want.dtype and got.device == want.device
    assert got.is_meta or torch.equal(got, want)
    assert used == [] and kernels.kernels() == [] and kernels._memory == []


def test_gradients_flow():
    linear = layer()
    direct.linear(torch.randn(1, 512), linear).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("problem", [torch.randn(1, 511), torch.randn(()), torch.randn(1, 512).double(), torch.randn(1, 512).long()])
def test_errors_are_those_of_the_layer(problem):
    linear = layer()
    with torch.no_grad():
        with pytest.raises(RuntimeError) as want:
            linear(problem)
        with pytest.raises(RuntimeError) as got:
            direct.linear(problem, linear)
    assert str(got.value) == str(want.value)


def test_a_mode_that_counts_operations_sees_no_probes():
    from kvcache_lib.cost import count_operations

    linear, x = layer(), torch.randn(1, 512)
    with torch.no_grad():
        assert count_operations(lambda: direct.linear(x, linear)) == count_operations(lambda: linear(x))
    assert kernels.kernels() == []  # it is measured later, when nobody watches
    ask(linear)
    assert len(chosen()) == 1


def test_inference_mode_and_default_devices_do_not_matter():
    linear, x = layer(), torch.randn(1, 512)
    with torch.inference_mode(), torch.device("meta"):
        y = direct.linear(x, linear)
    assert y.device.type == "cpu" and len(chosen()) == 1
    assert [(m.device.type, m.dtype) for m in kernels._memory] == [("cpu", torch.float32)]
    kernels._memory.clear()
    kernels.forget()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert direct.linear(x, linear).dtype == torch.float32 and len(chosen()) == 1
            assert kernels._memory[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_measuring_moves_no_random_numbers():
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad():
        direct.linear(torch.ones(1, 512), nn.utils.skip_init(nn.Linear, *WIDE))
    assert torch.equal(torch.rand(3), want) and len(chosen()) == 1


def test_compiled_code_has_f_linear():
    linear = layer()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(lambda x: direct.linear(x, linear), backend=backend, fullgraph=True)(torch.randn(1, 512))
    assert any("linear" in target for target in seen) and kernels.kernels() == []


# --- reading and fixing ---


def test_use_is_for_good_or_for_a_while():
    with kernels.use("plain"):
        with kernels.use("weights first"):
            assert kernels._fixed == "weights first"
        assert kernels._fixed == "plain"
        with pytest.raises(ZeroDivisionError), kernels.use("vector"):
            1 / 0
        assert kernels._fixed == "plain"
        kernels.use("vector")
        assert kernels._fixed == "vector"
    assert kernels._fixed == "measured"


@pytest.mark.parametrize("bad", ["fast", "", None, 3, ["plain"]])
def test_other_names_are_refused(bad):
    with pytest.raises(ValueError, match="expected the product of weights and rows to be one of measured, plain, .*got"):
        kernels.use(bad)
    assert kernels._fixed == "measured"


@pytest.mark.parametrize("name", ["plain", "", "quickest"])
def test_the_environment_fixes_it(monkeypatch, name):
    monkeypatch.setenv("KVCACHE_KERNELS", name)
    spec = importlib.util.spec_from_file_location("kvcache_lib._kernels_again", kernels.__file__)
    again = importlib.util.module_from_spec(spec)
    if name == "quickest":
        with pytest.raises(ValueError, match="expected the product of weights and rows to be one of measured, plain, .*got 'quickest'"):
            spec.loader.exec_module(again)
    else:
        spec.loader.exec_module(again)
        linear, x = layer(), torch.randn(1, 512)
        with torch.no_grad():
            assert torch.equal(again.product(x, linear.weight, linear.bias), linear(x)) or not name
        assert again._fixed == (name or "measured") and len(again.kernels()) == (not name)


FORKED = """
import os, torch
from kvcache_lib.direct import kernels, linear
torch.set_num_threads(2)
layer, x = torch.nn.Linear(512, 768), torch.randn(1, 512)
with torch.no_grad():
    linear(x, layer)
    pid = os.fork()
    if pid == 0:
        from kvcache_lib import kernels as k
        way = k.choice(1, layer.weight, layer.bias)
        torch.set_num_threads(1)
        linear(x, layer)
        os._exit(0 if way.name == "plain" and [row["threads"] for row in kernels()] == [1] else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), [row["threads"] for row in kernels()])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_counts_on_no_threads_of_its_parent():
    env = os.environ | {"KVCACHE_KERNELS": ""}
    done = subprocess.run([sys.executable, "-c", FORKED], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 [2]\n", done.stderr
