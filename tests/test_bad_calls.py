"""Random bad calls of the public face. Each must end in one clear sentence, or be right; no buffer may be damaged.

Seeded, so that it says the same on every run. CALLS=6000 in the environment makes it long.
"""

import linecache
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pair

import kvcache_lib
from kvcache_lib import GPT, GPT_fast, GPT_kv, GPTConfig, KVBuffer
from kvcache_lib.config import resolved
from kvcache_lib.trainer import Trainer, TrainerConfig

CALLS = int(os.environ.get("CALLS", 600))
OURS = str(Path(kvcache_lib.__file__).parent)
CLEAR = (TypeError, ValueError, MemoryError, AttributeError, NotImplementedError, RuntimeError)
CLOSE = dict(rtol=1e-9, atol=1e-9)
N_LAYER, V, BLOCK = 2, 11, 16


def inference(make):
    with torch.inference_mode():
        return make()


def tokens(B=2, t=7, **like):
    return torch.randint(V, (B, t), **like)


ODD = [
    None, True, False, 0, -1, 10**20, 2.5, float("nan"), float("inf"), 1e-45, "3", "", b"3", [], [1], (), {}, {"a": 1}, object(), print,
    np.float32(2), np.int64(2), np.bool_(True), np.array([1, 2]), torch.tensor(3), torch.tensor(2.0), torch.tensor([1, 2]), torch.Generator(),
    torch.float16, np.float32, "cuda:99", "abacus", range(3), 3 + 2j, torch.device("meta"),
]  # fmt: skip

IDX = [
    lambda: tokens(), lambda: tokens(t=16), lambda: tokens(t=17), lambda: tokens(t=40), lambda: tokens().int(), lambda: tokens().short(),
    lambda: tokens().float(), lambda: tokens() == 1, lambda: tokens() + 9, lambda: tokens() - 9, lambda: tokens()[0], lambda: tokens()[:, :0],
    lambda: tokens()[:0], lambda: tokens()[None], lambda: tokens().to("meta"), lambda: tokens().to_sparse(), lambda: tokens().numpy(),
    lambda: tokens().tolist(), lambda: torch.nested.nested_tensor([torch.arange(3), torch.arange(5)]),
    lambda: torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged), lambda: inference(tokens),
    lambda: torch.nn.Parameter(torch.rand(2, 7)), lambda: tokens().to(torch.complex64), lambda: tokens()[:, ::2], lambda: tokens(t=7).T,
]  # fmt: skip


def lists(B=2, P=3, C=8, n=N_LAYER, dtype=torch.float64, device="cpu"):
    return [[torch.randn(B, P, C, dtype=dtype).to(device) for _ in "kv"] for _ in range(n)]


CACHES = [
    lambda: None, lambda: [None] * N_LAYER, lambda: (None,) * N_LAYER, lambda: [None], lambda: lists(), lambda: lists(B=1), lambda: lists(B=3),
    lambda: lists(P=7), lambda: lists(P=16), lambda: lists(C=6), lambda: lists(n=3), lambda: lists(dtype=torch.float32), lambda: lists(dtype=torch.bfloat16),
    lambda: lists(device="meta"), lambda: lists()[0], lambda: torch.stack([torch.stack(x) for x in lists()]), lambda: [lists()[0], None],
    lambda: [[x[0]] for x in lists()], lambda: [[x[0], None] for x in lists()], lambda: [x + x for x in lists()], lambda: [{"k": x[0], "v": x[1]} for x in lists()],
    lambda: [[x[0], x[1][:, :2]] for x in lists()], lambda: [[t.to_sparse() for t in x] for x in lists()], lambda: inference(lists),
    lambda: [[t.numpy() for t in x] for x in lists()], lambda: [[t.long() for t in x] for x in lists()], lambda: buffer(), lambda: buffer(batch=3),
    lambda: buffer(dtype=torch.float32), lambda: buffer(n=7), lambda: buffer(n=16), lambda: buffer(n=0), lambda: buffer(n=3, limit=5),
]  # fmt: skip


def buffer(n=3, batch=2, limit=BLOCK, dtype=torch.float64):
    made = KVBuffer(CONFIG, batch, limit=limit, dtype=dtype)
    if n:
        made.append(torch.randn(N_LAYER, 2, batch, 2, n, 4, dtype=dtype))
    return made


CONFIG = GPTConfig(n_layer=N_LAYER, n_head=2, n_embd=8, vocab_size=V, block_size=BLOCK)


