"""Named tensors: operations against einsum, errors that name the axis, and the cost formulas against PyTorch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvcache_lib import named
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPT, GPTConfig
from kvcache_lib.named import NamedTensor


def randn(**shape):
    return NamedTensor(torch.randn(*shape.values(), dtype=torch.float64), *shape)


def test_dot_is_einsum_whatever_the_order_of_axes():
    A, B = randn(x=2, y=3, z=4), randn(z=4, w=5, y=3)
    want = torch.einsum("xyz,zwy->xw", A.data, B.data)
    torch.testing.assert_close(named.dot(A, B, "y", "z").tensor("x", "w"), want)
    torch.testing.assert_close(named.dot(B, A, "z", "y").tensor("x", "w"), want)
    kept = named.dot(A, B, "z").tensor("w", "x", "y")
    torch.testing.assert_close(kept, torch.einsum("xyz,zwy->wxy", A.data, B.data))


def test_softmax_sums_to_one_along_its_axis():
    X = randn(a=2, b=3)
    torch.testing.assert_close(named.softmax(X, "a").data.sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(named.softmax(X, "b").data.sum(1), torch.ones(2, dtype=torch.float64))


def test_cat_takes_any_order_of_axes():
    A, B = randn(a=2, b=3), randn(b=4, a=2)
    torch.testing.assert_close(named.cat(A, B, "b").tensor("a", "b"), torch.cat([A.data, B.data.T], dim=1))


@pytest.mark.parametrize(
    "make,says",
    [
        (
            lambda: named.dot(randn(seq=2, key=3), randn(seq=2, val=3), "key"),
            r"no axis 'key' in NamedTensor\(seq=2, val=3\)",
        ),
        (
            lambda: named.dot(randn(key=3), randn(key=4), "key"),
            r"axis 'key' has size 3 in .*key=3.* but 4 in .*key=4",
        ),
        (lambda: named.add(randn(a=2), randn(a=3)), "axis 'a' has size 2 in .* but 3 in"),
        (lambda: named.softmax(randn(key=3), "seq"), r"no axis 'seq' in NamedTensor\(key=3\)"),
        (lambda: named.rename(randn(key=3), "seq", "seq′"), r"no axis 'seq' in NamedTensor\(key=3\)"),
        (lambda: named.rename(randn(key=3, seq=2), "seq", "key"), r"different axis names"),
        (
            lambda: randn(a=2, b=3).tensor("a"),
            r"asked for the axes \('a',\), but the tensor is NamedTensor\(a=2, b=3\)",
        ),
        (
            lambda: NamedTensor(torch.zeros(2, 3), "a"),
            r"2 different axis names for shape \(2, 3\), got \('a',\)",
        ),
        (lambda: named.causal_mask(3, 4), "1 ≤ seq′ ≤ seq, got seq′=4 and seq=3"),
    ],
)
def test_errors_name_the_axis_and_the_shapes(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("P", [0, 3])
def test_mask(P):
    mask = named.causal_mask(P + 4, 4).tensor("seq′", "seq")
    for j in range(1, 5):
        assert [i for i in range(1, P + 5) if mask[j - 1, i - 1] == 0] == list(range(1, P + j + 1))


@pytest.mark.parametrize("T", [5, 64])
def test_costs_are_what_pytorch_counts_in_the_model(T):
    config = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=10, block_size=64)
    plain, cached = GPT(config).eval(), GPT_kv(config).eval()
    idx = torch.zeros(1, T, dtype=torch.long)
    with torch.no_grad():
        _, _, cache = cached(idx[:, :-1], kv_cache=[None] * 2)
        for new, run in ((T, lambda: plain(idx)), (1, lambda: cached(idx, kv_cache=cache))):
            with FlopCounterMode(display=False) as counter:
                run()
            cost = named.layer_cost(T, new, emb=32, heads=4)
            head = 32 * 10 * new
            assert counter.get_total_flops() == 2 * (2 * (cost.linear_macs + cost.attention_macs) + head)
