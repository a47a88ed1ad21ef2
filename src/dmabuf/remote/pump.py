"""A process that holds an agent of NIXL, and the handle by which its owner uses it.

UCX over TCP carries out what a peer asks for: whoever is connected to an agent can read and write
all memory of the agent's process. So an agent never lives in a program of the user, but in a pump:
a process for one connection, which maps the memory files that its owner grants over a Unix socket,
as the store's server does, and nothing else of the user's. Landlock takes its access to files.

Whichever process ends, nobody writes into memory that was freed. The pump has mappings of its own,
of memory files: what arrives late lands in their pages, which the kernel frees with the last of
the mappings and descriptors. The end of the owner ends the socket, and thereby the pump. The end of
the pump, which `close` waits for, ends its connections, mappings and RDMA memory regions: the
kernel closes a process's descriptors before wait4(2) returns it.

This module is also the pump's program: ``python -m dmabuf.remote.pump DESCRIPTOR``.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from dmabuf._core import address_of
from dmabuf.errors import os_error
from dmabuf.kernel import landlock
from dmabuf.remote.ranges import Range, Ranges

Operation = Literal["READ", "WRITE"]

_LIBRARIES = ("nixl_cu13", "nixl_cu12", "nixl")
_MOST_BYTES = 160 << 10
_MOST_PARTS = 1024
"""Parts of a transfer in one message."""
_PIECE = 64 << 20
"""Bytes of one transfer of NIXL, at most."""
_AT_ONCE = 2
"""Transfers under way at once, so that the connection is never idle between them."""
_GOES_ON = {"moved": True}
"""What the pump sends after each transfer, before the reply."""
_MOST = 60.0
"""Seconds that a request may take, but for `Pump.move`."""
_SLICE = 100
"""Milliseconds between two looks at the time."""
_POLL = 50e-6
"""Seconds between two looks at a transfer."""
_NETLINK_RDMA, _NLM_F_REQUEST = 20, 1
_GET_CHARDEV = 5 << 10 | 15
"""RDMA_NL_NLDEV and RDMA_NLDEV_CMD_GET_CHARDEV of include/uapi/rdma/rdma_netlink.h."""
_CHARDEV_TYPE = 69
"""RDMA_NLDEV_ATTR_CHARDEV_TYPE, a text."""


class Part(NamedTuple):
    """A contiguous part of a transfer: addresses in the two pumps, and bytes."""

    local: int
    remote: int
    size: int


class Region(NamedTuple):
    """Memory that a pump has mapped and registered."""

    number: int
    address: int
    """In the pump."""


def library() -> str | None:
    """Return the name of NIXL's Python package; None if none is installed. It is not imported."""
    return next((name for name in _LIBRARIES if find_spec(name) is not None), None)


# -- the owner's end


