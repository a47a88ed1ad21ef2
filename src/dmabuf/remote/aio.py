"""`dmabuf.remote` in an event loop of asyncio or trio: the same names, awaited.

    >>> from dmabuf.remote import aio
    >>> async with await aio.connect("10.0.0.5:7777") as node:
    ...     file = await node.open("model.safetensors")
    ...     await file.read_into(buf)

A call runs in a thread. The calls of one Node run one after the other, and one that waits for its
turn has no thread. Cancelling a call that runs stops it within 100 ms, and closes the connection.
The await returns when the call has ended: then nobody writes to the buffer's memory any more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

import anyio

from dmabuf import remote
from dmabuf.aio import call
from dmabuf.remote import Certificates, RemotePlan, RemoteTransfer, Status
from dmabuf.transfer import Mode

__all__ = ["Node", "RemoteFile", "RemotePlan", "RemoteTransfer", "Status", "connect"]

P = ParamSpec("P")
T = TypeVar("T")
Sync = TypeVar("Sync", bound=remote.Node | remote.RemoteFile)


class _Awaited(Generic[Sync]):
    """A Node or a RemoteFile whose calls are awaited."""

    def __init__(self, sync: Sync, lock: anyio.Lock) -> None:
        self.sync = sync
        """The one that carries out the calls."""
        self.lock = lock
        """Held by the call that runs."""

    @property
    def closed(self) -> bool:
        """Whether it was closed, or the connection is lost."""
        return self.sync.closed

    @property
    def transport(self) -> str:
        """What carries the bytes; see remote.Node."""
        return self.sync.transport

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread once no other call of the connection runs."""
        async with self.lock:
            return await call(function)

    async def aclose(self) -> None:
        """Close it, after the call that runs. Can be called again; cancelling has no effect."""
        with anyio.CancelScope(shield=True):
            await self.call(self.sync.close)

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return repr(self.sync).replace("dmabuf.remote.", "dmabuf.remote.aio.", 1)


def _awaited(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[_Awaited[Any], P], Coroutine[object, object, T]]:
    """Return a method that calls another one in a thread."""

    @wraps(method)
    async def awaited(self: _Awaited[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.call(partial(method, self.sync, *args, **kwargs))

    return awaited


class RemoteFile(_Awaited[remote.RemoteFile]):
    """A file of a node, opened by `Node.open`; its methods are those of remote.RemoteFile."""

    read_into = _awaited(remote.RemoteFile.read_into)
    write_from = _awaited(remote.RemoteFile.write_from)
    read_segments = _awaited(remote.RemoteFile.read_segments)
    write_segments = _awaited(remote.RemoteFile.write_segments)
    plan = _awaited(remote.RemoteFile.plan)
    flush = _awaited(remote.RemoteFile.flush)

    async def size(self) -> int:
        """Return where the file ends now, in bytes."""
        return await self.call(lambda: self.sync.size)

    async def __aenter__(self) -> RemoteFile:
        return self


class Node(_Awaited[remote.Node]):
    """A connection to another node, made by `connect`; its methods are those of remote.Node."""

    fetch = _awaited(remote.Node.fetch)
    fetch_many = _awaited(remote.Node.fetch_many)
    publish = _awaited(remote.Node.publish)
    revoke = _awaited(remote.Node.revoke)
    remove = _awaited(remote.Node.remove)
    ls = _awaited(remote.Node.ls)

    @property
    def address(self) -> str:
        """The address that it is connected to; see remote.Node."""
        return self.sync.address

    @property
    def reason(self) -> str:
        """A sentence: why NIXL is used, or why it is not."""
        return self.sync.reason

    async def open(self, path: str, mode: Mode = "r") -> RemoteFile:
        """Open a file; see remote.Node."""
        return RemoteFile(await self.call(lambda: self.sync.open(path, mode)), self.lock)

    @asynccontextmanager
    async def replacing(self, path: str, *, sync: bool = False) -> AsyncIterator[RemoteFile]:
        """Yield a new file, which takes its path at the end; see remote.Node."""
        made = self.sync.replacing(path, sync=sync)
        file = RemoteFile(await self.call(made.__enter__), self.lock)
        kind: type[BaseException] | None = None
        error: BaseException | None = None
        where: TracebackType | None = None
        try:
            yield file
        except BaseException as caught:
            kind, error, where = type(caught), caught, caught.__traceback__
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self.call(partial(made.__exit__, kind, error, where))

    async def __aenter__(self) -> Node:
        return self


async def connect(
    address: str | Sequence[str],
    *,
    engine: Literal["auto", "tcp", "nixl"] = "auto",
    certificates: Certificates | None = None,
    trusted_network: bool = False,
    timeout: float = 30.0,
) -> Node:
    """Return a connection to a node; the arguments and errors are those of remote.connect.

    Cancelling it returns when the node has answered, or after `timeout` seconds.
    """
    made = partial(
        remote.connect, address, engine=engine, certificates=certificates,
        trusted_network=trusted_network, timeout=timeout,
    )  # fmt: skip
    return Node(await call(made), anyio.Lock())
