"""Many texts in one packed step: each is what it is alone, whatever the mix; and lists of prompts."""

import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kvcache_lib.config import GPTConfig
from kvcache_lib.fast import GPT_fast
from kvcache_lib.gpt import GPT_kv
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.mingpt import CausalSelfAttention
from kvcache_lib.ragged import packed_step

CLOSE = dict(rtol=1e-9, atol=1e-9)
EXACT = dict(rtol=0, atol=0)
V, BLOCK = 17, 20
SIZES = dict(n_layer=2, n_head=4, n_embd=16, vocab_size=V, block_size=BLOCK)


def make(cls=GPT_fast, config=GPTConfig, **more):
    torch.manual_seed(0)
    model = cls(config(**SIZES, **more)).double().eval()
    for p in model.parameters():
        p.data *= 6  # so that attention matters
    return model


class OwnDropout(nn.Dropout):
    "Attention falls back on the baseline's `attend`."


def with_own_dropout():
    model = make()
    for block in model.transformer.h:
        block.attn.attn_dropout = OwnDropout(0.0)
    return model


def llama(**more):
    return make(Llama, LlamaConfig, **more)


MODELS = {
    "fast": make(),
    "fast, scores written": with_own_dropout(),
    "llama": llama(),
    "groups, norms, biases": llama(n_kv_head=2, qk_norm=True, qkv_bias=True),
    "window": llama(n_kv_head=1, window=5),
    "sinks": llama(n_kv_head=2, window=4, sinks=2),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def text(n):
    return torch.randint(V, (n,))


def copied(cache):
    return cache.length, cache.data.clone(), cache.text.clone()


# --- the step ---


@each_model
def test_every_text_is_what_it_is_alone(model):
    longest = BLOCK if model.block_size == BLOCK else 2 * BLOCK
    mixes = set()
    for seed in range(8):
        r = random.Random(seed)
        torch.manual_seed(seed)
        texts = [text(r.randint(1, longest)) for _ in range(r.randint(1, 6))]
        want = [model(t[None])[0][0].detach() for t in texts]
        caches = [model.new_buffer(1, 1) for _ in texts]
        while left := [b for b, t in enumerate(texts) if caches[b].length < len(t)]:
            left = r.sample(left, r.randint(1, len(left)))
            starts = [caches[b].length for b in left]
            new = [texts[b][P:][: r.choice((1, 1, 2, 3, longest))] for b, P in zip(left, starts)]
            mixes.add((min(starts) > 0, min(map(len, new)) == 1, max(map(len, new)) > 1))
            before = [cache.fork() for cache in caches]
            logits = packed_step(model, new, [caches[b] for b in left], every=True)
            for b, P, rows in zip(left, starts, logits.split([len(z) for z in new])):
                torch.testing.assert_close(rows, want[b][P : P + len(rows)], **CLOSE)
                assert caches[b].length == P + len(rows)
            last = packed_step(model, new, [before[b] for b in left])
            ends = torch.tensor([len(z) for z in new]).cumsum(0) - 1
            torch.testing.assert_close(last, logits[ends], **CLOSE)
    assert len(mixes) >= 5  # prefills, chunks and decode steps did meet


def test_each_token_is_computed_once_and_no_pad():
    model, seen = make(), []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2]))
    caches = [model.new_buffer() for _ in range(3)]
    packed_step(model, [text(9), text(1), text(4)], caches)
    packed_step(model, [text(1), text(2), text(1)], caches)
    assert seen == [(1, 14), (1, 4)] and [c.length for c in caches] == [10, 3, 5]


