"Exercise 4: wrong solutions, as edits of a right one, with the words that name them; and right ones, written in other ways."

RIGHT = '''
def ring_attention(q, k, v, ring, P):
    W, T = ring.size(3), q.size(2)
    old, new = torch.arange(max(0, P - W), P), torch.arange(P, P + T)
    turning = rotation(new, q.size(3), dtype=q.dtype)
    q, k = rotate(q, *turning), rotate(k, *turning)
    held = ring[:, :, :, old % W]
    keys, values = torch.cat([held, torch.stack([k, v])], dim=3)
    mask = visible(new, torch.cat([old, new]), W)
    y = F.scaled_dot_product_attention(q, keys, values, mask)
    ring[:, :, :, new[-W:] % W] = torch.stack([k, v])[:, :, :, -W:]
    return y
'''
ROTATES = "    q, k = rotate(q, *turning), rotate(k, *turning)\n"
TURNING, NO_DTYPE = "    turning = rotation(new, q.size(3), dtype=q.dtype)\n", "    turning = rotation(new, q.size(3))\n"
HELD = "    held = ring[:, :, :, old % W]\n"
WRITES = "    ring[:, :, :, new[-W:] % W] = torch.stack([k, v])[:, :, :, -W:]\n"
ATTENDS = "    y = F.scaled_dot_product_attention(q, keys, values, mask)\n"
MASK = "visible(new, torch.cat([old, new]), W)"


def edited(*pairs):
    source = RIGHT
    for old, new in pairs:
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    return source


