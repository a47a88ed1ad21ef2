"""The engine tcp: the bytes of a request travel through the socket that it was made by."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import TransferError
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel, Transport
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.transfer import Direction, Plan, Route


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
        self, channel: Channel, buffer: Buffer, places: Sequence[Range]
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
        places: Sequence[Range],
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
        done, left = 0, Ranges(places)
        try:
            while isinstance(found := channel.receive(), int):
                parts = left.take(found)
                if total(parts) < found:
                    raise Malformed("more data came than was requested")
                for start, size in parts:
                    with view[start : start + size] as part:
                        channel.read_into(part)
                    done += size
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
        places: Sequence[Range],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Send the data of a request, and return the reply; as `receive`."""
        channel.receive_reply()
        done = 0
        channel.announce(total(places))
        try:
            # Whole messages, between which an error of the node may come.
            for parts in Ranges(places).pieces(protocol.MOST_DATA):
                if channel.is_readable():
                    break
                for start, size in parts:
                    with view[start : start + size] as part:
                        channel.send_data(part)
                    done += size
                if meter is not None:
                    meter(done)
            channel.send(protocol.pack(end=True))
            return channel.receive_reply()
        except OSError as error:
            text = f"{error.strerror}; what the node holds of the range is undefined"
            raise TransferError(error.errno or errno.EIO, text, path, nbytes=done) from None
