"""Exercise 7, the join of two parts: every known mistake is named, and right solutions of other styles pass."""

import pytest

from kvcache_lib.checks.joining import check_join
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.longtext import join
from kvcache_lib.mistakes.joining import JOIN, JOIN_MISTAKES
from kvcache_lib.mistakes.solution import written


@pytest.mark.parametrize("mistake", JOIN_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_solution_is_named(mistake):
    with pytest.raises(CheckFailed) as e:
        check_join(written(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value
    assert e.value.failed and e.value.example


BY_DIFFERENCE = """
def join(a, b):
    "One weight is a sigmoid of the difference, the other what is left."
    (y1, l1), (y2, l2) = a, b
    both = (l1 == -math.inf) & (l2 == -math.inf)
    share = torch.sigmoid((l1 - l2).masked_fill(both, 0.0))[..., None]
    return torch.lerp(y2, y1, share), torch.logaddexp(l1, l2)
"""
STACKED = """
def join(a, b):
    "A softmax over the two."
    y, lse = (torch.stack(pair) for pair in zip(a, b))
    weights = torch.nan_to_num(lse.softmax(0), nan=0.0)
    return (weights.unsqueeze(-1) * y).sum(0), lse.logsumexp(0)
"""
LOOPS = """
def join(a, b):
    "Number by number."
    y, lse = torch.zeros_like(a[0]), torch.full_like(a[1], -math.inf)
    for at in torch.cartesian_prod(*map(torch.arange, lse.shape)).tolist():
        at = tuple(at)
        l1, l2 = a[1][at].item(), b[1][at].item()
        if max(l1, l2) == -math.inf:
            continue
        top = max(l1, l2)
        w1, w2 = math.exp(l1 - top), math.exp(l2 - top)
        y[at] = (w1 * a[0][at] + w2 * b[0][at]) / (w1 + w2)
        lse[at] = top + math.log(w1 + w2)
    return [y, lse]
"""
SORTED = """
def join(a, b):
    "The heavier one first, and what the other adds to it."
    (y1, l1), (y2, l2) = a, b
    swap = l1 < l2
    y1, y2 = torch.where(swap[..., None], y2, y1), torch.where(swap[..., None], y1, y2)
    high, low = torch.where(swap, l2, l1), torch.where(swap, l1, l2)
    extra = torch.where(low == -math.inf, 0.0, torch.exp(low - high))
    return (y1 + extra[..., None] * y2) / (1 + extra[..., None]), high + torch.log1p(extra)
"""


@pytest.mark.parametrize("source", [JOIN, BY_DIFFERENCE, STACKED, LOOPS, SORTED], ids="right difference stacked loops sorted".split())
def test_right_solutions_pass(source):
    for seed in range(3):
        assert len(check_join(written(source), seed).rows) == 10


def test_the_library_passes_its_own_check():
    assert check_join(join).rows