WRONG = {  # name: (what its message must hold, the source)
    "rows in place of positions": ("numbers of their rows", edited(("rotation(new,", "rotation(new % W,"))),
    "keys by their rows": (
        "keys are turned by the numbers of their rows", edited((ROTATES, "    q, k = rotate(q, *turning), rotate(k, *rotation(new % W, q.size(3), dtype=q.dtype))\n")),
    ),
    "row p": ("is it written to row p?", edited(("new[-W:] % W", "new[-W:]"))),
    "row p, by a slice": ("is it written to row p?", edited((WRITES, "    ring[:, :, :, P : P + T] = torch.stack([k, v])\n"))),
    "rows P mod W on, by a slice": ("is it written to row p?", edited((WRITES, "    ring[:, :, :, P % W : P % W + T] = torch.stack([k, v])\n"))),
    "written before it attends": (
        "the chunk is written before the ring is read", edited((HELD, WRITES + HELD), (ATTENDS + WRITES, ATTENDS)),
    ),
    "written before it attends, over the rows": (
        "the chunk is written before it attends",
        edited((HELD, WRITES + "    all = torch.arange(max(0, P + T - W), P + T)\n    held = ring[:, :, :, all % W]\n"),
               ("torch.cat([held, torch.stack([k, v])], dim=3)", "held"), (MASK, "visible(new, all, W)"), (ATTENDS + WRITES, ATTENDS)),
    ),
    "a band of W + 1": ("one too wide", edited((MASK, "visible(new, torch.cat([old, new]), W + 1)"))),
    "a band of W − 1": ("one too narrow", edited((MASK, "visible(new, torch.cat([old, new]), W - 1)"))),
    "no band": ("there is no band", edited((MASK, "visible(new, torch.cat([old, new]))"))),
    "no mask": ("there is no mask", edited((MASK, "None"))),
    "a mask from the left": ("the mask begins at the left", edited((MASK, "torch.ones(T, len(old) + T).tril().bool()"))),
    "values turned": ("values are turned", edited((ROTATES, ROTATES + "    v = rotate(v, *turning)\n"))),
    "values turned in the ring": (
        "values are written turned", edited((WRITES, WRITES.replace("[k, v]", "[k, rotate(v, *turning)]"))),
    ),
    "turned again": (
        "keys from the ring are turned again: they were turned",
        edited((ATTENDS, "    keys = torch.cat([rotate(held[0], *rotation(old, q.size(3), dtype=q.dtype)), k], dim=2)\n" + ATTENDS)),
    ),
    "turned again and written back": (
        "turned again in every call",
        edited((HELD, HELD + "    held[0] = rotate(held[0], *rotation(old, q.size(3), dtype=q.dtype))\n    ring[:, :, :, old % W] = held\n")),
    ),
    "queries forgotten": ("queries are not turned", edited((ROTATES, "    k = rotate(k, *turning)\n"))),
    "keys forgotten": ("keys are not turned", edited((ROTATES, "    q = rotate(q, *turning)\n"))),
    "both forgotten": ("neither queries nor keys are turned", edited((ROTATES, ""))),
    "cached as they came": (
        "keys are written as they came",
        edited((ROTATES, "    raw = k\n" + ROTATES), (WRITES, WRITES.replace("[k, v]", "[raw, v]"))),
    ),
    "positions from 0": ("the positions start at 0 in each call", edited(("rotation(new,", "rotation(torch.arange(T),"))),
    "queries from 0": (
        "the new queries are turned from position 0",
        edited((ROTATES, "    q, k = rotate(q, *rotation(torch.arange(T), q.size(3), dtype=q.dtype)), rotate(k, *turning)\n")),
    ),
    "nothing is written": ("not written to the ring", edited((WRITES, ""))),
    "the ring is not read": (
        "the ring is not read", edited(("torch.cat([held, torch.stack([k, v])], dim=3)", "torch.stack([k, v])"), (MASK, "visible(new, new, W)")),
    ),
    "the first of a long chunk are kept": ("longer than the ring", edited((WRITES, "    ring[:, :, :, new[:W] % W] = torch.stack([k, v])[:, :, :, :W]\n"))),
    "rows in which nothing lies": (
        "in which nothing lies yet",
        edited((HELD, "    held = ring if P < W else ring[:, :, :, old % W]\n"), (MASK, "torch.ones(T, 1).bool() & visible(new, torch.cat([old, new]), W) if P >= W else "
               "F.pad(visible(new, torch.cat([old, new]), W), (W - P, 0), value=True)")),
    ),
    "rows taken in the order of the text": ("in the order of the text", edited((HELD, "    held = ring[:, :, :, : len(old)]\n"))),
    "no dtype": ("computed in float32", edited((TURNING, NO_DTYPE))),
    "no dtype, for the written keys alone": (
        "computed in float32", edited((ROTATES, "    raw = k\n" + ROTATES), (WRITES, WRITES.replace("[k, v]", "[rotate(raw, *rotation(new, q.size(3))), v]"))),
    ),
    "no dtype, and queries forgotten": ("queries are not turned", edited((TURNING, NO_DTYPE), (ROTATES, "    k = rotate(k, *turning)\n"))),
    "no dtype, and no mask": ("there is no mask:", edited((TURNING, NO_DTYPE), (MASK, "None"))),
    "no dtype, and not scaled": ("are not scaled", edited((TURNING, NO_DTYPE), (ATTENDS, ATTENDS.replace("mask)", "mask, scale=1)")))),
    "not scaled": ("are not scaled", edited((ATTENDS, ATTENDS.replace("mask)", "mask, scale=1)")))),
    "a window without itself": (
        "a token does not see itself", edited((MASK, f"{MASK} & (torch.cat([old, new])[None] != new[:, None])")),
    ),
    "a window without itself, of W before it": (
        "a token does not see itself", edited((MASK, "visible(new - 1, torch.cat([old, new]), W)")),
    ),
    "a window without itself, by hand": (
        "a token does not see itself",
        edited((ATTENDS, "    at = torch.cat([old, new])\n    s = (q @ keys.mT / math.sqrt(q.size(3))).masked_fill(~(mask & (at < new[:, None])), -math.inf)\n    y = s.softmax(3) @ values\n")),
    ),
    "a mask at the beginning alone": ("where tokens came before", edited((MASK, f"{MASK} if P == 0 else None"))),
    "a mask of rows": ("the mask is given numbers of rows: ", edited((MASK, "visible(new, torch.cat([old % W, new]), W)"))),
    "a mask of rows, for all keys": ("numbers of rows, for all keys", edited((MASK, "visible(new, torch.cat([old, new]) % W, W)"))),
    "a mask of rows, for queries too": ("for queries and keys", edited((MASK, "visible(new % W, torch.cat([old, new]) % W, W)"))),
    "changed in place": ("is changed in place", edited((ROTATES, ROTATES.replace("q, k =", "q[:], k =")))),
    "a wrong shape": ("the shape and the dtype of q", edited(("    return y", "    return y.transpose(1, 2)"))),
}  # fmt: skip

