"""The engine tcp: the bytes of a request travel through the socket that it was made by."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import TransferError
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel, Transport
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.transfer import Direction, Plan, Route

Place = tuple[int, int]
"""Where in a buffer bytes go or come from: offset and size."""


class Tcp:
    """How bytes travel between the places of a view and the node, once the request was sent.

    Another engine has the same members, and uses the channel for nothing but messages.
    """

    by_card = False
    """Whether the network card reaches the buffer's pages, without the CPU."""
    route = Route.STAGED
    """The route at this end."""

    def __init__(self, transport: Transport, why: str) -> None:
        self.transport = transport
        """What carries the bytes."""
        self.why = why
        """A sentence: why this engine."""

    def reason(self, direction: Direction) -> str:
        """Return the reason for the route at this end."""
        if direction == "read":
            return "the kernel copies from the socket's buffers into the buffer's mapping"
        return "the kernel copies from the buffer's mapping into the socket's buffers"

    def rejected(self, there: CopySide | Plan) -> Mapping[Route, str]:
        """Return why better routes are not taken at this end, with the node's route."""
        text = f"{self.transport} moves bytes through the buffers of a socket: {self.why}"
        text = f"{text}; at the node {there.route}: {there.reason}"
        return {Route.NATIVE: text, Route.DIRECT: text}

    def prepare(
        self, channel: Channel, buffer: Buffer, places: Iterable[Place]
    ) -> dict[str, object]:
        """Return what a request needs beside its fields."""
        return {}

    def revoke(self, buffer: Buffer) -> None:
        """Take a buffer from the node, which cannot reach any."""

    def close(self) -> None:
        """End what else than the connection it has."""

    def forget(self) -> None:
        """Close a forked child's copy."""

    def receive(
        self,
        channel: Channel,
        view: memoryview,
        places: Sequence[Place],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Receive the data of a reply, and return the message that ends it.

        Args:
            channel: the connection.
            view: the memory.
            places: where in the view the bytes go, one place after the other.
            path: what the data is of, for errors.
            meter: called with the bytes received.

        Raises:
            TransferError: the connection failed, or the time was up.
            Reported: the node reports an error.
        """
        done, cursor = 0, _Cursor(view, places)
        try:
            while isinstance(found := channel.receive(), int):
                for part in cursor.take(found):
                    with part:
                        channel.read_into(part)
                        done += len(part)
                if meter is not None:
                    meter(done)
        except OSError as error:
            text = f"{error.strerror}; the content of the buffer's range is undefined"
            raise TransferError(error.errno or errno.EIO, text, path, nbytes=done) from None
        if "error" not in found and found.number("nbytes") != done:
            raise Malformed("fewer bytes came than the node reports")
        return protocol.checked(found, channel.name)

    def send(
        self,
        channel: Channel,
        view: memoryview,
        places: Sequence[Place],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Send the data of a request, and return the reply; as `receive`."""
        channel.receive_reply()
        done, cursor, left = 0, _Cursor(view, places), sum(size for _, size in places)
        channel.announce(left)
        try:
            # Whole messages, between which an error of the node may come.
            while left and not channel.is_readable():
                for part in cursor.take(min(left, protocol.MOST_DATA)):
                    with part:
                        channel.send_data(part)
                        done, left = done + len(part), left - len(part)
                if meter is not None:
                    meter(done)
            channel.send(protocol.pack(end=True))
            return channel.receive_reply()
        except OSError as error:
            text = f"{error.strerror}; what the node holds of the range is undefined"
            raise TransferError(error.errno or errno.EIO, text, path, nbytes=done) from None


class _Cursor:
    """The places of a view that bytes fill one after the other."""

    def __init__(self, view: memoryview, places: Sequence[Place]) -> None:
        self._view, self._places = view, places
        self._index = self._done = 0

    def take(self, size: int) -> Iterator[memoryview]:
        """Yield the places of the next bytes. Raises Malformed if there are not as many."""
        while size:
            if self._index == len(self._places):
                raise Malformed("more data came than was requested")
            start, length = self._places[self._index]
            part = min(size, length - self._done)
            if part:
                start += self._done
                yield self._view[start : start + part]
            self._done += part
            size -= part
            if self._done == length:
                self._index, self._done = self._index + 1, 0
