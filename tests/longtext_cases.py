"""What the processes of tests/test_longtext.py run."""

import os

import torch
import torch.distributed as dist

from kvcache_lib.config import GPTConfig
from kvcache_lib.fast import GPT_fast
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.longtext import DealtCache, dealt_step, differences, generate_dealt, positions_of

SIZES = dict(n_layer=2, n_embd=24, vocab_size=31, block_size=40)
CONFIGS = {
    "GPT": GPTConfig(n_head=3, **SIZES),
    "grouped": LlamaConfig(n_head=4, n_kv_head=2, n_hidden=40, head_size=6, **SIZES),
    "one head of keys": LlamaConfig(n_head=4, n_kv_head=1, n_hidden=40, head_size=6, qkv_bias=True, qk_norm=True, tied=True, **SIZES),
}


def model_of(name, dtype=torch.float64):
    "Large weights, no trivial bias or norm: a mistake must not hide in the rounding."
    torch.manual_seed(0)
    model = (Llama if isinstance(CONFIGS[name], LlamaConfig) else GPT_fast)(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def compared():
    "Every model with 1 to 4 processes: prompts shorter than the group, in one chunk and in several."
    text = torch.randint(31, (1, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for prompt, chunk in ((2, 5), (19, 7), (24, 24)):
        found += differences([model_of(name) for name in CONFIGS], text, prompt, chunk, (1, 2, 3, 4))
    return found


def rows_held():
    "How far the leader's rows are from those that one process has, layer by layer."
    model, text = model_of("grouped"), torch.randint(31, (1, 21), generator=torch.Generator().manual_seed(2))
    buffer, cache = model.new_buffer(), DealtCache(model, 3)
    for start, end in ((0, 10), (10, 11), (11, 21)):
        model.step(text[:, :end], buffer)
        dealt_step(model, text[0, start:end], cache)
    own = cache.rows.buffer.data[:, :, :, :, : cache.rows.buffer.length]
    held = cache.close()
    return (own - buffer.data[:, :, :, :, positions_of(21, 0, 3)]).abs().max().item(), [row["rows"] for row in held]


def written_past_the_block():
    "Texts of generate_dealt and of one process: the window moves on, another text follows, and one is drawn by chance."
    model, text = model_of("GPT"), torch.randint(31, (1, 37), generator=torch.Generator().manual_seed(3))
    pairs = []
    for choice in ({}, {"do_sample": True, "temperature": 1.3, "top_k": 9}):
        draws = [choice | ({"generator": torch.Generator().manual_seed(5)} if choice else {}) for _ in range(2)]
        pairs.append((generate_dealt(model, text, 8, processes=3, chunk=9, **draws[0])[0], model.generate_kv(text, 8, **draws[1])))
    return pairs


def refused():
    "What is said when something cannot be done, and that the cache is good for the next step."
    model = model_of("GPT", torch.float32)
    cache, said = DealtCache(model, 2), []
    dealt_step(model, torch.arange(30), cache)
    try:
        dealt_step(model, torch.arange(11), cache)
    except ValueError as e:
        said.append(str(e))
    before = cache.length
    cache.crop(20)
    logits = dealt_step(model, torch.arange(20, 30), cache)
    buffer = model.new_buffer()
    right = model.step(torch.arange(30)[None], buffer, last_only=True)[0][:, -1]
    cache.close()
    for make in (
        lambda: DealtCache(Llama(LlamaConfig(n_head=4, window=8, **SIZES)).eval()), lambda: DealtCache(GPT_fast(CONFIGS["GPT"])),
        lambda: DealtCache(model, 5), lambda: DealtCache("model"), lambda: generate_dealt(model, torch.zeros(2, 3, dtype=torch.long), 1),
    ):  # fmt: skip
        try:
            make()
        except (ValueError, TypeError) as e:
            said.append(str(e))
    return before, (logits - right).abs().max().item(), said


def one_dies():
    "Process 2 ends in the middle of a step."
    from kvcache_lib import longtext

    if dist.get_rank() == 2:
        attended = []

        def dying(*given):
            attended.append(0)
            if len(attended) == 3:
                os._exit(7)
            return kept(*given)

        kept, longtext.partial_attention = longtext.partial_attention, dying
    return longtext.led(generate_dealt, model_of("GPT"), torch.arange(10)[None], 20)
