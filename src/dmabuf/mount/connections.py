"""The mount's connections to its store, and what happens when that ends."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmabuf.errors import ClosedError, os_error
from dmabuf.store import Store, connect


class Connections:
    """One for "names", one for "memory", since making memory takes its time. Thread-safe.

    ``lost`` is called when the store has ended; the next call tries to reach it again.
    """

    def __init__(self, path: str, lost: Callable[[], None]) -> None:
        self._path, self._lost = path, lost
        self._open: dict[str, Store] = {}

    def get(self, use: str) -> Store:
        """A connection. Raises what :func:`dmabuf.store.connect` raises."""
        found = self._open.get(use)
        if found is None:
            found = self._open[use] = connect(self._path)
        return found

    @contextmanager
    def asking(self, use: str = "names") -> Iterator[Store]:
        """A connection, for a request or two. Raises OSError(EIO) where the store is gone."""
        try:
            store = self.get(use)
        except OSError as error:
            raise os_error(errno.EIO, f"the store is gone: {error.strerror}", self._path) from None
        try:
            yield store
        except (ConnectionError, ClosedError) as error:
            self.close()
            self._lost()
            text = f"the store is gone: {getattr(error, 'strerror', error)}"
            raise os_error(errno.EIO, text, self._path) from None

    def close(self) -> None:
        """End them."""
        for store in self._open.values():
            store.close()
        self._open.clear()
