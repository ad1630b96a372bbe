"Right solutions as texts, written from the exercises' text alone by somebody who had not seen the checks."

RIGHT_TEXTS = {  # (exercise, name): source
    ('attention', 'einsum'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        S = P + T
        if T < 1 or S > self.bias.size(3):
            raise ValueError(f"{P} + {T} tokens do not fit into a block of {self.bias.size(3)}")
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(kv_cache, (k, v)))
        q, K, V = (z.reshape(B, -1, self.n_head, C // self.n_head) for z in (q, k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, K) * (C // self.n_head) ** -0.5
        scores = scores.masked_fill(~self.bias[0, 0, P:S, :S].bool(), -torch.inf)
        weights = self.attn_dropout(torch.softmax(scores, dim=-1))
        y = torch.einsum("bhts,bshd->bthd", weights, V).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y)), [k, v]
""",
    ('attention', 'SDPA with causal_lower_right'): """
from torch.nn.attention.bias import causal_lower_right


def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        S = P + T
        if T < 1 or S > self.bias.size(3):
            raise ValueError(f"{P} + {T} tokens do not fit into a block of {self.bias.size(3)}")
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(kv_cache, (k, v)))
        Q, K, V = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2).contiguous() for z in (q, k, v))
        y = F.scaled_dot_product_attention(
            Q, K, V, attn_mask=causal_lower_right(T, S), dropout_p=self.attn_dropout.p if self.training else 0.0
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), [k, v]
""",
    ('attention', 'recursion over halves'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        if T < 1 or P + T > self.bias.size(3):
            raise ValueError("too many tokens, or none")
        if T > 1:
            left, kv_cache = self(x[:, : T // 2], kv_cache)
            right, kv_cache = self(x[:, T // 2 :], kv_cache)
            return torch.cat([left, right], dim=1), kv_cache
        q, *new = self.project(x)
        kv = new if kv_cache is None else [torch.cat(pair, dim=1) for pair in zip(kv_cache, new)]
        return self.attend(q, *kv, mask=self.bias[:, :, P : P + 1, : P + 1]), kv
""",
    ('attention', 'online softmax over chunks of keys'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        S = P + T
        if T < 1 or S > self.bias.size(3):
            raise ValueError(f"{P} + {T} tokens do not fit into a block of {self.bias.size(3)}")
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(kv_cache, (k, v)))
        Q, K, V = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in (q, k, v))
        Q = Q / math.sqrt(Q.size(3))
        top = Q.new_full(Q.shape[:3] + (1,), -math.inf)
        total = torch.zeros_like(top)
        y = torch.zeros_like(Q)
        for a in range(0, S, 5):
            b = min(a + 5, S)
            scores = (Q @ K[:, :, a:b].mT).masked_fill(self.bias[:, :, P:S, a:b] == 0, -math.inf)
            higher = torch.maximum(top, scores.amax(dim=3, keepdim=True))  # chunk 0 is seen by all, so it is finite
            w = (scores - higher).exp()
            shrink = (top - higher).exp()
            total = total * shrink + w.sum(dim=3, keepdim=True)
            y = y * shrink + self.attn_dropout(w) @ V[:, :, a:b]
            top = higher
        y = (y / total).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y)), [k, v]
""",
    ('attention', 'three products and padding in place of cat'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        if T < 1 or P + T > self.bias.size(3):
            raise ValueError("too many tokens, or none")
        w, b = self.c_attn.weight.chunk(3), self.c_attn.bias.chunk(3)
        q, k, v = (F.linear(x, *wb) for wb in zip(w, b))
        if P:
            k, v = (F.pad(old, (0, 0, 0, T)) + F.pad(new, (0, 0, P, 0)) for old, new in zip(kv_cache, (k, v)))
        return self.attend(q, k, v, self.bias[:, :, P : P + T, : P + T]), [k, v]
""",
    ('attention', 'vmap over the heads'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        S = P + T
        if T < 1 or S > self.bias.size(3):
            raise ValueError(f"{P} + {T} tokens do not fit into a block of {self.bias.size(3)}")
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(kv_cache, (k, v)))
        def head(q, k, v):  # (B, T or S, hs)
            scores = torch.einsum("btd,bsd->bts", q, k) / math.sqrt(q.size(2))
            att = scores.masked_fill(hidden, -math.inf).softmax(dim=2)
            return self.attn_dropout(att) @ v

        hidden = self.bias[0, :, P:S, :S] == 0
        Q, K, V = (z.unflatten(2, (self.n_head, -1)) for z in (q, k, v))
        y = torch.vmap(head, in_dims=2, out_dims=2, randomness="different")(Q, K, V).flatten(2)
        return self.resid_dropout(self.c_proj(y)), [k, v]
