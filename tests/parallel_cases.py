"""What the processes of tests/test_parallel.py run. Each function runs in all of them at once."""

import os
import signal
import time

import torch
import torch.distributed as dist

from kvcache_lib.config import GPTConfig
from kvcache_lib.cut import handed_over, part_cache_bytes
from kvcache_lib.fast import GPT_fast
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.parallel import Peers, cut

SIZES = dict(n_layer=2, n_embd=48, vocab_size=29, block_size=24)
MODELS = {
    "GPT": GPTConfig(n_head=12, **SIZES),
    "Llama": LlamaConfig(n_head=12, n_hidden=96, head_size=6, **SIZES),
    "grouped": LlamaConfig(n_head=12, n_kv_head=12, n_hidden=96, head_size=4, qkv_bias=True, **SIZES),
    "fewer heads than processes": LlamaConfig(n_head=12, n_kv_head=1, n_hidden=96, head_size=4, qk_norm=True, tied=True, **SIZES),
    "window and sinks": LlamaConfig(n_head=12, n_kv_head=12, n_hidden=96, head_size=4, window=7, sinks=2, **SIZES),
}


def whole_model(name, seed=0):
    "Large weights, and no trivial bias or norm: a mistake must not hide in the rounding. The same in every process."
    config = MODELS[name]
    torch.manual_seed(seed)
    model = (Llama if isinstance(config, LlamaConfig) else GPT_fast)(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def own_heads(z, rank, processes):
    "The heads of a whole buffer that a process must hold.  z: (n_layer, 2, B, heads, S, hs)."
    n = z.size(3)
    return z[:, :, :, rank * n // processes : max(rank * n // processes + 1, (rank + 1) * n // processes)]


_GROUPS = {}


def group(size):
    "The first `size` processes, made once, by all at the same time."
    if size not in _GROUPS:
        _GROUPS[size] = dist.new_group(list(range(size)))
    return _GROUPS[size]


def equal_everywhere(name, size, splits):
    "The largest difference of logits, and of caches, over splits of two texts into calls; then what was counted and predicted."
    g = group(size)
    if dist.get_rank() >= size:
        return None
    model = whole_model(name)
    peers = Peers(g)
    part = cut(model, peers)
    worst = [0.0, 0.0]
    counted, predicted = [], []
    for split in splits:
        text = torch.randint(29, (2, sum(split)), generator=torch.Generator().manual_seed(len(split)))
        want_buffer, buffer = model.new_buffer(2), part.new_buffer(2)
        assert buffer.nbytes == part_cache_bytes(model.config, size, buffer.capacity, 2, 8)
        end = 0
        for new in split:
            end += new
            before = peers.bytes
            got = part.step(text[:, :end], buffer)[0]
            counted.append(peers.bytes - before)
            predicted.append(handed_over(model.config, size, new, 2, 8, all_logits=True))
            want = model.step(text[:, :end], want_buffer)[0]
            worst[0] = max(worst[0], (got - want).abs().max().item())
            held = [own_heads(want_buffer.data, peers.rank, size), buffer.data]
            held = [z[..., : buffer.held, :] for z in held]
            worst[1] = max(worst[1], (held[0] - held[1]).abs().max().item())
        if model.config.cache_sizes().window is None:
            worst[0] = max(worst[0], (part(text)[0] - model(text)[0]).abs().max().item())
    return worst, counted, predicted
