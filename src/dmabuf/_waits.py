"""Waiting in an event loop: for one task's wake-up, and for descriptors of others."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import anyio.lowlevel

from dmabuf import fence
from dmabuf.steps import Fences, Ready

if TYPE_CHECKING:
    import asyncio


class Wake(Protocol):
    """What one task awaits until it is given a result; asyncio's Future is one."""

    def done(self) -> bool:
        """Whether nobody waits for it any more."""

    def set_result(self, result: Any, /) -> None:
        """While it is awaited, once: what awaiting it returns."""

    def __await__(self) -> Generator[Any, Any, Any]: ...


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The running loop, where it is one of asyncio's."""
    if not type(anyio.Event()).__module__.endswith("asyncio"):
        return None
    return sys.modules["asyncio"].get_running_loop()  # type: ignore[no-any-return]


@cache
def _trio_wake() -> Callable[[], Wake]:
    """A class whose instances are as a trio.Event that one task waits for, and cost less.

    One function aborts all the sleeps: which of them are over trio tells itself, by taking away
    their tasks' `custom_sleep_data`. And the outcome that a task is sent is the wake.
    """
    lowlevel = sys.modules["trio"].lowlevel
    current_task, reschedule = lowlevel.current_task, lowlevel.reschedule
    wait_task_rescheduled, succeeded = lowlevel.wait_task_rescheduled, lowlevel.Abort.SUCCEEDED

    def abort(_: object) -> object:
        return succeeded

    class TrioWake:
        __slots__ = ("_result", "_task")

        def done(self) -> bool:
            return self._task.custom_sleep_data is not self

        def set_result(self, result: Any, /) -> None:
            self._result = result
            reschedule(self._task, self)

        def unwrap(self) -> Any:
            return self._result

        def __await__(self) -> Generator[Any, Any, Any]:
            self._task = task = current_task()
            task.custom_sleep_data = self
            return wait_task_rescheduled(abort).__await__()  # type: ignore[no-any-return]

    return TrioWake


def kind_of_wake() -> Callable[[], Wake]:
    """What makes a Wake of the running loop."""
    if loop := _asyncio_loop():
        # What anyio.Event has inside on asyncio, at a quarter of the cost.
        return partial(sys.modules["asyncio"].Future, loop=loop)
    return _trio_wake()


def call_soon() -> Callable[[Callable[[], None]], object]:
    """What has the running loop make a call once those tasks had their turn that are ready now."""
    if loop := _asyncio_loop():
        return loop.call_soon
    return sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]


def watch(fd: int, call: Callable[[], None]) -> Callable[[], object]:
    """Have the running loop make a call whenever a descriptor can be read.

    Ends with the loop, or by the function that is returned, before the descriptor is closed.
    """
    if loop := _asyncio_loop():
        loop.add_reader(fd, call)
        return partial(loop.remove_reader, fd)
    return _watch_by_a_system_task(fd, call)


def _watch_by_a_system_task(fd: int, call: Callable[[], None]) -> Callable[[], object]:
    lowlevel = sys.modules["trio"].lowlevel

    async def watcher() -> None:
        with suppress(sys.modules["trio"].ClosedResourceError):
            while True:
                await lowlevel.wait_readable(fd)
                call()

    def stop() -> None:
        with suppress(RuntimeError):  # the loop has ended, and the watcher with it
            lowlevel.notify_closing(fd)

    lowlevel.spawn_system_task(watcher)
    return stop


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
