"""The names of the store: their owners and modes, and the limit of the memory that they hold.

The rules are those of files in a sticky directory (chmod(1), inode(7)): the owner, group and other
bits of the mode decide who opens a buffer; only its owner, or root, removes or renames it.
"""

from __future__ import annotations

import errno
import itertools
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmabuf.sizes import format_size
from dmabuf.store.memory import Memory
from dmabuf.store.protocol import UNCHANGED, Refusal, Status
from dmabuf.store.restart import Item

READ, WRITE = 4, 2


class Peer(NamedTuple):
    """The user at the other end of a connection, as the kernel reports it."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


_KEPT = (
    "name", "number", "uid", "gid", "mode", "length", "charge",
    "created_ns", "changed_ns", "modified_ns", "accessed_ns",
)  # fmt: skip
"""Attributes of an Entry that a restart keeps."""
_REASON_LENGTH = 512


@dataclass(slots=True, eq=False)
class Entry:
    """One buffer: its memory (None while it is made), its name (None without one), its owner.

    ``charge`` is the number of bytes that count against the limit.
    """

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
    cached: bool = False
    memory: Memory | None = None

    @property
    def key(self) -> str:
        """The key of its :meth:`item`."""
        return f"b{self.number}"

    def item(self) -> Item:
        """Return what the next server needs to hold this buffer."""
        assert self.memory is not None
        record = {name: getattr(self, name) for name in _KEPT}
        record["exporter"], record["size"] = self.memory.exporter, self.memory.size
        record["reason"] = self.memory.reason[:_REASON_LENGTH]
        record["slabs"], record["cached"] = len(self.memory.slabs), self.cached
        return Item(self.key, record, self.memory.descriptors)

    @classmethod
    def of(cls, item: Item) -> Entry:
        """Return the buffer of an item. Raises KeyError for one of another version."""
        record, own = item.record, item.descriptors
        attributes: dict[str, Any] = {name: record[name] for name in _KEPT}
        count = record["slabs"]
        memory = Memory(
            record["exporter"], record["reason"], record["size"], own[:count],
            own[count] if count < len(own) else None, granted=True,
        )  # fmt: skip
        return cls(**attributes, memory=memory, cached=record.get("cached", False))

    def allows(self, peer: Peer, wanted: int) -> bool:
        """Return whether a peer may open it for READ or READ | WRITE: inode(7)."""
        if peer.uid == 0:
            return True
        bits = self.mode
        if peer.uid == self.uid:
            bits >>= 6
        elif self.gid == peer.gid or self.gid in peer.groups:
            bits >>= 3
        return wanted & ~bits == 0

    def is_unused(self) -> bool:
        """Return whether no process but the server has the memory; False if that is unknown."""
        return self.memory is not None and self.memory.in_use() is False

    def status(self, in_use: bool | None = None) -> Status:
        """Return the record of this buffer."""
        assert self.memory is not None
        return Status(
            name=self.name or "",
            size=self.memory.size,
            length=self.length,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            created_ns=self.created_ns,
            changed_ns=self.changed_ns,
            modified_ns=self.modified_ns,
            accessed_ns=self.accessed_ns,
            exporter=self.memory.exporter,
            reason=self.memory.reason,
            slabs=max(len(self.memory.slabs), 1),
            is_dmabuf=self.memory.is_dmabuf,
            number=self.number,
            cached=self.cached,
            in_use=in_use,
        )


class Names:
    """The buffers that the store holds, and the sum of their memory.

    ``max_memory`` is in bytes. Memory counts from before it is made until the store gives it up;
    then ``released`` is called with the entry. Not thread-safe: it belongs to the server's loop.
    """

    def __init__(
        self, max_memory: int, max_names: int, released: Callable[[Entry], object]
    ) -> None:
        self.max_memory, self.max_names = max_memory, max_names
        self.charged = 0
        self._released = released
        self._entries: dict[str, Entry] = {}
        self._order: list[str] = []  # sorted, of the entries that have memory
        self._unnamed: set[Entry] = set()
        # Microseconds, so that no number comes back after a restart, and all fit a double.
        self._numbers = itertools.count(time.time_ns() // 1000)

    def __len__(self) -> int:
        return len(self._entries) + len(self._unnamed)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._entries.values()
        yield from self._unnamed

    def adopt(self, entry: Entry) -> None:
        """Take a buffer of the last server, whatever the limits are now."""
        self.charged += entry.charge
        self._numbers = itertools.count(max(next(self._numbers), entry.number + 1))
        if entry.name is None:
            self._unnamed.add(entry)
        else:
            self._entries[entry.name] = entry
            insort(self._order, entry.name)

    def begin(self, name: str | None, peer: Peer, mode: int, length: int, size: int) -> Entry:
        """Reserve a name (None for none) and ``size`` bytes before the memory is made."""
        if name in self._entries:
            raise Refusal(errno.EEXIST, "a buffer of that name exists", name)
        if len(self) >= self.max_names:
            text = f"the store is full: it holds {self.max_names} names; remove some"
            raise Refusal(errno.ENOSPC, text, name)
        left = max(self.max_memory - self.charged, 0)
        if size > left:
            left += self._drop_unused(size - left)
        if size > left:
            text = (
                f"the store is full: {format_size(size)} wanted, {format_size(left)} of "
                f"{format_size(self.max_memory)} left; raise --max-memory"
            )
            raise Refusal(errno.ENOSPC, text, name)
        now = time.time_ns()
        number = next(self._numbers)
        entry = Entry(name, number, peer.uid, peer.gid, mode, length, size, now, now, now, now)
        if name is None:
            self._unnamed.add(entry)
        else:
            self._entries[name] = entry
        self.charged += size
        return entry

    def finish(self, entry: Entry, memory: Memory) -> None:
        """Give a reserved entry its memory; its name is visible from now on."""
        entry.memory = memory
        if entry.name is not None:
            insort(self._order, entry.name)

    def _drop_unused(self, wanted: int) -> int:
        """Drop cached buffers, the least recently used first, if all together are large enough.

        Returns the bytes that were given up.
        """
        unused = [entry for entry in self.cached() if entry.is_unused()]
        if sum(entry.charge for entry in unused) < wanted:
            return 0
        given = 0
        for entry in sorted(unused, key=lambda entry: entry.accessed_ns):
            if given < wanted:
                given += entry.charge
                self.drop(entry)
        return given

    def cached(self) -> list[Entry]:
        """Return the buffers that may be dropped while nobody uses them."""
        return [entry for entry in self._entries.values() if entry.cached]

    def drop(self, entry: Entry) -> None:
        """Forget an entry, with or without a name or memory."""
        self._unname(entry)
        entry.name = None
        self.charged -= entry.charge
        if entry.memory is not None:
            self._released(entry)

    def find(self, name: str, number: int | None = None) -> Entry:
        """Return the entry of a name, and of a number unless that is None."""
        entry = self._entries.get(name)
        if number is not None and (entry is None or entry.number != number):
            raise Refusal(errno.ESTALE, f"the name no longer belongs to buffer {number}", name)
        if entry is None or entry.memory is None:
            raise Refusal(errno.ENOENT, "there is no such buffer", name)
        return entry

    def owned_or_none(self, name: str, peer: Peer) -> Entry | None:
        """Return the entry of a name that the peer owns; None if there is no such name."""
        entry = self._entries.get(name)
        if entry is None or entry.memory is None:
            return None
        if entry.uid != peer.uid:
            raise Refusal(errno.EPERM, f"the name belongs to user {entry.uid}", name)
        return entry

    def after(self, name: str) -> Iterator[Entry]:
        """Yield the entries whose names follow ``name``, in order."""
        for one in self._order[bisect_right(self._order, name) :]:
            yield self._entries[one]

    def open(self, name: str, peer: Peer, mode: str) -> Entry:
        """Return the entry of a name that the peer may open for ``mode``, "r" or "r+"."""
        entry = self.find(name)
        if not entry.allows(peer, READ if mode == "r" else READ | WRITE):
            text = f"permission denied (mode {entry.mode:03o}, owner {entry.uid})"
            raise Refusal(errno.EACCES, text, name)
        return entry

    def remove(self, name: str, peer: Peer) -> None:
        """Remove a name and give up its memory."""
        self.drop(self._owned(name, peer, "removed"))

    def rename(self, name: str, to: str, replace: bool | int, peer: Peer) -> Entry:
        """Rename a buffer and return it; ``replace`` is that of :meth:`link`."""
        entry = self._owned(name, peer, "renamed")
        if name != to or not replace:
            self.link(entry, to, replace, None, peer)
        return entry

    def link(
        self, entry: Entry, name: str, replace: bool | int, length: int | None, peer: Peer
    ) -> None:
        """Give an entry a name, and its content a length unless that is None.

        ``replace`` is whether a buffer of that name is replaced; a number replaces that one only.
        """
        if length is not None:
            self._check_length(length, entry, name)
        if not isinstance(replace, bool):
            self.find(name, replace)
        there = self._entries.get(name)
        if there is not None:
            if not replace:
                raise Refusal(errno.EEXIST, "a buffer of that name exists", name)
            if there.memory is None:
                raise Refusal(errno.EBUSY, "a buffer of that name is being made", name)
            self.drop(self._owned(name, peer, "replaced"))
        self._unname(entry)
        entry.name, entry.changed_ns = name, time.time_ns()
        if length is not None:
            entry.length, entry.modified_ns = length, entry.changed_ns
        self._entries[name] = entry
        insort(self._order, name)

    def truncate(self, name: str, length: int, peer: Peer) -> Entry:
        """Set the length of the content; the memory keeps its size. Returns the buffer."""
        entry = self.open(name, peer, "r+")
        self._check_length(length, entry, name)
        entry.length = length
        entry.changed_ns = entry.modified_ns = time.time_ns()
        return entry

    def utime(self, name: str, accessed_ns: int, modified_ns: int, peer: Peer) -> Entry:
        """Set the times of the content: for its owner, and for users who may write it.

        Returns the buffer.
        """
        entry = self.find(name)
        if peer.uid != entry.uid:
            self.open(name, peer, "r+")
        if accessed_ns != UNCHANGED:
            entry.accessed_ns = accessed_ns
        if modified_ns != UNCHANGED:
            entry.modified_ns = modified_ns
        entry.changed_ns = time.time_ns()
        return entry

    def chmod(self, name: str, mode: int, peer: Peer) -> Entry:
        """Change the mode, for users who open it from now on. Returns the buffer."""
        entry = self._owned(name, peer, "changed")
        entry.mode, entry.changed_ns = mode, time.time_ns()
        return entry

    def chown(self, name: str, uid: int, gid: int, peer: Peer) -> Entry:
        """Change the owner (root only) or the group (to one of the owner's), as chown(2).

        Returns the buffer.
        """
        entry = self._owned(name, peer, "changed")
        uid = entry.uid if uid == UNCHANGED else uid
        gid = entry.gid if gid == UNCHANGED else gid
        if peer.uid != 0 and (uid != entry.uid or gid not in {entry.gid, peer.gid, *peer.groups}):
            text = "permission denied: only root may give it to that user or group"
            raise Refusal(errno.EPERM, text, name)
        entry.uid, entry.gid, entry.changed_ns = uid, gid, time.time_ns()
        return entry

    def _owned(self, name: str, peer: Peer, verb: str) -> Entry:
        entry = self.find(name)
        if peer.uid not in (0, entry.uid):
            text = f"may be {verb} by its owner (user {entry.uid}) or root only"
            raise Refusal(errno.EPERM, text, name)
        return entry

    @staticmethod
    def _check_length(length: int, entry: Entry, name: str) -> None:
        if length > entry.charge:
            text = f"length {length} is larger than the buffer of {entry.charge} bytes"
            raise Refusal(errno.EFBIG, text, name)

    def _unname(self, entry: Entry) -> None:
        if entry.name is None:
            self._unnamed.discard(entry)
            return
        del self._entries[entry.name]
        if entry.memory is not None:
            del self._order[bisect_left(self._order, entry.name)]