@each_model
def test_an_exception_leaves_every_cache_as_it_was(model):
    caches = [model.new_buffer() for _ in range(3)]
    packed_step(model, [text(12), text(3), text(6)], caches)  # the windows' rings are full
    before = [copied(cache) for cache in caches]
    new = [text(1), text(4), text(1)]
    want = packed_step(model, new, [cache.fork() for cache in caches])

    def fails(*args):
        raise RuntimeError("in the last layer")

    handle = model.transformer.h[-1].register_forward_hook(fails)
    try:
        with pytest.raises(RuntimeError, match="in the last layer"):
            packed_step(model, new, caches)
    finally:
        handle.remove()
    for cache, (length, _, known) in zip(caches, before):
        assert cache.length == length and cache.rows is None
        torch.testing.assert_close(cache.text, known, **EXACT)
    torch.testing.assert_close(packed_step(model, new, caches), want, **EXACT)


def test_a_full_cache_stops_the_step_before_anything_is_written():
    model = make()
    caches = [model.new_buffer(), model.new_buffer(1, 4, 4)]
    packed_step(model, [text(3), text(4)], caches)
    before = [copied(cache) for cache in caches]
    with pytest.raises(ValueError, match="the buffer is full"):
        packed_step(model, [text(2), text(1)], caches)
    for cache, was in zip(caches, before):
        assert cache.length == was[0]
        torch.testing.assert_close(cache.data[..., : was[0], :], was[1][..., : was[0], :], **EXACT)


def test_a_buffer_knows_the_text_that_was_packed():
    model = make()
    whole, cache = text(8), model.new_buffer()
    packed_step(model, [whole[:3]], [cache])
    packed_step(model, [whole[3:5]], [cache])
    torch.testing.assert_close(cache.text[0], whole[:5], **EXACT)
    torch.testing.assert_close(model.step(whole[None], cache)[0][0, -1], model(whole[None])[0][0, -1].detach(), **CLOSE)
    other = whole.clone()
    other[4] = (other[4] + 1) % V
    with pytest.raises(ValueError, match="another text"):
        model.step(torch.cat([other, text(1)])[None], cache)


def test_what_was_appended_leaves_a_gap_in_the_text():
    model = make()
    cache = model.new_buffer()
    cache.append(torch.randn(2, 2, 1, 4, 3, 4, dtype=torch.float64))
    packed_step(model, [text(2)], [cache])
    assert cache.length == 5 and cache.text.shape == (1, 0)


class Rows:
    "The smallest TextCache: keys and values in lists."

    def __init__(self, n_layer):
        self.layers, self.new, self.length = [None] * n_layer, [], 0

    def check_model(self, model):
        if len(self.layers) != model.n_layer:
            raise ValueError("another model")

    @contextmanager
    def extend(self, n):
        self.new = []
        yield [Layer(self, held) for held in self.layers]
        self.layers, self.length = self.new, self.length + n


class Layer:
    def __init__(self, cache, held):
        self.cache, self.held = cache, held

    def write(self, k, v):
        kv = (k, v) if self.held is None else tuple(torch.cat(z, dim=2) for z in zip(self.held, (k, v)))
        self.cache.new.append(kv)
        return kv


@pytest.mark.parametrize("name", ["fast", "fast, scores written", "groups, norms, biases"])
def test_other_caches_serve_beside_buffers(name):
    model = MODELS[name]
    caches, whole = [Rows(2), model.new_buffer(), Rows(2)], [text(9), text(7), text(8)]
    for cuts in ((2, 3, 8), (5, 4, None), (6, 7, None), (9, None, None)):
        go = [b for b in range(3) if cuts[b]]
        logits = packed_step(model, [whole[b][caches[b].length : cuts[b]] for b in go], [caches[b] for b in go])
        for b, row in zip(go, logits):
            torch.testing.assert_close(row, model(whole[b][None, : cuts[b]])[0][0, -1].detach(), **CLOSE)
    with pytest.raises(ValueError, match="another model"):
        packed_step(model, [text(1)], [Rows(3)])


