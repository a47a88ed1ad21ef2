"""What a server of the store leaves to the next one, and the two ways there.

Under systemd everything lies in its descriptor store (sd_notify(3)), which also outlives a server
that was killed. Elsewhere the next server takes everything from the running one, over the store's
socket (``dmabuf serve --replace``). Clients keep their connections either way.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dmabuf.store import place, protocol
from dmabuf.store.protocol import Refusal

_SECONDS = 30.0
"""How long one server waits for the other during a hand-over."""
_DONE = b"done"


class Item(NamedTuple):
    """A record, and the descriptors that belong to it. ``key`` is unique among the items."""

    key: str
    record: dict[str, Any]
    descriptors: Sequence[int]


class DescriptorStore:
    """systemd's descriptor store, which holds items for the next server.

    ``room`` is the number of descriptors that fit (``FileDescriptorStoreMax=``), 0 to hold nothing.
    ``found`` are the descriptors that systemd passed, by their names there: the item's key, a dot
    and an index. Index 0 is a memfd of one page with the record, so that every write of a record is
    whole, also that of a server that is killed.
    """

    def __init__(self, room: int, found: Mapping[str, int]) -> None:
        self.room = room
        self.used = len(found)
        self.items: list[Item] = []
        """What the last server left."""
        self._kept: dict[str, tuple[int, int]] = {}  # the record's descriptor, the others' number
        groups: dict[str, dict[int, int]] = {}
        for name, fd in found.items():
            key, _, index = name.rpartition(".")
            groups.setdefault(key, {})[int(index)] = fd
        for key, group in groups.items():
            self._take(key, group)

    def _take(self, key: str, group: dict[int, int]) -> None:
        try:
            record = json.loads(os.pread(group[0], os.fstat(group[0]).st_size, 0))
            own = [group[index + 1] for index in range(record.pop("descriptors"))]
        except (
            KeyError,
            ValueError,
            TypeError,
        ):  # the server was killed while it left or removed it
            for index, fd in group.items():
                os.close(fd)
                self._remove(key, index)
            return
        self._kept[key] = group[0], len(own)
        self.items.append(Item(key, record, own))

    def put(self, item: Item) -> None:
        """Leave an item, or change its record. Raises Refusal(ENOSPC) if it does not fit."""
        if not self.room:
            return
        text = json.dumps(item.record | {"descriptors": len(item.descriptors)})
        page = text.encode().ljust(mmap.PAGESIZE)
        if item.key in self._kept:
            os.pwrite(self._kept[item.key][0], page, 0)
            return
        if self.used + len(item.descriptors) >= self.room:
            text = f"the store is full: systemd keeps {self.room} descriptors; remove some names"
            raise Refusal(errno.ENOSPC, text)
        fd = os.memfd_create("dmabuf record", os.MFD_CLOEXEC)
        os.pwrite(fd, page, 0)
        self._kept[item.key] = fd, len(item.descriptors)
        for index, one in enumerate([fd, *item.descriptors]):
            self.used += 1
            place.notify_systemd(f"FDSTORE=1\nFDNAME={item.key}.{index}\nFDPOLL=0", one)

    def remove(self, key: str) -> None:
        """Remove an item, if it is there."""
        if key in self._kept:
            fd, others = self._kept.pop(key)
            os.close(fd)
            for index in range(1 + others):
                self._remove(key, index)

    def _remove(self, key: str, index: int) -> None:
        self.used -= 1
        place.notify_systemd(f"FDSTOREREMOVE=1\nFDNAME={key}.{index}")

    def close(self) -> None:
        """Close this process's descriptors of the records; what systemd holds stays."""
        for fd, _ in self._kept.values():
            os.close(fd)
        self._kept.clear()


class Takeover:
    """All that the running server at a path holds, which :meth:`finish` makes this process's own.

    If that is never called, the other server continues when this is closed or the process ends.
    """

    def __init__(self, connection: socket.socket, path: str) -> None:
        self._connection, self._path = connection, path
        self.items: list[Item] = []
        self.listener: socket.socket | None = None
        """The socket where the other server listens."""
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> None:
        self._connection.send(protocol.pack_request("hand_over"))
        while True:
            data, descriptors, flags, _ = socket.recv_fds(
                self._connection,
                protocol.REPLY_BYTES,
                protocol.MOST_DESCRIPTORS,
                socket.MSG_CMSG_CLOEXEC,
            )
            self.items.append(Item("", {}, descriptors))
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "too many open files; raise ulimit -n", self._path)
            key, record = _parse(data, self._path)
            self.items[-1] = Item(key, record, descriptors)
            if not descriptors:
                self.items.pop()
                return
            if key == "listener":
                self.listener = socket.socket(fileno=self.items.pop().descriptors[0])
            self._connection.send(_DONE)

    def finish(self) -> None:
        """Make the other server end, without a change to what it held. Raises OSError."""
        self._connection.send(_DONE)
        if self._connection.recv(len(_DONE)) != _DONE:
            raise OSError(errno.ECONNABORTED, "the other server went on; try again", self._path)
        self._connection.close()

    def close(self) -> None:
        """Close what was taken and has no other owner yet, unless :meth:`finish` was called."""
        if self._connection.fileno() < 0:
            return
        self._connection.close()
        if self.listener is not None:
            self.listener.close()
        for item in self.items:
            for fd in item.descriptors:
                os.close(fd)
        self.items.clear()


def take_over(path: str) -> Takeover | None:
    """Return what the server at a path holds; None if none listens there.

    Raises OSError: EPERM for another user's server, EBUSY for one that systemd runs.
    """
    place.check_path(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise OSError(error.errno, error.strerror, path) from None
    connection.settimeout(_SECONDS)
    if place.user_of(connection)[0] != os.geteuid():
        connection.close()
        raise OSError(errno.EPERM, "replace: the server is another user's", path)
    return Takeover(connection, path)


def hand_over(connection: socket.socket, items: Iterable[Item]) -> None:
    """Send items to the next server. Raises OSError unless it has accepted all of them."""
    connection.settimeout(_SECONDS)
    for key, record, descriptors in [*items, Item("", {}, ())]:
        data = protocol.pack_result(key=key, record=record)
        socket.send_fds(connection, [data], descriptors)
        if connection.recv(len(_DONE)) != _DONE:
            raise OSError(errno.ECONNABORTED, "the next server has ended")
    connection.send(_DONE)


def _parse(data: bytes, path: str) -> tuple[str, dict[str, Any]]:
    try:
        match protocol.parse_reply(data):
            case {"key": str(key), "record": dict(record)}:
                return key, record
    except Refusal as refusal:
        raise OSError(refusal.errno, f"replace: {refusal.text}", path) from None
    raise OSError(errno.EPROTO, "replace: the server is one of another version", path)
