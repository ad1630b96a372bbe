"""The exercise of notebook 22: every known mistake is named, and right solutions of other styles pass."""

import pytest

from kvcache_lib.checks.capacity import check_users_at_once
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.mistakes.capacity import USERS, USERS_MISTAKES
from kvcache_lib.mistakes.solution import written
from kvcache_lib.planner import users_at_once

HEAD = "def users_at_once(memory, weights, n_layer, n_kv_head, head_size, context, itemsize=2, window=None, processes=1):\n"


@pytest.mark.parametrize("mistake", USERS_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_solution_is_named(mistake):
    with pytest.raises(CheckFailed) as e:
        check_users_at_once(written(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value
    assert e.value.failed and e.value.example


FLOOR = HEAD + """
    left = memory - weights / processes
    if left < 0:
        return 0
    heads = 1 if n_kv_head < processes else n_kv_head // processes
    if window is not None and context > window:
        context = window
    return math.floor(left / (context * itemsize * head_size * heads * n_layer * 2))
"""
COUNTED = HEAD + """
    text = sum(2 * head_size * itemsize * min(context, window or context) for _ in range(n_layer * max(1, n_kv_head // processes)))
    n, left = 0, memory - weights / processes
    while left >= text:
        n, left = n + 1, left - text
    return n
"""
TOKENS = HEAD + """
    token = 2 * n_layer * -(-n_kv_head // processes) * head_size * itemsize
    tokens = (memory - weights / processes) // token
    return int(max(tokens, 0) // (context if not window else min(window, context)))
"""
ALL = HEAD + """
    "All processes together; heads that are held twice count twice."
    text = 2 * n_layer * max(n_kv_head, processes) * head_size * min([context] + [window] * (window is not None)) * itemsize
    return max(int((processes * memory - weights) // text), 0)
"""


@pytest.mark.parametrize("source", [USERS, FLOOR, COUNTED, TOKENS, ALL], ids="right floor counted tokens all".split())
def test_right_solutions_pass(source):
    for seed in range(3):
        assert len(check_users_at_once(written(source), seed).rows) == 13


def test_the_library_passes_its_own_check():
    assert check_users_at_once(users_at_once).rows
