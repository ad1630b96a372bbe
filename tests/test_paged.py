"""Pages: who holds which, what is shared, what is copied, and what an exception leaves."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvcache_lib.config import GPTConfig
from kvcache_lib.llama import LlamaConfig
from kvcache_lib.paged import PagePool, Pages, PagedText, PageTable, PoolFull

SIZES = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=11)
EXACT = dict(rtol=0, atol=0)


def new_pool(pages=8, page_size=4, **more):
    return PagePool(GPTConfig(**SIZES, block_size=64), pages, page_size, dtype=torch.float64, **more)


def extend(text, numbers):
    "Append a token for each number, that fills its keys, and its values with the negative."
    z = torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 2, -1, 4)
    with text.extend(len(numbers)) as layers:
        for n, layer in enumerate(layers):
            k, v = layer.write(z + 100 * n, -z - 100 * n)
    return k, v


def read(text):
    "The numbers that `extend` wrote; and all layers, heads, keys and values agree."
    if not text.length:
        return []
    found = text.pool.data.index_select(2, text.rows())  # (n_layer, 2, S, nh, hs)
    numbers = found[0, 0, :, 0, 0]
    sign = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    layer = 100 * torch.arange(2).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(found, ((numbers[:, None, None] + layer) * sign).expand_as(found).to(found), **EXACT)
    return numbers.tolist()


def state(pool):
    return sorted(pool._free), list(pool.users)


def test_a_page_lies_where_the_table_says():
    pages = Pages(6, page_size=4)
    table = PageTable(pages)
    table.table, table.length = [5, 2, 0], 9
    assert [table.place(p) for p in (0, 3, 4, 7, 8)] == [(5, 0), (5, 3), (2, 0), (2, 3), (0, 0)]


@pytest.mark.parametrize("steps", [[1] * 9, [9], [4, 4, 1], [3, 1, 4, 0, 1], [0, 9]])
def test_pages_are_taken_when_they_are_needed(steps):
    pages, length = Pages(6, page_size=4), 0
    table = PageTable(pages)
    for n in steps:
        assert table.append(n) is None
        length += n
        assert (table.length, len(table.table)) == (length, -(-length // 4))
        assert len(set(table.table)) == len(table.table) == 6 - pages.free_pages
    table.free()
    assert (table.table, table.length, pages.free_pages, pages.users) == ([], 0, 6, [0] * 6)
    table.free()  # it holds nothing: nothing happens
    assert pages.free_pages == 6


def test_a_full_pool_changes_nothing():
    pool = new_pool(pages=3)
    text, other = pool.new_text(), pool.new_text()
    extend(text, range(6))
    before = state(pool)
    with pytest.raises(PoolFull, match="2 more pages are needed, 1 of 3 are free"):
        extend(other, range(5))
    assert (state(pool), other.table, other.length, read(text)) == (before, [], 0, [0, 1, 2, 3, 4, 5])
    extend(other, range(4))
    fork = text.fork()
    with pytest.raises(PoolFull):  # the copy of the last page
        extend(fork, [9])
    assert (fork.length, fork.table, read(fork)) == (6, text.table, read(text))
    other.free()
    extend(fork, [9])
    assert (read(fork), read(text)) == ([0, 1, 2, 3, 4, 5, 9], [0, 1, 2, 3, 4, 5])


def test_whoever_writes_first_copies_and_the_last_one_does_not():
    pool = new_pool()
    text = pool.new_text()
    extend(text, range(6))
    a, b = text.fork(), text.fork()
    assert (len(pool) - pool.free_pages, pool.users[text.table[0]], pool.users[text.table[1]]) == (2, 3, 3)
    extend(a, [10])
    extend(b, [20, 21, 22])
    assert (len(pool) - pool.free_pages, pool.users[text.table[1]]) == (5, 1)
    at = text.table[1]
    extend(text, [30])
    assert text.table[1] == at, "nobody shared it any more"
    assert (read(text)[-1], read(a)[-1], read(b)[-3:]) == (30, 10, [20, 21, 22])
    assert read(text)[:6] == read(a)[:6] == read(b)[:6] == [0, 1, 2, 3, 4, 5]
    for z in (text, a, b):
        z.free()
    assert state(pool) == (list(range(8)), [0] * 8)


def test_a_full_last_page_is_shared_without_a_copy():
    pool = new_pool()
    text = pool.new_text()
    extend(text, range(4))
    fork = text.fork()
    extend(fork, [4])
    assert (fork.table[0], len(pool) - pool.free_pages, read(fork)) == (text.table[0], 2, [0, 1, 2, 3, 4])


def test_forks_that_are_extended_together():
    pool = new_pool()
    text = pool.new_text()
    extend(text, range(5))
    fork = text.fork()
    with text.extend(1) as ours, fork.extend(1) as theirs:
        for layer in range(2):
            for layers, number in ((ours, 7.0), (theirs, 8.0)):
                z = torch.full((1, 2, 1, 4), number + 100 * layer, dtype=torch.float64)
                layers[layer].write(z, -z)
    assert (read(text), read(fork)) == ([0, 1, 2, 3, 4, 7], [0, 1, 2, 3, 4, 8])
    assert len(pool) - pool.free_pages == 3


@pytest.mark.parametrize("length", range(7))
def test_cropped_texts_go_on(length):
    pool = new_pool()
    text = pool.new_text()
    extend(text, range(6))
    fork = text.fork()
    fork.crop(length)
    assert (fork.length, read(fork)) == (length, list(range(length)))
    extend(fork, [50, 51])
    assert (read(fork), read(text)) == ([*range(length), 50, 51], list(range(6)))
    text.crop(length)
    assert len(text.table) == -(-length // 4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("P", [0, 3, 4, 6])
def test_an_exception_leaves_text_and_pool_as_they_were(P, shared):
    pool = new_pool()
    text = pool.new_text()
    extend(text, range(P))
    fork = text.fork() if shared else None
    before, table = state(pool), list(text.table)
    with pytest.raises(KeyError):
        with text.extend(5) as layers:
            layers[0].write(*torch.full((2, 1, 2, 5, 4), 9.0, dtype=torch.float64))
            assert text.length == P, "it moves at the end"
            raise KeyError
    assert (state(pool), text.table, text.length, read(text)) == (before, table, P, list(range(P)))
    extend(text, [9])
    assert read(text) == [*range(P), 9] and (fork is None or read(fork) == list(range(P)))


def test_nothing_else_is_done_to_a_text_that_is_being_extended():
    text = new_pool().new_text()
    with text.extend(1):
        for act in (lambda: text.extend(1).__enter__(), text.free, text.fork, lambda: text.crop(0)):
            with pytest.raises(RuntimeError, match="being extended"):
                act()


def test_what_the_new_tokens_attend_to():
    text = new_pool().new_text()
    extend(text, range(6))
    k, v = extend(text, [6, 7, 8])
    assert k.shape == v.shape == (1, 2, 9, 4)
    assert k[0, 1, :, 3].tolist() == [100 + n for n in range(9)] and v[0, 0, :, 0].tolist() == [-100 - n for n in range(9)]


def test_gathered_rows_lie_in_the_order_of_the_text():
    "Also after a longer text was gathered into the same memory."
    pool = new_pool()
    texts = [pool.new_text() for _ in range(3)]
    for n in range(5):  # token by token in turns, so that the pages lie mixed
        for t, text in enumerate(texts[: 3 if n < 3 else 2]):
            extend(text, [10 * t + n])
    for t, text in enumerate(texts):
        K, V = pool.gather(1, text.rows())
        assert K.shape == (1, 2, text.length, 4)
        assert (K[0, 1, :, 0] - 100).tolist() == [10 * t + n for n in range(text.length)]
        torch.testing.assert_close(V, -K, **EXACT)


def test_a_text_is_extended_in_and_out_of_inference_mode():
    text = new_pool().new_text()
    with torch.inference_mode():
        extend(text, range(4))
    assert extend(text, [4, 5])[0].shape == (1, 2, 6, 4) and read(text) == list(range(6))


def test_a_copy_as_lists():
    text = new_pool().new_text()
    extend(text, range(5))
    lists = text.to_lists()
    assert [[tuple(z.shape) for z in layer] for layer in lists] == [[(1, 5, 8)] * 2] * 2
    assert lists[1][1][0, :, 7].tolist() == [-100 - n for n in range(5)]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: new_pool(pages=0), ValueError, "number of pages ≥ 1, got 0"),
        (lambda: new_pool(page_size=0), ValueError, "page_size ≥ 1, got 0"),
        (lambda: new_pool(page_size=2.5), TypeError, "page_size to be a whole number"),
        (lambda: new_pool(pages=10**12), MemoryError, "GB"),
        (lambda: PagePool(LlamaConfig(**SIZES, block_size=64, window=8), 4), ValueError, "without a window, got one of 8"),
        (lambda: PagePool({}, 4), TypeError, "GPTConfig"),
        (lambda: Pages(4).release(2), ValueError, "page 2 is free"),
        (lambda: Pages(4).share(0), ValueError, "page 0 is free"),
        (lambda: extend(new_pool(pages=40).new_text(), range(65)), ValueError, "may hold 64, not 65"),
        (lambda: new_pool().new_text().extend(1.5).__enter__(), TypeError, "n to be a whole number"),
        (lambda: new_pool().new_text().extend(-1).__enter__(), ValueError, "n ≥ 0"),
        (lambda: new_pool().new_text().crop(1), ValueError, "length ≤ 0, got 1"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Texts(RuleBasedStateMachine):
    "Any order of what may be done to texts; a plain list of numbers says what each must hold."

    texts = Bundle("texts")

    def __init__(self):
        super().__init__()
        self.pool, self.expected, self.next = new_pool(pages=7), {}, 0

    @rule(target=texts)
    def begin(self):
        text = self.pool.new_text()
        self.expected[text] = []
        return text

    @rule(target=texts, text=texts)
    def fork(self, text):
        other = text.fork()
        self.expected[other] = list(self.expected[text])
        return other

    @rule(text=texts, n=st.integers(0, 6), fails=st.booleans())
    def extend(self, text, n, fails):
        numbers = list(range(self.next, self.next + n))
        before, table = state(self.pool), list(text.table)
        try:
            if fails:
                with text.extend(n) as layers:
                    layers[0].write(*torch.full((2, 1, 2, n, 4), 9.0, dtype=torch.float64))
                    raise KeyError
            extend(text, numbers)
        except (PoolFull, KeyError):
            assert (state(self.pool), text.table) == (before, table)
            return
        self.next += n
        self.expected[text] += numbers

    @rule(text=texts, share=st.floats(0, 1))
    def crop(self, text, share):
        length = int(share * text.length)
        text.crop(length)
        del self.expected[text][length:]

    @rule(text=consumes(texts))
    def free(self, text):
        text.free()
        del self.expected[text]

    @invariant()
    def every_page_is_held_as_often_as_it_is_counted(self):
        held = [page for text in self.expected for page in text.table]
        assert self.pool.users == [held.count(page) for page in range(len(self.pool))]
        assert sorted(self.pool._free) == [page for page in range(len(self.pool)) if page not in held]

    @invariant()
    def every_text_holds_what_was_written(self):
        for text, numbers in self.expected.items():
            assert (read(text), text.length, len(text.table)) == (numbers, len(numbers), -(-len(numbers) // 4))


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, database=None, derandomize=True)
