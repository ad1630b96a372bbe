"""The exercises beyond the course: each known mistake is named, and what is right in another way passes."""

import math

import grouped_solutions
import pytest
import ring_solutions
import stored_solutions
import streaming_solutions
import torch
import torch.nn.functional as F

from kvcache_lib.checks.grouped import check_grouped
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.checks.ring import check_ring
from kvcache_lib.checks.stored import check_layer_weights
from kvcache_lib.checks.streaming import check_whole_characters
from kvcache_lib.rotary import rotate, rotation, visible

ROOM = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "rotate": rotate, "rotation": rotation, "visible": visible}


def made(source, name):
    "What a source defines under a name."
    room = dict(ROOM)
    exec(compile(source, "<a learner's cell>", "exec"), room)
    return room[name]


EXERCISES = {  # module: its check, what is written, how many cases
    ring_solutions: (check_ring, "ring_attention", 12),
    grouped_solutions: (check_grouped, "GroupedAttention_kv", 11),
    stored_solutions: (check_layer_weights, "layer_weights", 5),
    streaming_solutions: (check_whole_characters, "whole_characters", 8),
}


def each(kind):
    return [pytest.param(module, name, id=f"{module.__name__}: {name}") for module in EXERCISES for name in getattr(module, kind)]


@pytest.mark.parametrize("module, name", each("WRONG"))
def test_a_mistake_is_named(module, name):
    check, what, _ = EXERCISES[module]
    words, source = module.WRONG[name]
    with pytest.raises(CheckFailed) as failed:
        check(made(source, what))
    assert words in failed.value.mistake


@pytest.mark.parametrize("module, name", each("RIGHTS"))
def test_what_is_right_passes(module, name):
    "In one process, and in two, with other numbers."
    check, what, cases = EXERCISES[module]
    subject = made(module.RIGHTS[name], what)
    assert len(check(subject).rows) == len(check.judge(check.observe(subject, 271828), 271828).rows) == cases


@pytest.mark.parametrize("module", EXERCISES)
def test_a_blank_is_no_mistake_and_what_cannot_be_it_is_refused(module):
    check, what, _ = EXERCISES[module]
    head = module.RIGHTS["as in the course"].partition("    P = ")[0].partition("        T, hs")[0].rstrip()
    with pytest.raises(TypeError, match="itself, got 'ring'"):
        check("ring")
    with pytest.raises(TypeError, match="itself, got"):
        check(len if check.kind == "class" else int)
    if check.kind == "function":
        def blank(*given):
            raise NotImplementedError(f"Exercise 99_x: write {what}")

        with pytest.raises(CheckFailed, match=f"Exercise 99_x is not written yet: write {what}"):
            check(blank)
    else:
        with pytest.raises(CheckFailed, match=f"Exercise 5 is not written yet: write {what}.forward"):
            check(made(f"{head}\n        raise NotImplementedError('Exercise 5: write {what}.forward')", what))
