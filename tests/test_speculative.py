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
    for end in sorted(set(plain), key=plain.index)[:4]:
        want = model.generate_kv(idx, 30, eos_token=end)
        assert torch.equal(generate_speculative(model, DRAFTS[draft](), idx, 30, eos_token=end), want)
        assert want.size(1) == 5 + plain.index(end) + 1
        streamed = list(generate_speculative(model, DRAFTS[draft](), idx, 30, eos_token=end, stream=True))
        assert all(token.shape == (1, 1) for token in streamed) and torch.equal(torch.cat([idx, *streamed], 1), want)


def test_a_comparison_forgives_a_tie_and_nothing_else(monkeypatch):
    model, rounds = text_model(GPT_fast), dict(seconds=0.01)
    idx = encode_sections(kept_tokenizer(), kept_corpus()[1])[None, :30]
    (row,) = speculative.compare_drafts(model, {"lookup": (PromptLookup(), 4)}, idx, 12, **rounds)
    assert row["tokens a step"] >= 1 and 0 <= row["accepted, %"] <= 100
    text = model.generate_kv(idx, 12)
    other = text.clone()
    other[0, 35] = (text[0, 35] + 1) % 1024
    monkeypatch.setattr(speculative, "generate_speculative", lambda *_, **more: other)
    with pytest.raises(AssertionError, match="part at token 35"):
        speculative.compare_drafts(model, {"lookup": (PromptLookup(), 4)}, idx, 12, **rounds)
    model.lm_head.weight.data[other[0, 35]] = model.lm_head.weight.data[text[0, 35]]  # now these two are tied
    speculative._check_same(model, text, other)


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


# Over all texts. A vocabulary of 3, texts of 3 tokens: 27 of them.

V, LENGTH, TIMES = 3, 3, 600
TEXTS = list(itertools.product(range(V), repeat=LENGTH))


class Tables:
    "What a model of 3 tokens says, and what its draft says."

    target = random_model(vocab_size=V, n_layer=1, n_embd=4, block_size=8, scale=6.0, seed=0)
    draft = random_model(vocab_size=V, n_layer=1, n_embd=4, block_size=8, scale=6.0, seed=10)
    settings = dict(temperature=0.9, do_sample=True)


def law(model, temperature=0.9):
    "The probability of each text after the prompt [0], (27,)."
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


def rule_law(k, accept=lambda p, q, x: min(1.0, p[x] / q[x]), rest=lambda p, q, x: [max(0.0, a - b) for a, b in zip(p, q)]):
    "The probability of each text that guessing with Tables.draft gives by a rule, exactly: all guesses and all outcomes are gone through."
    tables = {}
    for model in (Tables.target, Tables.draft):
        with torch.no_grad():
            for text in itertools.chain(*(itertools.product(range(V), repeat=n) for n in range(LENGTH))):
                tables[model, text] = (model(torch.tensor([[0, *text]]))[0][0, -1] / 0.9).softmax(0).tolist()
    end = dict.fromkeys(TEXTS, 0.0)

    def go(text, weight):
        if len(text) == LENGTH:
            end[text] += weight
            return
        n = min(k, LENGTH - len(text) - 1)
        for guess in itertools.product(range(V), repeat=n):
            alive = weight * math.prod(tables[Tables.draft, text + guess[:i]][x] for i, x in enumerate(guess))
            for i, x in enumerate(guess):
                p, q = (tables[model, text + guess[:i]] for model in (Tables.target, Tables.draft))
                yes, weights = accept(p, q, x), rest(p, q, x)
                if yes < 1:
                    for y in range(V):
                        go(text + guess[:i] + (y,), alive * (1 - yes) * weights[y] / sum(weights))
                alive *= yes
            for y, share in enumerate(tables[Tables.target, text + guess]):
                go(text + guess + (y,), alive * share)

    go((), 1.0)
    return torch.tensor([end[text] for text in TEXTS], dtype=torch.float64)


WRONG = {
    "the residual is p": dict(rest=lambda p, q, x: p),
    "the residual is q": dict(rest=lambda p, q, x: q),
    "accepted with probability p": dict(accept=lambda p, q, x: p[x]),
    "accepted if p is at least q": dict(accept=lambda p, q, x: float(p[x] >= q[x])),
}


@pytest.fixture(scope="module")
def p():
    return law(Tables.target)


@pytest.fixture(scope="module")
def limit(p):
    return critical(p)


