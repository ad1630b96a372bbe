"""GPT_fast computes plain layers directly. Whatever else was put in a layer's place is called, as GPT_kv calls it."""

import copy

import pytest
import torch
from conftest import make_pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kvcache_lib.fast import CausalSelfAttention_fast, GPT_fast, is_plain
from kvcache_lib.gpt import GPT_kv

CLOSE = dict(rtol=1e-12, atol=1e-12)


class LoRA(nn.Linear):
    "A subclass of nn.Linear that adds a product of rank 2."

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = (nn.Parameter(torch.randn(n, 2).double()) for n in (layer.in_features, layer.out_features))

    def forward(self, x):
        return super().forward(x) + x @ self.down @ self.up.T


class Int8(nn.Module):
    "A layer without `weight`: eight bits a number, and a scale for each row."

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("q", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.q * self.scale, self.bias)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1.5 * self.layer(x)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def hook(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,) if args[0].is_floating_point() else None)
    return layer


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def normed(layer):
    layer = parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    return layer


LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
CHANGES = {
    **{f"{change.__name__} {place}": (place, change) for place in [*LINEARS, "lm_head"]
       for change in (LoRA, Int8, Wrapped, hook, pre_hook, patched, pruned, parametrized, normed)},
    **{f"{change.__name__} {place}": (place, change) for place in ("wpe", "wte", "mlp.act", "ln_f", "ln_2")
       for change in (Wrapped, hook, patched)},
    **{f"{change.__name__} {place}": (place, change) for place in ("attn.attn_dropout", "attn.resid_dropout", "drop")
       for change in (Wrapped, hook, patched)},
    "pruned wpe": ("wpe", pruned),
    "parametrized wpe": ("wpe", parametrized),
    "max_norm wpe": ("wpe", lambda layer: setattr(layer, "max_norm", 0.5) or layer),
    "another activation": ("mlp.act", lambda layer: nn.ReLU()),
    "dropout on in eval": ("mlp.dropout", lambda layer: nn.Dropout(1.0).train()),
    "attention's dropout on in eval": ("attn.attn_dropout", lambda layer: nn.Dropout(1.0).train()),
}  # fmt: skip


def change(model, place, how):
    t = model.transformer
    if place in ("wpe", "wte", "drop", "ln_f"):
        t[place] = how(t[place])
    elif place == "lm_head":
        model.lm_head = how(model.lm_head)
    else:
        for block in t.h:
            part, _, name = place.partition(".")
            owner = block if not name else getattr(block, part)
            name = name or part
            if isinstance(owner, nn.ModuleDict):
                owner[name] = how(owner[name])
            else:
                setattr(owner, name, how(getattr(owner, name)))


def in_pieces(model, idx):
    "The logits of idx with a KVBuffer, in three pieces, the last two of one token and of many."
    buffer, rows = model.new_buffer(len(idx)), []
    for stop in (4, 5, idx.size(1)):
        logits, _, buffer = model(idx[:, :stop], kv_cache=buffer)
        rows.append(logits)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("name", CHANGES)
def test_fast_is_kv(name):
    place, how = CHANGES[name]
    kv, plain = make_pair()
    fast, idx = GPT_fast(kv.config).eval().double(), torch.randint(11, (2, 11))
    fast.load_state_dict(kv.state_dict())
    for model in (kv, fast):
        torch.manual_seed(1)  # a change may draw weights
        change(model, place, how)
    with torch.no_grad():
        want = kv(idx)[0]
        changed = not torch.allclose(want, plain(idx)[0])
        torch.testing.assert_close(in_pieces(fast, idx), want, **CLOSE)
        torch.testing.assert_close(fast(idx)[0], want, **CLOSE)  # lists, and no cache
    torch.testing.assert_close(fast(idx)[0], want, **CLOSE)  # with gradients
    assert changed  # or the test would show nothing


def test_a_subclass_with_its_own_project_and_attend():
    class Shifted(CausalSelfAttention_fast):
        def project(self, x):
            q, k, v = super().project(x)
            return q, k + 1, v * 2

    class Doubled(CausalSelfAttention_fast):
        def attend(self, q, k, v, mask):
            return super().attend(q, k, 2 * v, mask)

    for attention in (Shifted, Doubled):
        kv, _ = make_pair()
        block = type("Block", (GPT_fast.block_class,), {"attention_class": attention})
        fast = type("Fast", (GPT_fast,), {"block_class": block})(kv.config).eval().double()
        fast.load_state_dict(kv.state_dict())
        idx = torch.randint(11, (2, 11))
        with torch.no_grad():
            want = fast(idx)[0]  # without a cache `project` and `attend` are called anyway
            assert not torch.allclose(want, kv(idx)[0])
            torch.testing.assert_close(in_pieces(fast, idx), want, **CLOSE)


