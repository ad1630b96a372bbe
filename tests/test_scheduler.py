"""Many texts at once: each is its own `generate`, whatever happens beside it, and no page is lost.

KVCACHE_EXAMPLES=1500 pytest tests/test_scheduler.py -k Texts: a longer search, of some 10,000 requests.
"""

import os
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from conftest import make_pair
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache_lib import scheduler
from kvcache_lib.fast import GPT_fast
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.paged import PagedLayer, PagePool, Pages, PoolFull
from kvcache_lib.prefix import PrefixCache
from kvcache_lib.scheduler import Scheduler

BLOCK, PAGE = 32, 4
MODEL, PLAIN = make_pair(block_size=BLOCK, cached_class=GPT_fast)
EXAMPLES = int(os.environ.get("KVCACHE_EXAMPLES", 40))
BEGINNINGS = [  # many prompts begin alike, or hold the same page after another
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 9, 9, 9, 9, 2], [9, 9, 9, 9, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 1, 2, 3, 4, 5], [7],
]  # fmt: skip


def new_generator(seed):
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=None)
def alone(prompt, n, seed=None, eos=None):
    "What `generate` writes, without any cache. seed: of the generator of a sampled text."
    with torch.inference_mode():
        text = PLAIN.generate(torch.tensor([prompt]), n, eos_token=eos, **choice_of(seed))
    return text[0].tolist()


def choice_of(seed):
    return {} if seed is None else dict(do_sample=True, temperature=1.5, top_k=9, generator=new_generator(seed))


def accounts(loop):
    "How many hold each page, counted from the tables and the known pages."
    users = [0] * len(loop.pool)
    for text in loop.live:
        for page in text.cache.table if text.cache else ():
            users[page] += 1
    for known in loop.prefix.used if loop.prefix else ():
        users[known.page] += 1
    return users


