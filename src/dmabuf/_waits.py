"""Waiting in an event loop: for one task's wake-up, and for descriptors of others."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import anyio
import anyio.lowlevel

from dmabuf import fence
from dmabuf.steps import Fences, Ready


class Wake(Protocol):
    """An event for one task, which awaits it."""

    def set(self) -> None:
        """Wake the task, now or when it comes to wait."""

    def __await__(self) -> Generator[Any, Any, Any]: ...


class _Event:
    """Any event as a Wake."""

    __slots__ = ("_event", "set")

    def __init__(self, kind: Callable[[], Any]) -> None:
        self._event = kind()
        self.set = self._event.set

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._event.wait().__await__()  # type: ignore[no-any-return]


def kind_of_wake() -> Callable[[], Wake]:
    """What makes the running loop's."""
    backend = type(anyio.Event()).__module__.rpartition("_")[2]
    if backend == "asyncio":
        return _by_future()
    return partial(_Event, sys.modules["trio"].Event if backend == "trio" else anyio.Event)


def _by_future() -> Callable[[], Wake]:
    """As anyio.Event on asyncio, at a third of the cost."""
    asyncio = sys.modules["asyncio"]

    class FutureWake(asyncio.Future):  # type: ignore[name-defined,misc]
        __slots__ = ()

        def set(self) -> None:
            if not self.done():
                self.set_result(None)

    return partial(FutureWake, loop=asyncio.get_running_loop())


async def readable(fd: int, access: Literal["read", "write"]) -> None:
    """Wait until a descriptor can be read (or written).

    By a duplicate, since a loop has one waiter for a descriptor, and others may wait for it too. A
    device without poll, like /dev/zero, is always ready, and epoll(7) refuses it with EPERM.
    """
    now = select.poll()
    now.register(fd, select.POLLIN if access == "read" else select.POLLOUT)
    if now.poll(0):
        await anyio.lowlevel.checkpoint()
        return
    mine = os.dup(fd)
    try:
        await (anyio.wait_readable if access == "read" else anyio.wait_writable)(mine)
    finally:
        os.close(mine)


async def until_unfenced(
    fds: Sequence[int],
    access: fence.Access,
    timeout: float | None,
    *,
    spent: float = 0.0,
    path: str | None = None,
) -> None:
    """As fence.wait, in the loop."""
    left = fence.pending(fds, access) if fds else fds
    if not left:
        return
    seconds = None if timeout is None else max(0.0, timeout - spent)
    with anyio.move_on_after(seconds) as patience:
        while left:
            await readable(left[0], access)
            left = fence.pending(left, access)
    if patience.cancelled_caught:
        fence.wait(left, access, timeout, spent=timeout or 0.0, path=path)  # says so, or not


async def until(step: Fences | Ready) -> None:
    """As the step's `here`, in the loop."""
    if isinstance(step, Fences):
        await until_unfenced(step.fds, step.access, step.timeout, spent=step.spent, path=step.path)
        return
    with anyio.move_on_after(step.left) as patience:
        await readable(step.fd, step.access)
    if patience.cancelled_caught:
        raise step.late()