@pytest.mark.parametrize("k", (1, 2, 3))
def test_the_rule_gives_the_targets_law_exactly(p, k):
    assert (rule_law(k) - p).abs().max() < 1e-14 and p.sum().item() == pytest.approx(1)


def test_the_power_of_the_test_over_all_texts(p, limit):
    "A limit that is passed once in 10,000 times if all is right; each of these mistakes passes it in more than 99% of runs."
    for name, parts in WRONG.items():
        wrong = rule_law(2, **parts)
        seen = drawn(wrong, 400)
        power = (((seen - TIMES * p) ** 2 / (TIMES * p)).sum(1) > limit).double().mean().item()
        print(name, power)
        assert power > 0.99, name


GUESSERS = {"a model": lambda: DraftModel(Tables.draft), "lookup": lambda: PromptLookup(2)}


@pytest.mark.parametrize("draft", GUESSERS)
def test_every_text_is_drawn_as_often_as_the_target_draws_it(p, limit, draft):
    assert chi_squared(counts(GUESSERS[draft](), 2, seed=1), p) < limit


def wrong_verify(tokens, q, p, u):
    accepted, token = verify(tokens, q, p, u)
    return accepted, token if accepted == len(tokens) else pick(p[accepted], float(u[-1]))


def test_a_wrong_residual_is_seen(p, limit, monkeypatch):
    monkeypatch.setattr(speculative, "verify", wrong_verify)
    assert chi_squared(counts(DraftModel(Tables.draft), 2, seed=1), p) > limit


def test_a_temperature_on_the_target_alone_is_seen(p, limit, monkeypatch):
    "What was drawn was drawn at 0.9; a q that is said to be of another temperature is a wrong q."
    right = Choice.draft

    def other(self, logits):
        return right(self, logits)[0], self._replace(temperature=0.45).probabilities(logits)

    monkeypatch.setattr(Choice, "draft", other)
    assert chi_squared(counts(DraftModel(Tables.draft), 2, seed=1), p) > limit


# The exercise.


