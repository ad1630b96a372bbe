"""Guessing ahead: greedy it is the target's text token for token, drawn it has the target's distribution."""

import itertools
import math

import pytest
import torch

from kvcache_lib import speculative
from kvcache_lib.checks.guessing import check_advance, check_verify, chi_squared, frequency_guesses
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.config import GPTConfig
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.kept import kept_corpus, kept_tokenizer, text_model
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.mingpt import next_token
from kvcache_lib.mistakes.guessing import ADVANCE, ADVANCE_MISTAKES, VERIFY, VERIFY_MISTAKES
from kvcache_lib.mistakes.solution import written
from kvcache_lib.speculative import Choice, DraftModel, EarlyExit, PromptLookup, advance, generate_speculative, pick, verify
from kvcache_lib.text import encode_sections


def random_model(cls=GPT_fast, config=GPTConfig, scale=5.0, seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=20, block_size=48)
    model = cls(config(**(sizes | more))).double().eval()
    for p in model.parameters():
        p.data *= scale
    return model


TARGETS = {
    "GPT_fast": random_model(),
    "Llama": random_model(Llama, LlamaConfig),
    "Llama, groups, norms": random_model(Llama, LlamaConfig, n_kv_head=1, qk_norm=True),
    "Llama, a window that stays": random_model(Llama, LlamaConfig, window=40, sinks=2),
}
DRAFTS = {
    "lookup": lambda: PromptLookup(),
    "lookup, one token": lambda: PromptLookup(1),
    "another model": lambda: DraftModel(random_model(seed=1, n_layer=1)),
    "a shorter model": lambda: DraftModel(random_model(seed=1, n_layer=1, block_size=24)),
    "first layer": lambda: EarlyExit(1),
    "all layers": lambda: EarlyExit(2),
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("target", TARGETS)
def test_greedy_is_the_targets_text(target, draft):
    model, guess = TARGETS[target], DRAFTS[draft]()
    for seed, t, new, k in ((0, 1, 30, 4), (1, 7, 34, 1), (2, 20, 21, 9)):  # the draft serves one text after the other
        idx = torch.randint(20, (1, t), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(generate_speculative(model, guess, idx, new, k=k), model.generate_kv(idx, new))


@pytest.mark.parametrize("draft", DRAFTS)
def test_past_the_block_size_it_goes_on_as_generate_does(draft):
    model = TARGETS["GPT_fast"]
    for t in (30, 48, 60):
        idx = torch.randint(20, (1, t), generator=torch.Generator().manual_seed(t))
        assert torch.equal(generate_speculative(model, DRAFTS[draft](), idx, 24), model.generate_kv(idx, 24))


def test_the_text_model_in_float32():
    model, draft = text_model(GPT_fast), DraftModel(text_model(GPT_fast, "draft"))
    ids = encode_sections(kept_tokenizer(), kept_corpus()[1])[None]
    for start, guess in zip((0, 700, 1400, 2100), (PromptLookup(), draft, EarlyExit(2), PromptLookup(2))):
        idx = ids[:, start : start + 30]
        assert torch.equal(generate_speculative(model, guess, idx, 80, k=5), model.generate_kv(idx, 80))


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_end_token_ends_the_text_inside_a_run(draft):
    model = TARGETS["GPT_fast"]
    idx = torch.randint(20, (1, 5), generator=torch.Generator().manual_seed(3))
    plain = model.generate_kv(idx, 30)[0, 5:].tolist()
    for end in set(plain):
        want = model.generate_kv(idx, 30, eos_token=end)
        assert torch.equal(generate_speculative(model, DRAFTS[draft](), idx, 30, eos_token=end), want)
        assert want.size(1) == 5 + plain.index(end) + 1
        streamed = list(generate_speculative(model, DRAFTS[draft](), idx, 30, eos_token=end, stream=True))
        assert all(token.shape == (1, 1) for token in streamed) and torch.equal(torch.cat([idx, *streamed], 1), want)


class Told:
    "A draft that guesses what it is told, right or wrong."

    def __init__(self, guess):
        self.guess = guess

    def begin(self, model, buffer, choice):
        self.buffer = buffer

    def propose(self, text, n):
        assert self.buffer.length == text.size(1) - 1
        return self.guess(text, n)[:n], None


def test_a_draft_that_is_always_right_saves_all_it_can_and_one_that_never_is_costs_nothing_in_text():
    model, steps = TARGETS["Llama"], []
    idx = torch.tensor([[1, 2, 3]])
    text = model.generate_kv(idx, 21)
    assert torch.equal(generate_speculative(model, Told(lambda given, n: text[0, given.size(1) :]), idx, 21, k=6, watch=lambda *z: steps.append(z)), text)
    assert steps == [(6, 6)] * 3
    wrong = Told(lambda given, n: (text[0, given.size(1) :] + 1) % 20)
    steps.clear()
    assert torch.equal(generate_speculative(model, wrong, idx, 21, k=6, watch=lambda *z: steps.append(z)), text)
    assert len(steps) == 21 and not any(accepted for _, accepted in steps)


def test_lookup_finds_what_followed_last_and_copies_past_the_end():
    draft, text = PromptLookup(2), torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6]])
    draft.begin(None, None, None)
    assert draft.propose(text, 4)[0].tolist() == [8, 5, 6, 8]
    longer = torch.cat([text, torch.tensor([[9]])], 1)
    assert draft.propose(longer, 4)[0].tolist() == []  # 9 was never there
    assert draft.propose(torch.cat([longer, torch.tensor([[7]])], 1), 4)[0].tolist() == [5, 6, 8, 5]
    assert PromptLookup(3).longest == 3 and "3" in repr(PromptLookup(3))


