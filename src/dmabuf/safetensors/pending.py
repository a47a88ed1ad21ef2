"""Saves in the background: the handle of each, and the last one of each path.

Saves of one path run one after the other. `save_async` writes after the last save of its path that
is still pending. `save` and `save_sharded` wait for that one. So the file of the last call stays.
"""

from __future__ import annotations

import errno
import os
import threading

from dmabuf.errors import ClosedError, os_error
from dmabuf.kernel import process
from dmabuf.transfer import Transfer


class Saving:
    """A save in the background, made by `save_async`."""

    def __init__(self, path: str) -> None:
        self.path = path
        """The file that it writes."""
        self._key = os.path.realpath(path)
        self._ended = threading.Event()
        self._transfers: tuple[Transfer, ...] = ()
        self._error: BaseException | None = None
        self._pid = process.pid
        self.thread: threading.Thread | None = None
        """What makes it."""
        self.before: Saving | None = None
        """The save that it has to wait for."""

    def done(self) -> bool:
        """Return whether it has ended: the file is on the medium, or the save failed."""
        return self._ended.is_set()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until it has ended, and return the exception of its failure, or None.

        Raises:
            TimeoutError: it goes on after `timeout` seconds.
            OSError: EDEADLK, its own progress function would wait for it without a `timeout`.
            ClosedError: a process that forked this one makes the save.
        """
        if not self._ended.is_set() and self._pid != process.pid:
            raise ClosedError(f"save {self.path}: it runs in the process that forked this one")
        if timeout is None:
            self._check_thread()
        if not self._ended.wait(timeout):
            raise TimeoutError(f"save {self.path}: it goes on after {timeout} s")
        if self.thread is not None:
            self.thread.join()  # it has nothing left to do
        return self._error

    def result(self, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Wait until the file is on the medium, and return the records of the transfers.

        Raises:
            TimeoutError: it goes on after `timeout` seconds.
            OSError: the save failed; the file is as it was.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._transfers

    def wait(self) -> None:
        """Return when it has ended. Raises OSError(EDEADLK) in its own progress function."""
        self._check_thread()
        self._ended.wait()

    def _check_thread(self) -> None:
        """Raise if this thread makes the save, or one that it has to wait for."""
        one: Saving | None = self
        while one is not None and not one.done():
            if one.thread is threading.current_thread():
                text = "save: it would wait for the save whose progress function calls it"
                raise os_error(errno.EDEADLK, f"{text}; save afterwards, or do not wait", one.path)
            one = one.before

    def succeed(self, transfer: Transfer) -> None:
        """Note the record of the transfer; the thread of the save calls it."""
        self._transfers = (transfer,)

    def fail(self, error: BaseException) -> None:
        """Note why it fails; the thread of the save calls it."""
        import logging

        self._error = error
        logging.getLogger("dmabuf").error("save %s in the background: %s", self.path, error)

    def take_turn(self) -> None:
        """Make it the last save of its path, after the one that was the last."""
        with _changing:
            self.before = _latest.get(self._key)
            _latest[self._key] = self

    def end(self) -> None:
        """Note that it has ended; nothing uses its memory any more."""
        with _changing:
            if _latest.get(self._key) is self:
                del _latest[self._key]
        self.before = None
        self._ended.set()

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._error else "done"
        return f"<dmabuf.safetensors.Saving {self.path!r} {state}>"


_latest: dict[str, Saving] = {}
"""The last save of each path, unless it has ended."""
_changing = threading.Lock()


def wait_for_pending(path: str | os.PathLike[str]) -> None:
    """Return when the saves of a path that `save_async` has begun so far have ended."""
    last = _latest.get(os.path.realpath(path))
    if last is not None:
        last.wait()


def _after_fork() -> None:
    global _changing
    _changing = threading.Lock()
    _latest.clear()


os.register_at_fork(after_in_child=_after_fork)
