"""The exercise on left padding: every known mistake is named, and right solutions of other styles pass."""

import pytest

from kvcache_lib.checks.padding import check_left_padded
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.mistakes.padding import LEFT_PADDED, LEFT_PADDED_MISTAKES
from kvcache_lib.mistakes.solution import written
from kvcache_lib.ragged import left_padded


@pytest.mark.parametrize("mistake", LEFT_PADDED_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_solution_is_named(mistake):
    with pytest.raises(CheckFailed) as e:
        check_left_padded(written(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value
    assert e.value.failed and e.value.example


LOOPS = """
def left_padded(lengths, T):
    W = max(lengths)
    if T < 1 or T > W:
        raise ValueError("T")
    positions = torch.zeros(len(lengths), T, dtype=torch.long)
    mask = torch.zeros(len(lengths), T, W, dtype=torch.bool)
    for b, n in enumerate(lengths):
        for j in range(T):
            column = W - T + j
            mask[b, j, column] = True
            if column >= W - n:
                positions[b, j] = column - (W - n)
                mask[b, j, W - n : column + 1] = True
    return positions, mask
"""
RUNNING_COUNT = """
def left_padded(lengths, T):
    assert_width = max(lengths)
    if T not in range(1, assert_width + 1):
        raise ValueError(f"no {T}")
    real = torch.stack([torch.arange(assert_width) >= assert_width - n for n in lengths])
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    square = torch.ones(assert_width, assert_width, dtype=torch.bool).tril() & real[:, None, :]
    square |= torch.eye(assert_width, dtype=torch.bool)
    return positions[:, -T:], square[:, -T:]
"""
NEW_PADS = """
def left_padded(lengths, T):
    n = torch.as_tensor(lengths)
    W = int(n.max())
    if not 0 < T <= W:
        raise ValueError
    i, j = torch.arange(W)[None, None], torch.arange(W)[None, :, None]
    first = (W - n)[:, None, None]
    mask = ((i <= j) & (i >= first)) | (i == j)
    positions = torch.where(j >= first, j - first, 0).squeeze(2)
    return positions[:, W - T :].int(), mask[:, W - T :]
"""
BY_POSITION = """
def left_padded(lengths, T):
    W, P = max(lengths), max(lengths) - T
    if P < 0 or T <= 0:
        raise ValueError("between 1 and W")
    stands = torch.stack([torch.arange(n - W, n) for n in lengths])
    new = stands[:, P:]
    mask = (0 <= stands[:, None]) & (stands[:, None] <= new[:, :, None])
    mask[:, range(T), range(P, W)] = True
    return [new.relu(), mask]
"""


@pytest.mark.parametrize("source", [LEFT_PADDED, LOOPS, RUNNING_COUNT, NEW_PADS, BY_POSITION], ids="right loops count where position".split())
def test_right_solutions_pass(source):
    for seed in range(3):
        assert check_left_padded(written(source), seed).rows


def test_the_library_passes_its_own_check():
    assert check_left_padded(left_padded).rows
