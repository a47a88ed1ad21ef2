"""What differs between asyncio and trio: waking a task, watching a descriptor, calling soon.

anyio covers the rest. It is not used to wait for a descriptor on asyncio: its cancel scopes and its
table of descriptors refer to the waiting task from a global, so the task, its loop and the buffer
of its transfer would stay for ever where the loop is closed before the task has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio

if TYPE_CHECKING:
    import asyncio

Stop = Callable[[], object]
"""Ends a watch; calling it again does nothing."""


class Wakeup(Protocol):
    """What one task awaits until it is given a result; asyncio's Future is one."""

    def done(self) -> bool:
        """Return whether no task waits for it any more."""

    def set_result(self, result: Any, /) -> None:
        """Wake the task, which must be waiting; awaiting the wakeup returns the result."""

    def __await__(self) -> Generator[Any, Any, Any]: ...


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running loop if it is one of asyncio's."""
    if not type(anyio.Event()).__module__.endswith("asyncio"):
        return None
    return sys.modules["asyncio"].get_running_loop()  # type: ignore[no-any-return]


@cache
def _trio_wakeup() -> Callable[[], Wakeup]:
    """Return a class of wakeups for trio: like trio.Event for one task, and cheaper.

    One function aborts every sleep. Trio itself clears `custom_sleep_data` of a task that it wakes,
    which shows whether the task still waits. The wakeup is also the outcome that the task is sent.
    """
    lowlevel = sys.modules["trio"].lowlevel
    current_task, reschedule = lowlevel.current_task, lowlevel.reschedule
    wait_task_rescheduled, succeeded = lowlevel.wait_task_rescheduled, lowlevel.Abort.SUCCEEDED

    def abort(_: object) -> object:
        return succeeded

    class TrioWakeup:
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

    return TrioWakeup


def wakeup_factory() -> Callable[[], Wakeup]:
    """Return what makes wakeups for tasks of the running loop."""
    if loop := _asyncio_loop():
        # anyio.Event has one inside on asyncio, and costs four times as much.
        return partial(sys.modules["asyncio"].Future, loop=loop)
    return _trio_wakeup()


def call_soon() -> Callable[[Callable[[], None]], object]:
    """Return what makes the running loop call a function after the tasks that are ready now."""
    if loop := _asyncio_loop():
        return loop.call_soon
    return sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]


def watch(fd: int, call: Callable[[], None]) -> Stop:
    """Make the running loop call a function whenever a descriptor can be read.

    Ends with the loop, or by the function that is returned, before the descriptor is closed.
    """
    if loop := _asyncio_loop():
        loop.add_reader(fd, call)
        return partial(loop.remove_reader, fd)
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


def watch_once(
    fd: int,
    access: Literal["read", "write"],
    seconds: float | None,
    call: Callable[[bool], object],
) -> Stop:
    """Make the running loop call a function once, with whether the descriptor is ready.

    Args:
        fd: a descriptor that nothing else in the loop watches.
        access: "read" or "write".
        seconds: when to call it with False; None waits without a limit.
        call: the function.
    """
    if loop := _asyncio_loop():
        return _watch_on_asyncio(loop, fd, access, seconds, call)
    return _watch_on_trio(fd, access, seconds, call)


def _watch_on_trio(
    fd: int, access: Literal["read", "write"], seconds: float | None, call: Callable[[bool], object]
) -> Stop:
    trio = sys.modules["trio"]
    wait = trio.lowlevel.wait_readable if access == "read" else trio.lowlevel.wait_writable
    stopped: list[bool] = []

    async def watcher() -> None:
        if stopped:
            return
        with (
            suppress(trio.ClosedResourceError),
            trio.move_on_after(float("inf") if seconds is None else seconds) as limit,
        ):
            await wait(fd)
            call(True)
        if limit.cancelled_caught:
            call(False)

    def stop() -> None:
        stopped.append(True)
        with suppress(RuntimeError):  # the loop has ended, and the watcher with it
            trio.lowlevel.notify_closing(fd)

    trio.lowlevel.spawn_system_task(watcher)
    return stop


def _watch_on_asyncio(
    loop: asyncio.AbstractEventLoop,
    fd: int,
    access: Literal["read", "write"],
    seconds: float | None,
    call: Callable[[bool], object],
) -> Stop:
    add = loop.add_reader if access == "read" else loop.add_writer
    remove = loop.remove_reader if access == "read" else loop.remove_writer
    timer = None if seconds is None else loop.call_later(seconds, call, False)
    add(fd, call, True)

    def stop() -> None:
        if timer is not None:
            timer.cancel()
        with suppress(RuntimeError):  # the loop is closed, and watches nothing
            remove(fd)

    return stop
