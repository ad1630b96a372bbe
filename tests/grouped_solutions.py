"Exercise 5: wrong solutions, as edits of a right one, with the words that name them; and right ones, written in other ways."

HEAD = '''
class GroupedAttention_kv(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size, self.theta = config.n_head, config.n_kv_head, config.head_size, config.theta
        self.sizes = [n * self.head_size for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.c_proj = nn.Linear(self.sizes[0], config.n_embd, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_size, config.eps) if config.qk_norm else None for _ in range(2))

    def forward(self, x, kv_cache=None):
'''
RIGHT = '''        T, hs = x.size(1), self.head_size
        P = 0 if kv_cache is None else kv_cache[0].size(2)
        S = P + T
        q, k, v = self.c_attn(x).split(self.sizes, dim=2)
        q, k, v = (z.unflatten(2, (-1, hs)).transpose(1, 2) for z in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        at = torch.arange(S)
        turning = rotation(at[P:], hs, self.theta, x.dtype)
        q, k = rotate(q, *turning), rotate(k, *turning)
        if kv_cache is not None:
            k, v = torch.cat([kv_cache[0], k], dim=2), torch.cat([kv_cache[1], v], dim=2)
        m = self.n_head // self.n_kv_head
        keys, values = k.repeat_interleave(m, dim=1), v.repeat_interleave(m, dim=1)
        mask = visible(at[P:], at)
        y = F.scaled_dot_product_attention(q, keys, values, mask)
        return self.c_proj(y.transpose(1, 2).flatten(2)), [k, v]
'''
SPLIT = "        q, k, v = self.c_attn(x).split(self.sizes, dim=2)\n"
NORMS = "        if self.q_norm is not None:\n            q, k = self.q_norm(q), self.k_norm(k)\n"
TURNS = "        q, k = rotate(q, *turning), rotate(k, *turning)\n"
GROWS = "        if kv_cache is not None:\n            k, v = torch.cat([kv_cache[0], k], dim=2), torch.cat([kv_cache[1], v], dim=2)\n"
REPEATS = "        keys, values = k.repeat_interleave(m, dim=1), v.repeat_interleave(m, dim=1)\n"
MEMBERS = "        m = self.n_head // self.n_kv_head\n"
NO_DTYPE = "        turning = rotation(at[P:], hs, self.theta)\n"
CUTS = "        q, k, v = (z.unflatten(2, (-1, hs)).transpose(1, 2) for z in (q, k, v))\n"
COUNTS = "        P = 0 if kv_cache is None else kv_cache[0].size(2)\n"
MASK = "        mask = visible(at[P:], at)\n"
ATTENDS = "F.scaled_dot_product_attention(q, keys, values, mask)"
TURNING = "        turning = rotation(at[P:], hs, self.theta, x.dtype)\n"


def edited(*pairs):
    source = RIGHT
    for old, new in pairs:
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    return HEAD + source


def scaled(by):
    return edited((ATTENDS, f"F.scaled_dot_product_attention(q, keys, values, mask, scale={by})"))


