"""The seams of the core that tests are run on: faked completions, and the native route emulated.

See csrc/tests/testing.h. Each holds for every ring of the process until its block ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tests import core  # before dmabuf

# isort: split

import dmabuf

ffi, lib = core.ffi, core.lib

BACKENDS = 1 << lib.DMB_BACKEND_URING | 1 << lib.DMB_BACKEND_THREADS


class Filter:
    """A function that sees each completion, and answers its result: a count or -errno."""

    def __init__(self, function: Callable[[Any], int]) -> None:
        self.seen: list[tuple[int, int, int]] = []
        """(offset, size, result) of each."""

        @ffi.callback("int32_t(void *, const struct dmb_completion *)", error=-5)
        def filtered(_arg: object, completion: Any) -> int:
            self.seen.append((completion.offset, completion.size, completion.result))
            return function(completion)

        self._callback = filtered

    def __enter__(self) -> Filter:
        lib.dmb_testing_set_filter(self._callback, ffi.NULL)
        return self

    def __exit__(self, *exc: object) -> None:
        lib.dmb_testing_set_filter(ffi.NULL, ffi.NULL)


def in_the_middle(count: int, first: int, act: Callable[[], object]) -> Filter:
    """Return a filter that acts once: `count` requests are done then, and that at offset `first`.

    Requests complete in any order: without the first one `nbytes` of the error could be 0.
    """
    done, acted = set[int](), list[bool]()

    def judge(completion: Any) -> int:
        done.add(completion.offset)
        if len(done) >= count and first in done and not acted:
            acted.append(True)
            act()
        return int(completion.result)

    return Filter(judge)


@contextlib.contextmanager
def native(backends: int = BACKENDS) -> Iterator[None]:
    """Rings that are made meanwhile emulate the native route, as long as they live."""
    lib.dmb_testing_set_native(backends)
    try:
        yield
    finally:
        lib.dmb_testing_set_native(0)


def engine(**how: Any) -> dmabuf.Engine:
    """Return an engine that emulates the native route."""
    with native():
        return dmabuf.Engine(**how)


@contextlib.contextmanager
def registrar(function: Callable[[int, int], int]) -> Iterator[None]:
    """Have a function answer the registration of each dma-buf for a file: 0 or -errno."""

    @ffi.callback("int32_t(void *, int32_t, int32_t)", error=-5)
    def asked(_arg: object, dmabuf_fd: int, target_fd: int) -> int:
        return function(dmabuf_fd, target_fd)

    lib.dmb_testing_set_registrar(asked, ffi.NULL)
    try:
        yield
    finally:
        lib.dmb_testing_set_registrar(ffi.NULL, ffi.NULL)


@contextlib.contextmanager
def memory(fd: int, offset: int) -> Iterator[None]:
    """Have the emulation map a range of a file in the place of a dma-buf that cannot be mapped."""
    lib.dmb_testing_set_memory(fd, offset)
    try:
        yield
    finally:
        lib.dmb_testing_set_memory(-1, 0)


def interrupt(signal: int, *, after: int = 0, count: int = 1) -> None:
    """Have a signal come in `count` waits for completions, after so many others."""
    lib.dmb_testing_interrupt(after, count, signal)


__all__ = ["Filter", "core", "engine", "interrupt", "memory", "native", "registrar"]
