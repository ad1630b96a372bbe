"""A cache dealt over processes: the join, and texts that four processes hold together. One group serves all cases."""

import random
import time
from functools import reduce

import longtext_cases as cases
import pytest
import torch

from kvcache_lib.config import GPTConfig, resolved
from kvcache_lib.llama import LlamaConfig
from kvcache_lib.longtext import Part, bytes_sent, join, led, partial_attention, positions_of, rows_of
from kvcache_lib.processes import Processes, ProcessFailed


def test_any_cut_in_any_order_is_attention():
    r = random.Random(0)
    torch.manual_seed(0)
    for _ in range(50):
        nkv, members, T, S = r.randint(1, 3), r.randint(1, 3), r.randint(1, 5), r.randint(1, 12)
        size = r.choice((0.1, 1.0, 100.0))
        q, k, v = (size * torch.randn(1, n, t, 4, dtype=torch.float64) for n, t in ((nkv * members, T), (nkv, S), (nkv, S)))
        mask = torch.rand(T, S) < 0.7
        owners = torch.randint(4, (S,))
        parts = [partial_attention(q, k[:, :, owners == o], v[:, :, owners == o], mask[:, owners == o]) for o in range(4)]
        r.shuffle(parts)
        y, lse = join(join(parts[0], parts[1]), join(parts[2], parts[3])) if r.random() < 0.5 else reduce(join, parts)
        scores = (q @ k.repeat_interleave(members, 1).mT / 2).masked_fill(~mask, -torch.inf)
        want = scores.softmax(3).nan_to_num(0.0) @ v.repeat_interleave(members, 1)  # a row that sees nothing is 0
        torch.testing.assert_close(y, want, rtol=0, atol=1e-12 * max(1.0, want.abs().max().item()))
        torch.testing.assert_close(lse, scores.logsumexp(3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_and_extreme_parts_in_every_dtype(dtype):
    y = torch.ones(1, 1, 3, 2, dtype=dtype)
    inf, large = torch.inf, torch.finfo(dtype).max / 2
    a = Part(y * torch.tensor([1.0, 1.0, 0.0]).to(dtype)[:, None], torch.tensor([[[large, 5.0, -inf]]], dtype=dtype))
    b = Part(y * torch.tensor([3.0, 0.0, 0.0]).to(dtype)[:, None], torch.tensor([[[-large, -inf, -inf]]], dtype=dtype))
    for got in (join(a, b), join(b, a)):
        assert got.y.dtype == dtype and got.y[0, 0, :, 0].tolist() == [1.0, 1.0, 0.0]
        assert torch.equal(got.lse, a.lse)


def test_every_token_has_one_place():
    for processes in range(1, 7):
        for tokens in range(20):
            where = [positions_of(tokens, r, processes).tolist() for r in range(processes)]
            assert sorted(sum(where, [])) == list(range(tokens))
            assert [len(own) for own in where] == [rows_of(tokens, r, processes) for r in range(processes)]


def test_the_bytes_of_a_step_do_not_grow_with_the_text():
    config = resolved(LlamaConfig(n_layer=3, n_head=4, n_kv_head=2, head_size=6, n_embd=24, vocab_size=9, block_size=5000))
    assert bytes_sent(config, 6, 1, 3) == bytes_sent(config, 4500, 1, 3) and bytes_sent(config, 7, 1, 1) == 0
    # 2 others; queries 4 · 6, answers 4 · 7, and the new row in one of them: 2 · 2 · 6
    assert bytes_sent(config, 7, 1, 3, 8) == 2 * 16 + 3 * 8 * (2 * (24 + 28) + 24)
    plain = resolved(GPTConfig(n_layer=1, n_head=2, n_embd=4, vocab_size=9, block_size=9))
    assert bytes_sent(plain, 0, 5, 2, 2) == 16 + 2 * 5 * (4 + 6) + 2 * 2 * 2 * 4  # positions 1 and 3 lie in process 1


@pytest.fixture(scope="module")
def group():
    with Processes(4, timeout=20) as processes:
        yield processes


def test_logits_are_those_of_one_process(group):
    rows = group.run(led, cases.compared)[0]
    assert len(rows) == 3 * 3 * 4 and {row["processes"] for row in rows} == {1, 2, 3, 4}
    assert max(row["largest difference"] for row in rows) <= 1e-12
    assert [row["sent"] for row in rows] == [row["predicted"] for row in rows]
    assert all(len(row["cache bytes"]) == row["processes"] for row in rows)


def test_the_rows_are_those_of_one_process(group):
    difference, held = group.run(led, cases.rows_held)[0]
    assert difference <= 1e-12 and held == [7, 7, 7]


def test_texts_are_those_of_one_process(group):
    for got, want in group.run(led, cases.written_past_the_block)[0]:
        assert torch.equal(got, want)


def test_what_cannot_be_done_is_said_and_nothing_is_lost(group):
    before, difference, said = group.run(led, cases.refused)[0]
    assert before == 30 and difference < 1e-5
    words = ["may hold 40 tokens, not 41", "window of 8 tokens", "model.eval()", "processes", "expected a GPT_fast or a Llama, got str", "one text"]
    assert len(said) == len(words) and all(word in text for word, text in zip(words, said)), said


def test_a_process_that_dies_ends_all_with_its_number(group):
    start = time.monotonic()
    with pytest.raises(ProcessFailed, match="rank 2 ended by itself, with exit code 7"):
        group.run(cases.one_dies)
    assert time.monotonic() - start < 15 and not group.pids