WRONG = {  # name: (what its message must hold, the source)
    "repeat": ("repeat_interleave, not repeat", edited((REPEATS, "        keys, values = k.repeat(1, m, 1, 1), v.repeat(1, m, 1, 1)\n"))),
    "one head for all": (
        "the keys and values of head 0", edited((REPEATS, "        keys, values = (z[:, :1].expand(-1, self.n_head, -1, -1) for z in (k, v))\n")),
    ),
    "repeated before it is cached": (
        "is repeated before it is cached",
        edited((MEMBERS + REPEATS, "        keys, values = k, v\n"), (TURNS, TURNS + MEMBERS + "        k, v = k.repeat_interleave(m, dim=1), v.repeat_interleave(m, dim=1)\n")),
    ),
    "values turned": ("values are turned", edited((TURNS, TURNS + "        v = rotate(v, *turning)\n"))),
    "queries not turned": ("queries are not turned", edited((TURNS, "        k = rotate(k, *turning)\n"))),
    "keys not turned": ("keys are not turned", edited((TURNS, "        q = rotate(q, *turning)\n"))),
    "nothing turned": ("neither queries nor keys", edited((TURNS, ""))),
    "turned again": (
        "turned again: they were", edited((REPEATS, "        again = torch.cat([rotate(k[:, :, :P], *rotation(at[:P], hs, self.theta, x.dtype)), k[:, :, P:]], dim=2)\n" + REPEATS.replace("k.rep", "again.rep"))),
    ),
    "all keys turned in every call": (
        "turned again in every call",
        edited((TURNS, "        q = rotate(q, *turning)\n"), (GROWS, GROWS + "        k = rotate(k, *rotation(at, hs, self.theta, x.dtype))\n")),
    ),
    "keys cached as they came, and turned at each step": (
        "cached before they are turned",
        edited((TURNS, "        q = rotate(q, *turning)\n"), (REPEATS, REPEATS.replace("k.rep", "rotate(k, *rotation(at, hs, self.theta, x.dtype)).rep"))),
    ),
    "keys cached as they came, and never turned": (
        "cached before they are turned",
        edited((TURNS, "        q, turned = rotate(q, *turning), rotate(k, *turning)\n"), (REPEATS, "        keys = torch.cat([k[:, :, :P], turned], dim=2)\n" + REPEATS.replace("k.rep", "keys.rep"))),
    ),
    "positions from 0": ("the positions start at 0 in each call", edited((TURNING, TURNING.replace("at[P:]", "at[:T]")))),
    "queries from 0": (
        "the new queries are turned from position 0", edited((TURNS, TURNS.replace("rotate(q, *turning)", "rotate(q, *rotation(at[:T], hs, self.theta, x.dtype))"))),
    ),
    "theta forgotten": ("theta is not the configuration's", edited((TURNING, TURNING.replace("self.theta", "10_000")))),
    "no mask": ("there is no mask", edited((ATTENDS, "F.scaled_dot_product_attention(q, keys, values)"))),
    "is_causal": ("the mask begins at the left", edited((ATTENDS, "F.scaled_dot_product_attention(q, keys, values, is_causal=True)"))),
    "the cache not seen": ("the cached tokens are not seen", edited((ATTENDS, "F.scaled_dot_product_attention(q, keys[:, :, P:], values[:, :, P:], mask[:, P:])"))),
    "not scaled": ("are not scaled", scaled("1")),
    "scaled by the head size": ("divided by the head size", scaled("1 / hs")),
    "scaled by the width": ("root of n_embd:", scaled("x.size(2) ** -0.5")),
    "scaled by all heads": ("root of n_head · head_size", scaled("self.sizes[0] ** -0.5")),
    "scaled by the heads of keys": ("root of n_kv_head · head_size", scaled("self.sizes[1] ** -0.5")),
    "scaled by the number of heads of keys": ("root of n_kv_head:", scaled("self.n_kv_head ** -0.5")),
    "normed after turning": ("normed after they are turned", edited((NORMS, ""), (TURNS, TURNS + NORMS))),
    "not normed": ("queries and keys are not normed", edited((NORMS, ""))),
    "keys not normed": ("keys are not normed", edited((NORMS, NORMS.replace(", self.k_norm(k)", ", k")))),
    "queries not normed": ("queries are not normed", edited((NORMS, NORMS.replace("= self.q_norm(q)", "= q")))),
    "normed and turned after it is cached": (
        "cached before they are turned",
        edited((NORMS, ""), (TURNING + TURNS + GROWS, GROWS + "        raw = k\n" + NORMS + "        all = rotation(at, hs, self.theta, x.dtype)\n        q, k = rotate(q, *[z[P:] for z in all]), rotate(k, *all)\n"),
               (", [k, v]", ", [raw, v]")),
    ),
    "values before keys": ("taken as queries, values, keys", edited((SPLIT, SPLIT.replace("q, k, v", "q, v, k")))),
    "keys, values, queries": (
        "taken as keys, values, queries", edited((SPLIT, "        k, v, q = self.c_attn(x).split([self.sizes[1], self.sizes[1], self.sizes[0]], dim=2)\n")),
    ),
    "cut by groups": (
        "cut by groups",
        edited((SPLIT, "        z = self.c_attn(x).unflatten(2, (self.n_kv_head, -1, hs))\n        q, k, v = (part.flatten(2) for part in (z[:, :, :, :-2].flatten(2, 3), z[:, :, :, -2], z[:, :, :, -1]))\n")),
    ),
    "no dtype": ("computed in float32", edited((TURNING, NO_DTYPE))),
    "no dtype, and repeat": (
        "repeat_interleave, not repeat", edited((TURNING, NO_DTYPE), (REPEATS, "        keys, values = k.repeat(1, m, 1, 1), v.repeat(1, m, 1, 1)\n")),
    ),
    "no dtype, and no mask": ("there is no mask:", edited((TURNING, NO_DTYPE), (ATTENDS, "F.scaled_dot_product_attention(q, keys, values)"))),
    "no dtype, for the cached keys alone": (
        "computed in float32", edited((TURNS, "        raw = k\n" + TURNS), (", [k, v]", ", [k if P else rotate(raw, *rotation(at, hs, self.theta)), v]")),
    ),
    "is_causal where there is no cache": ("no mask behind cached tokens", edited((ATTENDS, "F.scaled_dot_product_attention(q, keys, values, is_causal=P == 0)"))),
    "a mask where there is no cache": ("no mask behind cached tokens", edited((ATTENDS, "F.scaled_dot_product_attention(q, keys, values, mask if P == 0 else None)"))),
    "a mask without itself": ("a token does not see itself", edited((MASK, MASK.replace("at[P:], at", "at[P:] - 1, at")))),
    "a mask with the next": ("sees the one after it", edited((MASK, MASK.replace("at[P:], at", "at[P:] + 1, at")))),
    "heads interleaved": ("the heads are interleaved", edited((CUTS, CUTS.replace("z.unflatten(2, (-1, hs)).transpose(1, 2)", "z.unflatten(2, (hs, -1)).permute(0, 3, 1, 2)")))),
    "heads by a reshape": ("a reshape to (B, heads, T, hs)", edited((CUTS, CUTS.replace("z.unflatten(2, (-1, hs)).transpose(1, 2)", "z.reshape(z.size(0), -1, T, hs)")))),
    "heads by a reshape, there and back": (
        "put together again, by reshapes",
        edited((CUTS, CUTS.replace("z.unflatten(2, (-1, hs)).transpose(1, 2)", "z.reshape(z.size(0), -1, T, hs)")), ("y.transpose(1, 2).flatten(2)", "y.reshape(y.size(0), T, -1)")),
    ),
    "q_norm for keys": ("keys are normed by q_norm", edited((NORMS, NORMS.replace("self.k_norm(k)", "self.q_norm(k)")))),
    "k_norm for queries": ("queries are normed by k_norm", edited((NORMS, NORMS.replace("self.q_norm(q)", "self.k_norm(q)")))),
    "norms swapped": ("q_norm and k_norm are swapped", edited((NORMS, NORMS.replace("= self.q_norm(q), self.k_norm(k)", "= self.k_norm(q), self.q_norm(k)")))),
    "normed over all heads": (
        "over all heads of a token",
        edited((NORMS, "        if self.q_norm is not None:\n            q, k = (z / (z.square().mean((1, 3), keepdim=True) + 1e-5).sqrt() * f.weight for z, f in ((q, self.q_norm), (k, self.k_norm)))\n")),
    ),
    "normed before the heads are cut": (
        "cut into heads first, then norm", edited((NORMS, ""), (CUTS, NORMS + CUTS)),
    ),
    "split(C)": ("cut by `self.sizes`?", edited((SPLIT, "        q, k, v = self.c_attn(x).split(x.size(2), dim=2)\n"))),
    "P from the heads": ("P is kv_cache[0].size(2)", edited((COUNTS, COUNTS.replace("size(2)", "size(1)")))),
    "P from the heads, for positions alone": (
        "not the number of cached tokens but of heads",
        edited((TURNING, TURNING.replace("at[P:]", "(0 if P == 0 else self.n_kv_head) + torch.arange(T)"))),
    ),
    "joined along the heads": ("joined to the old ones along dim 2", edited((GROWS, GROWS.replace("dim=2", "dim=1")))),
    "chunk(3)": ("cut by `self.sizes`?", edited((SPLIT, "        q, k, v = self.c_attn(x).chunk(3, dim=2)\n"))),
    "heads not side by side": ("side by side", edited(("y.transpose(1, 2).flatten(2)", "y.reshape(*x.shape[:2], -1)"))),
    "no projection": ("the shape and the dtype of x", edited(("self.c_proj(y.transpose(1, 2).flatten(2))", "y.transpose(1, 2).flatten(2)"))),
    "only the new ones are cached": ("only the new tokens are cached", edited((GROWS, GROWS.replace("            k, v", "            new = k, v\n            k, v")), (", [k, v]", ", [k[:, :, P:], v[:, :, P:]]"))),
    "new before old": ("before the old ones", edited((", [k, v]", ", [torch.cat([z[:, :, P:], z[:, :, :P]], dim=2) for z in (k, v)]"))),
    "values first": ("keys come first", edited((", [k, v]", ", [v, k]"))),
    "the list is changed": (
        "the cache is changed in place", edited((GROWS, GROWS + "            kv_cache[:] = k, v\n")),
    ),
    "y alone": ("return two things", edited((", [k, v]", ""))),
}  # fmt: skip