RIGHTS = {
    "as in the course": RIGHT,
    "one token after the other": '''
def ring_attention(q, k, v, ring, P):
    W, rows = ring.shape[3], []
    for j in range(q.shape[2]):
        p = P + j
        cos, sin = rotation(torch.tensor([p]), q.shape[-1], dtype=q.dtype)
        ring[0, :, :, p % W] = rotate(k[:, :, j : j + 1], cos, sin)[:, :, 0]
        ring[1, :, :, p % W] = v[:, :, j]
        K, V = ring[:, :, :, : min(p + 1, W)]
        rows.append(F.scaled_dot_product_attention(rotate(q[:, :, j : j + 1], cos, sin), K, V))
    return torch.cat(rows, dim=2)
''',
    "by hand, with complex numbers": '''
def ring_attention(q, k, v, ring, P):
    def turn(x, at):
        half = x.size(-1) // 2
        angle = at[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)

    W, S = ring.size(3), P + q.size(2)
    at = torch.arange(max(0, P - W), S)
    seen = at[at < P]
    q, k = turn(q, at[at >= P]), turn(k, at[at >= P])
    K = torch.cat([ring[0].index_select(2, seen.remainder(W)), k], 2)
    V = torch.cat([ring[1].index_select(2, seen.remainder(W)), v], 2)
    scores = torch.einsum("bhtd,bhsd->bhts", q, K) / math.sqrt(q.size(-1))
    distance = at[at >= P][:, None] - at
    scores[:, :, (distance < 0) | (distance >= W)] = float("-inf")
    for j in range(max(P, S - W), S):
        ring[0, :, :, j % W], ring[1, :, :, j % W] = k[:, :, j - P], v[:, :, j - P]
    return torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), V)
''',
    "a copy of the ring, rolled": '''
def ring_attention(q, k, v, ring, P):
    W, T = ring.size(3), q.size(2)
    turning = rotation(torch.arange(P, P + T), q.size(3), dtype=q.dtype)
    q, new = rotate(q, *turning), torch.stack([rotate(k, *turning), v])
    held = ring[:, :, :, :P] if P < W else ring.roll(-(P % W), dims=3)
    K, V = everything = torch.cat([held, new], dim=3)
    n = held.size(3)
    i, j = torch.arange(n + T)[None], torch.arange(n, n + T)[:, None]
    y = F.scaled_dot_product_attention(q, K, V, (i <= j) & (j - i < W))
    last = everything[:, :, :, -W:]
    rows = torch.arange(P + T - last.size(3), P + T) % W
    ring.index_copy_(3, rows, last)
    return y
''',
    "rows with the token that lies there": '''
def ring_attention(q, k, v, ring, P):
    "All rows of the ring and all new tokens are keys; a mask says which of them count."
    W, T = ring.size(3), q.size(2)
    new = P + torch.arange(T)
    rows = torch.arange(W)
    lies = P - 1 - (P - 1 - rows) % W  # the newest token of each row; below 0: none
    cos, sin = rotation(new, q.size(3), dtype=q.dtype)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    at = torch.cat([lies, new])
    mask = visible(new, at, W) & (at >= 0)
    y = F.scaled_dot_product_attention(q, torch.cat([ring[0], k], 2), torch.cat([ring[1], v], 2), mask)
    for r in range(W):
        latest = P + T - 1 - (P + T - 1 - r) % W
        if latest >= P:
            ring[0][:, :, r] = k[:, :, latest - P]
            ring[1][:, :, r] = v[:, :, latest - P]
    return y
''',
}