def check_pool(loop):
    assert loop.pool.users == accounts(loop)
    free = loop.pool._free
    assert len(set(free)) == len(free) and sorted(free) == [page for page, n in enumerate(loop.pool.users) if not n]
    for text in loop.live:
        if text.cache is not None:
            assert len(text.cache.table) == -(-text.cache.length // PAGE)
            assert 0 < text.cache.length < len(text.tokens)
        assert text.name not in loop.finished


@contextmanager
def fault(where, calls):
    "An error in the n-th call of something that a step does. The context's list says whether it came."
    owner, name = where
    real, left, came = getattr(owner, name), [calls], []

    def broken(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            came.append(True)
            raise OSError("injected")
        return real(*args, **kwargs)

    setattr(owner, name, broken)
    try:
        yield came
    finally:
        setattr(owner, name, real)


FAULTS = [
    (PagedLayer, "write"), (scheduler, "packed_step"), (scheduler, "next_token"), (scheduler, "plan"),
    (Pages, "take"), (PrefixCache, "insert"), (PrefixCache, "lookup"), (GPT_fast, "logits"),
]  # fmt: skip


class Texts(RuleBasedStateMachine):
    "A pool that is too small for all, and everything that can happen to the texts in it."

    requests = preempted = 0  # of all examples

    @initialize(pages=st.integers(8, 12), budget=st.integers(PAGE, 12), most=st.integers(1, 6), prefix=st.booleans())
    def start(self, pages, budget, most, prefix):
        self.loop = Scheduler(MODEL, PagePool.like(MODEL, pages, PAGE), budget, prefix, most)
        self.want, self.seed = {}, 0

    def expect(self, name, *text):
        self.want[name] = alone(*text)
        Texts.requests += 1

    def new_seed(self, sampled):
        self.seed += 1
        return self.seed if sampled else None

    @rule(
        begin=st.sampled_from(BEGINNINGS), keep=st.integers(1, 10), more=st.lists(st.integers(0, 10), max_size=5),
        n=st.integers(0, 14), sampled=st.booleans(), eos=st.sampled_from([None, None, 3]),
    )  # fmt: skip
    def add(self, begin, keep, more, n, sampled, eos):
        prompt, seed = tuple(begin[:keep] + more), self.new_seed(sampled)
        name = self.loop.add(list(prompt), n, eos_token=eos, **choice_of(seed))
        self.expect(name, prompt, n, seed, eos)

    @rule()
    def step(self):
        before = {text.name: list(text.tokens) for text in self.loop.live}
        served = [text for text in self.loop.live[: self.loop.max_texts] if text.cache and text.pending == 1][: self.loop.budget]
        events = len(self.loop.log)
        written = self.loop.step()
        assert len(dict(written)) == len(written)
        now = {text.name: list(text.tokens) for text in self.loop.live} | {k: v.tolist() for k, v in self.loop.finished.items()}
        for name, text in before.items():
            assert now[name] == text + [token for other, token in written if other == name]
        log = self.loop.log[events:]
        assert sum(event.tokens for event in log if event.kind in ("prefill", "decode")) <= self.loop.budget
        out = [event.name for event in log if event.kind == "preempt"]
        Texts.preempted += len(out)
        for text in served:  # whoever decodes is served, or gives way
            assert text.name in dict(written) or text.name in out
        if out:  # nobody takes what was given up, but those that are older
            order = list(before)
            assert all(order.index(e.name) < min(map(order.index, out)) for e in log if e.kind in ("prefill", "decode"))

    @rule(n=st.integers(2, 12))
    def steps(self, n):
        for _ in range(n):
            self.step()
            check_pool(self.loop)

    def pick(self, data):
        return data.draw(st.sampled_from([text.name for text in self.loop.live]))

    @precondition(lambda self: self.loop.live)
    @rule(data=st.data())
    def fork(self, data):
        old = self.loop.live[self.loop._find(self.pick(data))]
        seed = self.new_seed(old.choice["do_sample"])
        name = ("fork", self.seed, len(self.want))
        self.loop.fork(old.name, name, None if seed is None else new_generator(seed))
        self.expect(name, tuple(old.tokens), old.end - len(old.tokens), seed, old.eos_token)

    @precondition(lambda self: self.loop.live)
    @rule(data=st.data())
    def cancel(self, data):
        name = self.pick(data)
        text = self.loop.cancel(name).tolist()
        assert text == self.want.pop(name)[: len(text)]

    @precondition(lambda self: self.loop.live)
    @rule(data=st.data())
    def preempt(self, data):
        self.loop.preempt(self.pick(data))

    @rule(where=st.sampled_from(FAULTS), calls=st.integers(1, 6))
    def fail(self, where, calls):
        def state():
            kept = {event.name for event in self.loop.log[events:] if event.kind == "preempt"}
            texts = [(text.name, list(text.tokens), text.name in kept or text.cache and text.cache.length) for text in self.loop.live]
            draws = [text.generator and text.generator.get_state().tolist() for text in self.loop.live]
            return texts, draws, self.loop.steps, {k: v.tolist() for k, v in self.loop.finished.items()}

        events = len(self.loop.log)
        before, counts = state(), None
        with fault(where, calls) as came:
            try:
                self.loop.step()
            except OSError:
                counts = state()
        assert bool(came) == (counts is not None)
        if came:
            preempted = {event.name for event in self.loop.log[events:]}
            texts = [(name, tokens, name in preempted or length) for name, tokens, length in before[0]]
            assert counts == (texts, *before[1:])
            assert {event.kind for event in self.loop.log[events:]} <= {"preempt"}

    @invariant()
    def no_page_is_lost(self):
        if hasattr(self, "loop"):
            check_pool(self.loop)

    @invariant()
    def finished_texts_are_right(self):
        if hasattr(self, "loop"):
            for name in list(self.loop.finished):
                assert self.loop.finished.pop(name).tolist() == self.want.pop(name)

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        limit = self.loop.steps + sum(2 * text.end for text in self.loop.live) + 10
        while self.loop.live:
            self.step()
            check_pool(self.loop)
            assert self.loop.steps <= limit, "a step for each token would do, even one text after the other"
        assert {name: text.tolist() for name, text in self.loop.finished.items()} == self.want
        held = accounts(self.loop)
        assert sum(held) == (len(self.loop.prefix) if self.loop.prefix else 0)


TestTexts = Texts.TestCase
TestTexts.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None, derandomize="KVCACHE_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


# --- what a machine that plays at random would seldom meet ---


def small(pages=10, budget=8, prefix=False, **more):
    return Scheduler(MODEL, PagePool.like(MODEL, pages, PAGE), budget, prefix, **more)


@pytest.mark.parametrize("budget", [8, 32])
def test_a_long_request_among_endless_short_ones_ends(budget):
    "Four pages are always held by short texts and four are free: the long one needs five, so these must wait for it."
    loop, long = small(pages=8, budget=budget), tuple(range(10)) * 2
    for i in range(31):
        for _ in range(4):
            loop.add([5, 6], 2)
        if i == 1:
            loop.add(long, 6, name="long")
        loop.step()
    assert loop.finished["long"].tolist() == alone(long, 6) and len(loop.live) > 4


def test_the_oldest_advances_in_every_step():
    loop = small(pages=7, budget=5)
    for i in range(6):
        loop.add([i] * (3 * i + 1), 9, name=i)
    while loop.live:
        oldest = loop.live[0]
        encoded, tokens = oldest.cache.length if oldest.cache else 0, len(oldest.tokens)
        loop.step()
        assert len(oldest.tokens) > tokens or oldest.cache.length > encoded
    assert {event.kind for event in loop.log} == {"prefill", "decode", "preempt", "finish"}


def test_a_fork_is_as_old_as_its_text_and_writes_its_own():
    loop = small()
    for name in "ab":
        loop.add([1, 2, 3, 4, 5], 8, name=name, **choice_of(ord(name)))
    for _ in range(3):
        loop.step()
    tokens = list(loop.live[0].tokens)
    loop.fork("a", "c", new_generator(5))
    assert [text.name for text in loop.live] == ["a", "c", "b"]
    assert loop.live[0].cache.table == loop.live[1].cache.table and loop.live[0].tokens is not loop.live[1].tokens
    texts = loop.run()
    for name, seed in (("a", ord("a")), ("b", ord("b"))):
        assert texts[name].tolist() == alone((1, 2, 3, 4, 5), 8, seed)
    assert texts["c"].tolist() == alone(tuple(tokens), 13 - len(tokens), 5)
    with pytest.raises(KeyError, match="no text named 'a' is being written any more|no text named 'a'"):
        loop.fork("a", "d", new_generator(6))


def test_a_shared_beginning_is_encoded_once():
    prompt = list(range(10)) + [3] * 6
    loop = small(pages=12, prefix=True, budget=16)
    loop.add(prompt + [1], 3, name="a")
    loop.step()
    loop.add(prompt + [2], 3, name="b")
    texts = loop.run()
    assert sum(e.tokens for e in loop.log if e.name == "b" and e.kind == "prefill") == 1
    assert all(texts[name].tolist() == alone((*prompt, end), 3) for name, end in (("a", 1), ("b", 2)))


BAD = [  # arguments of add, the error, its words
    (([], 3), ValueError, "prompt 0 of shape \\(t,\\) with t ≥ 1, got \\(0,\\)"),
    ((torch.empty(0, dtype=torch.int64), 3), ValueError, "with t ≥ 1"),
    (("text", 3), TypeError, "tensor or a list of token numbers, got str"),
    (([[1]], 3), TypeError, "each token of prompt 0"),
    (([11], 3), ValueError, "≤ 10, got 11"),
    (([1.0], 3), TypeError, "each token"),
    (([1], -1), ValueError, "max_new_tokens"),
    (([1] * 30, 4), ValueError, "at most 33 tokens in all, the block size is 32, got a prompt of 30 and 4 new ones"),
    (([1] * 10, 20, {}, 6), ValueError, "at most 25 tokens in all, all 6 pages of the pool hold 24"),
    (([1], 3, dict(do_sample=True)), ValueError, "a torch.Generator of its own"),
    (([1], 3, dict(temperature=0)), ValueError, "temperature > 0"),
    (([1], 3, dict(top_k=12)), ValueError, "top_k"),
    (([1], 3, dict(eos_token=11)), ValueError, "eos_token"),
    (([1], 3, dict(name="there")), ValueError, "there is a text named 'there' already"),
    (([1], 3, dict(stream=True)), TypeError, "stream"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,words", BAD, ids=[str(n) for n in range(len(BAD))])
def test_what_cannot_be_written_is_refused_and_nothing_changes(call, error, words):
    prompt, new, *more = call
    loop = small(pages=more[1] if len(more) > 1 else 10)
    loop.add([1, 2, 3], 4, name="there")
    loop.step()
    with pytest.raises(error, match=words):
        loop.add(prompt, new, **(more[0] if more else {}))
    assert len(loop.live) == 1 and loop.run()["there"].tolist() == alone((1, 2, 3), 4)


def test_names_and_generators_are_each_texts_own():
    loop, generator = small(), new_generator(0)
    loop.add([1], 2, name="a", do_sample=True, generator=generator)
    with pytest.raises(ValueError, match="a generator of its own for 'b', got another text's"):
        loop.add([1], 2, name="b", do_sample=True, generator=generator)
    with pytest.raises(ValueError, match="already"):
        loop.fork("a", "a", new_generator(1))
    with pytest.raises(ValueError, match="of its own"):
        loop.fork("a", "b")
    loop.add([1], 0, name="nothing to write")
    assert [text.name for text in loop.live] == ["a"] and loop.finished["nothing to write"].tolist() == [1]
    while loop.live:
        loop.step()
    with pytest.raises(ValueError, match="already"):
        loop.add([1], 2, name="a")
    with pytest.raises(KeyError, match="no text named 'a' is being written any more"):
        loop.cancel("a")
    assert loop.step() == [] and set(loop.run()) == {"a", "nothing to write"} and loop.run() == {}


def test_a_text_cancelled_in_the_middle_leaves_the_others_unharmed():
    loop = small()
    for name in "abc":
        loop.add([1, 2, 3, 4, 5, 6, 7], 6, name=name)
    loop.step(), loop.step()
    got = loop.cancel("b").tolist()
    assert got == alone((1, 2, 3, 4, 5, 6, 7), 6)[: len(got)] and len(got) >= 7
    check_pool(loop)
    assert set(loop.run()) == {"a", "c"} and loop.pool.free_pages == len(loop.pool)


def test_pages_held_by_others_are_an_error_that_ends_with_them():
    loop = small(pages=4)
    with loop.pool.new_text().extend(0):
        pass
    foreign = loop.pool.new_text()
    foreign.append(9)  # three of four pages
    loop.add([1, 2, 3, 4, 5], 3)
    for _ in range(2):
        with pytest.raises(PoolFull, match="too few for 0 alone"):
            loop.step()
    foreign.free()
    assert loop.run()[0].tolist() == alone((1, 2, 3, 4, 5), 3)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(budget=PAGE - 1), ValueError, "a budget of at least one page, 4 tokens, got 3"),
        (dict(budget=0), ValueError, "budget"),
        (dict(budget=8.0), TypeError, "budget"),
        (dict(max_texts=0), ValueError, "max_texts"),
        (dict(prefix=PrefixCache(PagePool.like(MODEL, 2, PAGE))), ValueError, "a PrefixCache of this pool"),
        (dict(prefix="yes"), ValueError, "True, False or a PrefixCache"),
    ],
)
def test_a_scheduler_of_wrong_sizes_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Scheduler(MODEL, PagePool.like(MODEL, 4, PAGE), **arguments)


def test_model_and_pool_must_fit():
    for model, pool, error, words in (
        (PLAIN, PagePool.like(MODEL, 4), TypeError, "a GPT_fast or a Llama, got GPT"),
        (MODEL, MODEL.new_buffer(), TypeError, "a PagePool.*got KVBuffer"),
        (MODEL, PagePool(MODEL.config, 4), ValueError, "float64"),
        (make_pair(n_layer=1, cached_class=GPT_fast)[0], PagePool.like(MODEL, 4), ValueError, "1 layers"),
    ):
        with pytest.raises(error, match=words):
            Scheduler(model, pool)
    with pytest.raises(ValueError, match="page_size"):
        PagePool.like(MODEL, 4, 0)


def test_a_llama_is_served_too():
    torch.manual_seed(1)
    model = Llama(LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, vocab_size=11, block_size=BLOCK)).eval().double()
    loop = Scheduler(model, PagePool.like(model, 9, PAGE), budget=6)
    for i in range(5):
        loop.add(BEGINNINGS[0][: 2 * i + 1], 9, name=i)
    for i, text in loop.run().items():
        assert torch.equal(text, model.generate(torch.tensor([BEGINNINGS[0][: 2 * i + 1]]), 9)[0])
