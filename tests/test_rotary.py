"""Rotary positions and the ring, against attention that is written out once more, without a cache."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from kvcache_lib.buffer import KVBuffer
from kvcache_lib.config import GPTConfig
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.rotary import rotate, rotation, sink_attention, visible

CLOSE = dict(rtol=0, atol=1e-12)
EXACT = dict(rtol=0, atol=0)
TOKENS, SIZES = 24, dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, vocab_size=11, block_size=24)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def turned(x, positions, theta=10_000.0):
    "Rotation in complex numbers: pair f of a row turns by position · theta^(−2f / size)."
    half = x.size(-1) // 2
    angles = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("size,theta", [(2, 10_000.0), (6, 10_000.0), (64, 500.0)])
def test_rotation_is_multiplication_of_complex_numbers(size, theta):
    x, at = numbers(2, 3, 5, size), torch.tensor([0, 1, 7, 300, 10**6])
    got = rotate(x, *rotation(at, size, theta, torch.float64))
    torch.testing.assert_close(got, turned(x, at, theta), **CLOSE)
    torch.testing.assert_close(got[:, :, 0], x[:, :, 0], **EXACT)  # nothing turns at position 0


def test_scores_depend_on_the_distance_alone():
    q, k = numbers(1, 32), numbers(1, 32)

    def score(m, n):
        at = torch.tensor([m]), torch.tensor([n])
        return (rotate(q, *rotation(at[0], 32, dtype=torch.float64)) @ rotate(k, *rotation(at[1], 32, dtype=torch.float64)).T).item()

    for distance in (0, 1, 9, 200):
        scores = [score(start + distance, start) for start in (0, 1, 17, 4096, 10**6)]
        assert max(scores) - min(scores) < 1e-7  # angles of a million hold 1e-10
        assert max(scores[:4]) - min(scores[:4]) < 1e-10
    assert abs(score(3, 0) - score(4, 0)) > 1e-3


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="even head size, got 5"):
        rotation(torch.arange(3), 5)
    with pytest.raises(ValueError, match="even head_size, got 5"):
        Llama(LlamaConfig(**SIZES, head_size=5))


def test_who_sees_whom():
    at = torch.arange(6)
    for window, sinks in ((None, 0), (1, 0), (3, 0), (3, 1), (2, 3)):
        want = [[i <= j and (window is None or j - i < window or i < sinks) for i in range(6)] for j in range(6)]
        assert visible(at, at, window, sinks).tolist() == want
    assert visible(at[4:], torch.tensor([4, 5, 2, 3]), 3).tolist() == [[True, False, True, True], [True, True, False, True]]


def large(config):
    model = Llama(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


@torch.no_grad()
def written_out(model, idx):
    """Every position's logits by loops over layers and queries, all tokens at hand.

    With sinks, positions are counted within what a query sees, as StreamingLLM does: no cache, nothing rotated before.
    """
    c, t = model.config, model.transformer
    x = t.wte(idx)
    for block in t.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(block.attn.sizes, dim=2)
        q, k, v = (z.unflatten(2, (-1, c.head_size)).transpose(1, 2) for z in (q, k, v))
        k, v = (z.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for z in (k, v))
        rows = []
        for j in range(idx.size(1)):
            seen = [i for i in range(j + 1) if c.window is None or j - i < c.window or i < c.sinks]
            keys = turned(k[:, :, seen], torch.arange(len(seen)), c.theta)
            query = turned(q[:, :, j : j + 1], torch.tensor([len(seen) - 1]), c.theta)
            rows.append((query @ keys.mT / math.sqrt(c.head_size)).softmax(3) @ v[:, :, seen])
        x = x + block.attn.c_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))
        gate, value = block.mlp.c_fc(block.ln_2(x)).chunk(2, 2)
        x = x + block.mlp.c_proj(gate * gate.sigmoid() * value)
    return model.lm_head(t.ln_f(x))


KINDS = [dict(), dict(window=1), dict(window=5), dict(window=24), dict(window=5, sinks=1), dict(window=3, sinks=4), dict(window=16, sinks=8)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_ring_over_every_cut_is_attention_under_a_band(kind):
    model, idx = large(LlamaConfig(**SIZES, **kind)), torch.randint(11, (2, TOKENS))
    want = written_out(model, idx)
    torch.testing.assert_close(model(idx)[0].detach(), want, **CLOSE)
    cuts = [sorted({a, TOKENS}) for a in range(1, TOKENS + 1)]
    if kind in (dict(window=5), dict(window=3, sinks=4)):
        cuts += [[a, b, TOKENS] for a, b in itertools.combinations(range(1, TOKENS), 2)]
    cuts += [[n, *range(n + 1, TOKENS + 1)] for n in (1, 4, 6)]  # a prompt, then one by one
    cuts += [[*sorted(torch.randperm(TOKENS - 1)[:9].add(1).tolist()), TOKENS] for _ in range(10)]
    for cut in cuts:
        buffer, got = model.new_buffer(2, capacity=1), []
        for end in cut:
            got.append(model.step(idx[:, :end], buffer)[0])
            assert len(buffer) == end and buffer.held == min(end, buffer.limit)
        torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)
        limit = TOKENS if model.config.window is None else model.config.window + model.config.sinks
        assert buffer.capacity <= limit == buffer.limit
        assert buffer.nbytes == 2 * 2 * 2 * 2 * buffer.capacity * 4 * 8  # layers, k and v, batch, heads, rows, size, bytes


def test_a_band_by_pytorch_is_the_same():
    "Not ours, not written out: PyTorch's attention under a mask of PyTorch's."
    config = LlamaConfig(**SIZES | dict(n_kv_head=4), window=5)
    attn, x = large(config).transformer.h[0].attn, numbers(1, TOKENS, 16)
    model = Llama(config).double()
    q, k, v = (z.unflatten(2, (4, 4)).transpose(1, 2) for z in attn.c_attn(x).chunk(3, 2))
    at = torch.arange(TOKENS)
    band = torch.ones(TOKENS, TOKENS).tril().triu(-4).bool()
    y = F.scaled_dot_product_attention(turned(q, at), turned(k, at), v, band)
    torch.testing.assert_close(attn(x, model.place(TOKENS, None)), attn.c_proj(y.transpose(1, 2).flatten(2)), **CLOSE)


def test_texts_go_on_past_the_block_with_a_window_only():
    idx = torch.randint(11, (2, 10))
    for kind in (dict(window=5), dict(window=5, sinks=2)):
        model = large(LlamaConfig(**SIZES, **kind))
        text = model.generate(idx, 60)
        torch.testing.assert_close(model.generate_kv(idx, 60), text, **EXACT)
        buffer = model.new_buffer(2)
        model.step(text[:, :69], buffer)
        torch.testing.assert_close(model.step(text, buffer)[0], written_out(model, text)[:, -1:], **CLOSE)
    model = large(LlamaConfig(**SIZES))
    torch.testing.assert_close(model.generate_kv(idx, 30), model.generate(idx, 30), **EXACT)  # the last 24 are seen
    for call in (lambda: model(text), lambda: model.step(text, model.new_buffer(2))):
        with pytest.raises(ValueError, match="expected at most 24 tokens, the block size, got 70"):
            call()


def held(model, idx, **sizes):
    buffer = model.new_buffer(len(idx), **sizes)
    model.step(idx, buffer)
    return buffer


@pytest.fixture(scope="module")
def ringed():
    torch.manual_seed(1)
    return large(LlamaConfig(**SIZES, window=5, sinks=2))


def goes_on(model, idx, buffer, more=3):
    text = torch.cat([idx, torch.randint(11, (len(idx), more))], dim=1)
    for end in range(idx.size(1) + 1, text.size(1) + 1):
        logits = model.step(text[:, :end], buffer)[0]
    torch.testing.assert_close(logits, written_out(model, text)[:, -1:], **CLOSE)


@pytest.mark.parametrize("n", [3, 7, 12])
def test_rows_of_a_ring_are_copied_and_chosen(ringed, n):
    idx = torch.randint(11, (2, n))
    buffer = held(ringed, idx)
    goes_on(ringed, idx, buffer.fork())
    goes_on(ringed, idx[[1, 1, 0]], buffer.select([1, 1, 0]))
    goes_on(ringed, idx.repeat_interleave(2, 0), buffer.expand(2))
    goes_on(ringed, idx, buffer.to())
    assert (len(buffer), buffer.held) == (n, min(n, 7))
    torch.testing.assert_close(buffer.text, idx if n <= 7 else torch.cat([idx[:, :2], idx[:, -5:]], 1), **EXACT)
    lists = buffer.to_lists()
    assert [tuple(t.shape) for t in lists[0]] == [(2, min(n, 7), 8)] * 2
    if n <= 7:  # a list of more than it holds has the first ones too
        goes_on(ringed, idx, KVBuffer.from_lists(lists, ringed.config))


def test_append_takes_more_than_the_window_holds(ringed):
    kv = numbers(2, 2, 1, 2, 12, 4)
    for cut in ([12], [3, 12], [1, 7, 8, 12], [11, 12], list(range(1, 13))):
        buffer, start = KVBuffer(ringed.config, dtype=torch.float64), 0
        for end in cut:
            buffer.append(kv[:, :, :, :, start:end])
            start = end
        kept = torch.cat([kv[:, :, :, :, :2], kv[:, :, :, :, 7:]], dim=4)
        for layer, want in zip(buffer.to_lists(), kept):
            torch.testing.assert_close(torch.stack(layer), want.transpose(2, 3).flatten(3), **EXACT)
        assert buffer.text.size(1) == 0 and "7 of 7 tokens, limit 7 of 12, window 5, sinks 2" in repr(buffer)


def test_crop_says_what_is_gone(ringed):
    idx = torch.randint(11, (2, 12))
    buffer = held(ringed, idx[:, :6])
    buffer.crop(4)
    goes_on(ringed, idx[:, :4], buffer)
    buffer = held(ringed, idx)
    buffer.crop(12)
    with pytest.raises(ValueError, match="window has moved on: expected length 12, or ≤ 2, got 11; the tokens before position 7"):
        buffer.crop(11)
    goes_on(ringed, idx, buffer.fork())
    buffer.crop(2)
    goes_on(ringed, idx[:, :2], buffer)
    goes_on(ringed, idx, held(ringed, idx, capacity=100))
    ringed.step(idx[:, :3], buffer, compute_first=True)
    goes_on(ringed, idx[:, :3], buffer)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_after_an_exception_the_ring_is_what_it_was(ringed, n):
    idx = torch.randint(11, (2, 10))
    buffer, text = held(ringed, idx), torch.randint(11, (2, 10 + n))
    text[:, :10] = idx
    before = buffer.data.clone()
    last = ringed.transformer.h[1].mlp
    handle = last.register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            ringed.step(text, buffer)
    finally:
        handle.remove()
    assert len(buffer) == 10
    torch.testing.assert_close(buffer.data, before, **EXACT)
    goes_on(ringed, idx, buffer)


def test_another_text_is_refused_where_the_ring_still_knows(ringed):
    idx = torch.randint(11, (2, 13))
    buffer = held(ringed, idx[:, :12])
    for place in (0, 1, 7, 11):
        other = idx.clone()
        other[1, place] = (other[1, place] + 1) % 11
        with pytest.raises(ValueError, match=f"another text: at position {place} of row 1"):
            ringed.step(other, buffer)
    other = idx.clone()
    other[1, 4] = (other[1, 4] + 1) % 11  # out of sight, and no longer held
    ringed.step(other, buffer)


def test_what_a_window_refuses(ringed):
    sizes = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=3, block_size=16)
    for bad, says in (
        (dict(window=0), "window ≥ 1, got 0"), (dict(sinks=2), "expected a window too, got sinks=2"),
        (dict(window=4, sinks=-1), "sinks ≥ 0"), (dict(window=4, limit=9), "sets the limit: expected none, got 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            KVBuffer(sizes, **bad)
    for bad, says in (
        (dict(window=0), "window ≥ 1, got 0"), (dict(sinks=2), "expected a window too"), (dict(window=24, sinks=1), "sinks \\+ window ≤ 24"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Llama(LlamaConfig(**SIZES, **bad))
    with pytest.raises(TypeError, match="window to be a whole number"):
        Llama(LlamaConfig(**SIZES, window=2.5))
    idx = torch.randint(11, (1, 4))
    with pytest.raises(ValueError, match="window None, sinks 0"):
        ringed.step(idx, large(LlamaConfig(**SIZES)).new_buffer())
    assert KVBuffer(sizes, window=4, sinks=1).limit == 5


def test_sinks_are_seen_from_where_they_would_be_in_the_cache():
    q, k, v = numbers(1, 4, 1, 8), numbers(1, 2, 6, 8), numbers(1, 2, 6, 8)
    places, now = torch.tensor([0, 1, 96, 97, 98, 99]), torch.tensor([99])
    keys = rotate(k, *rotation(places, 8, dtype=torch.float64))
    near = (rotate(q, *rotation(at, 8, dtype=torch.float64)) for at in (now, torch.tensor([5])))
    got = sink_attention(*near, keys, v, None, sinks=2)
    within = turned(q, torch.tensor([5])), turned(k, torch.arange(6))  # of six tokens the last
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*within, v, enable_gqa=True), **CLOSE)
