"""Who may do what to which name, and how much memory there may be: pure, no descriptor is touched.

The rules are those of files in a sticky directory (chmod(1), inode(7)): the mode's owner, group and
other bits decide who opens; a name is removed and renamed by its owner; root may all.
"""

from __future__ import annotations

import errno
import itertools
import time
from bisect import bisect_left, bisect_right, insort
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

    def in_use(self) -> bool:
        """Whether anyone else has it."""


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel says."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


M = TypeVar("M", bound=Memory)


@dataclass(slots=True, eq=False)
class Entry(Generic[M]):
    """Memory (None while it is made), its name (None while it has none), its owner and mode."""

    name: str | None
    number: int
    uid: int
    gid: int
    mode: int
    length: int
    charge: int
    created_ns: int
    changed_ns: int
    modified_ns: int
    accessed_ns: int
    memory: M | None = None


READ, WRITE = 4, 2


def rights(uid: int, gid: int, mode: int, peer: Peer) -> int:
    """The READ and WRITE that a peer has to what is owned so: inode(7), and root has both."""
    if peer.uid == 0:
        return READ | WRITE
    if peer.uid == uid:
        mode >>= 6
    elif gid == peer.gid or gid in peer.groups:
        mode >>= 3
    return mode & (READ | WRITE)


