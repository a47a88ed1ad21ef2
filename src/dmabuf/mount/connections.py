"""The mount's connections to its store."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmabuf.errors import ClosedError
from dmabuf.store import Store, connect


class Connections:
    """Two connections to a store: making memory on one does not delay requests on the other.

    ``lost`` is called when the store has ended; the next use connects again. Thread-safe. Raises
    what :func:`dmabuf.store.connect` raises if no store is running at first.
    """

    def __init__(self, path: str, lost: Callable[[], None]) -> None:
        self._path, self._lost = path, lost
        self._lock = threading.Lock()
        self._open = {"names": connect(path, again=False)}

    @contextmanager
    def use(self, which: str = "names") -> Iterator[Store]:
        """Give the connection "names" or "memory". Raises OSError(EIO) if the store has ended."""
        with self._lock:
            store = self._open.get(which)
            if store is None:
                try:
                    store = self._open[which] = connect(self._path, again=False)
                except OSError as error:
                    raise self._ended(error) from None
        try:
            yield store
        except (ConnectionError, ClosedError) as error:
            if not store.closed:
                raise
            with self._lock:
                is_news = self._open.get(which) is store
            if is_news:
                self.close()
                self._lost()
            raise self._ended(error) from None

    def _ended(self, error: Exception) -> OSError:
        text = f"the store has ended: {getattr(error, 'strerror', error)}"
        return OSError(errno.EIO, text, self._path)

    def close(self) -> None:
        """Close both connections."""
        with self._lock:
            for store in self._open.values():
                store.close()
            self._open.clear()
