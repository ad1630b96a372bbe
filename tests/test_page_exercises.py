"""The exercises on pages and prefixes: every known mistake is named, and right solutions of other styles pass."""

import pytest

from kvcache_lib.checks.pages import check_append, check_fork, check_free, check_place
from kvcache_lib.checks.prefixes import check_evict, check_find, check_lookup
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.mistakes.pages import PAGE_MISTAKES, PAGE_TABLE, PREFIX, PREFIX_MISTAKES
from kvcache_lib.mistakes.solution import written
from kvcache_lib.paged import PageTable
from kvcache_lib.prefix import PrefixCache, page_key, whole_numbers

PAGES = (check_place, check_append, check_fork, check_free)
PREFIXES = (check_find, check_lookup, check_evict)


def diagnosis(checks, cls):
    for check in checks:
        try:
            check(cls)
        except CheckFailed as e:
            return e
    return None


@pytest.mark.parametrize("mistake", PAGE_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_page_table_is_named(mistake):
    found = diagnosis(PAGES, written(mistake.source(), mistake.name))
    assert found is not None and mistake.phrase in found.mistake, found
    assert found.failed and found.example


BY_ROWS = """
class PageTable:
    def __init__(self, pool):
        self.pool, self.table, self.length = pool, [], 0

    def place(self, position):
        page, row = 0, position
        while row >= self.pool.page_size:
            page, row = page + 1, row - self.pool.page_size
        return [self.table[page], row]

    def append(self, n):
        size = self.pool.page_size
        room = len(self.table) * size - self.length
        copy = n > 0 and room > 0 and self.pool.users[self.table[-1]] != 1
        new = iter(self.pool.take((max(0, n - room) + size - 1) // size + int(copy)))
        pair = None
        if copy:
            old = self.table.pop()
            self.table.append(next(new))
            pair = [old, self.table[-1]]
            self.pool.release(old)
        self.table.extend(new)
        self.length += n
        return pair

    def fork(self):
        other = type(self)(self.pool)
        other.append(0)
        for page in self.table:
            self.pool.users[page] += 1
            other.table.append(page)
        other.length = self.length
        return other

    def free(self):
        while self.table:
            self.pool.release(self.table.pop())
        self.length = 0
"""
WITHOUT_LOOPS = PAGE_TABLE.replace("        for page in self.table:\n            self.pool.share(page)\n", "        list(map(self.pool.share, self.table))\n")
EARLY_RETURN = PAGE_TABLE.replace("    def append(self, n):\n", "    def append(self, n):\n        if n == 0:\n            return None\n").replace("n > 0 and ", "")
FIRST_IS_NEW = PAGE_TABLE.replace("new.pop()", "new.pop(0)").replace("-(-end // pool.page_size)", "(end + pool.page_size - 1) // pool.page_size")


@pytest.mark.parametrize("source", [PAGE_TABLE, BY_ROWS, WITHOUT_LOOPS, EARLY_RETURN, FIRST_IS_NEW], ids="right rows map early first".split())
def test_right_page_tables_pass(source):
    assert diagnosis(PAGES, written(source)) is None


def test_the_librarys_own_passes():
    assert diagnosis(PAGES, PageTable) is None
    with pytest.raises(TypeError, match="your class itself"):
        check_append(len)


def test_what_is_not_written_is_said_so():
    class PageTable:
        def __init__(self, pool):
            self.pool, self.table, self.length = pool, [], 0

        def place(self, position):
            raise NotImplementedError("Exercise 6: write PageTable.place")

    assert diagnosis(PAGES, PageTable).mistake == "Exercise 6 is not written yet: write PageTable.place"


def mine(source):
    "The class of the exercise on prefixes: the library's, with these methods."
    names = dict(PrefixCache=PrefixCache, page_key=page_key, whole_numbers=whole_numbers)
    exec(source, names)
    return names["Mine"]


@pytest.mark.parametrize("mistake", PREFIX_MISTAKES, ids=lambda m: m.name)
def test_a_wrong_prefix_is_named(mistake):
    found = diagnosis(PREFIXES, mine(mistake.source()))
    assert found is not None and mistake.phrase in found.mistake, found
    assert found.failed and found.example


RECURSIVE = PREFIX[: PREFIX.index("    def find")] + """
    def find(self, tokens, before=None):
        size = self.pool.page_size
        own, rest = tuple(tokens[:size]), tokens[size:]
        for z in self.found.get(page_key(before, own, self.hash_of), ()) if len(own) == size else ():
            if (z.tokens, z.before) == (own, before):
                return [z, *self.find(rest, z)]
        return []

    def lookup(self, tokens):
        *tokens, _ = whole_numbers(tokens)
        text, chain = self.pool.new_text(), self.find(tokens)
        text.table = [z.page for z in chain]
        text.length = len(text.table) * self.pool.page_size
        list(map(self.pool.share, text.table))
        self.touch(chain)
        return text

    def evict(self, n):
        gone = 0
        for known in [*self.used]:
            if gone < n and self.pool.users[known.page] < 2:
                self.forget(known)
                gone += 1
        return gone
"""
BY_USE = PREFIX.replace("same_key = self.found.get(page_key(before, own, self.hash_of), [])", "same_key = self.used")
BY_MOVING = PREFIX.replace("self.touch(chain)", "for known in chain[::-1]:\n            self.used.move_to_end(known)")
STARTS = PREFIX.replace("range(size, len(tokens) + 1, size)", "[size * (n + 1) for n in range(len(tokens) // size)]")


@pytest.mark.parametrize("source", [PREFIX, RECURSIVE, BY_USE, BY_MOVING, STARTS], ids="right recursive used moving starts".split())
def test_right_prefixes_pass(source):
    assert diagnosis(PREFIXES, mine(source)) is None
