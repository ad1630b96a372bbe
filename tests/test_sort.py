"""The sorting data: complete, disjoint, and split in the same way everywhere."""

import os
import subprocess
import sys

import pytest
import torch

from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.sort import SortDataset, accuracy, all_inputs, sort_with


def test_the_splits_are_all_inputs_once():
    train, test = SortDataset("train").inputs, SortDataset("test").inputs
    assert (len(train), len(test)) == (547, 182)
    assert torch.equal(torch.cat([train, test]).unique(dim=0), all_inputs())


def test_items_are_text_and_next_token():
    data = SortDataset("train")
    for x, y in (data[i] for i in range(len(data))):
        assert x.shape == y.shape == (data.get_block_size(),)
        digits = x[:6]
        assert y[:5].tolist() == [-1] * 5
        assert y[5:].tolist() == digits.sort().values.tolist()
        assert x[6:].tolist() == y[5:-1].tolist()


def test_the_split_is_the_same_in_every_process():
    code = "from kvcache_lib.sort import SortDataset; print(SortDataset('test').inputs.tolist())"
    env = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}  # another than here
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(SortDataset("test").inputs.tolist())


def test_the_split_stays_the_same_over_versions():
    assert SortDataset("test").inputs[:2].tolist() == [[1, 0, 0, 1, 2, 2], [2, 2, 1, 1, 2, 2]]


@pytest.mark.parametrize("length,num_digits", [(1, 4), (3, 2), (4, 5)])
def test_other_sizes(length, num_digits):
    data = SortDataset("train", length, num_digits)
    assert data.get_block_size() == 2 * length - 1 and data.get_vocab_size() == num_digits
    assert len(data) + len(SortDataset("test", length, num_digits)) == num_digits**length


def test_errors():
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        SortDataset("valid")
    with pytest.raises(ValueError, match=r"at most a million inputs, got 10 \*\* 10"):
        SortDataset("train", 10, 10)


def test_accuracy_counts_whole_rows():
    inputs = torch.tensor([[2, 1], [0, 1]])
    assert accuracy(lambda idx, n: torch.cat([idx, idx.sort(dim=1).values], dim=1), inputs) == 1
    assert accuracy(lambda idx, n: torch.cat([idx, idx], dim=1), inputs) == 0.5
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=3, block_size=3)).eval()
    assert sort_with(model.generate, inputs).shape == (2, 2)
