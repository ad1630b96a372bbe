"""Right solutions, each written in another way than the reference. The checks must accept them all."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from kvcache_lib.mingpt import GPT, Block, CausalSelfAttention, next_token


class AsTheHints(CausalSelfAttention):
    "The baseline's project and attend; no check of the cache's length."

    def forward(self, x, kv_cache=None):
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = (torch.cat(pair, dim=1) for pair in zip(kv_cache, (k, v)))
        P, S = k.size(1) - x.size(1), k.size(1)
        return self.attend(q, k, v, self.bias[:, :, P:S, :S]), [k, v]


class FusedBoolMask(CausalSelfAttention):
    "PyTorch's fused attention with a mask made on the spot."

    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        if kv_cache:
            k, v = torch.cat((kv_cache[0], k), 1), torch.cat((kv_cache[1], v), 1)
        S = k.shape[1]
        see = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(diagonal=S - T)
        q, k_, v_ = (z.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        p = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k_, v_, attn_mask=see, dropout_p=p)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C))), [k, v]


class FusedFloatMask(CausalSelfAttention):
    "An additive mask of x's dtype; is_causal without a cache."

    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        q, k, v = self.project(x)
        P = 0
        if kv_cache is not None:
            P = kv_cache[0].size(1)
            k, v = torch.cat([kv_cache[0], k], dim=1), torch.cat([kv_cache[1], v], dim=1)
        q, k_, v_ = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in (q, k, v))
        if P == 0:
            y = F.scaled_dot_product_attention(q, k_, v_, is_causal=True)
        else:
            mask = x.new_zeros(T, P + T).masked_fill(self.bias[0, 0, P : P + T, : P + T] == 0, -1e9)
            y = F.scaled_dot_product_attention(q, k_, v_, attn_mask=mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), (k, v)


class Einops(CausalSelfAttention):
    "rearrange and einsum."

    def forward(self, x, kv_cache=None):
        q, k, v = self.project(x)
        if kv_cache is not None:
            k, v = torch.cat([kv_cache[0], k], 1), torch.cat([kv_cache[1], v], 1)
        Q, K, V = (rearrange(z, "b t (h d) -> b h t d", h=self.n_head) for z in (q, k, v))
        scores = torch.einsum("bhtd,bhsd->bhts", Q, K) * Q.size(-1) ** -0.5
        t, s = torch.arange(Q.size(2))[:, None], torch.arange(K.size(2))
        scores = scores.masked_fill(s > t + K.size(2) - Q.size(2), float("-inf"))
        y = torch.einsum("bhts,bhsd->bhtd", self.attn_dropout(scores.softmax(-1)), V)
        return self.resid_dropout(self.c_proj(rearrange(y, "b h t d -> b t (h d)"))), [k, v]


class TokenByToken(CausalSelfAttention):
    "One token at a time, each projected by itself; no mask is needed."

    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        hs, rows = C // self.n_head, []
        k, v = kv_cache if kv_cache is not None else (x[:, :0], x[:, :0])
        for t in range(T):
            q, k_t, v_t = self.c_attn(x[:, t : t + 1]).split(C, dim=2)
            k, v = torch.cat([k, k_t], dim=1), torch.cat([v, v_t], dim=1)
            heads = []
            for h in range(self.n_head):
                part = slice(h * hs, (h + 1) * hs)
                weights = (q[:, :, part] @ k[:, :, part].mT / math.sqrt(hs)).softmax(dim=-1)
                heads.append(self.attn_dropout(weights) @ v[:, :, part])
            rows.append(torch.cat(heads, dim=2))
        return self.resid_dropout(self.c_proj(torch.cat(rows, dim=1))), [k, v]


class OwnAttend(CausalSelfAttention):
    "attend is overridden, and weights are taken apart by hand; the cache is a tuple."

    def attend(self, q, k, v, mask):
        split = lambda z: z.reshape(*z.shape[:2], self.n_head, -1).permute(0, 2, 1, 3)
        q, k, v = split(q), split(k), split(v)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(mask == 0, -math.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))  # without this, large scores overflow
        y = (weights / weights.sum(-1, keepdim=True)) @ v
        return self.c_proj(y.permute(0, 2, 1, 3).reshape(y.size(0), y.size(2), -1))

    def forward(self, x, kv_cache=None):
        W_q, W_k, W_v = self.c_attn.weight.chunk(3)
        b_q, b_k, b_v = self.c_attn.bias.chunk(3)
        k, v = F.linear(x, W_k, b_k), F.linear(x, W_v, b_v)
        old = 0
        if kv_cache is not None:
            old_k, old_v = kv_cache
            old = old_k.shape[1]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        mask = self.bias[..., old : old + x.shape[1], : k.shape[1]]
        return self.attend(F.linear(x, W_q, b_q), k, v, mask), (k, v)


class Preallocated(CausalSelfAttention):
    "A new tensor of the right size for each call, filled in two parts."

    def forward(self, x, kv_cache=None):
        B, T, C = x.shape
        P = 0 if kv_cache is None else kv_cache[0].size(1)
        if P + T > self.bias.size(-1):
            raise ValueError("too long")
        q, *new = self.project(x)
        cache = []
        for n, part in enumerate(new):
            room = x.new_empty(B, P + T, C)
            if P:
                room[:, :P] = kv_cache[n]
            room[:, P:] = part
            cache.append(room)
        return self.attend(q, *cache, self.bias[:, :, P : P + T, : P + T]), cache


class BlockAsTheHints(Block):
    attention_class = AsTheHints

    def forward(self, x, kv_cache=None):
        a, kv_cache = self.attn(self.ln_1(x), kv_cache)
        x = x + a
        return x + self.mlpf(self.ln_2(x)), kv_cache


class BlockWrittenOut(Block):
    "Its own MLP, keyword arguments, a tuple that is indexed, a tuple cache from below."

    attention_class = OwnAttend

    def forward(self, x, kv_cache=None):
        out = self.attn(x=self.ln_1(x), kv_cache=kv_cache)
        h = out[0] + x
        m = self.mlp
        return h + m.dropout(m.c_proj(m.act(m.c_fc(self.ln_2(h))))), out[1]


class BlockTokenByToken(Block):
    "The layer over one token at a time."

    attention_class = FusedBoolMask

    def forward(self, x, kv_cache=None):
        rows = []
        for t in range(x.size(1)):
            a, kv_cache = self.attn(self.ln_1(x[:, t : t + 1]), kv_cache)
            h = x[:, t : t + 1] + a
            rows.append(h + self.mlpf(self.ln_2(h)))
        return torch.cat(rows, dim=1), kv_cache


class BlockDirect(Block):
    "Calls forward itself, and the attention's parts never."

    attention_class = Preallocated

    def forward(self, x, kv_cache=None):
        a, cache = self.attn.forward(self.ln_1(x), kv_cache)
        x = a.add(x)
        return self.mlpf(self.ln_2(x)).add(x), cache


class ModelAsTheHints(GPT):
    block_class = BlockAsTheHints

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        layers = [None] * len(self.transformer.h) if kv_cache is None or compute_first else kv_cache
        P = 0 if layers[0] is None else layers[0][0].size(1)
        x, new = self.embed(idx[:, P:], P), []
        for block, layer in zip(self.transformer.h, layers):
            x, layer = block(x, layer)
            new.append(layer)
        out = self.predict(x, targets if targets is None else targets[:, P:])
        return out if kv_cache is None else (*out, new)

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        cache = [None] * len(self.transformer.h)
        for _ in range(max_new_tokens):
            slid = idx.size(1) > self.block_size
            logits, _, cache = self(idx[:, -self.block_size :], kv_cache=cache, compute_first=slid)
            idx = torch.cat((idx, next_token(logits[:, -1], temperature, do_sample, top_k)), dim=1)
        return idx


class ModelWrittenOut(GPT):
    "Embedding, loss and sampling by hand; tuples; no cache at all past the block; an early way out."

    block_class = BlockWrittenOut

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        t = self.transformer
        cache = kv_cache if kv_cache is not None and not compute_first else (None,) * self.config.n_layer
        P = cache[0][0].shape[1] if cache[0] is not None else 0
        new = idx[:, P:]
        if new.size(1) == 0:
            raise ValueError("no new token")
        x = t.drop(t.wte(new) + t.wpe.weight[P : idx.size(1)])
        out = ()
        for i in range(self.config.n_layer):
            x, layer = t.h[i](x, cache[i])
            out += (layer,)
        logits, loss = self.lm_head(t.ln_f(x)), None
        if targets is not None:
            loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets[:, P:].reshape(-1), ignore_index=-1)
        return (logits, loss) if kv_cache is None else (logits, loss, out)

    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        if max_new_tokens == 0:
            return idx
        with torch.no_grad():
            cache = (None,) * self.config.n_layer
            for _ in range(max_new_tokens):
                if idx.size(1) <= self.block_size:
                    logits, _, cache = self(idx, kv_cache=cache)
                else:
                    logits, _ = self(idx[:, -self.block_size :])
                last = logits[:, -1, :] / temperature
                if top_k is not None:
                    values, _ = torch.topk(last, top_k)
                    last[last < values[:, [-1]]] = -float("inf")
                p = F.softmax(last, dim=-1)
                token = torch.multinomial(p, 1) if do_sample else torch.topk(p, k=1, dim=-1)[1]
                idx = torch.cat((idx, token), dim=1)
        return idx


class ModelPrefill(GPT):
    "The prompt first, then a loop that ends before the last token would be encoded for nothing."

    block_class = BlockTokenByToken

    def forward(self, idx, targets=None, kv_cache=None, compute_first=False):
        if kv_cache is None:
            x = self.embed(idx)
            for block in self.transformer.h:
                x = block(x)[0]
            return self.predict(x, targets)
        layers = list(kv_cache)
        if compute_first:
            layers = [None] * self.config.n_layer
        P = layers[0][0].size(1) if layers[0] else 0
        x = self.embed(idx[:, P:], start=P)
        for i, block in enumerate(self.transformer.h):
            x, layers[i] = block(x, layers[i])
        return (*self.predict(x, None if targets is None else targets[:, P:]), layers)

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        empty = [None] * self.config.n_layer
        logits, cache = None, empty
        for step in range(max_new_tokens):
            window = idx[:, -self.block_size :]
            if idx.size(1) > self.block_size:
                cache = empty
            logits, _, cache = self.forward(window, None, cache)
            idx = torch.cat([idx, next_token(logits[:, -1], temperature, do_sample, top_k)], dim=1)
        return idx


class ModelPromptTokenByToken(GPT):
    "Encodes the prompt one token at a time, and the last token for nothing; both cost only time."

    block_class = BlockDirect
    forward = ModelAsTheHints.forward

    @torch.no_grad()
    def generate_kv(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        if idx.size(1) + max_new_tokens > self.block_size:
            return ModelAsTheHints.generate_kv(self, idx, max_new_tokens, temperature, do_sample, top_k)
        cache = [None] * self.config.n_layer
        for t in range(1, idx.size(1) + 1):
            logits, _, cache = self(idx[:, :t], kv_cache=cache)
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, next_token(logits[:, -1], temperature, do_sample, top_k)], dim=1)
            logits, _, cache = self(idx, kv_cache=cache)
        return idx


ATTENTIONS = (AsTheHints, FusedBoolMask, FusedFloatMask, Einops, TokenByToken, OwnAttend, Preallocated)
BLOCKS = (BlockAsTheHints, BlockWrittenOut, BlockTokenByToken, BlockDirect)
MODELS = (ModelAsTheHints, ModelWrittenOut, ModelPrefill, ModelPromptTokenByToken)
