"""The check of notebook 17's exercise names each of these mistakes, and lets other right solutions pass."""

import inspect
import random

import pytest

from kvcache_lib import scheduler
from kvcache_lib.checks.planning import _drawn, _expected, check_plan
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.scheduler import Turn, pages_for, plan

SOURCE = inspect.getsource(plan)
START = "        if not started and pages_for(pending, room, page_size) > free:\n            return planned\n"
WRONG = [  # a name, words of the diagnosis, and what is put in place of what
    ("prompts first", "prompts are served before", "in decoding + prompts", "in prompts + decoding"),
    ("in the order of arrival", "in the order of their arrival", "in decoding + prompts", "in range(len(texts))"),
    ("youngest first", "the youngest text comes first", "in decoding + prompts", "in (decoding + prompts)[::-1]"),
    ("one token is decoding", "not started is no text that decodes", "text.started and text.pending == 1", "text.pending == 1"),
    ("pending is forgotten", "more tokens than it has pending", "min(pending, budget, ", "min(budget, "),
    ("the budget is for each", "each text gets the whole budget", "        budget -= planned[i]\n", ""),
    ("decoding costs nothing", "not taken off the budget", "budget -= planned[i]", "budget -= planned[i] * (i in prompts)"),
    ("no chunks", "cut it, and go on with it", "planned[i] = max(0,", "planned[i] = (pending <= budget) * max(0,"),
    ("no pages", "the pages are not counted", f"{START}        planned[i] = max(0, min(pending, budget, room + free * page_size))", "        planned[i] = min(pending, budget)"),
    ("pages are for each", "each text sees all free pages", "        free -= pages_for(planned[i], room, page_size)\n", ""),
    ("room is forgotten", "is left out: these tokens need no new page", "started, pending, room = texts[i]", "started, pending, room = *texts[i][:2], 0"),
    ("copies are forgotten", "a room below 0 is taken for none", "started, pending, room = texts[i]", "started, pending, room = *texts[i][:2], max(0, texts[i].room)"),
    ("starts anyway", "although there are not enough pages", START, ""),
    ("started ones wait", "that is started already waits", "if not started and pages_for", "if pending > 1 and pages_for"),
    ("overtaking", "a text overtakes one that must wait", "        if planned[i] < pending:\n", "        if planned[i] < pending and i in decoding:\n"),
    ("overtaking one that is not started", "a text overtakes one that must wait", f"{START}", START.replace("return planned", "continue")),
    ("decoding goes on", "the plan must end there", "        if planned[i] < pending:\n", "        if planned[i] < pending and i in prompts:\n"),
    ("negative", "below 0", "max(0, min(pending, budget, room + free * page_size))", "min(pending, budget, room + free * page_size)"),
    ("too short", "a number for each text", "    return planned\n", "    return [n for n in planned if n]\n"),
    ("a tuple", "list of whole numbers", "    return planned\n", "    return tuple(planned)\n"),
    ("an error", "your code stopped with IndexError", "texts[i]", "texts[i + 1]"),
    ("not written", "not written yet", "    planned = [0]", "    raise NotImplementedError\n    planned = [0]"),
]  # fmt: skip


@pytest.mark.parametrize("name,words,old,new", WRONG, ids=[wrong[0] for wrong in WRONG])
def test_mistakes_are_named(name, words, old, new):
    assert old in SOURCE
    there = dict(vars(scheduler))
    exec(compile(SOURCE.replace(old, new), "<yours>", "exec"), there)
    with pytest.raises(CheckFailed) as failed:
        check_plan(there["plan"])
    assert words in str(failed.value)


def by_filter(texts, budget, free, page_size=16):
    "The two kinds in turn, each with its loop."
    got = {}
    for i, text in enumerate(texts):
        if text.started and text.pending == 1:
            new = 0 if text.room > 0 else 1
            if not budget or new > free:
                return [got.get(i, 0) for i in range(len(texts))]
            got[i], budget, free = 1, budget - 1, free - new
    for i, text in enumerate(texts):
        if i not in got:
            if not text.started and -(-text.pending // page_size) > free:
                break
            n = min(text.pending, budget, max(0, text.room + free * page_size))
            got[i], budget = n, budget - n
            free -= pages_for(n, text.room, page_size)
            if n != text.pending:
                break
    return [got.get(i, 0) for i in range(len(texts))]


def token_by_token(texts, budget, free, page_size=16):
    "No division: one token after the other takes a page when there is no room."
    counts = [0] * len(texts)
    for i in sorted(range(len(texts)), key=lambda i: not (texts[i].started and texts[i].pending == 1)):
        started, pending, room = texts[i]
        while counts[i] < pending and budget:
            pages, left = 0, room - counts[i]
            while left < 1:
                left, pages = left + page_size, pages + 1
            if pages > free or (not started and counts[i] == 0 and -(-pending // page_size) > free):
                return counts
            free, room, budget, counts[i] = free - pages, room + pages * page_size, budget - 1, counts[i] + 1
        if counts[i] < pending:
            return counts
    return counts


def recursive(texts, budget, free, page_size=16):
    "Serve the first, then the rest with what is left."
    line = [i for decodes in (True, False) for i, t in enumerate(texts) if (t.started and t.pending == 1) == decodes]

    def serve(line, budget, free):
        if not line:
            return {}
        text = texts[line[0]]
        if not text.started and pages_for(text.pending, 0, page_size) > free:
            return {}
        n = max(0, min(text.pending, budget, text.room + page_size * free))
        rest = serve(line[1:], budget - n, free - pages_for(n, text.room, page_size)) if n == text.pending else {}
        return {line[0]: n} | rest

    served = serve(line, budget, free)
    return [served.get(i, 0) for i in range(len(texts))]


@pytest.mark.parametrize("right", [plan, by_filter, token_by_token, recursive], ids=lambda f: f.__name__)
def test_right_solutions_pass(right):
    assert len(check_plan(right).rows) == 12


def test_the_check_and_the_scheduler_plan_alike():
    for problem in _drawn(seed=random.randrange(10**6), n=500):
        assert plan(*problem) == _expected(problem)


def test_a_plan_keeps_to_budget_and_pages():
    for texts, budget, free, size in _drawn(seed=1, n=500):
        counts = plan(texts, budget, free, size)
        assert sum(counts) <= budget and all(0 <= n <= text.pending for n, text in zip(counts, texts))
        assert sum(pages_for(n, text.room, size) for n, text in zip(counts, texts) if n) <= free
    assert plan([], 4, 4) == [] and plan([Turn(True, 1, 0)], 4, 1) == [1]
