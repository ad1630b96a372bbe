"""Prefixes: what is found, what is never found, who is evicted, and hashes that collide."""

import pytest
import torch
from test_paged import EXACT, extend, new_pool, read, state

from kvcache_lib.paged import Pages, PoolFull
from kvcache_lib.prefix import PrefixCache, KnownPage, page_key


def encoded(cache, tokens):
    "Look a text up, encode what is not known of it, and make it known."
    text = cache.lookup(tokens)
    P = text.length
    try:
        extend(text, tokens[P:])
    except PoolFull:
        text.free()
        raise
    cache.insert(text, tokens)
    assert read(text) == tokens
    return text, P


def found(cache, tokens):
    "How many tokens are known, without keeping them."
    text = cache.lookup(tokens)
    length = text.length
    text.free()
    return length


def same(*_):
    return 0


hashes = pytest.mark.parametrize("hash_of", [hash, same, lambda z: z[1][0]], ids=["hash", "always 0", "first token"])


@hashes
def test_a_known_beginning_is_found(hash_of):
    pool = new_pool(pages=20)
    cache = PrefixCache(pool, hash_of)
    first, P = encoded(cache, list(range(10)))
    assert (P, len(cache)) == (0, 2)
    second, P = encoded(cache, [*range(8), 20, 21, 22, 23])
    assert (P, second.table[:2], len(cache)) == (8, first.table[:2], 3)
    third, P = encoded(cache, [*range(4), 20, 21, 22, 23, 9])  # the same page of tokens after another one
    assert (P, third.table[0], len(cache)) == (4, first.table[0], 4)
    _, P = encoded(cache, [20, 21, 22, 23, 0, 1, 2, 3, 4])
    assert (P, len(cache)) == (0, 6)


@hashes
def test_one_token_is_left_to_encode(hash_of):
    cache = PrefixCache(new_pool(pages=20), hash_of)
    encoded(cache, list(range(12)))
    assert [cache.lookup(list(range(n))).length for n in (0, 1, 4, 5, 8, 9, 12, 13, 16)] == [0, 0, 0, 4, 4, 8, 8, 12, 12]


def test_the_turns_of_a_chat():
    cache = PrefixCache(new_pool(pages=20))
    talk, lengths = list(range(6)), []
    for turn in range(4):
        text, P = encoded(cache, talk)
        extend(text, [50 + turn, 60 + turn, 70 + turn])  # the answer
        talk = [*talk, 50 + turn, 60 + turn, 70 + turn]
        cache.insert(text, talk)
        text.free()
        lengths.append(P)
        talk = [*talk, 80 + turn]
    assert lengths == [0, 8, 12, 16]


def test_two_that_were_encoded_at_once_end_in_the_same_pages():
    pool = new_pool()
    cache, tokens = PrefixCache(pool), list(range(9))
    a, b = cache.lookup(tokens), cache.lookup(tokens)
    for text in (a, b):
        extend(text, tokens)
    assert (cache.insert(a, tokens), cache.insert(b, tokens)) == (2, 0)
    assert (a.table[:2], len(pool) - pool.free_pages, read(b)) == (b.table[:2], 4, tokens)
    a.free()
    b.free()
    assert (pool.free_pages, cache.clear(), pool.free_pages) == (6, 2, 8)


def test_the_least_recently_used_are_evicted_first_and_ends_before_beginnings():
    pool = new_pool(pages=6)
    cache = PrefixCache(pool)
    a, b = [*range(8), 8], [*range(20, 28), 28]
    for tokens in (a, b):
        encoded(cache, tokens)[0].free()
    cache.lookup(a).free()  # used once more
    assert (len(cache), pool.free_pages) == (4, 2)
    new = pool.new_text()
    extend(new, list(range(40, 52)))
    assert (len(cache), found(cache, b), found(cache, a)) == (3, 4, 8)  # one page had to go, b's last
    extend(new, list(range(52, 56)))
    assert (len(cache), found(cache, b), found(cache, a)) == (2, 0, 8)


