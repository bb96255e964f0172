"""Who holds which pages of key-value memory, and which context already knows the beginning of a new one.

Pure bookkeeping: the numbers of pages and slots, never the tensors. A context is a row of token ids of which the first
`computed` have their keys and values in its pages. Contexts that no request holds stay, least recently used first in
line to go, for whoever comes with the same beginning. A full page may belong to several contexts; a page that is
partly used belongs to one, and sharing it copies it.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

BLOCK = 16  # tokens; a shorter common beginning is not looked for


class Context:
    """Token ids, and where their keys and values lie."""

    __slots__ = ("busy", "computed", "hashes", "pages", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.computed = 0
        self.pages: list[int] = []
        self.hashes: list[int] = []
        self.busy = True


class Cache:
    """`copy(source, target, count)` copies the first slots of a page into another."""

    def __init__(self, pages: int, page_size: int, copy: Callable[[int, int, int], None]) -> None:
        self.page_size = page_size
        self.pages = pages
        self.hits = self.lookups = self.evictions = 0  # hits and lookups in tokens
        self._copy = copy
        self._free = list(range(pages))  # a heap: low pages first keeps the busy ones together
        self._holders: Counter[int] = Counter()
        self._idle: OrderedDict[Context, None] = OrderedDict()
        self._index: dict[int, dict[Context, None]] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def idle_pages(self) -> int:
        """Held by what may be given up; with nobody at work, all that are not free."""
        return len({page for context in list(self._idle) for page in context.pages})

    def in_the_making(self, tokens: Sequence[int]) -> bool:
        """Is another request computing right now what one with these tokens could share?"""
        known, length = self._longest(list(tokens))
        return known is not None and known.busy and length - min(length, known.computed) >= BLOCK

    def open(self, tokens: Sequence[int], room: int) -> Context | None:
        """A context of these tokens with memory for them and `room` more, as much of it computed as anyone has.

        None while there is no memory.
        """
        tokens = list(tokens)
        known, length = self._longest(tokens)
        usable = min(length, known.computed) if known else 0
        needed = self._pages_for(len(tokens) + room)
        if known and self._may_be_taken(known, usable):
            context = known
            del self._idle[context]
            self._truncate(context, usable)
            self._shrink(context)
            if not self._grow(context, needed):
                self._rest(context)
                return None
            context.busy = True
            context.tokens = tokens
        else:
            context = Context(tokens)
            if not self._fork(context, known, usable, needed):
                self._release(context.pages)
                return None
        self.lookups += len(tokens)
        self.hits += context.computed
        self._register(context)
        return context

    def reserve(self, context: Context, length: int) -> bool:
        """Memory for that many tokens; False when there is none."""
        return self._grow(context, self._pages_for(length))

    def commit(self, context: Context, tokens: Sequence[int]) -> None:
        """These tokens follow, and their keys and values are in place."""
        context.tokens += tokens
        context.computed = len(context.tokens)
        self._register(context)

    def close(self, context: Context) -> None:
        """Its request is done; what is computed stays for others."""
        self._truncate(context, context.computed)
        self._rest(context)

    def drop(self, context: Context) -> None:
        """Its request needs the memory back more than the past."""
        self._truncate(context, 0)
        self._release(context.pages)
        context.pages = []

    def forget(self) -> None:
        """Drops every context that no request holds."""
        while self._idle:
            self.drop(self._idle.popitem()[0])

    def _rest(self, context: Context) -> None:
        context.busy = False
        if context.computed < BLOCK:  # nobody will find it
            self.drop(context)
            return
        self._shrink(context)
        self._idle[context] = None

    def _longest(self, tokens: list[int]) -> tuple[Context | None, int]:
        """The context with the longest common beginning, and its length; idle ones first among equals."""
        candidates: tuple[Context, ...] = ()
        chained = start = 0
        while start + BLOCK <= len(tokens):
            chained = hash((chained, *tokens[start : start + BLOCK]))
            if not (holders := self._index.get(chained)):
                break
            candidates, start = tuple(holders), start + BLOCK
        best: Context | None = None
        length = 0
        for context in candidates:
            common = _common(context.tokens, tokens, start)
            if common > length or (common == length and best and best.busy and not context.busy):
                best, length = context, common
        return best, length

    def _may_be_taken(self, context: Context, usable: int) -> bool:
        """Taking a context over destroys its rest: not where that is the greater part, nor where another shares it."""
        if context.busy or context.computed - usable > usable:
            return False
        return usable % self.page_size == 0 or self._holders[context.pages[usable // self.page_size]] == 1

    def _fork(self, context: Context, source: Context | None, usable: int, pages: int) -> bool:
        """Full pages are shared, the last one is copied."""
        if source is None:
            return self._grow(context, pages)
        shared, rest = divmod(usable, self.page_size)
        context.pages = source.pages[:shared]
        self._holders.update(context.pages)
        if self._grow(context, pages, keep=source):
            if not source.busy:
                self._idle.move_to_end(source)
            if rest:
                self._copy(source.pages[shared], context.pages[shared], rest)
            context.computed = usable
            return True
        if source.busy:
            return False
        # The only memory left is the source's own: better all of it lost but the shared pages than the request never
        # served.
        del self._idle[source]
        self.drop(source)
        self.evictions += 1
        context.computed = shared * self.page_size
        return self._grow(context, pages)

    def _shrink(self, context: Context) -> None:
        """Gives back the pages that hold nothing."""
        used = self._pages_for(context.computed)
        self._release(context.pages[used:])
        del context.pages[used:]

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _grow(self, context: Context, pages: int, keep: Context | None = None) -> bool:
        missing = pages - len(context.pages)
        while missing > len(self._free):
            oldest = next((idle for idle in self._idle if idle is not keep), None)
            if oldest is None:
                return False
            del self._idle[oldest]
            self.drop(oldest)
            self.evictions += 1
        for _ in range(missing):
            page = heapq.heappop(self._free)
            context.pages.append(page)
            self._holders[page] += 1
        return True

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                heapq.heappush(self._free, page)

    def _register(self, context: Context) -> None:
        tokens, hashes = context.tokens, context.hashes
        for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            chained = hash((hashes[-1] if hashes else 0, *tokens[start : start + BLOCK]))
            hashes.append(chained)
            self._index.setdefault(chained, {})[context] = None

    def _truncate(self, context: Context, length: int) -> None:
        """Forgets all tokens beyond that length; what was computed of them is void."""
        while len(context.hashes) * BLOCK > length:
            chained = context.hashes.pop()
            holders = self._index[chained]
            del holders[context]
            if not holders:
                del self._index[chained]
        del context.tokens[length:]
        context.computed = min(context.computed, length)


def _common(known: list[int], tokens: list[int], start: int) -> int:
    """The length of the common beginning, which is `start` or up to a block more, unless hashes have collided."""
    if known[:start] != tokens[:start]:
        return 0
    size = min(len(known), len(tokens))
    while start < size and known[start] == tokens[start]:
        start += 1
    return start
