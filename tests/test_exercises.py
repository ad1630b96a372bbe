"""The exercises beyond the course: each known mistake is named, and what is right in another way passes."""

import math

import pytest
import ring_solutions
import torch
import torch.nn.functional as F

from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.checks.ring import check_ring
from kvcache_lib.rotary import rotate, rotation, visible

ROOM = {"torch": torch, "F": F, "math": math, "rotate": rotate, "rotation": rotation, "visible": visible}


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