def test_global_hooks_and_backward_hooks_are_seen():
    layer = nn.Linear(2, 2)
    assert is_plain(layer, nn.Linear) and not is_plain(LoRA(layer.double()), nn.Linear)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    assert not is_plain(layer, nn.Linear)
    handle.remove()
    handle = layer.register_full_backward_hook(lambda *args: None)
    assert not is_plain(layer, nn.Linear)
    handle.remove()
    assert is_plain(layer, nn.Linear)
    assert not is_plain(torch.compile(layer, backend="eager"), nn.Linear)
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="eager")
    assert not is_plain(compiled, nn.Linear)


@pytest.mark.filterwarnings("ignore")
def test_pytorchs_dynamic_quantisation():
    "It works in float32 only, and scales by all rows that go in together: so both are given the same pieces."
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    kv, plain = make_pair(n_embd=16)
    fast, idx = GPT_fast(kv.config).eval(), torch.randint(11, (2, 11))
    fast.load_state_dict(kv.state_dict())
    try:
        kv, fast = (quantize(m.float(), {nn.Linear}) for m in (kv, fast))
    except RuntimeError as e:
        pytest.skip(f"no quantisation here: {e}")
    with torch.no_grad():
        cache, rows = [None] * 2, []
        for stop in (4, 5, 11):
            logits, _, cache = kv(idx[:, :stop], kv_cache=cache)
            rows.append(logits)
        want, exact = torch.cat(rows, dim=1), plain.float()(idx)[0]
        error = (in_pieces(fast, idx) - want).abs().max()
    assert error < 0.1 * (want - exact).abs().max(), error


# --- compiled, by PyTorch's front end alone: what it makes of the graphs is its own affair ---


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_compiled(what):
    torch._dynamo.reset()
    kv, plain = make_pair()
    model = GPT_fast(kv.config).eval().double()
    model.load_state_dict(kv.state_dict())
    idx = torch.randint(11, (2, 12))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = model.step
    if what == "blocks":
        for block in model.transformer.h:
            block.compile(dynamic=True, backend=backend)
    else:
        step = torch.compile(model.step, backend=backend)
    buffer, rows = model.new_buffer(2), []
    for stop in (5, 6, 7, 8, 9, 10, 11, 12):
        rows.append(step(idx[:, :stop], buffer)[0])
    torch.testing.assert_close(torch.cat(rows, dim=1), plain(idx)[0].detach(), **CLOSE)
    torch._dynamo.reset()
    step = torch.compile(model.step, backend="aot_eager")  # the stage that inference mode inside no_grad broke
    torch.testing.assert_close(step(idx, model.new_buffer(2))[0], plain(idx)[0].detach(), **CLOSE)
    assert len(buffer) == 12 and len(graphs) <= {"blocks": 2, "step": 4}[what]  # not one for each length


def test_export_is_refused_with_a_buffer():
    kv, _ = make_pair()
    model = GPT_fast(kv.config).eval().double()
    buffer = model.new_buffer(1)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model.step(idx, buffer)[0]

    for strict in (True, False):
        with pytest.raises(Exception, match="export a step with GPT_kv's lists"):
            torch.export.export(Step(), (torch.zeros(1, 3, dtype=torch.long),), strict=strict)
        assert len(buffer) == 0


@pytest.mark.parametrize("cls", [GPT_kv])
def test_a_step_with_lists_can_be_exported(cls):
    kv, plain = make_pair()
    idx = torch.randint(11, (1, 6))
    with torch.no_grad():
        _, _, lists = kv(idx[:, :5], kv_cache=[None] * 2)
        program = torch.export.export(kv, (idx,), {"kv_cache": lists}, strict=False)
        logits, _, cache = program.module()(idx, kv_cache=lists)
        torch.testing.assert_close(logits, plain(idx)[0][:, 5:], **CLOSE)
    assert cache[0][0].size(1) == 6
