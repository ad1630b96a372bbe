"""Models on pages: attention over pages is attention over the buffer, whoever shares what."""

import pytest
import torch

from kvcache_lib.fast import GPT_fast
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.mingpt import GPTConfig
from kvcache_lib.paged import PagePool, PoolFull
from kvcache_lib.prefix import PrefixCache
from kvcache_lib.ragged import packed_step

SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=11, block_size=64)
CLOSE = dict(rtol=1e-10, atol=1e-10)
EXACT = dict(rtol=0, atol=0)
KINDS = {
    "GPT_fast": lambda: GPT_fast(GPTConfig(**SIZES)),
    "Llama": lambda: Llama(LlamaConfig(**SIZES, n_kv_head=4)),
    "Llama with groups": lambda: Llama(LlamaConfig(**SIZES, n_kv_head=2, qk_norm=True)),
    "Llama with one head of keys": lambda: Llama(LlamaConfig(**SIZES, n_kv_head=1, qkv_bias=True)),
}


def new_model(kind, dtype=torch.float64):
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape))  # large weights: otherwise a wrong row hides in the rounding
    return model.to(dtype)


def alone(model, text):
    "Logits after every token of one text, encoded at once without a cache."
    with torch.no_grad():
        return model(text[None])[0][0]


def cuts(total, most=9):
    "Random chunks."
    while total:
        n = min(total, int(torch.randint(1, most + 1, ())))
        yield n
        total -= n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_give_the_buffers_logits_bit_for_bit(kind, dtype):
    model = new_model(kind, dtype)
    texts = [torch.randint(11, (n,)) for n in (1, 16, 17, 40, 64)]
    pool = PagePool.like(model, 40, page_size=7)
    pages, buffers = [pool.new_text() for _ in texts], [model.new_buffer(1) for _ in texts]
    chunks = [list(cuts(len(text))) for text in texts]
    logits = [[] for _ in texts]
    while any(chunks):
        going = [b for b, left in enumerate(chunks) if left]
        new = [texts[b][pages[b].length :][: chunks[b].pop(0)] for b in going]
        ours = packed_step(model, new, [pages[b] for b in going], every=True)
        theirs = packed_step(model, new, [buffers[b] for b in going], every=True)
        torch.testing.assert_close(ours, theirs, **EXACT)
        for b, rows in zip(going, ours.split([len(z) for z in new])):
            logits[b].append(rows)
    if dtype == torch.float64:
        for text, rows in zip(texts, logits):
            torch.testing.assert_close(torch.cat(rows), alone(model, text), **CLOSE)
    for a, b in zip(pages, buffers):
        for ours, theirs in zip(a.to_lists(), b.to_lists()):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_share_a_prompt(kind):
    model, prompt = new_model(kind), torch.randint(11, (21,))
    pool = PagePool.like(model, 20, page_size=8)
    first = pool.new_text()
    packed_step(model, [prompt], [first])
    texts = [first, *(first.fork() for _ in range(4))]
    assert len(pool) - pool.free_pages == 3
    written = [prompt] * 5
    for step in range(7):  # all of them in one step, each with a token of its own
        new = [torch.tensor([(3 * b + step) % 11]) for b in range(5)]
        logits = packed_step(model, new, texts)
        written = [torch.cat(z) for z in zip(written, new)]
        for text, row in zip(written, logits):
            torch.testing.assert_close(row, alone(model, text)[-1], **CLOSE)
    assert len(pool) - pool.free_pages == 2 + 5 * 2, "two full pages of the prompt are shared"


def test_beams_drop_and_fork():
    model, prompt = new_model("GPT_fast"), torch.randint(11, (10,))
    pool = PagePool.like(model, 40, page_size=4)
    first = pool.new_text()
    packed_step(model, [prompt], [first])
    beams = [(prompt, first), *((prompt, first.fork()) for _ in range(3))]
    for step in range(20):
        new = torch.randint(11, (4, 1)).unbind(0)
        logits = packed_step(model, new, [cache for _, cache in beams])
        beams = [(torch.cat([text, token]), cache) for (text, cache), token in zip(beams, new)]
        for (text, _), row in zip(beams, logits):
            torch.testing.assert_close(row, alone(model, text)[-1], **CLOSE)
        kept = [beams[i] for i in torch.randint(4, (4,)).tolist()]  # some twice, some not at all
        chosen = [(text, cache.fork()) for text, cache in kept]
        for _, cache in beams:
            cache.free()
        beams = chosen
    for _, cache in beams:
        cache.free()
    assert pool.free_pages == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_beginning_gives_the_same_logits(kind):
    model = new_model(kind)
    pool = PagePool.like(model, 24, page_size=8)
    cache = PrefixCache(pool, lambda z: 0)  # all keys collide
    shared, found = torch.randint(11, (20,)), []
    for n in range(6):
        prompt = torch.cat([shared[: 20 - n], torch.randint(11, (9,))])
        text = cache.lookup(prompt)
        found.append(text.length)
        logits = packed_step(model, [prompt[text.length :]], [text])
        torch.testing.assert_close(logits[0], alone(model, prompt)[-1], **CLOSE)
        cache.insert(text, prompt)
        text.free()
    assert found[:5] == [0, 16, 16, 16, 16] and found[5] >= 8


def test_what_fails_leaves_every_text_as_it_was():
    model = new_model("GPT_fast")
    pool = PagePool.like(model, 4, page_size=8)
    texts = [pool.new_text() for _ in range(2)]
    for text in texts:
        packed_step(model, [torch.arange(10)], [text])
    before = pool.data.clone()
    with pytest.raises(PoolFull):
        packed_step(model, [torch.arange(3), torch.arange(10)], texts)
    other = PagePool.like(new_model("Llama with groups"), 4).new_text()
    with pytest.raises(ValueError, match="expected a pool of 2 layers, 4 heads of 8, torch.float64 on cpu, got one of 2 layers, 2 heads"):
        packed_step(model, [torch.arange(3), torch.arange(3)], [texts[0], other])
    with pytest.raises(ValueError, match="without a window"):
        texts[0].check_model(Llama(LlamaConfig(**SIZES, n_kv_head=4, window=8)).double())
    assert [text.length for text in texts] == [10, 10] and pool.users == [1] * 4
    torch.testing.assert_close(pool.data, before, **EXACT)
