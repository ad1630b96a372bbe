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

from kvcache_lib import ragged, request, scheduler
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.paged import PagedLayer, PagePool, Pages, PoolFull
from kvcache_lib.prefix import PrefixCache
from kvcache_lib.scheduler import Scheduler, Turn, pages_for, plan

BLOCK, PAGE = 32, 4
MODEL, PLAIN = make_pair(block_size=BLOCK, cached_class=GPT_fast)
EXAMPLES = int(os.environ.get("KVCACHE_EXAMPLES", 40))
BEGINNINGS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 9, 9, 9, 9, 2], [7]]  # many prompts begin alike


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

    requests = 0

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
        written = self.loop.step()
        assert len(dict(written)) == len(written)
        now = {text.name: list(text.tokens) for text in self.loop.live} | {k: v.tolist() for k, v in self.loop.finished.items()}
        for name, text in before.items():
            assert now[name] == text + [token for other, token in written if other == name]
        step = [event for event in self.loop.log if event.step == self.loop.steps]
        assert sum(event.tokens for event in step if event.kind in ("prefill", "decode")) <= self.loop.budget

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
            self.loop.step()
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