def may(entry: Entry[M], peer: Peer, mode: str) -> bool:
    """Whether a peer may open it for ``mode``, "r" or "r+"."""
    wanted = READ if mode == "r" else READ | WRITE
    return wanted & ~rights(entry.uid, entry.gid, entry.mode, peer) == 0


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
        self.just_removed: list[M] = []
        """Those of them that the keeper has not seen yet."""
        self._entries: dict[str, Entry[M]] = {}
        self._order: list[str] = []  # of those that have memory
        self._unnamed = 0
        self._numbers = itertools.count(1)
        self._clock = clock

    def __len__(self) -> int:
        return len(self._entries) + self._unnamed

    @property
    def left(self) -> int:
        """Bytes that may still be taken."""
        return self.max_memory - self.charged

    def begin(self, name: str | None, peer: Peer, mode: int, length: int, size: int) -> Entry[M]:
        """Take a name, if there is to be one, and ``size`` bytes, before the memory is made.

        ``length`` is how many of them are the content's.
        """
        if name in self._entries:
            raise Refusal(errno.EEXIST, "there is a buffer of that name", name)
        if len(self) >= self.max_names:
            text = f"the store has {self.max_names} names, and takes no more"
            raise Refusal(errno.ENOSPC, text, name)
        if size > self.left:
            raise Refusal(
                errno.ENOSPC,
                f"{format_size(size)} are more than the store has left: "
                f"{format_size(self.left)} of {format_size(self.max_memory)} "
                "(dmabuf serve --max-memory)",
                name,
            )
        now = self._clock()
        number = next(self._numbers)
        entry: Entry[M] = Entry(
            name, number, peer.uid, peer.gid, mode, length, size, now, now, now, now
        )
        if name is None:
            self._unnamed += 1
        else:
            self._entries[name] = entry
        self.charged += size
        return entry

    def finish(self, entry: Entry[M], memory: M) -> None:
        """The memory was made: the name, if it has one, is there for all."""
        assert memory.size <= entry.charge
        entry.memory = memory
        if entry.name is not None:
            insort(self._order, entry.name)

    def abandon(self, entry: Entry[M]) -> None:
        """The memory could not be made."""
        self.charged -= entry.charge
        if entry.name is None:
            self._unnamed -= 1
        else:
            del self._entries[entry.name]

    def find(self, name: str, number: int | None = None) -> Entry[M]:
        """What a name stands for; with a number (not None), only if it is (still) that one's."""
        entry = self._entries.get(name)
        if number is not None and (entry is None or entry.number != number):
            raise Refusal(errno.ESTALE, f"no buffer of that name has the number {number}", name)
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

    def remove(self, name: str, peer: Peer) -> None:
        """Take the name away. The memory stays charged."""
        self.drop(self._owned(name, peer, "removed"))

    def rename(self, name: str, to: str, replace: bool | int, peer: Peer) -> None:
        """Give a name's memory another one; with ``replace``, as :meth:`link`."""
        entry = self._owned(name, peer, "renamed")
        if name != to or not replace:
            self.link(entry, to, replace, None, peer)

    def link(
        self, entry: Entry[M], name: str, replace: bool | int, length: int | None, peer: Peer
    ) -> None:
        """Give memory a name, in the place of what it is called.

        With ``replace``, in the place of what is called that, too; a number is for that one alone.
        With ``length`` (not None), that many bytes of it are content.
        """
        if length is not None:
            self._check_length(length, entry.charge, name)
        if name in self._entries:
            if not replace:
                raise Refusal(errno.EEXIST, "there is a buffer of that name", name)
            if replace is not True:
                self.find(name, replace)
            if self._entries[name].memory is None:
                raise Refusal(errno.EBUSY, "a buffer of that name is just being made", name)
            self.drop(self._owned(name, peer, "replaced"))
        self._unname(entry)
        entry.name, entry.changed_ns = name, self._clock()
        if length is not None:
            entry.length, entry.modified_ns = length, entry.changed_ns
        self._entries[name] = entry
        insort(self._order, name)

    def swap(self, entry: Entry[M], name: str, length: int, peer: Peer) -> None:
        """Put memory that has no name behind one, which keeps its owner, mode and number.

        Who may write the name may, while nobody else has the memory that goes.
        """
        named = self.open(name, peer, "r+")
        assert entry.memory is not None and named.memory is not None
        self._check_length(length, entry.charge, name)
        if named.memory.in_use():
            text = "others have its memory: it neither grows nor shrinks until they let go of it"
            raise Refusal(errno.EBUSY, text, name)
        self._unnamed -= 1
        self._removed(named.memory, named.charge)
        named.memory, named.charge, named.length = entry.memory, entry.charge, length
        named.changed_ns = named.modified_ns = self._clock()

    def utime(self, name: str, accessed_ns: int, modified_ns: int, peer: Peer) -> None:
        """Set the times of the content, in ns since 1970: its owner, and who may write."""
        entry = self.find(name)
        if peer.uid != entry.uid:
            self.open(name, peer, "r+")
        if accessed_ns != SAME:
            entry.accessed_ns = accessed_ns
        if modified_ns != SAME:
            entry.modified_ns = modified_ns
        entry.changed_ns = self._clock()

    def chmod(self, name: str, mode: int, peer: Peer) -> None:
        """Change who may open it from now on; what is open stays open."""
        entry = self._owned(name, peer, "changed")
        entry.mode, entry.changed_ns = mode, self._clock()

    def truncate(self, name: str, length: int, peer: Peer) -> None:
        """Say how many bytes of the memory are content: who may write may."""
        entry = self.open(name, peer, "r+")
        self._check_length(length, entry.charge, name)
        entry.length = length
        entry.changed_ns = entry.modified_ns = self._clock()

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

    def drop(self, entry: Entry[M]) -> None:
        """Take away whatever name it has; the memory stays charged until :meth:`forget`."""
        self._unname(entry)
        entry.name = None
        assert entry.memory is not None
        self._removed(entry.memory, entry.charge)

    def forget(self, memory: M) -> None:
        """Removed memory is nobody's any more."""
        self.charged -= self.removed.pop(memory)

    def _removed(self, memory: M, charge: int) -> None:
        self.removed[memory] = charge
        self.just_removed.append(memory)

    def _owned(self, name: str, peer: Peer, verb: str) -> Entry[M]:
        entry = self.find(name)
        if peer.uid not in (0, entry.uid):
            raise Refusal(errno.EPERM, f"is {verb} by its owner (or root) alone", name)
        return entry

    @staticmethod
    def _check_length(length: int, size: int, name: str) -> None:
        if length > size:
            text = f"a buffer does not grow: this one has {size} bytes, not {length}"
            raise Refusal(errno.EFBIG, text, name)

    def _unname(self, entry: Entry[M]) -> None:
        if entry.name is None:
            self._unnamed -= 1
        else:
            del self._entries[entry.name]
            del self._order[bisect_left(self._order, entry.name)]
