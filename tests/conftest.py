import gc
import os

import pytest
import torch

from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.mingpt import GPT, GPTConfig


LONG = "KVCACHE_LONG" in os.environ  # `make test-long`: what costs more than it finds from day to day
long = pytest.mark.skipif(not LONG, reason="KVCACHE_LONG=1 runs it")

CACHED = (GPT_kv, GPT_fast)  # what one promises, the other keeps


# The files that take longest, the longest first: so the workers end together. Else a browser is waited for alone.
LONGEST = (
    "test_checks", "test_browser", "test_grading_hostile", "test_edition", "test_grading", "test_site", "test_parallel",
    "test_speculative", "test_ladder", "test_longtext", "test_engines", "test_benchmark", "test_packaging", "test_types", "test_planner",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    gc.collect()
    gc.freeze()  # torch and the tests stay: to look through them again and again would take a tenth of the time


def make_pair(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16, seed=0, cached_class=GPT_kv):
    """A GPT with a cache and a GPT without, with the same weights, float64, eval.

    The weights are large, and no bias or norm is trivial: otherwise a wrong mask or position hides in the rounding.
    """
    config = GPTConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, block_size=block_size
    )
    generator = torch.Generator().manual_seed(seed)
    cached, plain = cached_class(config).eval().double(), GPT(config).eval().double()
    with torch.no_grad():
        for p in cached.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    plain.load_state_dict(cached.state_dict())
    return cached, plain


@pytest.fixture(scope="session", params=CACHED, ids=lambda c: c.__name__)
def pair(request):
    return make_pair(cached_class=request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