RIGHTS = {
    "as in the course": HEAD + RIGHT,
    "the notebook's groups": "from kvcache_lib.llama import grouped_attention\n"
    + edited((MEMBERS + REPEATS, ""), (ATTENDS, "grouped_attention(q, k, v, mask if P and T > 1 else None)")),
    "PyTorch's own groups": edited((MEMBERS + REPEATS, ""), (ATTENDS, "F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)")),
    "members are an axis, scores by hand": HEAD + '''
        B, T, _ = x.shape
        G, hs = self.n_kv_head, self.head_size
        z = self.c_attn(x).view(B, T, -1, hs).movedim(2, 1)
        q, k, v = z[:, : self.n_head], z[:, self.n_head : -G], z[:, -G:]
        if self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        P = kv_cache[0].shape[2] if kv_cache else 0
        cos, sin = rotation(torch.arange(P, P + T), hs, self.theta, x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv_cache:
            k, v = (torch.cat(pair, 2) for pair in zip(kv_cache, (k, v)))
        scores = torch.einsum("bgmtd,bgsd->bgmts", q.unflatten(1, (G, -1)), k) / math.sqrt(hs)
        future = torch.ones(T, P + T, dtype=torch.bool).triu(P + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        y = torch.einsum("bgmts,bgsd->btgmd", weights, v)
        return self.c_proj(y.reshape(B, T, -1)), (k, v)
''',
    "head by head": HEAD + '''
        z = self.c_attn(x).split(self.head_size, dim=2)
        P, T = 0 if kv_cache is None else kv_cache[0].size(2), x.size(1)
        turning = rotation(torch.arange(P, P + T), self.head_size, self.theta, x.dtype)
        norm = lambda f, y: y if f is None else f(y)
        qs = [rotate(norm(self.q_norm, y), *turning) for y in z[: self.n_head]]
        k = torch.stack([rotate(norm(self.k_norm, y), *turning) for y in z[self.n_head : self.n_head + self.n_kv_head]], 1)
        v = torch.stack(z[self.n_head + self.n_kv_head :], 1)
        if kv_cache is not None:
            k, v = torch.cat((kv_cache[0], k), 2), torch.cat((kv_cache[1], v), 2)
        out = []
        for h, q in enumerate(qs):
            g = h * self.n_kv_head // self.n_head
            score = q @ k[:, g].mT * self.head_size**-0.5
            score = score + torch.full_like(score, -torch.inf).triu(P + 1)
            out.append(score.softmax(2) @ v[:, g])
        return self.c_proj(torch.cat(out, 2)), [k, v]
''',
    "heads by an index, complex numbers": edited(
        (TURNING + TURNS, '''        w = self.theta ** (-torch.arange(hs // 2, dtype=torch.float64) * 2 / hs)
        turn = torch.exp(1j * at[P:, None] * w)
        def turned(z):
            c = torch.complex(z[..., : hs // 2].double(), z[..., hs // 2 :].double()) * turn
            return torch.cat([c.real, c.imag], -1).to(z.dtype)
        q, k = turned(q), turned(k)
'''),
        (REPEATS, "        which = torch.arange(self.n_head).div(m, rounding_mode='floor')\n        keys, values = k[:, which], v[:, which]\n"),
    ),
}  # fmt: skip
