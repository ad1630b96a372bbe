"""The exercises beyond the course: each known mistake is named, and what is right in another way passes."""

import math

import grouped_solutions
import pytest
import ring_solutions
import torch
import torch.nn.functional as F

from kvcache_lib.checks.grouped import check_grouped
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.checks.ring import check_ring
from kvcache_lib.rotary import rotate, rotation, visible

ROOM = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "rotate": rotate, "rotation": rotation, "visible": visible}


def made(source, name):
    "What a source defines under a name."
    room = dict(ROOM)
    exec(compile(source, "<a learner's cell>", "exec"), room)
    return room[name]


@pytest.mark.parametrize("name", ring_solutions.WRONG)
def test_a_mistake_with_the_ring_is_named(name):
    words, source = ring_solutions.WRONG[name]
    with pytest.raises(CheckFailed) as failed:
        check_ring(made(source, "ring_attention"))
    assert words in failed.value.mistake


@pytest.mark.parametrize("name", ring_solutions.RIGHTS)
@pytest.mark.parametrize("seed", [0, 271828])
def test_right_rings_pass(name, seed):
    function = made(ring_solutions.RIGHTS[name], "ring_attention")
    assert len(check_ring(function, seed).rows) == len(check_ring.judge(check_ring.observe(function, seed), seed).rows) == 12


@pytest.mark.parametrize("name", grouped_solutions.WRONG)
def test_a_mistake_with_groups_is_named(name):
    words, source = grouped_solutions.WRONG[name]
    with pytest.raises(CheckFailed) as failed:
        check_grouped(made(source, "GroupedAttention_kv"))
    assert words in failed.value.mistake


@pytest.mark.parametrize("name", grouped_solutions.RIGHTS)
@pytest.mark.parametrize("seed", [0, 271828])
def test_right_groups_pass(name, seed):
    cls = made(grouped_solutions.RIGHTS[name], "GroupedAttention_kv")
    assert len(check_grouped(cls, seed).rows) == len(check_grouped.judge(check_grouped.observe(cls, seed), seed).rows) == 11
