"""Devices beside storage: what `lab/run --devices all` adds to the guest, or such hardware."""

from collections.abc import Callable, Iterator

import pytest

from tests.kernel.conftest import BUFINFO, no_dma_buf_is_left, settled
from tests.resources import held

__all__ = ["no_dma_buf_is_left"]


def dma_bufs() -> str:
    """How many dma-bufs the kernel has, and bytes."""
    return BUFINFO.read_text().splitlines()[-1]


@pytest.fixture
def kernel_lists() -> Callable[[], object]:
    """What the kernel lists of what a test makes; a file may have more to look at."""
    return dma_bufs


@pytest.fixture(autouse=True)
def nothing_left_behind(kernel_lists: Callable[[], object]) -> Iterator[None]:
    """As much on the kernel's lists and in the process after each test as before it."""
    before = held(), kernel_lists()
    yield
    assert (settled(kernel_lists, before[1]), held()) == before[::-1]
