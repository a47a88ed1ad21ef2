"""The kernel's tests as they go where the kernel has dma-buf registered buffers: a pytest plugin.

`lab/run -- python3 -m pytest -p tests.kernel.emulation tests/kernel` has the engines that would
take io_uring emulate the native route on threads (csrc/emulate.c), for the targets that the series
"Add dmabuf read/write via io_uring" supports. It shows that the tests expect the right thing there,
not that the kernel does it.
"""

import errno
import os
import stat

import pytest

from dmabuf import engine
from dmabuf._ffi import lib
from dmabuf.ring import Ring


def _choose_backend(self: engine.Engine, backend: str) -> int:
    self._flags = 0 if backend == "threads" else lib.DMB_RING_EMULATE_NATIVE
    return int(lib.DMB_BACKEND_THREADS)


_new_passthrough_ring = engine.Engine._new_passthrough_ring


def _new_ring_of_commands(self: engine.Engine) -> Ring:
    """NVMe passthrough has no native route, and goes as on any kernel."""
    if not self._flags:
        return _new_passthrough_ring(self)
    return Ring(lib.DMB_BACKEND_URING, self.queue_depth, self._owner, lib.DMB_RING_PASSTHROUGH)


def _takes_dmabufs(target: int) -> bool:
    status = os.fstat(target)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return stat.S_ISBLK(status.st_mode) and "/nvme" in os.path.realpath(f"/sys/dev/block/{number}")


_take_dmabuf_slot = Ring.take_dmabuf_slot


def _take(self: Ring, dmabuf: int, target: int) -> int:
    if not _takes_dmabufs(target):
        return -errno.EOPNOTSUPP
    return _take_dmabuf_slot(self, dmabuf, target)


def pytest_configure(config: pytest.Config) -> None:
    """Before any engine is made."""
    engine.Engine._choose_backend = _choose_backend  # type: ignore[method-assign]
    engine.Engine._new_passthrough_ring = _new_ring_of_commands  # type: ignore[method-assign]
    Ring.take_dmabuf_slot = _take  # type: ignore[method-assign]
