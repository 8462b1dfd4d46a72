"""Ownership of KV pages, and which pages can be reused for an equal prefix.

Pure bookkeeping: no tensors. Page 0 is never handed out; padding rows write there. A full page of
committed tokens is named by a digest of its request's namespace and of all tokens up to its end, so
equal names mean equal prefixes of one namespace. Pages that no request holds keep their name and
content until they are needed (oldest first).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def page_root(namespace: str) -> bytes:
    """The name before a first page: requests of different namespaces share no page."""
    return hashlib.blake2b(namespace.encode(), digest_size=16, person=b"namespace").digest()


def page_names(tokens: Sequence[int], page_size: int, parent: bytes) -> list[bytes]:
    """Digest of every full page of ``tokens``, each chained to the one before.

    Args:
        parent: name of the page before the first one, or ``page_root``.
    """
    names = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[start : start + page_size], dtype=np.int64).tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        names.append(parent)
    return names


class PagePool:
    """Free list, reference counts and names of ``num_pages`` pages."""

    def __init__(self, num_pages: int, prefix_cache: bool) -> None:
        self.num_pages = num_pages
        self.prefix_cache = prefix_cache
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Number of pages that requests can hold in total."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Number of pages that can be taken now, including idle cached ones."""
        return len(self._free) + len(self._idle)

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix of ``names``; takes no reference."""
        pages = []
        for name in names if self.prefix_cache else ():
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of ``pages`` no request holds; sharing those reduces ``num_available``."""
        return sum(self._references[page] == 0 for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Take one more reference to each cached page."""
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """``count`` fresh pages, one reference each; evicts the cached pages idle the longest."""
        assert count <= self.num_available, "caller checks num_available"
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        self._references[page] = 1
        return page

    def name(self, page: int, name: bytes) -> None:
        """Declare ``page`` full and committed. The first page with a name stays the cached one."""
        if self.prefix_cache and name not in self._page_of and page not in self._name_of:
            self._name_of[page] = name
            self._page_of[name] = page

    def forget(self, pages: Sequence[int]) -> None:
        """Take away the names of pages that somebody holds."""
        for page in pages:
            name = self._name_of.pop(page, None)
            if name is not None:
                del self._page_of[name]

    def forget_all(self) -> None:
        """Take away every name: no page that is held or idle now is found by a prefix again."""
        self._name_of.clear()
        self._page_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each; named pages stay cached, the last ones are evicted first."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, "page released twice"
            if self._references[page]:
                continue
            if page in self._name_of:
                self._idle[page] = None
            else:
                self._free.append(page)
