"""A progress bar, once a copy has taken longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dmabuf.cli import _output

_WAIT = 1.0
"""Seconds before anything is shown, and between two lines where there is no terminal."""


class Display:
    """Takes what `copy` tells of its progress and shows it on standard error."""

    def __init__(self, stack: ExitStack, wanted: bool | None) -> None:
        self._stack = stack
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = terminal if wanted is None else wanted
        self._terminal = terminal
        self._next = time.monotonic() + _WAIT
        self._bar: _Bar | None = None

    def show(self, title: str, done: int, total: int | None) -> None:
        """`done` of `total` bytes; cheap to call often."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(title, done, total)
        elif self._shown and now >= self._next:
            if self._terminal:
                self._bar = _Bar(self._stack)
                self._bar.update(title, done, total)
                return
            self._next = now + _WAIT
            of = "" if total is None else f" of {_output.decimal(total)}"
            _output.note(f"{title}: {_output.decimal(done)}{of}")


class _Bar:
    """rich's, on standard error, gone when it is done."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
        )
        self._task = self._progress.add_task("", total=None)

    def update(self, title: str, done: int, total: int | None) -> None:
        self._progress.update(self._task, description=title, completed=done, total=total)


@contextmanager
def display(wanted: bool | None) -> Iterator[Display]:
    """What shows the progress: on a terminal by default, always or never where `wanted` says."""
    with ExitStack() as stack:
        yield Display(stack, wanted)
