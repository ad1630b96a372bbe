"""generate_kv writes what generate writes."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import CACHED, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_lib.block import Block_kv
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPT, best_device


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


@pytest.mark.filterwarnings("ignore:generating with dropout")
@pytest.mark.parametrize("cached_class", CACHED)
def test_mode_and_gradients_are_left_alone(cached_class):
    model, _ = make_pair(cached_class=cached_class)
    for mode in (True, False):
        model.train(mode)
        assert not model.generate_kv(torch.zeros(1, 2, dtype=torch.long), 2).requires_grad
        assert model.training is mode
    assert torch.is_grad_enabled()


# --- what people expect beyond the course's five settings ---

WAYS = [(cls, name) for cls in (GPT, *CACHED) for name in ("generate", "generate_kv") if hasattr(cls, name)]
ways = pytest.mark.parametrize("cls,name", WAYS, ids=lambda x: getattr(x, "__name__", x))


def way(cls, name):
    cached, plain = make_pair(cached_class=GPT_kv if cls is GPT else cls)
    return getattr(plain if cls is GPT else cached, name)


@ways
@pytest.mark.parametrize("eos", range(0, 11, 2))
def test_each_row_ends_by_itself(cls, name, eos):
    generate, prompt = way(cls, name), torch.randint(11, (4, 3))
    prompt[0, -1] = eos  # in the prompt it ends nothing
    torch.manual_seed(1)
    whole = generate(prompt, 20, do_sample=True)
    torch.manual_seed(1)
    got = generate(prompt, 20, do_sample=True, eos_token=eos)
    longest = 0
    for row, full in zip(got[:, 3:].tolist(), whole[:, 3:].tolist()):
        end = full.index(eos) + 1 if eos in full else 20
        # until the first row has ended the draws are the same; what follows an end is eos_token
        ended = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[ended:]) <= {eos}
        longest = max(longest, ended)
        if end == min(r.index(eos) + 1 if eos in r else 20 for r in whole[:, 3:].tolist()):
            assert row[:end] == full[:end]
    assert got.size(1) == 3 + longest


@ways
def test_greedy_rows_end_where_they_would_alone(cls, name):
    generate, prompt = way(cls, name), torch.randint(11, (5, 3))
    full = generate(prompt, 13)
    eos = full[0, 5].item()
    got = generate(prompt, 13, eos_token=np.int64(eos))
    for row, whole in zip(got[:, 3:].tolist(), full[:, 3:].tolist()):
        end = whole.index(eos) + 1 if eos in whole else 13
        assert row == whole[: min(end, len(row))] + [eos] * (len(row) - end)


@ways
def test_a_stream_yields_the_same_tokens_as_they_come(cls, name):
    generate, prompt = way(cls, name), torch.randint(11, (2, 9))
    want = generate(prompt, 12)
    stream = generate(prompt, 10**18, stream=True)  # as many as one asks for
    first = [next(stream) for _ in range(12)]
    assert all(token.shape == (2, 1) and not token.requires_grad for token in first)
    assert torch.equal(torch.cat([prompt, *first], dim=1), want) and torch.is_grad_enabled()
    with pytest.raises(ValueError, match="top_k ≤ 11"):  # at once, not at the first token
        generate(prompt, 4, top_k=12, stream=True)
    eos = want[0, 10].item()
    ended = list(generate(prompt, 12, eos_token=eos, stream=True))
    assert torch.equal(torch.cat([prompt, *ended], 1), generate(prompt, 12, eos_token=eos))


@ways
def test_a_generator_of_ones_own(cls, name):
    generate, prompt = way(cls, name), torch.randint(11, (2, 3))

    def draw(seed):
        return generate(prompt, 12, do_sample=True, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(5)
    want, state = [draw(s) for s in (1, 2)], torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(*want)  # torch's own is not touched
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(draw, (1, 2)), want))


@ways
@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 1e-3, 1, np.float32(2), 1e30, float("inf"), 10**20])
def test_no_temperature_changes_greedy_text_or_breaks_sampling(cls, name, temperature):
    generate, prompt = way(cls, name), torch.randint(11, (2, 3))
    want = generate(prompt, 8)
    assert torch.equal(generate(prompt, 8, temperature=temperature), want)
    drawn = generate(prompt, 8, temperature=temperature, do_sample=True)
    assert drawn.shape == (2, 11)
    if temperature < 1e-40:
        assert torch.equal(drawn, want)  # so sharp that nothing else is left


@ways
def test_whole_numbers_from_numpy(cls, name):
    generate, prompt = way(cls, name), torch.randint(11, (2, 3))
    torch.manual_seed(0)
    want = generate(prompt, 5, do_sample=True, top_k=3)
    torch.manual_seed(0)
    got = generate(prompt, np.int64(5), do_sample=np.bool_(True), top_k=np.int32(3))
    assert torch.equal(got, want)


@ways
def test_dropout_that_is_on_is_warned_of(cls, name):
    generate = way(cls, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(torch.zeros(1, 2, dtype=torch.long), 2)
        generate.__self__.train()
        with pytest.raises(UserWarning, match=r"model.eval\(\)"):
            generate(torch.zeros(1, 2, dtype=torch.long), 2)