class Pump:
    """A pump process of this process. Thread-safe: one request at a time."""

    def __init__(self, transports: str, device: str | None, start: float = _MOST) -> None:
        """Start it.

        Args:
            transports: UCX_TLS for it.
            device: UCX_NET_DEVICES for it, unless that is set.
            start: the most seconds that the first request waits until it serves. On a busy
                machine, or with a low priority, that takes long.
        """
        # UCX's cache of registrations would keep revoked memory pinned.
        env = os.environ | {"UCX_TLS": transports, "UCX_RCACHE_ENABLE": "n"}
        env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        if device is not None:
            env.setdefault("UCX_NET_DEVICES", device)
        self._lock = threading.Lock()
        self._holder = 0
        """The thread that makes a request."""
        self._late: deque[Region] = deque()
        """Regions that a finalizer revoked within a request."""
        self._numbers = itertools.count(1)
        self._serves, self._start = False, start
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the owner's
                cwd="/",
                env=env,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    @property
    def closed(self) -> bool:
        """Whether it was ended, by `close` or because a transfer of it failed."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """End it, and return when it has ended: nothing moves bytes for it any more."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Close a forked child's copy: the process is the parent's."""
        self._lock = threading.Lock()
        self._socket.close()
        self._process.returncode = 0

    def metadata(self) -> str:
        """Return what the peer's pump has to know of this one and its regions."""
        return str(self._ask("metadata")["metadata"])

    def connect(self, metadata: str) -> None:
        """Take in the peer's `metadata`, in place of what was taken in before."""
        self._ask("connect", metadata=metadata)

    def grant(self, fd: int, size: int, *, writable: bool) -> Region:
        """Have it map and register a memory file. Raises OSError; the pump then goes on."""
        number = next(self._numbers)
        reply = self._ask("grant", fd, number=number, size=size, writable=writable)
        return Region(number, int(str(reply["address"])))

    def revoke(self, region: Region) -> None:
        """Have it deregister and unmap a region; if that fails, end it, and with it all regions.

        In a finalizer within a request of this thread, it is done after the request.
        """
        if self._holder == threading.get_ident():
            self._late.append(region)
            return
        try:
            self._ask("revoke", number=region.number)
        except OSError:
            self.close()

    def move(
        self,
        operation: Operation,
        parts: Iterable[Part],
        timeout: float,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Move bytes to ("WRITE") or from ("READ") the peer, and return when they have arrived.

        `timeout` is the most seconds until the next 64 MiB have arrived; `tick` is called about ten
        times a second. After an error or an interrupt the process has been ended: this end moves
        nothing any more. The other end has to end its own, since bytes may be on their way to it.
        """
        whole = list(parts)
        try:
            for at in range(0, len(whole), _MOST_PARTS):
                some = whole[at : at + _MOST_PARTS]
                self._ask("move", operation=operation, parts=some, timeout=timeout, tick=tick)
        except BaseException:
            self.close()
            raise

    def _ask(
        self,
        op: str,
        *descriptors: int,
        timeout: float = _MOST,
        tick: Callable[[], None] = lambda: None,
        **fields: object,
    ) -> dict[str, object]:
        request = json.dumps({"op": op, **fields}).encode()
        with self._lock:
            self._holder = threading.get_ident()
            try:
                if self.closed:
                    raise os_error(errno.ECONNRESET, "the NIXL process was ended; connect again")
                if not self._serves:
                    _check(self._receive("start its process", self._start, tick))
                    self._serves = True
                with suppress(ConnectionError):  # it has ended: there is no reply either
                    socket.send_fds(self._socket, [request], descriptors)
                reply = self._receive(op, timeout, tick)
            except BaseException:
                self.close()
                raise
            finally:
                self._holder = 0
        while self._late:
            with suppress(IndexError):  # another thread was faster
                self.revoke(self._late.popleft())
        return _check(reply)

    def _receive(self, op: str, timeout: float, tick: Callable[[], None]) -> dict[str, object]:
        until = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            while not poll.poll(_SLICE):
                tick()
                if time.monotonic() > until:
                    text = f"NIXL: {op}: nothing came in {timeout:g} s"
                    raise os_error(errno.ETIMEDOUT, text)
            data = b""
            with suppress(ConnectionError):
                data = self._socket.recv(_MOST_BYTES)
            if not data:
                raise os_error(errno.ECONNRESET, f"NIXL: {op}: its process (pump) has ended")
            found: dict[str, object] = json.loads(data)
            if found != _GOES_ON:
                return found
            until = time.monotonic() + timeout


def _check(reply: dict[str, object]) -> dict[str, object]:
    if "error" in reply:
        raise os_error(int(str(reply["errno"])), f"NIXL: {reply['error']}")
    return reply


# -- the process


class _Agent:
    """NIXL's agent, and what it may use."""

    def __init__(self, name: str, owner: socket.socket) -> None:
        api = import_module(f"{name}._api")
        config = api.nixl_agent_config(backends=["UCX"])  # which does not listen
        self._agent: Any = api.nixl_agent(os.urandom(8).hex(), config)
        self._owner = owner
        self._regions: dict[int, tuple[mmap.mmap, Any]] = {}
        self._peer: str | None = None

    def grant(self, number: int, size: int, writable: bool, fd: int) -> dict[str, object]:
        """Map and register a memory file."""
        try:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
        finally:
            os.close(fd)
        address = address_of(memory)
        registered = self._agent.register_memory([(address, size, 0, "")], "DRAM")
        self._regions[number] = memory, registered
        return {"address": address}

    def revoke(self, number: int) -> dict[str, object]:
        """Deregister and unmap a region."""
        memory, registered = self._regions.pop(number)
        self._agent.deregister_memory(registered)
        memory.close()
        return {}

    def metadata(self) -> dict[str, object]:
        """Return the agent's metadata."""
        return {"metadata": b64encode(self._agent.get_agent_metadata()).decode()}

    def connect(self, metadata: str) -> dict[str, object]:
        """Take in the peer's metadata. Keys of regions that it revoked go with the old ones."""
        if self._peer is not None:
            self._agent.remove_remote_agent(self._peer)
            self._peer = None
        found = self._agent.add_remote_agent(b64decode(metadata))
        self._peer = found.decode() if isinstance(found, bytes) else found
        return {}

    def move(self, operation: str, parts: Iterable[Range]) -> dict[str, object]:
        """Move bytes; NIXL refuses what is not in a region of this end and one of the peer."""
        under_way = deque[tuple[Any, str]]()
        for piece in Ranges(parts).pieces(_PIECE):  # `timeout` is for each
            here, there = (
                self._agent.get_xfer_descs([(part[end], part[2], 0) for part in piece], "DRAM")
                for end in (0, 1)
            )
            transfer = self._agent.initialize_xfer(operation, here, there, self._peer)
            under_way.append((transfer, self._agent.transfer(transfer)))
            if len(under_way) == _AT_ONCE:
                self._finish(*under_way.popleft())
        while under_way:
            self._finish(*under_way.popleft())
        return {}

    def _finish(self, transfer: Any, state: str) -> None:
        """Wait for a transfer, and report to the owner that it goes on."""
        while state == "PROC":
            if select.select([self._owner], [], [], _POLL)[0]:
                os._exit(0)  # the owner has ended: it sends nothing meanwhile
            state = self._agent.check_xfer_state(transfer)
        if state != "DONE":
            raise OSError(f"a transfer ended as {state}")
        transfer.release()
        self._owner.send(json.dumps(_GOES_ON).encode())


def _load_verbs() -> None:
    """Have the kernel load ib_uverbs, which makes /dev/infiniband, as libibverbs does later.

    Landlock keeps access only to folders that exist. The kernel loads the module for any user who
    asks for its device file, before send(2) returns (ib_get_client_nl_info in
    drivers/infiniband/core/device.c, since Linux 5.3).
    """
    if not os.path.isdir("/sys/class/infiniband"):
        return
    wanted = struct.pack("=HH8s", 4 + 7, _CHARDEV_TYPE, b"uverbs")
    query = struct.pack("=IHHII", 16 + len(wanted), _GET_CHARDEV, _NLM_F_REQUEST, 0, 0) + wanted
    with suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_RDMA) as one:
        one.send(query)


