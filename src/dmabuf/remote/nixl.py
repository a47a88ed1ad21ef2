"""Engine nixl: which transports it may use, and the client's end.

Each end has a pump (pump.py) for each connection. The node's pump is the one that acts: it writes
into the regions of the client's pump what it has read from a file, and reads from them what it
writes to one. So the client's end only grants memory; `nixl_node.py` is the node's end.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import socket
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from dmabuf.copying import CopySide
from dmabuf.errors import os_error
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.engine import Engine, Moved
from dmabuf.remote.protocol import Message
from dmabuf.remote.pump import Pump, Region, library
from dmabuf.remote.ranges import Range
from dmabuf.transfer import Direction, Plan, Route

_RDMA = "rc_verbs,ud_verbs,self"
_TCP = "tcp"
_OF_RDMA = ("rc", "ud", "dc", "self")
"""How the names of UCX's transports begin that only reach registered memory."""
_SIOCGIFADDR = 0x8915

INSTALL = "pip install --no-deps nixl-cu13==1.5.1 numpy"


def transports(*, trusted: bool) -> list[str]:
    """Return the values of UCX_TLS that this end accepts, the best first; UCX_TLS itself if set.

    Raises OSError: EOPNOTSUPP, NIXL is not installed; EACCES, all of them need a trusted network.
    """
    if library() is None:
        raise os_error(errno.EOPNOTSUPP, f"NIXL is not installed; {INSTALL}")
    chosen = os.environ.get("UCX_TLS")
    found = [chosen] if chosen else [_RDMA, _TCP] if _rdma_is_up() else [_TCP]
    allowed = [one for one in found if trusted or is_rdma(one)]
    if not allowed:
        text = "UCX over TCP obeys whoever reaches it; pass trusted_network=True if nobody else can"
        raise os_error(errno.EACCES, text)
    return allowed


def is_rdma(transports: str) -> bool:
    """Return whether the network card moves the bytes, into registered memory only."""
    return all(one.startswith(_OF_RDMA) for one in transports.split(","))


def _rdma_is_up() -> bool:
    for path in glob.glob("/sys/class/infiniband/*/ports/*/state"):
        with suppress(OSError), open(path) as file:
            if "ACTIVE" in file.read():
                return True
    return False


def device_of(transports: str, local: str | None) -> str | None:
    """Return UCX_NET_DEVICES for a pump: the interface of the connection, and no other network.

    `local` is this end's numeric address of the connection; None for a Unix socket. Raises
    OSError(ENODEV) if its interface is unknown and the environment names none.
    """
    if is_rdma(transports) or "UCX_NET_DEVICES" in os.environ:
        return None
    address = (local or "127.0.0.1").removeprefix("::ffff:").partition("%")[0]
    if address == "::1" or address.startswith("127."):
        return "lo"
    with suppress(OSError), open("/proc/net/if_inet6") as file:
        for line in file:
            digits, *_, name = line.split()
            if socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)) == address:
                return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                wanted = struct.pack("256s", name.encode())
                found = fcntl.ioctl(probe, _SIOCGIFADDR, wanted)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    text = f"the interface with the address {address} is unknown; set UCX_NET_DEVICES"
    raise os_error(errno.ENODEV, text)


class _Granted(NamedTuple):
    region: Region
    buffer: weakref.ref[Buffer]
    on_close: Callable[[], None]

    def forget(self) -> None:
        """Take the callback back from the buffer."""
        buffer = self.buffer()
        if buffer is not None:
            buffer.not_on_close(self.on_close)


class Nixl(Engine):
    """How bytes travel between a buffer and the node by NIXL.

    The node may reach the buffers that were granted to it, until each is revoked, closed or
    dropped. They are known by identity, and by no address: another buffer at the same address has a
    region of its own. A closed or dropped buffer takes its entry out before it is freed.
    """

    def __init__(self, transports: str, device: str | None, start: float) -> None:
        first = transports.partition(",")[0]
        why = f"both ends have NIXL, and UCX_TLS={transports} is allowed"
        super().__init__("ucx_tcp" if first == "tcp" else first, why)
        self.by_card = is_rdma(transports)
        self.route = Route.DIRECT if self.by_card else Route.STAGED
        self.pump = Pump(transports, device, start)
        self._granted: dict[int, _Granted] = {}
        """By id(buffer)."""
        self._changed = True

    def reason(self, direction: Direction) -> str:
        """Return the reason for the route at this end."""
        if self.by_card:
            return f"NIXL by {self.transport}: the network card reaches the buffer's pages"
        way = "from the socket into" if direction == "read" else "into the socket from"
        return f"NIXL over TCP: the CPU copies {way} the buffer's pages, in a process of its own"

    def rejected(self, there: CopySide | Plan) -> Mapping[Route, str]:
        """Return why better routes are not taken at this end, with the node's route."""
        end = f"at the node {there.route}: {there.reason}"
        native = f"NIXL registers no dma-bufs; {end}"
        if self.by_card:
            return {Route.NATIVE: native}
        return {Route.NATIVE: native, Route.DIRECT: f"UCX over TCP copies by the CPU; {end}"}

    def grant(self, buffer: Buffer) -> str | None:
        """Have the pump register a buffer that it has not; return why it cannot.

        Raises OSError if the pump has ended.
        """
        if id(buffer) in self._granted:
            return None
        if buffer.pin_refusal is not None:
            return buffer.pin_refusal
        if buffer.memfd is None and buffer.is_dmabuf:
            return "its memory file is not here, and NIXL registers no dma-bufs"
        fd = buffer.slabs[0].fd if buffer.memfd is None else buffer.memfd
        try:
            region = self.pump.grant(fd, buffer.size, writable=buffer.descriptor_writable)
        except OSError as error:
            if self.pump.closed:
                raise
            return f"its pages cannot be registered: {error.strerror}"
        on_close = partial(self._end, id(buffer))
        self._granted[id(buffer)] = _Granted(region, weakref.ref(buffer), on_close)
        self._changed = True
        buffer.on_close(on_close)
        return None

    def metadata(self) -> str:
        """Return what the node has to know of the pump and its present regions."""
        self._changed = False
        return self.pump.metadata()

    def prepare(
        self, channel: Channel, buffer: Buffer, places: Sequence[Range]
    ) -> dict[str, object]:
        """Return the addresses of places, when the node knows the present regions."""
        if self._changed:
            channel.send(protocol.pack(op="regions", metadata=self.metadata()))
            channel.receive_reply()
        base = self._granted[id(buffer)].region.address
        return {"addresses": [base + start for start, _ in places]}

    def _receive(
        self, channel: Channel, view: memoryview, places: Sequence[Range], moved: Moved
    ) -> Message:
        while True:
            found = channel.receive_message()
            if "moved" in found:
                moved.add(found.number("moved"))
            elif "go" not in found:
                break
        if "broken" in found:
            error = protocol.parse_error(found, channel.name)
            raise os_error(getattr(error, "errno", None) or errno.EIO, str(error))
        return found

    _send = _receive  # the node's end acts in both directions

    def revoke(self, buffer: Buffer) -> None:
        """Deregister and unmap a buffer in the pump, if it was granted; from any thread."""
        self._end(id(buffer))

    def _end(self, key: int) -> None:
        found = self._granted.pop(key, None)
        if found is not None:
            found.forget()
            self._changed = True
            self.pump.revoke(found.region)

    def close(self) -> None:
        """End the pump, and with it all regions."""
        self.pump.close()
        while self._granted:
            self._granted.popitem()[1].forget()

    def forget(self) -> None:
        """Close a forked child's copy."""
        self.pump.forget()
        self._granted = {}
