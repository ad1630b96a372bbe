"""What the processes of tests/test_parallel.py run. Each function runs in all of them at once."""

import os
import signal
import time
from contextlib import contextmanager

import safetensors
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from kvcache_lib.checkpoint import load
from kvcache_lib.config import GPTConfig
from kvcache_lib.cut import handed_over, part_cache_bytes
from kvcache_lib.fast import GPT_fast
from kvcache_lib.llama import Llama, LlamaConfig
from kvcache_lib.parallel import cut, load_part, parallelized
from kvcache_lib.peers import Peers

SIZES = dict(n_layer=2, n_embd=48, n_head=12, vocab_size=29, block_size=24)
GATED = SIZES | dict(n_hidden=96)
MODELS = {  # and the numbers of processes that can share them
    "GPT": (GPTConfig(**SIZES), (1, 2, 3, 4)),
    "window and sinks": (LlamaConfig(window=7, sinks=2, head_size=6, **GATED), (1, 2, 3, 4)),
    "grouped heads": (LlamaConfig(n_kv_head=6, qkv_bias=True, **GATED), (2, 3)),
    "fewer heads of keys than processes": (LlamaConfig(n_kv_head=2, qk_norm=True, tied=True, **GATED), (2, 4)),
}
SPLITS = ([24], [5, 1, 1, 6], [1, 11, 2])  # texts, cut into calls


def whole_model(name, seed=0):
    "Large weights, and no trivial bias or norm: a mistake must not hide in the rounding. The same in every process."
    config = MODELS[name][0]
    torch.manual_seed(seed)
    model = (Llama if isinstance(config, LlamaConfig) else GPT_fast)(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


_GROUPS = {}


def group(size):
    "The first `size` processes, made once, by all at the same time."
    if size not in _GROUPS:
        _GROUPS[size] = dist.new_group(list(range(size)))
    return _GROUPS[size]


def own_heads(z, rank, processes):
    "The heads of a whole buffer that a process must hold.  z: (n_layer, 2, B, heads, S, hs)."
    n = z.size(3)
    first = rank * n // processes
    return z[:, :, :, first : first + max(1, n // processes)]


def equal_everywhere(name):
    "For each number of processes that this one belongs to: the largest differences, what was counted, what was predicted."
    found = {}
    for size in MODELS[name][1]:
        g = group(size)
        if dist.get_rank() >= size:
            continue
        model, peers = whole_model(name), Peers(g)
        part = cut(model, peers)
        logits, caches, counted, predicted = [], [], [], []
        for split in SPLITS:
            text = torch.randint(29, (2, sum(split)), generator=torch.Generator().manual_seed(len(split)))
            right, own, end = model.new_buffer(2), part.new_buffer(2), 0
            counted.append(own.nbytes)
            predicted.append(part_cache_bytes(model.config, size, own.capacity, 2, 8))
            for new in split:
                end += new
                before = peers.bytes
                got = part.step(text[:, :end], own)[0]
                counted.append(peers.bytes - before)
                predicted.append(handed_over(model.config, size, new, 2, 8, all_logits=True))
                logits.append((got - model.step(text[:, :end], right)[0]).abs().max().item())
                held = [z[..., : own.held, :] for z in (own_heads(right.data, peers.rank, size), own.data)]
                assert held[0].shape == held[1].shape
                caches.append((held[0] - held[1]).abs().max().item())
        logits.append((part(text)[0] - model(text)[0]).abs().max().item())  # without a cache
        prompts = [text[0, :3], text[1, :7]]  # packed; past the block size
        with torch.no_grad():
            same = all(map(torch.equal, part.generate_kv(prompts, 4), model.generate_kv(prompts, 4)))
            same &= torch.equal(part.generate_kv(text[:, :9], 18), model.generate_kv(text[:, :9], 18))
        found[size] = max(logits), max(caches), counted, predicted, same
    return found


def pytorchs_own_way():
    "The largest difference of logits and caches by `parallelized`, in two processes."
    worst, g = 0.0, group(2)
    if dist.get_rank() >= 2:
        return worst
    for name in ("GPT", "grouped heads"):
        model = whole_model(name)
        other = parallelized(model, DeviceMesh.from_group(g, "cpu"))
        text = torch.arange(20)[None]
        right, own = model.new_buffer(), other.new_buffer()
        for end in (13, 14):
            want, got = model.step(text[:, :end], right)[0], other.step(text[:, :end], own)[0]
            worst = max(worst, (want - got).abs().max().item())
        held = own_heads(right.data, dist.get_rank(), 2)
        worst = max(worst, (held - own.data)[..., :14, :].abs().max().item())
    return worst


@contextmanager
def bytes_read():
    "Counts what is read of tensors: `[(name, bytes), …]`."
    read, opened = [], safetensors.safe_open

    class Piece:
        def __init__(self, name, piece):
            self.name, self.piece = name, piece
            self.get_shape, self.get_dtype = piece.get_shape, piece.get_dtype

        def __getitem__(self, where):
            found = self.piece[where]
            read.append((self.name, found.nbytes))
            return found

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Piece(name, self.file.get_slice(name))

        def get_tensor(self, name):
            found = self.file.get_tensor(name)
            read.append((name, found.nbytes))
            return found

    safetensors.safe_open = Counting
    try:
        yield read
    finally:
        safetensors.safe_open = opened


def read_in_parts(folder):
    "The largest difference of logits to the whole model, the bytes that were read, those of the part's weights, and the most of one tensor."
    with bytes_read() as read:
        part = load_part(folder).model
    whole = load(folder).model
    text = torch.arange(20)[None]
    worst = (part.step(text, part.new_buffer())[0] - whole.step(text, whole.new_buffer())[0]).abs().max().item()
    weights = {p.data_ptr(): p.nbytes for p in part.parameters()}
    return worst, sum(nbytes for _, nbytes in read), sum(weights.values()), {name for name, _ in read}


def other_prompt(rank):
    part = cut(whole_model("GPT"))
    text = torch.arange(9)[None]
    if dist.get_rank() == rank:
        text[0, 4] += 1
    part.step(text, part.new_buffer())


def other_weights(rank):
    cut(whole_model("GPT", seed=int(dist.get_rank() == rank)))


def other_checkpoint(rank, folders):
    load_part(folders[dist.get_rank() == rank])


def own_mistake(rank):
    if dist.get_rank() == rank:
        raise KeyError("mine")
    Peers().sum(torch.zeros(1))


def dies_in_the_middle(rank):
    "Of a step: in its second layer."
    part = cut(whole_model("GPT"))
    if dist.get_rank() == rank:
        part.transformer.h[1].register_forward_pre_hook(lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    part.step(torch.arange(9)[None], part.new_buffer())


def stands_still(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    Peers().sum(torch.zeros(1))


def sleeps():
    time.sleep(600)
