"""What quantised caches and weights promise: what is stored depends on the text alone, and bytes, crops and kernels agree."""

import copy
import inspect
import random
import types
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvcache_lib import float16, int8, quantized as room, rounding
from kvcache_lib.cost import cache_bytes, step_cost
from kvcache_lib.fast import GPT_fast, KVBuffer
from kvcache_lib.float16 import Float16Linear
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.int8 import Int8Linear
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.ragged import packed_step
from kvcache_lib.rotary import rotate, rotation
from kvcache_lib.rounding import Rounding, row_bytes
from kvcache_lib.speculative import EarlyExit, PromptLookup, generate_speculative

EXACT = dict(rtol=0, atol=0)
CLOSE = dict(rtol=1e-9, atol=1e-9)


@cache
def model_of(kind, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind is Llama:
            config = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, head_size=8, vocab_size=11, block_size=48, qk_norm=True)
        else:
            config = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=48, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        model = kind(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype)


def tokens(n, batch=2, seed=0):
    return torch.randint(11, (batch, n), generator=torch.Generator().manual_seed(seed))


def cuts(r, t):
    "Where calls end, of t tokens: a few, all, one by one."
    some = sorted(r.sample(range(1, t), r.randint(0, min(6, t - 1))))
    return r.choice([[*some, t], [t], list(range(1, t + 1))])