def is_clear(error: BaseException) -> bool:
    "An exception of our own raising, in one sentence. PyTorch's, from deep inside, is not."
    where = error.__traceback__
    while where.tb_next is not None:
        where = where.tb_next
    text, code = str(error), where.tb_frame.f_code
    raised = code.co_filename.startswith(OURS) and linecache.getline(code.co_filename, where.tb_lineno).strip().startswith("raise ")
    signature = isinstance(error, TypeError) and ("argument" in text and ("unexpected" in text or "positional" in text))
    return isinstance(error, CLEAR) and bool(text) and (raised or signature)


class Calls:
    "Each method makes one call with random arguments, and says what went wrong, or None."

    def __init__(self, seed):
        self.r = random.Random(seed)
        torch.manual_seed(seed)
        self.kv, self.plain = make_pair()
        self.fast = GPT_fast(CONFIG).eval().double()
        self.fast.load_state_dict(self.kv.state_dict())

    def odd(self, good, chance=0.3):
        return self.r.choice(ODD) if self.r.random() < chance else good

    def idx(self, chance=0.5):
        return self.r.choice(IDX)() if self.r.random() < chance else self.r.choice((tokens, lambda: tokens(t=12)))()

    def attempt(self, call, right=lambda out: True, kept=()):
        "What `call` did that it must not do, in words."
        before = [(b, b.length, b.data.clone()) for b in kept if isinstance(b, KVBuffer) and not b.data.is_meta]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                out = call()
            except (KeyboardInterrupt, pytest.fail.Exception):
                raise
            except BaseException as error:
                for b, length, data in before:
                    same = torch.equal(b.data[:, :, :, :, :length].nan_to_num(), data[:, :, :, :, :length].nan_to_num())
                    if b.length != length or not same:
                        return f"damaged a buffer: {type(error).__name__}: {error}"
                return None if is_clear(error) else f"unclear: {type(error).__name__}: {str(error)[:150]}"
            return None if right(out) else "a wrong result, silently"

    def config(self):
        names = ["model_type", "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "embd_pdrop", "resid_pdrop", "attn_pdrop"]
        settings = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16)
        settings |= {self.r.choice(names): self.r.choice(ODD) for _ in range(self.r.choice((1, 1, 2)))}
        model = self.r.choice((GPT, GPT_kv, GPT_fast))

        def right(made):
            c = made.config
            return all(type(getattr(c, n)) is int and getattr(c, n) >= 1 for n in names[1:6])

        return self.attempt(lambda: model(GPTConfig(**settings)), right)

    def other_config(self):
        given = self.r.choice(ODD)
        return self.attempt(lambda: self.r.choice((GPT, resolved, KVBuffer))(given), lambda out: False)

    def forward(self):
        model = self.r.choice((self.plain, self.kv, self.fast))
        idx = self.idx()
        kwargs = {}
        if self.r.random() < 0.4:
            kwargs["targets"] = self.odd(self.idx(), 0.2)
        cache = self.r.choice(CACHES)()
        if model is not self.plain and self.r.random() < 0.7:
            kwargs["kv_cache"] = self.odd(cache, 0.1)
            kwargs["compute_first"] = self.r.random() < 0.3
        cache = kwargs.get("kv_cache")
        fresh = cache is None or kwargs.get("compute_first") or all(x is None for x in (cache if isinstance(cache, (list, tuple)) else [1]))

        def right(out):
            if idx.min() < 0 or idx.max() >= V or idx.size(1) > BLOCK:
                return False
            if fresh or (isinstance(cache, KVBuffer) and cache.length == idx.size(1) and kwargs["compute_first"]):
                torch.testing.assert_close(out[0].detach(), self.plain(idx.clone())[0].detach(), **CLOSE)
            return out[0].shape[::2] == (idx.size(0), V) and len(out) == (2 if cache is None else 3)

        # compute_first empties the buffer: what it held may be gone, but only once the arguments have been accepted
        return self.attempt(lambda: model(idx, **kwargs), right, [cache])

    def step(self):
        idx, cache = self.idx(), self.odd(self.r.choice(CACHES[-7:])(), 0.2)
        targets = self.r.choice((None, None, tokens(), tokens().float(), tokens() - 5))
        last = self.r.random() < 0.5
        return self.attempt(lambda: self.fast.step(idx, cache, targets, last_only=last), lambda out: out[0].size(2) == V, [cache])

    def another_text(self):
        "A buffer that belongs to another text must not be taken."
        made, idx = self.fast.new_buffer(2), tokens(t=9)
        self.fast.step(idx[:, :6], made)
        other = idx.clone()
        row, place = self.r.randrange(2), self.r.randrange(6)
        other[row, place] = (other[row, place] + 1) % V
        return self.attempt(lambda: self.fast.step(other, made), lambda out: False, [made])

    def generate(self):
        model = self.r.choice((self.plain, self.kv, self.fast))
        name = self.r.choice(("generate",) if model is self.plain else ("generate", "generate_kv"))
        idx, greedy = self.idx(), self.r.random() < 0.5
        arguments = dict(max_new_tokens=4, temperature=1.0, do_sample=not greedy, top_k=None, eos_token=None, generator=None)
        for key in self.r.sample(list(arguments), self.r.choice((0, 1, 1, 2))):
            arguments[key] = self.r.choice(ODD)
        if isinstance(arguments["max_new_tokens"], int) and arguments["max_new_tokens"] > 100:
            arguments["max_new_tokens"] = 5  # it would be obeyed

        def right(text):
            n = int(arguments["max_new_tokens"])
            if not (idx.min() >= 0 and idx.max() < V and torch.equal(text[:, : idx.size(1)], idx) and text.max() < V):
                return False
            if arguments["eos_token"] is None and not arguments["do_sample"]:  # whatever the temperature
                return torch.equal(text, self.plain.generate(idx, n))
            return text.size(1) == idx.size(1) + n or arguments["eos_token"] is not None

        return self.attempt(lambda: getattr(model, name)(idx, **arguments), right)

    def make_buffer(self):
        arguments = dict(batch_size=2, capacity=4, limit=8, dtype=torch.float64, device=None)
        for key in self.r.sample(list(arguments), self.r.choice((1, 1, 2))):
            arguments[key] = self.r.choice(ODD)
        return self.attempt(lambda: KVBuffer(CONFIG, **arguments), lambda b: 1 <= b.capacity <= b.limit and b.length == 0)

    def use_buffer(self):
        made = buffer(limit=self.r.choice((5, 16)))
        act = self.r.choice(("append", "crop", "reserve", "extend", "select", "expand", "to", "from_lists", "twice"))
        odd = self.r.choice(ODD)
        kv = self.r.choice((torch.randn(N_LAYER, 2, 2, 2, 9, 4), torch.randn(N_LAYER, 2, 2, 2, 9, 4).double(), torch.randn(3), odd,
                            torch.randn(N_LAYER, 2, 2, 2, 1, 4).double().to_sparse(), torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])))  # fmt: skip

        def extend(n, inner=None):
            with made.extend(n) as layers:
                if inner is not None:
                    with made.extend(inner):
                        pass
                return layers

        calls = {
            "append": lambda: made.append(kv), "crop": lambda: made.crop(odd), "reserve": lambda: made.reserve(odd),
            "extend": lambda: extend(odd), "twice": lambda: extend(1, 1), "select": lambda: made.select(odd), "expand": lambda: made.expand(odd),
            "to": lambda: made.to(*((odd, None) if self.r.random() < 0.5 else (None, odd))),
            "from_lists": lambda: KVBuffer.from_lists(self.r.choice([*CACHES[:-7], lambda: odd])(), CONFIG),
        }  # fmt: skip
        before = made.length

        def right(out):
            if act in ("crop", "extend", "append"):
                return 0 <= made.length <= made.limit
            return act != "twice" and made.length == before

        return self.attempt(calls[act], right, [made])

    def train(self):
        settings = dict(max_iters=1, batch_size=2, device="cpu")
        settings[self.r.choice(("max_iters", "batch_size"))] = self.r.choice(ODD)
        if settings["max_iters"] is None:
            return None  # until interrupted
        return self.attempt(lambda: Trainer(TrainerConfig(**settings), torch.nn.Linear(1, 1), [1]))


KINDS = [name for name in vars(Calls) if not name.startswith("_") and name not in ("odd", "idx", "attempt")]
WEIGHTS = [3 if name in ("forward", "generate", "use_buffer") else 1 for name in KINDS]


@pytest.mark.parametrize("seed", range(3))
def test_bad_calls(seed):
    calls, wrong = Calls(seed), {}
    for i in range(CALLS // 3):
        kind = calls.r.choices(KINDS, WEIGHTS)[0]
        problem = getattr(calls, kind)()
        if problem:
            wrong.setdefault(f"{kind}: {problem}", i)
    assert not wrong, "\n".join(f"call {i}: {text}" for text, i in list(wrong.items())[:20])
