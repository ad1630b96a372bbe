"""The exercise on whose rows are whose: every known mistake is named, and right solutions of other styles pass."""

import pytest

from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.checks.rows import check_own_rows
from kvcache_lib.mistakes.rows import OWN_ROWS, OWN_ROWS_MISTAKES
from kvcache_lib.mistakes.solution import written
from kvcache_lib.parallel import own_rows


@pytest.mark.parametrize("mistake", OWN_ROWS_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_solution_is_named(mistake):
    with pytest.raises(CheckFailed) as e:
        check_own_rows(written(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value
    assert e.value.failed and e.value.example


IN_ROWS = """
def own_rows(rank, processes, n_head, n_kv_head, head_size):
    Q, KV = n_head * head_size, n_kv_head * head_size
    if n_head % processes:
        raise ValueError("heads")
    if max(n_kv_head, processes) % min(n_kv_head, processes):
        raise ValueError("heads of keys")
    q = Q // processes
    kv = max(head_size, KV // processes)
    k = rank * n_kv_head // processes * head_size
    return [range(rank * q, (rank + 1) * q), range(Q + k, Q + k + kv), range(Q + KV + k, Q + KV + k + kv)]
"""
BY_GROUP = """
def own_rows(rank, processes, n_head, n_kv_head, head_size):
    own, rest = divmod(n_head, processes)
    if rest or (n_kv_head % processes and processes % n_kv_head):
        raise ValueError(f"{processes} processes")
    heads = range(rank * own, (rank + 1) * own)
    group = n_head // n_kv_head
    first, last = heads[0] // group, heads[-1] // group
    return [range(a * head_size, (b + 1) * head_size) for a, b in
            ((heads[0], heads[-1]), (n_head + first, n_head + last), (n_head + n_kv_head + first, n_head + n_kv_head + last))]
"""
LOOPS = """
def own_rows(rank, processes, n_head, n_kv_head, head_size):
    if n_head % processes != 0 or not (n_kv_head % processes == 0 or processes % n_kv_head == 0):
        raise ValueError("not divided")
    queries, keys, values = [], [], []
    for head in range(n_head):
        if head // (n_head // processes) != rank:
            continue
        kv = head // (n_head // n_kv_head)
        for row in range(head_size):
            queries.append(head * head_size + row)
            if (n_head + kv) * head_size + row not in keys:
                keys.append((n_head + kv) * head_size + row)
                values.append((n_head + n_kv_head + kv) * head_size + row)
    return queries, keys, values
"""
NUMBERED = """
def own_rows(rank, processes, n_head, n_kv_head, head_size):
    if n_head % processes or (processes % n_kv_head and n_kv_head % processes):
        raise ValueError("not divided")
    rows = torch.arange((n_head + 2 * n_kv_head) * head_size).view(-1, head_size)
    q, k, v = rows.split([n_head, n_kv_head, n_kv_head])
    times = max(1, processes // n_kv_head)
    k, v = (z.repeat_interleave(times, dim=0) for z in (k, v))
    return [z.chunk(processes)[rank].flatten() for z in (q, k, v)]
"""


@pytest.mark.parametrize("source", [OWN_ROWS, IN_ROWS, BY_GROUP, LOOPS, NUMBERED], ids="right rows group loops numbered".split())
def test_right_solutions_pass(source):
    for seed in range(3):
        assert check_own_rows(written(source), seed).rows


def test_the_library_passes_its_own_check_and_another_process_can_judge():
    assert check_own_rows(own_rows).rows
    assert check_own_rows.judge(check_own_rows.observe(own_rows, 5), 5).rows
