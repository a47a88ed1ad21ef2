"""The engine tcp: the bytes of a request travel through the socket that it was made by."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import TransferError
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.transfer import Direction, Plan, Route

_UNDEFINED: Mapping[Direction, str] = {
    "read": "the content of the buffer's range is undefined",
    "write": "what the node holds of the range is undefined",
}


class Moved:
    """Counts the bytes of a transfer, for its progress and its errors."""

    def __init__(self, meter: Meter | None) -> None:
        self.nbytes = 0
        self._meter = meter

    def add(self, nbytes: int) -> None:
        """Count bytes that have moved."""
        self.nbytes += nbytes
        if self._meter is not None:
            self._meter(self.nbytes)


class Engine:
    """How bytes travel between a view of memory and the node, once the request was sent.

    This is the engine tcp. A subclass has another way, and uses the channel only for messages.
    """

    by_card = False
    """Whether the network card reaches the buffer's pages, without the CPU."""
    route = Route.STAGED
    """The route at this end."""

    def __init__(self, transport: str, why: str) -> None:
        self.transport = transport
        """What carries the bytes: see RemoteTransfer."""
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

    def grant(self, buffer: Buffer) -> str | None:
        """Let the node reach a buffer as far as the engine needs it; return why it cannot."""
        return None

    def prepare(
        self, channel: Channel, buffer: Buffer, places: Sequence[Range]
    ) -> dict[str, object]:
        """Return the fields of a request by which the node reaches places of a granted buffer."""
        return {}

    def revoke(self, buffer: Buffer) -> None:
        """Take a buffer from the node."""

    def close(self) -> None:
        """End what it has beside the connection."""

    def forget(self) -> None:
        """Close a forked child's copy."""

    def carry(
        self,
        direction: Direction,
        channel: Channel,
        view: memoryview,
        places: Sequence[Range],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Move the bytes of a request that was sent, and return the reply to it.

        Args:
            direction: "read" from the node or "write" to it.
            channel: the connection.
            view: the memory.
            places: where in the view the bytes go or come from, one place after the other.
            path: what the bytes are of, for errors.
            meter: called with the bytes moved.

        Raises:
            TransferError: the connection failed, or the time was up.
            Reported: the node reports an error.
        """
        moved, move = Moved(meter), self._receive if direction == "read" else self._send
        try:
            reply = move(channel, view, places, moved)
        except OSError as error:
            text = f"{error.strerror}; {_UNDEFINED[direction]}"
            number = error.errno or errno.EIO
            raise TransferError(number, text, path, nbytes=moved.nbytes) from None
        protocol.checked(reply, channel.name)
        if reply.number("nbytes") != moved.nbytes:
            raise Malformed(f"{moved.nbytes} bytes moved, and the node reports another number")
        return reply

    def _receive(
        self, channel: Channel, view: memoryview, places: Sequence[Range], moved: Moved
    ) -> Message:
        left = Ranges(places)
        while isinstance(found := channel.receive(), int):
            parts = left.take(found)
            if total(parts) < found:
                raise Malformed("more data came than was requested")
            for start, size in parts:
                with view[start : start + size] as part:
                    channel.read_into(part)
                moved.add(size)
        return found

    def _send(
        self, channel: Channel, view: memoryview, places: Sequence[Range], moved: Moved
    ) -> Message:
        channel.receive_reply()
        channel.announce(total(places))
        for parts in Ranges(places).pieces(protocol.MOST_DATA):
            if channel.is_readable():  # the node reports an error, between two messages
                break
            for start, size in parts:
                with view[start : start + size] as part:
                    channel.send_data(part)
                moved.add(size)
        channel.send(protocol.pack(end=True))
        return channel.receive_message()
