"""Event loops whose tasks take turns in the same order each time: their clocks are virtual."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any, Literal

import anyio
import trio._core._run
import trio.testing

trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # trio sorts the tasks that can run by age


class _Selector(selectors.DefaultSelector):
    """Waits for no time: where no descriptor is ready, the clock goes forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(function: Callable[[], Any], backend: Literal["asyncio", "trio"], seed: int) -> None:
    """Run a coroutine function in a new event loop."""
    options: dict[str, Any] = {"loop_factory": _Loop}
    if backend == "trio":
        trio._core._run._r.seed(seed)  # by it, trio runs the sorted tasks forwards or backwards
        options = {"clock": trio.testing.MockClock(autojump_threshold=0)}
    anyio.run(function, backend=backend, backend_options=options)