@pytest.mark.parametrize("check, mistake", [(check_verify, m) for m in VERIFY_MISTAKES] + [(check_advance, m) for m in ADVANCE_MISTAKES], ids=lambda z: getattr(z, "name", None))
def test_a_wrong_solution_is_named(check, mistake):
    with pytest.raises(CheckFailed) as e:
        check(written(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value


VECTORS = """
def verify(tokens, q, p, u):
    n = len(tokens)
    at = torch.arange(n)
    no = (u[:n] * q[at, tokens] >= p[at, tokens]).nonzero()
    i = int(no[0]) if len(no) else n
    left = p[i] if i == n else (p[i] - q[i]).relu()
    return i, int((left.cumsum(0) / left.sum() <= u[n]).sum())
"""
RUNNING_PRODUCT = """
def verify(tokens, q, p, u):
    n = len(tokens)
    ratios = torch.stack([torch.ones(()).double(), *((p[i, x] / q[i, x]).clamp(max=1) for i, x in enumerate(tokens))])[1:]
    accepted = (u[:n] < ratios).long().cumprod(0).sum()
    rows = torch.cat([q, torch.zeros(1, p.size(1))])  # the bonus token: nothing is taken away
    weights = torch.maximum(p[accepted] - rows[accepted], torch.zeros(()).double())
    weights = weights / weights.sum()
    return accepted, torch.searchsorted(weights.cumsum(0), u[n], right=True)
"""
LISTS = """
def verify(tokens, q, p, u):
    u, i = u.tolist(), 0
    def choose(weights):
        total, last, at = 0.0, u[-1] * sum(weights), 0
        for x, w in enumerate(weights):
            total += w
            if total > last:
                return x
    for x in tokens.tolist():
        if not u[i] < min(1, p[i][x].item() / q[i][x].item()):
            return [i, choose([max(0.0, a - b) for a, b in zip(p[i].tolist(), q[i].tolist())])]
        i += 1
    return [i, choose(p[i].tolist())]
"""
WHILE = """
def verify(tokens, q, p, u):
    accepted = 0
    while accepted < len(tokens) and u[accepted] < p[accepted, tokens[accepted]] / q[accepted, tokens[accepted]]:
        accepted += 1
    probs = p[accepted]
    if accepted < len(tokens):
        probs = torch.where(probs > q[accepted], probs - q[accepted], 0.0)
        probs /= probs.sum()
    return torch.tensor([accepted, int((probs.cumsum(0) > u[-1]).nonzero()[0])])
"""


@pytest.mark.parametrize("source", [VERIFY, VECTORS, RUNNING_PRODUCT, LISTS, WHILE], ids="right vectors product lists while".split())
def test_right_ways_to_verify_pass(source):
    assert len(check_verify(written(source), 3).rows) == len(check_verify.judge(check_verify.observe(written(source), 4), 4).rows) == 7


STEPS = (
    ADVANCE,
    """
def advance(model, buffer, text, tokens, decide):
    P = buffer.length
    longer = torch.cat((text[0], tokens))[None]
    (logits,), _ = model.step(longer, buffer, compute_first=False)
    n, token = decide(longer[0, P + 1 :], logits)
    buffer.crop(P + 1 + n)
    new = longer[0, text.numel() : text.numel() + n].tolist()
    new.append(token)
    return new
""",
    """
def advance(model, buffer, text, tokens, decide):
    idx = torch.hstack([text, tokens.unsqueeze(0)])
    logits = model.step(idx, buffer)[0].squeeze(0)
    accepted, token = decide(tokens, logits[-len(tokens) - 1 :])
    if accepted < len(tokens):
        buffer.crop(buffer.length - (len(tokens) - accepted))
    return [int(x) for x in tokens[:accepted]] + [int(token)]
""",
    """
def advance(model, buffer, text, tokens, decide):
    out, loss = model.step(F.pad(text, (0, len(tokens))).index_copy_(1, torch.arange(len(tokens)) + text.size(1), tokens[None]), buffer)
    accepted, token = decide(tokens, out[0])
    buffer.crop(length=text.size(1) + accepted)
    return torch.cat([tokens[:accepted], torch.tensor([token])])
""",
)


@pytest.mark.parametrize("source", STEPS, ids=range(len(STEPS)))
def test_right_ways_to_advance_pass(source):
    assert len(check_advance(written(source), 3).rows) == len(check_advance.judge(check_advance.observe(written(source), 4), 4).rows) == 6


def test_the_power_of_the_checks_frequencies():
    "Drawing from p in place of the residual, 200 times: found each time, while what is right is never blamed."
    _, p = frequency_guesses(0, 2)
    q = torch.tensor([0.1, 0.15, 0.2, 0.15, 0.4]).double()
    kept = torch.minimum(p, q)
    for law, blamed in ((kept + (1 - kept.sum()) * p, True), (p, False)):
        seen = torch.multinomial(law, 200 * 2000, replacement=True, generator=torch.Generator().manual_seed(0)).view(200, 2000)
        assert all((chi_squared(torch.bincount(row, minlength=5).double(), p) > 33.4) == blamed for row in seen)


# What can't be.


@pytest.mark.parametrize("change, error, words", [
    (dict(model=GPT_kv(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=20, block_size=8))), TypeError, "expected a GPT_fast or a Llama, got GPT_kv"),
    (dict(draft="lookup"), TypeError, "expected a draft, such as"),
    (dict(idx=torch.zeros(2, 3, dtype=torch.long)), ValueError, "expected one text, .* a batch of 2"),
    (dict(idx=torch.full((1, 3), 20)), ValueError, "expected tokens from 0 to 19"),
    (dict(max_new_tokens=-1), ValueError, "max_new_tokens"),
    (dict(k=0), ValueError, "k"),
    (dict(temperature=0, do_sample=True), ValueError, "temperature"),
    (dict(draft=EarlyExit(3)), ValueError, "the layers of the draft"),
    (dict(draft=DraftModel(random_model(vocab_size=21))), ValueError, "the model's vocabulary of 20 tokens, got one of 21"),
    (dict(model=random_model(Llama, LlamaConfig, window=6, sinks=2)), ValueError, "a window that has moved cannot do: expected at most 9 tokens in all, got 3 and 10"),
])  # fmt: skip
def test_what_cannot_be_is_refused_at_once(change, error, words):
    call = dict(model=TARGETS["GPT_fast"], draft=PromptLookup(), idx=torch.zeros(1, 3, dtype=torch.long), max_new_tokens=10)
    with pytest.raises(error, match=words):
        generate_speculative(**(call | change), stream=True)


def test_nothing_to_write():
    idx = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(generate_speculative(TARGETS["GPT_fast"], PromptLookup(), idx, 0), idx)
    for bad in (lambda: PromptLookup(0), lambda: EarlyExit(0)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(TypeError, match="expected a GPT_fast or a Llama as a draft"):
        DraftModel(None)
