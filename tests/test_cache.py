"""The claim of the course: however a text is cut, the cache changes nothing. Float64, every position."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CACHED, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gpt2_logits

from kvcache_lib.attention import CausalSelfAttention_kv
from kvcache_lib.block import Block_kv
from kvcache_lib.fast import Block_fast, CausalSelfAttention_fast
from kvcache_lib.mingpt import Block, CausalSelfAttention, GPTConfig

CLOSE = dict(rtol=1e-9, atol=1e-9)

partitions = st.lists(st.integers(1, 6), min_size=1, max_size=8).filter(lambda chunks: sum(chunks) <= 16)
shapes = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 4), (1, 8)])  # n_layer, n_head


def run_chunks(step, length_of, chunks):
    "Call `step(start, stop, cache) -> (rows, cache)` for each chunk; all rows, and the cache after each."
    cache, start, rows, caches = None, 0, [], []
    for chunk in chunks:
        out, cache = step(start, start + chunk, cache)
        rows.append(out)
        caches.append(cache)
        start += chunk
        assert length_of(cache) == start
    return torch.cat(rows, dim=1), caches


@pytest.mark.parametrize(
    "classes", [(CausalSelfAttention_kv, Block_kv), (CausalSelfAttention_fast, Block_fast)]
)
@settings(max_examples=60, deadline=None)
@given(chunks=partitions, B=st.integers(1, 3), n_head=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 999))
def test_attention_and_block_in_chunks(classes, chunks, B, n_head, seed):
    torch.manual_seed(seed)
    config = GPTConfig(n_layer=1, n_head=n_head, n_embd=8, vocab_size=11, block_size=16)
    x = torch.randn(B, sum(chunks), 8, dtype=torch.float64)
    for cached_class, plain_class in zip(classes, (CausalSelfAttention, Block)):
        cached, plain = cached_class(config).eval().double(), plain_class(config).eval().double()
        with torch.no_grad():
            for p in cached.parameters():
                p.mul_(3)
        plain.load_state_dict(cached.state_dict())
        rows, _ = run_chunks(
            lambda a, b, cache: cached(x[:, a:b], cache), lambda cache: cache[0].size(1), chunks
        )
        torch.testing.assert_close(rows, plain(x), **CLOSE)


@pytest.mark.parametrize("cached_class", CACHED)
@settings(max_examples=60, deadline=None)
@given(chunks=partitions, B=st.integers(1, 3), shape=shapes, seed=st.integers(0, 999))
def test_gpt_in_chunks_equals_an_independent_gpt2(cached_class, chunks, B, shape, seed):
    n_layer, n_head = shape
    cached, plain = make_pair(n_layer=n_layer, n_head=n_head, seed=seed, cached_class=cached_class)
    idx = torch.randint(11, (B, sum(chunks)), generator=torch.Generator().manual_seed(seed))

    def step(start, stop, cache):
        logits, loss, cache = cached(idx[:, :stop], kv_cache=cache or [None] * n_layer)
        assert loss is None and logits.shape == (B, stop - start, 11)
        return logits, cache

    rows, _ = run_chunks(step, lambda cache: cache[-1][1].size(1), chunks)
    torch.testing.assert_close(rows, plain(idx)[0], **CLOSE)
    torch.testing.assert_close(
        rows, torch.stack([gpt2_logits(plain.state_dict(), n_head, row) for row in idx]), **CLOSE
    )


@pytest.mark.parametrize("cached_class", CACHED)
def test_gpt_in_chunks_equals_transformers(cached_class):
    transformers = pytest.importorskip("transformers")
    cached, _ = make_pair(n_layer=3, n_head=4, cached_class=cached_class)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=3, n_head=4, activation_function="gelu_new",
        embd_pdrop=0, resid_pdrop=0, attn_pdrop=0, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval().double()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # their Conv1D keeps (in, out)
    state = {
        name: tensor.T if name.endswith(transposed) else tensor
        for name, tensor in cached.state_dict().items()
        if not name.endswith(".attn.bias")
    }
    theirs.load_state_dict(state, strict=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        B, t = (
            torch.randint(1, 4, (1,), generator=generator).item(),
            torch.randint(1, 17, (1,), generator=generator).item(),
        )
        idx = torch.randint(11, (B, t), generator=generator)
        want = theirs(idx).logits.detach()
        cuts = [i + 1 for i in range(t - 1) if torch.rand(1, generator=generator) < 0.4] + [t]
        cache, start = [None] * 3, 0
        for stop in cuts:
            logits, _, cache = cached(idx[:, :stop], kv_cache=cache)
            torch.testing.assert_close(logits, want[:, start:stop], **CLOSE)
            start = stop
    past = theirs(idx, use_cache=True).past_key_values
    for layer in range(3):  # their cache, (B, heads, t, size), holds the same numbers
        for ours, other in zip(cache[layer], (past.layers[layer].keys, past.layers[layer].values)):
            torch.testing.assert_close(ours, other.transpose(1, 2).flatten(2), **CLOSE)


# --- the contract, point by point ---


def test_without_a_cache_it_is_the_baseline(pair):
    cached, plain = pair
    idx, targets = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    out = cached(idx, targets)
    assert len(out) == 2
    torch.testing.assert_close(out, plain(idx, targets), **CLOSE)
    assert len(cached(idx, compute_first=True)) == 2


def test_loss_is_over_the_new_positions(pair):
    cached, plain = pair
    idx, targets = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    targets[0, 7] = -1
    _, _, cache = cached(idx[:, :5], kv_cache=[None] * 2)
    logits, loss, _ = cached(idx, targets, kv_cache=cache)
    want = plain(idx)[0][:, 5:]
    torch.testing.assert_close(logits, want, **CLOSE)
    torch.testing.assert_close(
        loss, F.cross_entropy(want.flatten(0, 1), targets[:, 5:].flatten(), ignore_index=-1)
    )


def test_nothing_passed_in_is_changed_and_branches_do_not_meet(pair):
    cached, plain = pair
    prompt = torch.randint(11, (2, 4))
    _, _, shared = cached(prompt, kv_cache=[None] * 2)
    layers, before = list(shared), [[t.clone() for t in layer] for layer in shared]
    for _ in range(2):
        text, cache = prompt, shared
        for length in (1, 3, 2):
            text = torch.cat([text, torch.randint(11, (2, length))], dim=1)
            logits, _, cache = cached(text, kv_cache=cache)
            torch.testing.assert_close(logits, plain(text)[0][:, -length:], **CLOSE)
    assert all(a is b for a, b in zip(shared, layers))
    torch.testing.assert_close(shared, before, rtol=0, atol=0)


def test_compute_first_takes_no_notice_of_a_stale_cache(pair):
    cached, plain = pair
    _, _, stale = cached(torch.randint(11, (3, 12)), kv_cache=[None] * 2)
    idx = torch.randint(11, (2, 6))
    logits, _, cache = cached(idx, kv_cache=stale, compute_first=True)
    torch.testing.assert_close(logits, plain(idx)[0], **CLOSE)
    assert cache[0][0].shape == (2, 6, 8)
    torch.testing.assert_close(cache, cached(idx, kv_cache=[None] * 2)[2], rtol=0, atol=0)


def test_tuples_are_accepted_and_lists_come_back(pair):
    cached, plain = pair
    idx = torch.randint(11, (1, 6))
    _, _, cache = cached(idx[:, :4], kv_cache=(None, None))
    assert isinstance(cache, list) and all(isinstance(layer, list) for layer in cache)
    logits, _, _ = cached(idx, kv_cache=tuple(tuple(layer) for layer in cache))
    torch.testing.assert_close(logits, plain(idx)[0][:, 4:], **CLOSE)


def test_an_empty_cache_of_tensors_is_an_empty_cache(pair):
    cached, plain = pair
    empty = torch.empty(2, 0, 8, dtype=torch.float64)
    idx = torch.randint(11, (2, 5))
    torch.testing.assert_close(cached(idx, kv_cache=[[empty, empty]] * 2)[0], plain(idx)[0], **CLOSE)


def test_gradients_flow_through_the_cache(pair):
    cached, plain = pair
    idx, targets = torch.randint(11, (1, 6)), torch.randint(11, (1, 6))
    _, _, cache = cached(idx[:, :4], kv_cache=[None] * 2)
    cached.zero_grad(), plain.zero_grad()
    cached(idx, targets, kv_cache=cache)[1].backward()
    F.cross_entropy(plain(idx)[0][:, 4:].flatten(0, 1), targets[:, 4:].flatten()).backward()
    for (name, a), (_, b) in zip(cached.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=lambda m: f"{name}: {m}")


# --- errors ---


def layer(B=2, P=3, C=8):
    return [torch.zeros(B, P, C, dtype=torch.float64) for _ in "kv"]


@pytest.mark.parametrize(
    "cache,error,says",
    [
        ([layer()], ValueError, "2 entries, one for each layer, got 1"),
        ([], ValueError, "2 entries, one for each layer, got 0"),
        ([layer()] * 3, ValueError, "got 3"),
        ([layer(B=1)] * 2, ValueError, r"both of shape \(2, P, 8\), got shapes \[\(1, 3, 8\), \(1, 3, 8\)\]"),
        ([layer(C=6)] * 2, ValueError, r"both of shape \(2, P, 8\)"),
        ([layer(P=3), layer(P=4)], ValueError, r"same number of tokens, got \[3, 4\]"),
        ([layer(P=3), None], ValueError, r"same number of tokens, got \[3, 0\]"),
        ([[layer(P=3)[0], layer(P=4)[0]]] * 2, ValueError, r"got shapes \[\(2, 3, 8\), \(2, 4, 8\)\]"),
        ([[layer()[0]]] * 2, ValueError, r"got shapes \[\(2, 3, 8\)\]"),
        ([[t.view(2, 3, 2, 4) for t in layer()]] * 2, ValueError, r"both of shape \(2, P, 8\)"),
        ([layer(P=6)] * 2, ValueError, "longer than the 6 cached tokens, got 6"),
        ([layer(P=9)] * 2, ValueError, "longer than the 9 cached tokens, got 6"),
        ([layer()[0]] * 2, TypeError, r"None or a list \[k, v\] of tensors, got Tensor"),
        ([[1, 2]] * 2, TypeError, r"None or a list \[k, v\] of tensors, got list"),
        (layer()[0], TypeError, "a list of 2 entries, one for each layer, got Tensor"),
    ],
)
def test_gpt_refuses_a_cache_that_does_not_fit_before_any_work(pair, monkeypatch, cache, error, says):
    monkeypatch.setattr(Block_kv, "forward", lambda *args: pytest.fail("the model was run"))
    with pytest.raises(error, match=says):
        pair[0](torch.zeros(2, 6, dtype=torch.long), kv_cache=cache)


def test_attention_refuses_what_does_not_fit():
    attn = CausalSelfAttention_kv(
        GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=4)
    ).double()
    x = torch.zeros(2, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="P=3 and T=2"):
        attn(x, layer(P=3))
    with pytest.raises(ValueError, match="P=3 and T=0"):
        attn(x[:, :0], layer(P=3))
    with pytest.raises(ValueError, match=r"both of shape \(2, P, 8\)"):
        attn(x, layer(B=1))