""",
    ('attention', 'torch.compile with the eager backend'): """
def known(kv_cache, B, C):
    "P, the number of tokens in the cache; an error if it does not fit."
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError("the cache must be None or [k, v]")
    if len(kv_cache) != 2 or kv_cache[0].shape != kv_cache[1].shape:
        raise ValueError("the cache must be two tensors of one shape")
    if kv_cache[0].ndim != 3 or kv_cache[0].size(0) != B or kv_cache[0].size(2) != C:
        raise ValueError(f"the cache must be of shape ({B}, P, {C})")
    return kv_cache[0].size(1)


@torch.compile(backend="eager", dynamic=True)
def weights_of(q, k, hidden):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


class CausalSelfAttention_kv(CausalSelfAttention):
    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = known(kv_cache, B, C)
        S = P + T
        if T < 1 or S > self.bias.size(3):
            raise ValueError(f"{P} + {T} tokens do not fit into a block of {self.bias.size(3)}")
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(kv_cache, (k, v)))
        Q, K, V = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in (q, k, v))
        att = weights_of(Q, K, self.bias[:, :, P:S, :S] == 0)
        y = (self.attn_dropout(att) @ V).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y)), [k, v]
""",
    ('block', 'MLP in chunks'): """
class Block_kv(Block):
    attention_class = CausalSelfAttention_kv

    def forward(self, x, kv_cache=None):
        y, kv_cache = self.attn(self.ln_1(x), kv_cache)
        x = x + y
        x = x + torch.cat([self.mlpf(self.ln_2(part)) for part in x.split(2, dim=1)], dim=1)
        return x, kv_cache
""",
    ('block', 'checkpointed MLP'): """
from torch.utils.checkpoint import checkpoint


class Block_kv(Block):
    attention_class = CausalSelfAttention_kv

    def forward(self, x, kv_cache=None):
        y, kv_cache = self.attn(self.ln_1(x), kv_cache)
        x = x + y
        x = x + checkpoint(lambda z: self.mlpf(self.ln_2(z)), x, use_reentrant=False)
        return x, kv_cache
""",
    ('models', 'recursion over the layers'): """
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_lib.mingpt import GPT, check_generation, next_token


def cache_length(kv_cache, B, C):
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError(f"expected None or [k, v], got {type(kv_cache).__name__}")
    shapes = [tuple(t.shape) for t in kv_cache]
    fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][::2] == (B, C)
    if not fits:
        raise ValueError(f"expected [k, v], both ({B}, P, {C}), got {shapes}")
    return shapes[0][1]


def cached_tokens(kv_cache, n_layer, B, C):
    if not isinstance(kv_cache, (list, tuple)):
        raise TypeError(f"expected kv_cache to be a list of {n_layer} entries, got {type(kv_cache).__name__}")
    if len(kv_cache) != n_layer:
        raise ValueError(f"expected kv_cache to have {n_layer} entries, got {len(kv_cache)}")
    lengths = [cache_length(layer, B, C) for layer in kv_cache]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected every layer to hold the same number of tokens, got {lengths}")
    return lengths[0]