def test_a_page_in_use_is_never_evicted():
    pool = new_pool(pages=4)
    cache = PrefixCache(pool)
    text, _ = encoded(cache, list(range(9)))
    before = state(pool)
    with pytest.raises(PoolFull):
        extend(pool.new_text(), list(range(8)))
    assert (state(pool), len(cache), cache.unused, cache.clear()) == (before, 2, 0, 0)
    text.free()
    assert cache.unused == 2
    again = cache.lookup(list(range(9)))
    with pytest.raises(PoolFull):  # what was looked up is in use again
        extend(pool.new_text(), list(range(12)))
    assert read(again) == list(range(8))


def test_a_known_page_is_not_written():
    cache = PrefixCache(new_pool())
    text, _ = encoded(cache, list(range(8)))
    text.crop(6)
    extend(text, [60, 70])
    assert read(text) == [*range(6), 60, 70]
    assert read(cache.lookup(list(range(9)))) == list(range(8))


def test_random_texts_hold_what_a_plain_search_finds():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))
    pool = new_pool(pages=12)
    cache, seen, running, hits = PrefixCache(pool, lambda z: z[1][0]), [], [], 0
    for _ in range(300):
        tokens = [draw(2) for _ in range(1 + draw(16))]
        common = max((sum(1 for _ in iter_common(tokens[:-1], other)) // 4 * 4 for other in seen), default=0)
        try:
            text, P = encoded(cache, tokens)
        except PoolFull:
            while running:
                running.pop().free()
            continue
        hits += P > 0
        assert P <= common
        seen.append(tokens)
        running.append(text)
        if draw(2):
            running.pop(draw(len(running))).free()
        held = [page for z in running for page in z.table]
        known = [z.page for z in cache.used]
        assert len(set(known)) == len(known) and all(pool.users[p] == held.count(p) + known.count(p) for p in range(12))
        assert sum(len(z) for z in cache.found.values()) == len(cache)
        assert all(z.before is None or z.before in cache.used for z in cache.used), "nobody is evicted before those that follow"
    assert hits > 50
    for text in running:
        text.free()
    cache.clear()
    assert (pool.free_pages, len(cache), cache.found) == (12, 0, {})


def iter_common(a, b):
    for x, y in zip(a, b):
        if x != y:
            return
        yield x


def test_the_key_depends_on_what_lies_before():
    first = [KnownPage(n, own, None, page_key(None, own)) for n, own in enumerate([(1, 2), (9, 2)])]
    assert page_key(first[0], (3, 4)) != page_key(first[1], (3, 4)) != page_key(None, (3, 4))
    assert page_key(first[0], (3, 4)) == page_key(KnownPage(7, (1, 2), None, page_key(None, (1, 2))), (3, 4))


def test_plain_numbers_without_a_tensor():
    pages = Pages(6, page_size=2)
    cache, table = PrefixCache(pages), pages.new_text()
    table.append(5)
    assert cache.insert(table, [1, 2, 3, 4, 5]) == 2
    assert cache.lookup([1, 2, 3, 4, 6]).table == table.table[:2]


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda cache, text: PrefixCache([4]), TypeError, "expected a PagePool, got list"),
        (lambda cache, text: PrefixCache(cache.pool), ValueError, "has a cache of prefixes already"),
        (lambda cache, text: cache.insert(new_pool().new_text(), []), ValueError, "another pool"),
        (lambda cache, text: cache.insert([], []), TypeError, "expected a PagedText, got list"),
        (lambda cache, text: cache.insert(text, [0, 1]), ValueError, "the 5 tokens that the text holds, got 2"),
        (lambda cache, text: cache.lookup(torch.zeros(2, 3, dtype=torch.int64)), ValueError, "one text"),
        (lambda cache, text: cache.lookup(torch.zeros(3)), ValueError, "float32"),
    ],
)
def test_bad_input_is_refused(act, error, message):
    cache = PrefixCache(new_pool())
    text, _ = encoded(cache, list(range(5)))
    before = state(cache.pool), list(text.table), len(cache)
    with pytest.raises(error, match=message):
        act(cache, text)
    assert (state(cache.pool), text.table, len(cache)) == before
