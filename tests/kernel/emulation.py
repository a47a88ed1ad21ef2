"""The kernel's tests as they go where the kernel has dma-buf registered buffers: a pytest plugin.

`lab/run -- python3 -m pytest -p tests.kernel.emulation tests/kernel` has the engines that take
io_uring emulate the native route (csrc/tests/testing.c), for the targets that the series "Add
dmabuf read/write via io_uring" supports. It shows that the tests expect the right thing there, not
that the kernel does it.
"""

import contextlib
import errno
import os
import stat

import pytest

from tests import emulation

_stack = contextlib.ExitStack()


def answer(_dmabuf: int, target: int) -> int:
    """Return what registering a dma-buf for a descriptor answers: 0 or -errno."""
    status = os.fstat(target)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    nvme = "/nvme" in os.path.realpath(f"/sys/dev/block/{number}")
    return 0 if stat.S_ISBLK(status.st_mode) and nvme else -errno.EOPNOTSUPP


def pytest_configure(config: pytest.Config) -> None:
    """Before any engine is made."""
    _stack.enter_context(emulation.native(1 << emulation.core.lib.DMB_BACKEND_URING))
    _stack.enter_context(emulation.registrar(answer))
    config.add_cleanup(_stack.close)