def _confine(name: str) -> None:
    """Leave nothing readable but what NIXL's libraries read, and nothing to execute."""
    found = find_spec(name)
    places = [os.path.dirname(one) for one in (found and found.submodule_search_locations) or ()]
    system = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc", "/proc", "/sys"]
    kept = dict.fromkeys([*places, *system], landlock.READ | landlock.LIST)
    _load_verbs()
    kept["/dev/infiniband"] = landlock.READ | landlock.LIST | landlock.WRITE | landlock.IOCTL
    landlock.confine(kept)


def main() -> None:
    """Serve the owner until it ends."""
    owner = socket.socket(fileno=int(sys.argv[1]))
    name = library()
    try:
        if name is None:
            raise ImportError("it is not installed")
        _confine(name)
        agent = _Agent(name, owner)
    except Exception as error:
        owner.send(json.dumps(_error(error)).encode())
        return
    reply: dict[str, object] = {}
    while True:
        try:
            owner.send(json.dumps(reply).encode())
            data, descriptors, _, _ = socket.recv_fds(
                owner, _MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            data = b""
        if not data:
            os._exit(0)  # without waiting for a peer
        request = json.loads(data)
        if descriptors:
            request["fd"] = descriptors[0]
        try:
            reply = getattr(agent, request.pop("op"))(**request)
        except Exception as error:
            reply = _error(error)


def _error(error: Exception) -> dict[str, object]:
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = errno.ECONNRESET if "Disconnect" in type(error).__name__ else errno.EIO
    return {"error": str(error) or type(error).__name__, "errno": number}


if __name__ == "__main__":
    main()