def state(buffer):
    "All that is held, byte for byte."
    Q, g = buffer.rounded, buffer.rounding.group
    full = buffer.data[:, :, :, :, Q - buffer.first : buffer.length - buffer.first]
    return [buffer.keys[:, :, :, : Q // g].clone(), buffer.values[:, :, :, :Q].clone(), full.clone()]


def same_state(got, want):
    "What is rounded is the same bit for bit; what a product computed is the same but for its own rounding."
    torch.testing.assert_close(got[:2], want[:2], **EXACT)
    torch.testing.assert_close(got[2], want[2], **CLOSE)


# --- an independent reference: position by position, group by group ---


def plain_round(x, bits):
    "Numbers (n,), rounded together."
    kind = torch.float32 if bits == 8 else torch.float16
    low = x.min().to(kind)
    scale = ((x.max() - low.double()) / (2**bits - 1)).to(kind).double()
    codes = [min(max(round((z.item() - low.item()) / scale.item()) if scale else 0, 0), 2**bits - 1) for z in x]
    return torch.tensor(codes, dtype=torch.float64) * scale + low.double()


def all_rounded(k, v, r):
    "Keys and values, (t, hs), with each whole group rounded."
    k, v, g = k.clone(), v.clone(), r.group
    for n in range(0, len(k) - g + 1, g):
        for c in range(k.size(1)):
            k[n : n + g, c] = plain_round(k[n : n + g, c], r.bits)
        for i in range(n, n + g):
            for c in range(0, v.size(1), r.value_group):
                v[i, c : c + r.value_group] = plain_round(v[i, c : c + r.value_group], r.bits)
    return k, v


def old_enough(j, r):
    "How many tokens the token at position j sees rounded: counted group by group."
    n = 0
    while n + r.group + r.residual <= j:
        n += r.group
    return n


@torch.no_grad()
def reference(model, idx, r):
    "Logits of a text, (t,), from caches that are rounded by the rule."
    c, t = model.config, idx.size(1)
    sizes = c.cache_sizes()
    x = model.embed(idx)
    for block in model.transformer.h:
        qkv = block.attn.c_attn(block.ln_1(x))[0].view(t, -1, sizes.head_size).transpose(0, 1)
        q, k, v = qkv.split([c.n_head, sizes.n_head, sizes.n_head])
        if isinstance(model, Llama):
            turn = rotation(torch.arange(t), sizes.head_size, c.theta, x.dtype)
            q, k = rotate(block.attn.q_norm(q), *turn), rotate(block.attn.k_norm(k), *turn)
        y = torch.empty(t, c.n_head, sizes.head_size, dtype=x.dtype)
        for h in range(sizes.n_head):
            small = all_rounded(k[h], v[h], r)
            for j in range(t):
                Q = old_enough(j, r)
                kj, vj = (torch.cat([z[:Q], w[h, Q : j + 1]]) for z, w in zip(small, (k, v)))
                for member in range(c.n_head // sizes.n_head):
                    i = h * (c.n_head // sizes.n_head) + member
                    y[j, i] = (q[i, j] @ kj.T * sizes.head_size**-0.5).softmax(0) @ vj
        x = x + block.attn.c_proj(y.flatten(1)[None])
        m = block.ln_2(x)
        x = x + (block.mlpf(m) if hasattr(block, "mlpf") else block.mlp(m))
    return model.logits(x)


ROUNDINGS = [Rounding(8, 4, 3, 8), Rounding(4, 6, 0, 4), Rounding(8, 3, 0, 2), Rounding(4, 2, 5, 8), Rounding(8, 5, 2, 1), Rounding(8, 1, 0, 2)]


def made(kind, r, module=room, dtype=torch.float64, weights=None):
    names = {8: "int8", 4: "int4"}
    return module.quantized(model_of(kind, dtype), weights, names[r.bits], group=r.group, residual=r.residual, value_group=r.value_group)


@pytest.mark.parametrize("kind", [GPT_fast, Llama], ids=lambda k: k.__name__)
@pytest.mark.parametrize("r", ROUNDINGS[:4], ids=str)
def test_every_position_over_random_cuts(kind, r):
    model, idx = made(kind, r), tokens(19, 1)
    want = reference(model_of(kind), idx, r)
    rand, states = random.Random(str(r)), []
    for _ in range(4):
        buffer, got = model.new_buffer(1, rand.choice([1, 7, 48])), []
        for end in cuts(rand, 19):
            got.append(model.step(idx[:, :end], buffer)[0])
        torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)
        states.append(state(buffer))
    for other in states[1:]:
        same_state(other, states[0])


def held_after(module, r, kv, ends, capacity):
    buffer = module.QuantizedBuffer(model_of(GPT_fast).config, kv.size(2), capacity, None, kv.dtype, None, r)
    for start, end in pairwise([0, *ends]):
        buffer.append(kv[:, :, :, :, start:end])
    return buffer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_depends_on_the_text_alone(dtype):
    rand = random.Random(1)
    for r in ROUNDINGS:
        t = rand.randint(20, 48)
        kv = torch.randn(2, 2, 2, 2, t, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        whole = held_after(room, r, kv, [t], 48)
        for _ in range(3):
            buffer = held_after(room, r, kv, cuts(rand, t), rand.choice([1, 9, 48]))
            torch.testing.assert_close(state(buffer), state(whole), **EXACT)
            torch.testing.assert_close(buffer.to_lists(), whole.to_lists(), **EXACT)


def test_what_is_read_is_near_what_was_stored():
    for r in ROUNDINGS:
        kv = torch.randn(2, 2, 2, 2, 40, 8, dtype=torch.float64) * 5 + 3
        back = torch.stack([torch.stack(layer) for layer in held_after(room, r, kv, [40], 40).to_lists()])
        back = back.unflatten(4, (2, 8)).transpose(3, 4)
        off = (back - kv).abs()
        Q = r.rounded(40)
        assert Q and (off[..., Q:, :] == 0).all()
        k = kv[:, 0, :, :, :Q].unflatten(3, (-1, r.group))
        bound = (k.amax(4) - k.amin(4))[:, :, :, :, None] / (2**r.bits - 1)
        slack = 0.5 + (1e-4 if r.bits == 8 else 0.1)
        assert (off[:, 0, :, :, :Q].unflatten(3, (-1, r.group)) <= slack * bound + 1e-6 * 30 + (r.bits == 4) * 0.01).all()


@pytest.mark.parametrize("kind", [GPT_fast, Llama], ids=lambda k: k.__name__)
@pytest.mark.parametrize("r", [Rounding(8, 4, 3, 8), Rounding(4, 6, 0, 4), Rounding(8, 2, 1, 2)], ids=str)
def test_the_kernel_sums_what_is_stored(kind, r, monkeypatch):
    if not rounding.has_kernel(r.bits):
        pytest.skip("PyTorch has no sums over rows here")
    model, idx = made(kind, r, dtype=torch.float32), tokens(30, 3)
    buffer = model.new_buffer(3)
    model.step(idx[:, :12], buffer)
    for t in range(13, 31):
        other = buffer.fork()
        calls = []
        with monkeypatch.context() as m:
            m.setattr(room, "weighted_sums", lambda *a: calls.append(1) or rounding.weighted_sums(*a))
            got = model.step(idx[:, :t], buffer)[0]
        with monkeypatch.context() as m:
            m.setattr(room, "has_kernel", lambda bits: False)
            want = model.step(idx[:, :t], other)[0]
        assert len(calls) == 4  # two for each layer
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch):
    for wrong in (lambda *a: torch.zeros(2, 6), lambda *a: (_ for _ in ()).throw(RuntimeError("no"))):
        monkeypatch.setattr(rounding, "weighted_sums", wrong)
        rounding.has_kernel.cache_clear()
        assert not rounding.has_kernel(8) and not rounding.has_kernel(4)
    monkeypatch.setattr(int8, "_product", None)
    int8.has_packed.cache_clear()
    assert not int8.has_packed()
    layer, x = nn.Linear(16, 5), torch.randn(2, 3, 16)
    torch.testing.assert_close(Int8Linear(layer)(x), layer(x).detach(), rtol=0.05, atol=0.05)
    monkeypatch.undo()
    rounding.has_kernel.cache_clear()
    int8.has_packed.cache_clear()


def test_bytes_are_those_that_cost_predicts():
    for kind in (GPT_fast, Llama):
        for r in ROUNDINGS:
            model = made(kind, r)
            for capacity in (1, 19):
                buffer = model.new_buffer(2, capacity)
                assert buffer.nbytes == cache_bytes(model.config, capacity, 2, 8, r, reserved=True)
                for t in range(1, capacity + 1, 6):
                    model.step(tokens(t), buffer, compute_first=True)
                    assert buffer.held_bytes == cache_bytes(model.config, t, 2, 8, r)
                    assert buffer.held_bytes <= buffer.nbytes
    small = room.quantized(model_of(GPT_fast), "int8")
    held = sum(m.nbytes for m in small.modules() if isinstance(m, Int8Linear))
    assert held == step_cost(small.config, 1, 5, itemsize=8, weights="int8").weight_bytes
    small = room.quantized(model_of(GPT_fast), "float16")
    held = sum(m.nbytes for m in small.modules() if isinstance(m, Float16Linear))
    assert held == step_cost(small.config, 1, 5, itemsize=8, weights="float16").weight_bytes == 2 * sum(m.weights().numel() for m in small.modules() if isinstance(m, Float16Linear))
    with pytest.raises(ValueError, match="'int8' or 'float16', got 'int4'"):
        step_cost(small.config, 1, 5, weights="int4")
    cost = step_cost(small.config, 1, 40, rounding=ROUNDINGS[0])
    assert cost.cache_bytes == cache_bytes(small.config, 40, rounding=ROUNDINGS[0])
    assert row_bytes(8, 32) == 40 and row_bytes(4, 32) == 20


# --- cropping, copies, growth, faults ---


def test_crop_takes_one_group_back_and_says_what_it_cannot():
    r = Rounding(8, 4, 3, 8)
    model, idx = made(GPT_fast, r), tokens(40)
    for t in (3, 7, 21, 28):
        whole = model.new_buffer(2)
        model.step(idx[:, :t], whole)
        for length in range(t + 1):
            buffer = whole.fork()
            if length and r.rounded(length) < max(0, r.rounded(t) - 4):
                with pytest.raises(ValueError, match=f"cannot be undone: expected length ≥ {buffer.first + 3}, or 0, got {length}"):
                    buffer.crop(length)
                assert len(buffer) == t
                continue
            buffer.crop(length)
            assert len(buffer) == length
            if t % 7 == 0 and length % 2:
                fresh = model.new_buffer(2)
                model.step(idx[:, :length], fresh)
                same_state(state(buffer), state(fresh))
                got, want = (model.step(torch.cat([idx[:, :length], tokens(8, seed=5)], 1), b)[0] for b in (buffer, fresh))
                torch.testing.assert_close(got, want, **CLOSE)
                same_state(state(buffer), state(fresh))
    for length in (41, -1):
        with pytest.raises(ValueError, match="expected length"):
            buffer.crop(length)


def test_at_least_a_group_can_be_taken_back():
    for r in ROUNDINGS:
        buffer = made(GPT_fast, r).new_buffer(1)
        for t in range(1, 49):
            with buffer.extend(1) as layers:
                for layer in layers:
                    layer.attend(*torch.randn(2, 1, 2, 1, 8, dtype=torch.float64), None)
            buffer.fork().crop(max(0, t - r.group))


def test_copies_share_nothing_and_go_on_alike():
    model, idx = made(Llama, Rounding(4, 4, 2, 8)), tokens(30, 3)
    buffer = model.new_buffer(3, 21)
    model.step(idx[:, :20], buffer)
    want = model.step(idx, buffer.fork())[0]
    for rows in ([0, 1, 2], [2, 0], [1, 1, 0]):
        got = model.step(idx[rows], buffer.select(rows))[0]
        torch.testing.assert_close(got, want[rows], **CLOSE)
    many = buffer.expand(2)
    torch.testing.assert_close(model.step(idx.repeat_interleave(2, 0), many)[0], want.repeat_interleave(2, 0), **CLOSE)
    assert len(buffer) == 20 and buffer.capacity == 21 and buffer.text.equal(idx[:, :20])
    other = buffer.to(dtype=torch.float32)
    assert other.data.dtype == torch.float32 and torch.equal(other.keys[:, :, :, :4], buffer.keys[:, :, :, :4])
    torch.testing.assert_close(model.step(idx, buffer)[0], want, **CLOSE)  # it grows
    assert buffer.capacity == 42 and "in 4 bits" in repr(buffer)
    assert buffer.to("meta").keys.is_meta


def test_after_an_exception_it_is_what_it_was(monkeypatch):
    model, idx = made(GPT_fast, Rounding(8, 4, 3, 8)), tokens(40)
    for P in (0, 5, 14):
        for t in (P + 1, P + 6, 40):
            buffer = model.new_buffer(2)
            if P:
                model.step(idx[:, :P], buffer)
            before = state(buffer)
            with monkeypatch.context() as m:
                m.setattr(model.transformer.h[1].mlp.c_fc, "forward", lambda x: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model.step(tokens(40, seed=9)[:, :t] if not P else idx[:, :t], buffer)
            assert len(buffer) == P and buffer.rows is None
            torch.testing.assert_close(state(buffer), before, **EXACT)
            fresh = model.new_buffer(2)
            torch.testing.assert_close(model.step(idx, buffer)[0][:, -1], model.step(idx, fresh)[0][:, -1], **CLOSE)


def test_numbers_that_no_scale_can_hold():
    model = made(GPT_fast, Rounding(4, 4, 0, 8), dtype=torch.float32)
    buffer = model.new_buffer(1)
    kv = torch.randn(2, 2, 1, 2, 9, 8)
    kv[1, 0, 0, 1, 6, 3] = 2e6
    with pytest.raises(ValueError, match="torch.float16 can hold, got others from position 4 to 7"):
        buffer.append(kv)
    assert len(buffer) == 0
    for bad in (torch.nan, torch.inf):
        kv[1, 0, 0, 1, 6, 3] = bad
        with pytest.raises(ValueError, match="can hold"):
            buffer.append(kv)


# --- generating ---


@pytest.mark.parametrize("kind", [GPT_fast, Llama], ids=lambda k: k.__name__)
def test_generate_is_what_the_reference_writes(kind):
    r = Rounding(4, 4, 2, 8)
    model, idx = made(kind, r), tokens(9, 1)
    text = idx
    for _ in range(12):
        text = torch.cat([text, reference(model_of(kind), text, r)[:, -1].argmax(1, keepdim=True)], 1)
    assert model.generate_kv(idx, 12).equal(text)
    assert [z.tolist() for z in model.generate_kv([idx[0], idx[0, :4]], 12)][0] == text[0].tolist()
    parts = list(model.generate_kv(idx, 12, stream=True))
    assert torch.cat(parts, 1).equal(text[:, 9:])


def test_past_the_block_size_the_last_tokens_are_encoded_afresh():
    model, idx = made(GPT_fast, Rounding(8, 4, 2, 8)), tokens(45)
    text = idx
    for _ in range(8):
        window = text[:, -48:]
        text = torch.cat([text, model.step(window, model.new_buffer(2), last_only=True)[0][:, -1].argmax(1, keepdim=True)], 1)
    assert model.generate_kv(idx, 8).equal(text)


def test_guessing_ahead_takes_back_what_was_rounded():
    for r in (Rounding(8, 8, 0, 8), Rounding(4, 6, 3, 8)):  # a group holds more than the guesses of a step
        model, idx = made(GPT_fast, r, weights="int8"), tokens(9, 1)
        want = model.generate_kv(idx, 30)
        for draft in (PromptLookup(), EarlyExit(1)):
            assert generate_speculative(model, draft, idx, 30, k=4).equal(want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_floats_are_computed_in_larger_ones(dtype):
    layer, x = nn.Linear(64, 8), torch.randn(3, 64)
    x[1] = 0
    x[2] *= 1e-4
    small = Int8Linear(copy.deepcopy(layer).to(dtype))
    torch.testing.assert_close(small(x.to(dtype)).float(), layer(x).detach(), rtol=0.05, atol=0.05)
    model = room.quantized(copy.deepcopy(model_of(GPT_fast)).to(dtype), "int8", "int8", group=4)
    assert model.generate_kv(tokens(9), 9).shape == (2, 18)


def test_the_model_it_is_made_of_stays_as_it_was():
    plain = copy.deepcopy(model_of(GPT_fast))
    before = {name: (id(p), p.clone()) for name, p in plain.named_parameters()}
    model = room.quantized(plain, "int8", "int8", group=4)
    assert type(plain) is GPT_fast and isinstance(model, GPT_fast) and type(model).__name__ == "QuantizedGPT_fast"
    assert all(id(p) == before[name][0] and p.equal(before[name][1]) for name, p in plain.named_parameters())
    assert model.transformer.wte.weight is plain.transformer.wte.weight
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert copy.deepcopy(model).generate_kv(tokens(9), 3).equal(model.generate_kv(tokens(9), 3))


# --- weights ---


def test_a_product_of_whole_numbers_is_the_same_however_it_is_made():
    layer = nn.Linear(96, 40)
    with torch.no_grad():
        layer.weight[3] *= 50
        layer.weight[4] = 0
    small = Int8Linear(layer)
    x = torch.randn(6, 96) * torch.tensor([1e-20, 0, 1, 30, 1, 1e6])[:, None]
    ints = (x.double() * 63 / x.abs().amax(1, keepdim=True).double().clamp_min(1e-30)).round()
    want = ints @ small.codes().T.double() * small.scale * (x.abs().amax(1, keepdim=True) / 63) + layer.bias.double()
    for got in (small(x), torch.cat([small(row[None]) for row in x]), small._by_float(x, small.codes()), small(x[None])[0], small(x.double())):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
    assert small.codes().abs().max() == 127 and small.codes()[4].eq(0).all() and (small.codes().amin() >= -127)
    assert ((small.codes() * small.scale[:, None] - layer.weight).abs() <= 0.5001 * small.scale[:, None]).all()
    assert small(x[:0]).shape == (0, 40) and small(x * torch.nan).isnan().all()
    if small.pack is not None:
        rows = torch.randn(5, 96)
        alone = torch.cat([small._by_pack(row[None], 1) for row in rows])
        for got in (small._by_pack(rows, 5), small._by_float(rows, small.codes())):
            torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-6)


def test_the_largest_numbers_are_added_up_whole():
    layer = nn.Linear(768, 3, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    for rows in (1, 3, 100):
        torch.testing.assert_close(Int8Linear(layer)(torch.ones(rows, 768)), torch.full((rows, 3), 384.0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("missing", [False, True], ids=["packed", "not packed"])
def test_weights_of_16_bits_are_all_that_is_rounded(monkeypatch, bias, missing):
    if missing:
        monkeypatch.setattr(float16, "_product", None)
        float16.has_packed16.cache_clear()
    layer, x = nn.Linear(96, 40, bias=bias), torch.randn(2, 3, 96)
    with torch.no_grad():
        layer.weight[3] *= 1e3
        layer.weight[4] = 3e-8  # below float16's normal numbers
    small = Float16Linear(layer)
    float16.has_packed16.cache_clear()
    assert (small.pack is None) or not missing
    want = F.linear(x.double(), layer.weight.half().double(), None if layer.bias is None else layer.bias.double()).detach()
    rows = torch.cat([small(row[None]) for row in x.flatten(0, 1)]).view_as(want)
    for got in (small(x), rows, copy.deepcopy(small)(x), small(x.flatten(0, 1)).view_as(want), torch.stack([small(z) for z in x.flatten(0, 1)]).view_as(want)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(x.double()), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(small.weights(), layer.weight.detach().half()) and small(x[:0]).shape == (0, 3, 40) and not small(x).requires_grad
    half = Float16Linear(copy.deepcopy(layer).bfloat16())
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), want, rtol=0.05, atol=0.5)


def test_weights_that_float16_does_not_hold_are_refused():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[2, 3] = -7e4
    with pytest.raises(ValueError, match="expected weights that float16 holds, up to 65,504, got one of 7e.04"):
        Float16Linear(layer)


@pytest.mark.parametrize("kind", [GPT_fast, Llama], ids=lambda kind: kind.__name__)
def test_a_model_with_weights_of_16_bits_is_the_model_with_those_weights(kind):
    plain = copy.deepcopy(model_of(kind)).float()
    small = room.quantized(plain, "float16")
    with torch.no_grad():
        for layer in plain.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.half().float())  # a new one: a tied embedding stays
    idx = tokens(20)
    for first in (20, 7):
        buffer = small.new_buffer(2)
        logits = [small.step(idx[:, :end], buffer)[0] for end in sorted({first, 20})]
        torch.testing.assert_close(torch.cat(logits, 1), plain.step(idx, plain.new_buffer(2))[0], rtol=1e-4, atol=1e-4)
    both = room.quantized(plain, "float16", "int8", group=4)
    assert both.generate_kv(idx, 9).shape == (2, 29)


def test_cutting_changes_nothing_with_rounded_weights_too():
    for kind in (GPT_fast, Llama):
        model, idx = made(kind, Rounding(8, 4, 2, 8), weights="int8"), tokens(40)
        a, b = model.new_buffer(2), model.new_buffer(2)
        want = model.step(idx, a)[0][:, -1]
        for t in (3, 17, 18, 40):
            got = model.step(idx[:, :t], b)[0][:, -1]
        torch.testing.assert_close(got, want, **CLOSE)
        same_state(state(a), state(b))


# --- bad input ---


def test_what_makes_no_sense_is_refused():
    gpt, llama = model_of(GPT_fast), model_of(Llama)
    for more, error, words in (
        (dict(cache="int3"), ValueError, "expected the numbers of the cache to be None, 'int8' or 'int4', got 'int3'"),
        (dict(cache=8), ValueError, "got 8"),
        (dict(weights="int4"), ValueError, "expected the numbers of the weights to be None, 'int8' or 'float16', got 'int4'"),
        (dict(weights=8), ValueError, "'float16', got 8"),
        (dict(weights=["int8"]), ValueError, "got .'int8'"),
        (dict(cache="int8", value_group=3), ValueError, "value_group must divide the head size, 8, got 3"),
        (dict(cache="int4", value_group=1), ValueError, "expected an even value_group, got 1"),
        (dict(cache="int4", group=5), ValueError, "expected an even group, got 5"),
        (dict(cache="int8", group=0), ValueError, "expected group ≥ 1, got 0"),
        (dict(cache="int8", group=2.5), TypeError, "expected group to be a whole number"),
        (dict(cache="int8", residual=-1), ValueError, "expected residual ≥ 0, got -1"),
    ):
        with pytest.raises(error, match=words):
            room.quantized(gpt, **more)
    with pytest.raises(TypeError, match="expected a GPT_fast or a Llama, got GPT_kv"):
        room.quantized(GPT_kv(gpt.config), "int8")
    with pytest.raises(ValueError, match="quantised already"):
        room.quantized(room.quantized(gpt, "int8"), cache="int8")
    hooked = copy.deepcopy(gpt)
    hooked.lm_head.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="but lm_head is a Linear that may do more"):
        room.quantized(hooked, "int8")
    windowed = Llama(LlamaConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11, block_size=48, window=8))
    with pytest.raises(ValueError, match="without a window, got one of 8 tokens"):
        room.quantized(windowed, cache="int8")
    assert room.quantized(windowed, "int8").new_buffer().window == 8
    model, idx = room.quantized(llama, cache="int8", group=4), tokens(9)
    for cache_, error, words in (
        (KVBuffer(llama.config, 2, dtype=torch.float64), TypeError, "expected a QuantizedBuffer"),
        (room.quantized(llama, cache="int8", group=2).new_buffer(2), ValueError, "expected a buffer of Rounding.bits=8, group=4"),
        (model.new_buffer(3), ValueError, "batch 2"),
        (model.new_buffer(2).to(dtype=torch.float32), ValueError, "torch.float64 on cpu, got one of"),
    ):
        with pytest.raises(error, match=words):
            model.step(idx, cache_)
    buffer = model.new_buffer(2)
    with pytest.raises(TypeError, match="made by `quantized`"):
        llama.step(idx, buffer)
    assert len(buffer) == 0
    alone = model.new_buffer(1)
    with pytest.raises(TypeError, match="does not share a step"):
        packed_step(model, [idx[0]], [alone])
    assert len(alone) == 0
    with pytest.raises(ValueError, match="full"):
        made(GPT_fast, ROUNDINGS[0]).step(tokens(9), made(GPT_fast, ROUNDINGS[0]).new_buffer(2, 4, 8))
    for kv in ("no", torch.randn(2, 2, 2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 2, 2, 3, 8)):
        with pytest.raises((TypeError, ValueError), match="expected keys and values"):
            model.new_buffer(2).append(kv)


# --- mutations: each must be caught by one of the properties above ---


MUTATIONS = [
    ("the groups begin where the chunk does", "max(0, first - residual) // group * group", "P + max(0, first - P - residual) // group * group"),
    ("the residual is forgotten in the runs", "max(0, first - residual) // group", "max(0, first) // group"),
    ("a run is one too long", "end = min(P + n, residual + rounded + group)", "end = min(P + n, residual + rounded + group + 1)"),
    ("all of a chunk is one run", "end = min(P + n, residual + rounded + group)", "end = P + n"),
    ("keys per token", "codes, *ends = quantize(k, r.bits, dim=2)  # per channel", "codes, *ends = quantize(k, r.bits, dim=2); ends = [z * 0 + z.mean(3, keepdim=True) for z in ends]"),
    ("the scale of the first channel for all", "channels = pack(codes.mT, *(z.mT for z in ends), r.bits)", "channels = pack(codes.mT, *(z.mT[:, :, :1].expand_as(z.mT) for z in ends), r.bits)"),
    ("the zero point is forgotten", "steps = (x - low) / scale", "steps = x / scale"),
    ("truncated, not rounded", "steps.round().clamp", "steps.clamp"),
    ("clamped one too low", ".clamp(0, most)", ".clamp(0, most - 1)"),
    ("clamped as if signed", ".clamp(0, most)", ".clamp(0, most // 2)"),
    ("one code too many", "2**bits - 1", "2**bits"),
    ("the scale is rounded after the codes", "/ most).to(kind)", "/ most)"),
    ("a group's rows lie one further", "self.keys[:, :, first // r.group] = channels", "self.keys[:, :, (first // r.group + 1) % self.keys.size(2)] = channels"),
    ("what is rounded is not read back", "K[:, :, group], V[:, :, group] = self._dequantized(old, old + r.group)", "pass"),
    ("values are not rounded for the chunk", "K[:, :, group], V[:, :, group] = self._dequantized(old, old + r.group)", "K[:, :, group] = self._dequantized(old, old + r.group)[0]"),
    ("rounded before its own token attends", "Q, fits = r.rounded(P), end - first <= b.data.size(4)\n", "Q, fits = r.rounded(P), end - first <= b.data.size(4)\n        if end == P + 1 and r.rounded(end) > Q and attention is not None: return self._early(k, v, attention, queries, dim)\n"),
    ("a decode step does not round", "            if r.rounded(end) > Q:\n                self._round", "            if False:\n                self._round"),
    ("the tail is that of the start", "K[:, :, last:], V[:, :, last:]", "K[:, :, : self.end - last], V[:, :, : self.end - last]"),
    ("the full rows do not move up", "elif first > self.first:", "elif False:"),
    ("first is not noted", "self.length, self.first = end, first", "self.length = end"),
    ("no group is kept to be taken back", "first = max(self.first, self.rounding.rounded(end) - self.rounding.group)", "first = max(self.first, self.rounding.rounded(end))"),
    ("any crop is allowed", "if self.rounding.rounded(length) < self.first and length:", "if False:"),
    ("an emptied buffer keeps its first", "        if not length:\n            self.first = 0\n", ""),
    ("scores of the rounded tokens are not scaled", "q = q * hs**-0.5", "q = q * hs**-0.5 if r.group > 9 else q"),
    ("softmax over each part", "torch.cat([scores, q @ k.mT], dim=3).softmax(dim=3)", "torch.cat([scores.softmax(3), (q @ k.mT).softmax(3)], dim=3)"),
    ("the bags are those of another length", "key = (n_head, Q, self.keys.size(3))", "key = (n_head, self.keys.size(3))"),
    ("a copy forgets its first", "other.length, other.first = self.length, self.first", "other.length = self.length"),
    ("a copy forgets its rows", "other.values[:, :, :, :Q] = ", "_ = "),
]  # fmt: skip


def mutant(old, new):
    source = inspect.getsource(room)
    assert source.count(old) >= 1, old
    module = types.ModuleType("kvcache_lib.mutant")
    module.__package__ = "kvcache_lib"
    exec(compile(source.replace(old, new), "<mutant>", "exec"), module.__dict__)
    return module


def battery(module):
    "The properties in short, on a module. Raises AssertionError, or what a broken module raises."
    rand = random.Random(0)
    for r in (Rounding(8, 4, 5, 8), Rounding(4, 2, 0, 4)):
        kv = torch.randn(2, 2, 1, 2, 23, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 2
        kv[:, :, :, :, :4, 5] = 1.5  # equal numbers
        want = held_after(module, r, kv, [23], 48)
        assert not any(torch.isnan(z).any() for layer in want.to_lists() for z in layer)
        for _ in range(3):
            torch.testing.assert_close(state(held_after(module, r, kv, cuts(rand, 23), rand.choice([1, 48]))), state(want), **EXACT)
        for dtype, close in ((torch.float64, CLOSE), (torch.float32, dict(rtol=1e-3, atol=1e-3))):
            model, idx = made(GPT_fast, r, module, dtype), tokens(15, 1)
            logits = _reference(r)
            for ends in ([15], [6, 7, 15], list(range(1, 16))):
                buffer, got = model.new_buffer(1), []
                for end in ends:
                    got.append(model.step(idx[:, :end], buffer)[0])
                torch.testing.assert_close(torch.cat(got, 1).double(), logits, **close)
        buffer.crop(15 - r.group)
        copied = buffer.fork()
        copied.reserve(buffer.length + 1)
        again = model.step(idx, copied)[0].double()
        torch.testing.assert_close(again, logits[:, 15 - r.group :], **close)
        buffer.crop(0)
        torch.testing.assert_close(model.step(idx, buffer)[0].double(), logits, **close)
        with pytest.raises(ValueError, match="undone"):
            buffer.crop(r.residual + 1)


@cache
def _reference(r):
    return reference(model_of(GPT_fast), tokens(15, 1), r)


def test_the_battery_passes_what_is_right():
    battery(room)


@pytest.mark.parametrize("name,old,new", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_mutations_are_caught(name, old, new):
    module = mutant(old, new)
    with pytest.raises((Exception, pytest.fail.Exception)):
        battery(module)
