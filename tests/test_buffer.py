"""What KVBuffer can do with rows, places and texts. Appending, growing and branching are in test_fast."""

import copy

import pytest
import torch
from conftest import make_pair

from kvcache_lib.fast import GPT_fast, KVBuffer

CLOSE = dict(rtol=1e-10, atol=1e-10)
EXACT = dict(rtol=0, atol=0)


@pytest.fixture(scope="module")
def models():
    return make_pair(cached_class=GPT_fast)


def tokens(n, batch=2):
    return torch.randint(11, (batch, n))


def held(model, idx, **sizes):
    buffer = model.new_buffer(len(idx), **sizes)
    model.step(idx, buffer)
    return buffer


def same_as_plain(models, text, buffer):
    "Go on with a buffer by one token; the logits are those of the whole text."
    model, plain = models
    longer = torch.cat([text, tokens(1, len(text))], dim=1)
    logits, _ = model.step(longer, buffer)
    torch.testing.assert_close(logits[:, -1], plain(longer)[0][:, -1].detach(), **CLOSE)


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 1, 0], torch.tensor([2, 2])])
def test_beams_select_their_texts(models, rows):
    idx = tokens(6, batch=3)
    buffer = held(models[0], idx, capacity=7)
    before = buffer.to_lists()
    chosen = buffer.select(rows)
    same_as_plain(models, idx[rows], chosen)
    assert (chosen.batch_size, len(chosen), len(buffer)) == (len(rows), 7, 6)
    torch.testing.assert_close(buffer.to_lists(), before, **EXACT)  # nothing is shared
    same_as_plain(models, idx, buffer)


def test_one_prefill_serves_n_samples(models):
    idx = tokens(5)
    buffer = held(models[0], idx)
    many = buffer.expand(3)
    assert many.batch_size == 6
    same_as_plain(models, idx.repeat_interleave(3, dim=0), many)


def test_a_copy_of_another_dtype(models):
    idx = tokens(5)
    buffer = held(models[0], idx)
    half = buffer.to(dtype=torch.float32)
    assert half.data.dtype == torch.float32 and 2 * half.nbytes == buffer.nbytes and len(half) == 5
    torch.testing.assert_close(half.to(dtype=torch.float64).to_lists(), buffer.to_lists(), rtol=1e-6, atol=1e-6)
    model = copy.deepcopy(models[0]).float()
    logits, _ = model.step(torch.cat([idx, idx[:, :1]], 1), half)
    assert logits.dtype == torch.float32
    same = buffer.to()
    assert same.data.data_ptr() != buffer.data.data_ptr()
    meta = buffer.to("meta")
    assert meta.data.is_meta and len(meta) == 5 and meta.text.size(1) == 0


def test_a_buffer_is_as_long_as_its_text_and_never_false(models):
    buffer = models[0].new_buffer()
    assert len(buffer) == 0 and buffer
    models[0].step(tokens(4, 1), buffer)
    assert len(buffer) == 4


def test_a_text_that_is_not_its_own_is_refused(models):
    model, plain = models
    idx = tokens(8)
    for make in (lambda b: b, KVBuffer.fork, lambda b: b.select([0, 1]), lambda b: b.to()):
        buffer = make(held(model, idx[:, :6], capacity=6))
        for row, place in ((0, 0), (1, 5), (1, 2)):
            other = idx.clone()
            other[row, place] = (other[row, place] + 1) % 11
            says = f"another text: at position {place} of row {row} it holds token {idx[row, place]}, and idx has"
            for call in (lambda: model.step(other, buffer), lambda: model(other.int(), kv_cache=buffer)):
                with pytest.raises(ValueError, match=says):
                    call()
            assert len(buffer) == 6
        model.step(other, buffer.fork(), compute_first=True)  # which takes no notice
        logits, _ = model.step(idx, buffer)  # and grows
        torch.testing.assert_close(logits, plain(idx)[0][:, 6:].detach(), **CLOSE)


def test_what_is_known_of_the_text(models):
    model, _ = models
    idx = tokens(9)
    buffer = held(model, idx[:, :6])
    torch.testing.assert_close(buffer.text, idx[:, :6], **EXACT)
    buffer.crop(4)
    buffer.append(torch.randn(2, 2, 2, 2, 3, 4, dtype=torch.float64))  # of no known text
    torch.testing.assert_close(buffer.text, idx[:, :4], **EXACT)
    other = idx.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    model.step(other[:, :8], buffer)  # so it is taken on trust, and known from now on
    torch.testing.assert_close(buffer.text, other[:, :8], **EXACT)
    with pytest.raises(ValueError, match="position 5 of row 0"):
        model.step(idx, buffer)
    theirs = idx.clone()
    buffer = held(model, theirs[:, :6])
    theirs.zero_()  # the caller's own tensor
    torch.testing.assert_close(buffer.text, idx[:, :6], **EXACT)
    assert KVBuffer.from_lists(buffer.to_lists(), model.config).text.size(1) == 0


def test_extending_twice_at_once_is_refused(models):
    buffer = held(models[0], tokens(4))
    with pytest.raises(RuntimeError, match="being extended"):
        with buffer.extend(1):
            with buffer.extend(1):
                pytest.fail("entered")
    assert len(buffer) == 4
    with pytest.raises(RuntimeError, match="being extended"):
        with buffer.extend(1):
            buffer.crop(0)
    with buffer.extend(1) as layers:
        assert layers[0].size(3) == 5
    assert len(buffer) == 5


def test_bad_tokens_leave_even_a_buffer_that_was_to_be_emptied(models):
    idx = tokens(4)
    buffer = held(models[0], idx)
    before = buffer.to_lists()
    for bad in (idx + 9, idx - 9):
        with pytest.raises(ValueError, match="expected tokens from 0 to 10"):
            models[0].step(bad, buffer, compute_first=True)
        assert len(buffer) == 4
        torch.testing.assert_close(buffer.to_lists(), before, **EXACT)


def test_more_memory_than_there_is(models):
    with pytest.raises(MemoryError, match="a buffer of shape .* takes .* GB"):
        models[0].new_buffer(batch_size=10**12)
    with pytest.raises(MemoryError, match="10+ times 2 texts takes"):
        models[0].new_buffer(2).expand(10**15)