class GPT_kv(GPT):
    block_class = Block_kv

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        self.check_length(idx, targets)
        n = self.config.n_layer
        old = [None] * n if kv_cache is None or compute_first else kv_cache
        P = cached_tokens(old, n, idx.shape[0], self.config.n_embd)
        if not P < idx.shape[1]:
            raise ValueError("the cache holds the whole text already")

        def climb(x, i):
            if i == n:
                return x, []
            x, mine = self.transformer.h[i](x, old[i])
            x, above = climb(x, i + 1)
            return x, [mine] + above

        x, new = climb(self.embed(idx[:, P:], P), 0)
        out = self.predict(x, targets[:, P:] if targets is not None else None)
        return out if kv_cache is None else (*out, new)

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        check_generation(idx, max_new_tokens, temperature, top_k, self.config.vocab_size)

        def go(idx, left, cache):
            if left == 0:
                return idx
            logits, _, cache = self(idx[:, -self.block_size :], kv_cache=cache, compute_first=idx.size(1) > self.block_size)
            return go(torch.cat([idx, next_token(logits[:, -1], temperature, do_sample, top_k)], 1), left - 1, cache)

        return go(idx, max_new_tokens, [None] * self.config.n_layer)
""",
    ('models', 'exponential race instead of multinomial'): """
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_lib.mingpt import GPT, check_generation, next_token


def cache_length(kv_cache, B, C):
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError(f"expected None or [k, v], got {type(kv_cache).__name__}")
    shapes = [tuple(t.shape) for t in kv_cache]
    fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][::2] == (B, C)
    if not fits:
        raise ValueError(f"expected [k, v], both ({B}, P, {C}), got {shapes}")
    return shapes[0][1]


def cached_tokens(kv_cache, n_layer, B, C):
    if not isinstance(kv_cache, (list, tuple)):
        raise TypeError(f"expected kv_cache to be a list of {n_layer} entries, got {type(kv_cache).__name__}")
    if len(kv_cache) != n_layer:
        raise ValueError(f"expected kv_cache to have {n_layer} entries, got {len(kv_cache)}")
    lengths = [cache_length(layer, B, C) for layer in kv_cache]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected every layer to hold the same number of tokens, got {lengths}")
    return lengths[0]


class GPT_kv(GPT):
    block_class = Block_kv

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        self.check_length(idx, targets)
        n_layer, C = self.config.n_layer, self.config.n_embd
        layers = kv_cache
        if kv_cache is None or compute_first:
            layers = [None] * n_layer
        P = cached_tokens(layers, n_layer, idx.size(0), C)
        if P >= idx.size(1):
            raise ValueError(f"expected at least one new token, got {idx.size(1)} with {P} cached")
        x = self.embed(idx[:, P:], P)
        new = []
        for block, layer in zip(self.transformer.h, layers):
            x, layer = block(x, layer)
            new.append(layer)
        logits, loss = self.predict(x, None if targets is None else targets[:, P:])
        if kv_cache is None:
            return logits, loss
        return logits, loss, new

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        check_generation(idx, max_new_tokens, temperature, top_k, self.config.vocab_size)
        kv_cache = [None] * self.config.n_layer
        for _ in range(max_new_tokens):
            window = idx[:, -self.block_size :]
            slid = idx.size(1) > self.block_size
            logits, _, kv_cache = self(window, kv_cache=kv_cache, compute_first=slid)
            last = logits[:, -1] / temperature
            if top_k is not None:
                last = last.masked_fill(last < last.topk(top_k).values[:, -1:], -math.inf)
            if do_sample:  # what multinomial does for one sample: p / q with q exponential
                p = last.softmax(dim=1)
                token = (p / torch.empty_like(p).exponential_(1)).argmax(dim=1, keepdim=True)
            else:
                token = last.argmax(dim=1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
        return idx
""",
    ('models', 'fold with functools.reduce'): """
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_lib.mingpt import GPT, check_generation, next_token


def cache_length(kv_cache, B, C):
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError(f"expected None or [k, v], got {type(kv_cache).__name__}")
    shapes = [tuple(t.shape) for t in kv_cache]
    fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][::2] == (B, C)
    if not fits:
        raise ValueError(f"expected [k, v], both ({B}, P, {C}), got {shapes}")
    return shapes[0][1]


def cached_tokens(kv_cache, n_layer, B, C):
    if not isinstance(kv_cache, (list, tuple)):
        raise TypeError(f"expected kv_cache to be a list of {n_layer} entries, got {type(kv_cache).__name__}")
    if len(kv_cache) != n_layer:
        raise ValueError(f"expected kv_cache to have {n_layer} entries, got {len(kv_cache)}")
    lengths = [cache_length(layer, B, C) for layer in kv_cache]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected every layer to hold the same number of tokens, got {lengths}")
    return lengths[0]