def test_bad_steps_are_refused():
    model, other = make(), GPT_fast(GPTConfig(**SIZES | {"n_layer": 1})).double()
    cache = model.new_buffer()
    for new, caches, error, says in (
        ([], [], ValueError, "at least one text"),
        ([text(1)], [], ValueError, "got 1 and 0"),
        (text(2), [cache, cache], TypeError, "two lists"),
        ([text(1), text(1)], [cache, cache], ValueError, "got one twice"),
        ([[1]], [cache], TypeError, "text 0"),
        ([text(2)[None]], [cache], TypeError, r"text 0 to be a tensor \(n,\), got \(1, 2\)"),
        ([text(0)], [cache], ValueError, "text 0"),
        ([text(2).float()], [cache], TypeError, "text 0 to hold whole numbers"),
        ([torch.tensor([V])], [cache], ValueError, f"from 0 to {V - 1}"),
        ([torch.tensor([-1])], [cache], ValueError, f"from 0 to {V - 1}"),
        ([text(1).to("meta")], [cache], ValueError, "text 0 on cpu"),
        ([text(1), text(BLOCK + 1)], [cache, model.new_buffer()], ValueError, f"text 1 to have at most {BLOCK} tokens"),
        ([text(1)], [other.new_buffer()], ValueError, "expected a buffer of 2 layers"),
        ([text(1)], [model.new_buffer(2)], ValueError, "batch 1"),
        ([text(1)], [[None, None]], TypeError, "the cache of text 0"),
    ):
        with pytest.raises(error, match=says):
            packed_step(model, new, caches)
    assert cache.length == 0
    with pytest.raises(TypeError, match="expected a GPT_fast or a Llama, got GPT_kv"):
        packed_step(GPT_kv(model.config), [text(1)], [cache])


# --- writing ---


def same_weights(model):
    "GPT_kv with the weights of a GPT_fast."
    other = GPT_kv(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


WRITERS = {"GPT_kv": same_weights(MODELS["fast"])} | {name: MODELS[name] for name in ("fast", "groups, norms, biases", "sinks")}
each_writer = pytest.mark.parametrize("model", WRITERS.values(), ids=WRITERS)


def generators(n):
    return [torch.Generator().manual_seed(b) for b in range(n)]


@each_writer
@pytest.mark.parametrize(
    "settings",
    [{}, dict(do_sample=True, top_k=9), dict(do_sample=True, temperature=3.0, eos_token=3), dict(max_new_tokens=0), dict(max_new_tokens=1)],
    ids=str,
)  # fmt: skip
def test_a_list_of_prompts_is_written_as_each_alone(model, settings):
    torch.manual_seed(1)
    prompts = [text(n) for n in (3, 1, BLOCK + 4, 9, BLOCK)]  # beyond the block size, and at its edge
    settings = dict(max_new_tokens=14) | settings
    want = [model.generate_kv(p[None], generator=g, **settings)[0] for p, g in zip(prompts, generators(5))]
    got = model.generate_kv([prompts[0].tolist(), tuple(prompts[1].tolist()), *prompts[2:]], generator=generators(5), **settings)
    assert [t.tolist() for t in got] == [t.tolist() for t in want]
    if "eos_token" in settings:
        assert len({len(t) - len(p) for t, p in zip(want, prompts)}) > 1  # they end at different steps
    steps = list(model.generate_kv(prompts, generator=generators(5), stream=True, **settings))
    assert len(steps) == max(len(t) - len(p) for t, p in zip(want, prompts)) and all(len(step) == 5 for step in steps)
    for b, (prompt, whole) in enumerate(zip(prompts, want)):
        new = [step[b] for step in steps]
        count = len(whole) - len(prompt)
        assert new[count:] == [None] * (len(steps) - count)
        assert torch.cat([prompt, *new[:count]]).tolist() == whole.tolist()


@each_writer
def test_one_generator_draws_for_one_text_after_the_other(model):
    prompts = [text(2), text(5)]
    draw = lambda: model.generate_kv(prompts, 6, do_sample=True, generator=torch.Generator().manual_seed(5))  # noqa: E731
    assert [t.tolist() for t in draw()] == [t.tolist() for t in draw()]


def test_the_classes_draw_alike_from_one_generator():
    prompts = [text(2), text(5), text(3)]
    texts = [
        WRITERS[name].generate_kv(prompts, 9, do_sample=True, eos_token=2, generator=torch.Generator().manual_seed(5))
        for name in ("GPT_kv", "fast")
    ]
    assert [t.tolist() for t in texts[0]] == [t.tolist() for t in texts[1]]


def test_an_ended_text_is_computed_no_more():
    model, seen = make(), []
    prompts = next(two for two in ([text(3), text(5)] for _ in range(50)) if len({t[-1].item() for t in model.generate_kv(two, 1)}) == 2)
    end = model.generate_kv(prompts, 1)[0][-1].item()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, args, out: seen.append(args[0].size(1)))
    model.generate_kv(prompts, 4, eos_token=end)
    assert seen[:2] == [8, 1]