def test_drawn_from_is_what_next_token_draws_from():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).double()
    for temperature, top_k in ((1.0, None), (0.5, 4), (2.0, 7), (1e-320, None)):
        for seed in range(5):
            ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
            p = Choice(True, temperature, top_k, None).probabilities(logits)
            assert torch.multinomial(p, 1, generator=ours) == next_token(logits, temperature, True, top_k, theirs)


# Over all texts. A vocabulary of 3, texts of 4 tokens: 81 of them.

V, LENGTH, TIMES = 3, 4, 1500
TEXTS = list(itertools.product(range(V), repeat=LENGTH))


class Tables:
    "What a model of 3 tokens says, and what its draft says."

    target = random_model(vocab_size=V, n_layer=1, n_embd=4, block_size=8, scale=12.0, seed=5)
    draft = random_model(vocab_size=V, n_layer=1, n_embd=4, block_size=8, scale=12.0, seed=2)
    settings = dict(temperature=0.9, do_sample=True)


def law(model, temperature=0.9):
    "The probability of each text after the prompt [0], (81,)."
    texts = torch.tensor(TEXTS)
    with torch.no_grad():
        logits = model(torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts], 1))[0][:, :-1]
    return (logits / temperature).log_softmax(2).gather(2, texts[:, :, None]).sum((1, 2)).exp()


def counts(draft, k, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [tuple(generate_speculative(Tables.target, draft, torch.zeros(1, 1, dtype=torch.long), LENGTH, **Tables.settings, k=k, generator=generator)[0, 1:].tolist()) for _ in range(TIMES)]
    return torch.tensor([texts.count(text) for text in TEXTS]).double()


def critical(p, share=1e-4, rounds=20_000):
    "What chi-squared exceeds with this probability if all is right, by simulation: rare texts make no table right."
    seen = drawn(p, rounds)
    return ((seen - TIMES * p) ** 2 / (TIMES * p)).sum(1).quantile(1 - share).item()


def drawn(p, rounds):
    cells = torch.multinomial(p, TIMES * rounds, replacement=True, generator=torch.Generator().manual_seed(0)).view(rounds, TIMES)
    return torch.zeros(rounds, len(p)).scatter_add_(1, cells, torch.ones(()).expand(rounds, TIMES)).double()
