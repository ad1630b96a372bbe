"""The exercise on rounding: every known mistake is named, and right solutions of other styles pass."""

import pytest
import torch

from kvcache_lib.checks.quantizing import check_quantize, check_runs
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.mistakes import quantizing as mistakes
from kvcache_lib.mistakes.solution import written
from kvcache_lib.quantized import quantize, runs
from kvcache_lib.rounding import SCALES

CHECKS = {"quantize": check_quantize, "runs": check_runs}


def solution(source, name=None):
    function = written(source, name) if name else written(source)
    function.__globals__["SCALES"] = SCALES
    return function


@pytest.mark.parametrize("mistake", mistakes.QUANTIZE_MISTAKES + mistakes.RUN_MISTAKES, ids=lambda m: f"{m.exercise}: {m.name}")
def test_a_wrong_solution_is_named(mistake):
    with pytest.raises(CheckFailed) as e:
        CHECKS[mistake.exercise](solution(mistake.source(), mistake.name))
    assert mistake.phrase in e.value.mistake, e.value
    assert e.value.failed and e.value.example


ROWS_LAST = """
def quantize(x, bits, dim):
    z = x.movedim(dim, -1)
    dtype, n = SCALES[bits], (1 << bits) - 1
    low = z.min(-1).values[..., None].to(dtype)
    scale = ((z.max(-1).values[..., None] - low) / n).to(dtype)
    codes = torch.where(scale == 0, 0.0, torch.nan_to_num((z - low) / scale)).round().clamp(min=0, max=n).byte()
    return tuple(t.movedim(-1, dim) for t in (codes, scale, low))
"""
BY_LINES = """
def quantize(x, bits, dim):
    most = 2**bits - 1
    low, high = (z.to(SCALES[bits]) if n == 0 else z for n, z in enumerate(torch.aminmax(x, dim=dim, keepdim=True)))
    scale = torch.div(high - low, most).to(SCALES[bits])
    offset = torch.sub(x, low)
    inverse = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.clamp(torch.round(offset / inverse), 0, most).to(torch.uint8), scale, low
"""
TOKENS = """
def runs(P, n, group, residual):
    out = []
    for p in range(P, P + n):
        Q = 0
        while Q + group <= p - residual:
            Q += group
        if out and out[-1][2] == Q:
            out[-1] = (out[-1][0], p + 1, Q)
        else:
            out.append((p, p + 1, Q))
    return out
"""
BORDERS = """
def runs(P, n, group, residual):
    borders = [p for p in range(P + 1, P + n) if p > residual and (p - residual) % group == 0]
    cut = [P, *borders, P + n] if n else []
    return [[a, b, max(0, (a - residual) // group) * group] for a, b in zip(cut, cut[1:])]
"""
RECURSIVE = """
def runs(P, n, group, residual):
    if not n:
        return []
    Q = max((P - residual) // group, 0)
    m = min(n, (Q + 1) * group + residual - P)
    return [(P, P + m, Q * group)] + runs(P + m, n - m, group, residual)
"""


@pytest.mark.parametrize("source", [mistakes.QUANTIZE, ROWS_LAST, BY_LINES], ids="right last lines".split())
def test_right_groups_pass(source):
    for seed in range(3):
        assert check_quantize(solution(source), seed).rows


@pytest.mark.parametrize("source", [mistakes.RUNS, TOKENS, BORDERS, RECURSIVE], ids="right tokens borders recursive".split())
def test_right_runs_pass(source):
    for seed in range(3):
        assert check_runs(solution(source), seed).rows


def test_the_library_passes_its_own_checks():
    assert check_quantize(quantize).rows and check_runs(runs).rows
    assert quantize(torch.ones(1, 2), 8, 1)[0].tolist() == [[0, 0]]
