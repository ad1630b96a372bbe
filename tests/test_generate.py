"""generate_kv writes what generate writes."""

import pytest
import torch
from conftest import CACHED, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_lib.block import Block_kv
from kvcache_lib.mingpt import best_device


def both(pair, prompt, tokens, **options):
    "The texts of generate_kv and of generate, from the same seed."
    texts = []
    for generate in (pair[0].generate_kv, pair[1].generate):
        torch.manual_seed(1)
        texts.append(generate(prompt, tokens, **options))
    return texts


@pytest.mark.parametrize("cached_class", CACHED)
@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    t=st.integers(1, 20),
    tokens=st.integers(0, 25),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 4, 11]),
    do_sample=st.booleans(),
    seed=st.integers(0, 99),
)
def test_generate_kv_writes_what_generate_writes(
    cached_class, B, t, tokens, temperature, top_k, do_sample, seed
):
    pair = make_pair(seed=seed, cached_class=cached_class)
    prompt = torch.randint(11, (B, t), generator=torch.Generator().manual_seed(seed))
    before = prompt.clone()
    got, want = both(pair, prompt, tokens, temperature=temperature, top_k=top_k, do_sample=do_sample)
    assert torch.equal(got, want)
    assert got.shape == (B, t + tokens) and torch.equal(got[:, :t], before) and torch.equal(prompt, before)


@pytest.mark.skipif(best_device() == "cpu", reason="no CUDA or Apple GPU")
@pytest.mark.parametrize("cached_class", CACHED)
def test_on_an_accelerator(cached_class):
    device = best_device()
    cached, plain = (model.float().to(device) for model in make_pair(cached_class=cached_class))
    prompt = torch.randint(11, (2, 5), device=device)
    for options in ({}, {"do_sample": True, "top_k": 5}):
        got, want = both((cached, plain), prompt, 20, **options)
        assert got.device.type == device and torch.equal(got, want)


def test_the_settings_matter(pair):
    prompt = torch.randint(11, (4, 3))
    texts = [both(pair, prompt, 12, do_sample=True, **o)[0] for o in ({}, {"temperature": 0.2}, {"top_k": 2})]
    texts.append(both(pair, prompt, 12)[0])
    for i, a in enumerate(texts):
        assert not any(torch.equal(a, b) for b in texts[:i])


def encoded(model, prompt, tokens):
    counts = []
    hook = model.transformer.h[0].register_forward_hook(
        lambda module, args, out: counts.append(args[0].size(1))
    )
    model.generate_kv(prompt, tokens)
    hook.remove()
    return counts


def test_one_token_is_encoded_per_step_within_the_block(pair):
    model = pair[0]
    assert encoded(model, torch.zeros(2, 5, dtype=torch.long), 12) == [5] + [1] * 11
    assert encoded(model, torch.zeros(1, 14, dtype=torch.long), 6) == [14, 1, 1, 16, 16, 16]
    assert encoded(model, torch.zeros(1, 30, dtype=torch.long), 2) == [16, 16]


def test_no_new_tokens_returns_the_prompt(pair, monkeypatch):
    monkeypatch.setattr(Block_kv, "forward", lambda *args: pytest.fail("the model was run"))
    prompt = torch.randint(11, (2, 3))
    assert torch.equal(pair[0].generate_kv(prompt, 0), prompt)


def test_a_second_call_starts_afresh(pair):
    first, second = torch.randint(11, (1, 9)), torch.randint(11, (3, 2))
    pair[0].generate_kv(first, 5)
    got, want = both(pair, second, 5)
    assert torch.equal(got, want)


@pytest.mark.parametrize("cached_class", CACHED)
def test_mode_and_gradients_are_left_alone(cached_class):
    model, _ = make_pair(cached_class=cached_class)
    for mode in (True, False):
        model.train(mode)
        assert not model.generate_kv(torch.zeros(1, 2, dtype=torch.long), 2).requires_grad
        assert model.training is mode
    assert torch.is_grad_enabled()
