"""Links: what is known about one open file and each buffer that it exchanges bytes with."""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial

from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.transfer.engine import default_engine
from dmabuf.transfer.link import Link
from dmabuf.transfer.plan import Direction
from dmabuf.transfer.target import Target, check_identity

_reopening = threading.Lock()


class Links:
    """The links of one open file, by buffer. Closing the file or a buffer drops them."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.known: dict[tuple[int, Direction], Link] = {}
        """The links by id() of the buffer and direction; each goes with its buffer."""

    def get(self, buffer: Buffer, direction: Direction) -> Link:
        """Return the link to a buffer.

        Raises:
            TypeError: `buffer` is not a Buffer.
            ClosedError: the file or the buffer is closed.
            OSError: EBADF, the file is not open for the direction; EACCES, the buffer's descriptor
                is read-only.
        """
        key = id(buffer), direction
        found = self.known.get(key)
        if found is not None:
            if found.buffer_ref() is buffer:
                return found
            self.forget(key)  # of a buffer that is gone, whose id this one has now
        target = self.current()
        if target.owner != process.pid:
            target.check_open()
        link = Link(target, buffer, direction, self.refresh, self.close_if_idle)
        if direction == "read":
            buffer.written_by_others()
        # The buffer may outlive the file, and does not keep it.
        link.on_close = partial(_forget, weakref.ref(self), key)
        buffer.attach(link.users, link.on_close)
        found = self.known.setdefault(key, link)
        if found is not link:  # another thread made one meanwhile
            link.detach()
        return found

    def current(self) -> Target:
        """Return the open file, which the child of a fork opens again by its path.

        Raises:
            OSError: its path cannot be opened; ESTALE: another file has the path now.
        """
        if self.target.pid != process.pid and self.target.travels:
            with _reopening:
                old = self.target
                if old.pid != process.pid and not old.closed:
                    path, mode, force, identity = old.reopening()
                    target = Target(path, mode, force, default_engine(), travels=True)
                    check_identity(target, identity)
                    self.target = target
                    old.abandon()
        return self.target

    def forget(self, key: tuple[int, Direction]) -> None:
        """Drop a link whose buffer is closed."""
        self.known.pop(key, None)

    def refresh(self) -> None:
        """Have every link compute its facts again."""
        for link in list(self.known.values()):
            link.refresh()

    def plain(self) -> int:
        """Return the file's descriptor without O_DIRECT."""
        before, fd = self.target.direct_refusal, self.target.plain()
        if self.target.direct_refusal is not before:
            self.refresh()
        return fd

    @property
    def busy(self) -> bool:
        """Whether a transfer of the file runs."""
        return any(link.users for link in list(self.known.values()))

    def close(self) -> None:
        """Close the file once no transfer uses it."""
        self.target.closed, self.target.owner = True, 0
        self.close_if_idle()

    def close_if_idle(self) -> None:
        """Close the descriptors of a closed file if no transfer uses them."""
        links = list(self.known.values())
        for link in links:
            if link.users:
                return
        for link in links:
            link.detach()
        self.known.clear()
        self.target.close()


def _forget(links: weakref.ref[Links], key: tuple[int, Direction]) -> None:
    """Drop a link whose buffer is closed, if its file still has links."""
    found = links()
    if found is not None:
        found.forget(key)


def _after_fork() -> None:
    global _reopening
    _reopening = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
