"""The mount's connections to its store, and what happens when that ends."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmabuf.errors import ClosedError, os_error
from dmabuf.store import Store, connect


class Connections:
    """One for "names", one for "memory", since making memory takes its time. Thread-safe.

    ``lost`` is called when the store has ended; the next call tries to reach it again. Raises what
    :func:`dmabuf.store.connect` raises where there is none to begin with.
    """

    def __init__(self, path: str, lost: Callable[[], None]) -> None:
        self._path, self._lost = path, lost
        self._lock = threading.Lock()
        self._open = {"names": connect(path)}

    def get(self, use: str) -> Store:
        """A connection. Raises OSError(EIO) where the store is gone."""
        with self._lock:
            found = self._open.get(use)
            if found is None:
                try:
                    found = self._open[use] = connect(self._path)
                except OSError as error:
                    raise self._gone(error) from None
            return found

    @contextmanager
    def asking(self, use: str = "names") -> Iterator[Store]:
        """A connection, for a request or two. Raises OSError(EIO) where the store is gone."""
        store = self.get(use)
        try:
            yield store
        except (ConnectionError, ClosedError) as error:
            if not store.closed:  # it was something else that has ended
                raise
            if self._end(use, store):
                self._lost()
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> OSError:
        text = f"the store is gone: {getattr(error, 'strerror', error)}"
        return os_error(errno.EIO, text, self._path)

    def _end(self, use: str, store: Store) -> bool:
        """End all of them with one that has ended; False where others have taken their place."""
        with self._lock:
            if self._open.get(use) is not store:
                return False
            self._close()
            return True

    def close(self) -> None:
        """End them."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for store in self._open.values():
            store.close()
        self._open.clear()