@each_writer
def test_bad_lists_are_refused_before_any_work(model):
    called = []
    handle = model.transformer.wte.register_forward_hook(lambda *args: called.append(1))
    try:
        for prompts, more, error, says in (
            ([], {}, ValueError, "at least one prompt"),
            ([1, 2, 3], {}, TypeError, "one prompt: wrap it"),
            ([[1], []], {}, ValueError, "prompt 1 of shape"),
            ([text(2), text(0)], {}, ValueError, "prompt 1 of shape"),
            ([text(2), text(2)[None]], {}, ValueError, r"prompt 1 of shape \(t,\) with t ≥ 1, got \(1, 2\)"),
            ([text(2), text(2).float()], {}, TypeError, "prompt 1: "),
            ([[1, 2.5]], {}, TypeError, "each token of prompt 0"),
            ([[1, True]], {}, TypeError, "each token of prompt 0"),
            ([[1], [V]], {}, ValueError, f"each token of prompt 1 ≤ {V - 1}"),
            ([text(2), torch.tensor([V])], {}, ValueError, "prompt 1: "),
            (["the cache"], {}, TypeError, "prompt 0 to be a tensor or a list of token numbers, got str"),
            ([text(2), text(2).to("meta")], {}, ValueError, "prompt 1 on cpu"),
            ([[1], [2]], dict(generator=generators(1)), ValueError, "one generator for each of 2 prompts, got 1"),
            ([[1], [2]], dict(generator=[None, 3]), TypeError, "prompt 1: expected a torch.Generator, got int"),
            ([[1]], dict(temperature=0), ValueError, "temperature > 0"),
            ([[1]], dict(top_k=V + 1), ValueError, "top_k"),
            ([[1]], dict(eos_token=V), ValueError, "eos_token"),
            ([[1]], dict(max_new_tokens=-1), ValueError, "max_new_tokens"),
        ):
            for stream in (False, True):  # at once, not at the first step
                with pytest.raises(error, match=says):
                    model.generate_kv(prompts, **dict(max_new_tokens=2, stream=stream) | more)
    finally:
        handle.remove()
    assert called == []


@each_writer
def test_dropout_is_warned_of(model):
    model.train()
    try:
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            with pytest.warns(UserWarning, match="model.eval") as record:
                model.generate_kv([[1], [2]], 1)
            assert {w.filename for w in record} == {__file__}
    finally:
        model.eval()


def test_the_list_decorator_leaves_a_batch_alone():
    model = WRITERS["GPT_kv"]
    assert model.generate_kv.__name__ == "generate_kv" and "generate" in (model.generate_kv.__doc__ or "")
    batch = torch.randint(V, (2, 4))
    assert torch.equal(model.generate_kv(idx=batch, max_new_tokens=3), model.generate(batch, 3))
    assert issubclass(type(model.transformer.h[0].attn), CausalSelfAttention)