from functools import reduce


class GPT_kv(GPT):
    block_class = Block_kv

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        self.check_length(idx, targets)
        n_layer, C = self.config.n_layer, self.config.n_embd
        layers = kv_cache
        if kv_cache is None or compute_first:
            layers = [None] * n_layer
        P = cached_tokens(layers, n_layer, idx.size(0), C)
        if P >= idx.size(1):
            raise ValueError(f"expected at least one new token, got {idx.size(1)} with {P} cached")
        x = self.embed(idx[:, P:], P)

        def step(state, pair):
            x, done = state
            block, layer = pair
            x, layer = block(x, layer)
            return x, done + [layer]

        x, new = reduce(step, zip(self.transformer.h, layers), (x, []))
        logits, loss = self.predict(x, None if targets is None else targets[:, P:])
        if kv_cache is None:
            return logits, loss
        return logits, loss, new

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        check_generation(idx, max_new_tokens, temperature, top_k, self.config.vocab_size)
        kv_cache = [None] * self.config.n_layer
        for _ in range(max_new_tokens):
            window = idx[:, -self.block_size :]
            slid = idx.size(1) > self.block_size
            logits, _, kv_cache = self(window, kv_cache=kv_cache, compute_first=slid)
            token = next_token(logits[:, -1], temperature, do_sample, top_k)
            idx = torch.cat([idx, token], dim=1)
        return idx
""",
    ('models', 'iterator with a sentinel and a deque'): """
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_lib.mingpt import GPT, check_generation, next_token


def cache_length(kv_cache, B, C):
    if kv_cache is None:
        return 0
    if not isinstance(kv_cache, (list, tuple)) or not all(isinstance(t, Tensor) for t in kv_cache):
        raise TypeError(f"expected None or [k, v], got {type(kv_cache).__name__}")
    shapes = [tuple(t.shape) for t in kv_cache]
    fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][::2] == (B, C)
    if not fits:
        raise ValueError(f"expected [k, v], both ({B}, P, {C}), got {shapes}")
    return shapes[0][1]


def cached_tokens(kv_cache, n_layer, B, C):
    if not isinstance(kv_cache, (list, tuple)):
        raise TypeError(f"expected kv_cache to be a list of {n_layer} entries, got {type(kv_cache).__name__}")
    if len(kv_cache) != n_layer:
        raise ValueError(f"expected kv_cache to have {n_layer} entries, got {len(kv_cache)}")
    lengths = [cache_length(layer, B, C) for layer in kv_cache]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected every layer to hold the same number of tokens, got {lengths}")
    return lengths[0]


from collections import deque


class GPT_kv(GPT):
    block_class = Block_kv

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        self.check_length(idx, targets)
        n_layer, C = self.config.n_layer, self.config.n_embd
        layers = kv_cache
        if kv_cache is None or compute_first:
            layers = [None] * n_layer
        P = cached_tokens(layers, n_layer, idx.size(0), C)
        if P >= idx.size(1):
            raise ValueError(f"expected at least one new token, got {idx.size(1)} with {P} cached")
        x = self.embed(idx[:, P:], P)
        new = []
        for block, layer in zip(self.transformer.h, layers):
            x, layer = block(x, layer)
            new.append(layer)
        logits, loss = self.predict(x, None if targets is None else targets[:, P:])
        if kv_cache is None:
            return logits, loss
        return logits, loss, new

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        check_generation(idx, max_new_tokens, temperature, top_k, self.config.vocab_size)
        window = deque(idx.unbind(1), maxlen=self.block_size)
        written, cache, full = [], [None] * self.config.n_layer, idx.size(1) > self.block_size
        for _ in range(max_new_tokens):
            logits, _, cache = self(torch.stack(tuple(window), dim=1), kv_cache=cache, compute_first=full)
            token = next_token(logits[:, -1], temperature, do_sample, top_k)
            full = full or len(window) == self.block_size
            window.append(token[:, 0].to(idx.dtype))
            written.append(token)
        return torch.cat([idx, *written], dim=1) if written else idx
""",
}
