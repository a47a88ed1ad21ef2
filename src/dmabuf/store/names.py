"""Who may do what to which name, and how much memory there may be: pure, no descriptor is touched.

The rules are those of files in a sticky directory (chmod(1), inode(7)): the mode's owner, group and
other bits decide who opens; a name is removed and renamed by its owner; root may all.
"""

from __future__ import annotations

import errno
import time
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from dmabuf.sizes import format_size
from dmabuf.store.protocol import SAME, Refusal


class Memory(Protocol):
    """What stands behind a name, as far as this module looks at it."""

    @property
    def size(self) -> int:
        """Bytes."""


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel says."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


M = TypeVar("M", bound=Memory)


@dataclass(slots=True, eq=False)
class Entry(Generic[M]):
    """What a name stands for: memory (None while it is made), its owner, and who may what."""

    uid: int
    gid: int
    mode: int
    charge: int
    created_ns: int
    changed_ns: int
    memory: M | None = None


def may(entry: Entry[M], peer: Peer, mode: str) -> bool:
    """Whether a peer may open it for ``mode``, "r" or "r+"."""
    if peer.uid == 0:
        return True
    if peer.uid == entry.uid:
        bits = entry.mode >> 6
    elif entry.gid == peer.gid or entry.gid in peer.groups:
        bits = entry.mode >> 3
    else:
        bits = entry.mode
    wanted = 4 if mode == "r" else 6
    return bits & wanted == wanted


class Names(Generic[M]):
    """The names, and the sum of the memory behind them and behind those that are no more.

    ``max_memory`` is in bytes and ``max_names`` a count; neither is ever exceeded. Memory counts
    from before it is made until :meth:`forget`. Not thread-safe: it belongs to the server's loop.
    """

    def __init__(
        self, max_memory: int, max_names: int, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self.max_memory, self.max_names = max_memory, max_names
        self.charged = 0
        self.removed: dict[M, int] = {}
        """Memory without a name, which others may still have, and what it is charged."""
        self._entries: dict[str, Entry[M]] = {}
        self._order: list[str] = []  # of those that have memory
        self._clock = clock

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, name: str, peer: Peer, mode: int, size: int) -> None:
        """Take a name and ``size`` bytes, before the memory is made."""
        if name in self._entries:
            raise Refusal(errno.EEXIST, "there is a buffer of that name", name)
        if len(self._entries) >= self.max_names:
            raise Refusal(errno.ENOSPC, f"the store has {self.max_names} names, and takes no more")
        if size > self.max_memory - self.charged:
            raise Refusal(
                errno.ENOSPC,
                f"{format_size(size)} are more than the store has left: "
                f"{format_size(self.max_memory - self.charged)} of {format_size(self.max_memory)} "
                "(dmabuf serve --max-memory)",
                name,
            )
        now = self._clock()
        self._entries[name] = Entry(peer.uid, peer.gid, mode, size, now, now)
        self.charged += size

    def finish(self, name: str, memory: M) -> Entry[M]:
        """The memory was made: the name is there for all."""
        entry = self._entries[name]
        assert memory.size <= entry.charge
        entry.memory = memory
        insort(self._order, name)
        return entry

    def abandon(self, name: str) -> None:
        """The memory could not be made."""
        self.charged -= self._entries.pop(name).charge

    def find(self, name: str) -> Entry[M]:
        """What a name stands for."""
        entry = self._entries.get(name)
        if entry is None or entry.memory is None:
            raise Refusal(errno.ENOENT, "no buffer of that name", name)
        return entry

    def listing(self, after: str, most: int) -> list[str]:
        """The names that follow one, in order; at most so many."""
        start = bisect_right(self._order, after)
        return self._order[start : start + most]

    def open(self, name: str, peer: Peer, mode: str) -> Entry[M]:
        """What a name stands for, if the peer may open it so."""
        entry = self.find(name)
        if not may(entry, peer, mode):
            what = "read" if mode == "r" else "written"
            raise Refusal(
                errno.EACCES, f"may not be {what} by you: its mode is {entry.mode:03o}", name
            )
        return entry

    def remove(self, name: str, peer: Peer) -> M:
        """Take the name away. The memory stays charged until :meth:`forget`."""
        entry = self._owned(name, peer, "removed")
        return self._take(name, entry)

    def rename(self, name: str, to: str, peer: Peer) -> M | None:
        """Give a name's memory another one; the memory that had that one before, if any."""
        entry = self._owned(name, peer, "renamed")
        if name == to:
            return None
        other = self._entries.get(to)
        replaced = None
        if other is not None:
            if other.memory is None:
                raise Refusal(errno.EBUSY, "a buffer of that name is just being made", to)
            replaced = self._take(to, self._owned(to, peer, "replaced"))
        self._order.remove(name)
        self._entries[to] = self._entries.pop(name)
        insort(self._order, to)
        entry.changed_ns = self._clock()
        return replaced

    def chmod(self, name: str, mode: int, peer: Peer) -> None:
        """Change who may open it from now on; what is open stays open."""
        entry = self._owned(name, peer, "changed")
        entry.mode, entry.changed_ns = mode, self._clock()

    def chown(self, name: str, uid: int, gid: int, peer: Peer) -> None:
        """Give it away, as chown(2): root may, and an owner may choose among his own groups."""
        entry = self._owned(name, peer, "changed")
        uid = entry.uid if uid == SAME else uid
        gid = entry.gid if gid == SAME else gid
        own = {entry.gid, peer.gid, *peer.groups}
        if peer.uid != 0 and (uid != entry.uid or gid not in own):
            text = "only root gives a buffer to another user, or to a group that you are not in"
            raise Refusal(errno.EPERM, text, name)
        entry.uid, entry.gid, entry.changed_ns = uid, gid, self._clock()

    def forget(self, memory: M) -> None:
        """Removed memory is nobody's any more."""
        self.charged -= self.removed.pop(memory)

    def _owned(self, name: str, peer: Peer, verb: str) -> Entry[M]:
        entry = self.find(name)
        if peer.uid not in (0, entry.uid):
            raise Refusal(errno.EPERM, f"is {verb} by its owner (or root) alone", name)
        return entry

    def _take(self, name: str, entry: Entry[M]) -> M:
        del self._entries[name]
        self._order.remove(name)
        assert entry.memory is not None
        self.removed[entry.memory] = entry.charge
        return entry.memory
