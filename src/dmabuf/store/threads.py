"""Threads for what takes long, all there from the beginning: none has to be started later."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Threads:
    """``count`` of them, which do what they are given in its order. What they call raises nothing.

    Raises OSError(EAGAIN) where there may not be as many.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            thread = threading.Thread(target=self._run, name=f"dmabuf store: {name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self.end()
                text = f"no threads for the store: {error} (ulimit -u, or TasksMax=)"
                raise OSError(errno.EAGAIN, text) from None
            self._threads.append(thread)

    def do(self, call: Callable[[], None]) -> None:
        """Have one of them call something, soon."""
        self._calls.put(call)

    def end(self) -> None:
        """Wait until all that was given to them is done."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
