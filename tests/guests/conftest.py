"""The second guest is as it was after each test: it runs, and the network is whole."""

from collections.abc import Iterator

import pytest

from tests.guests.peer import befall
from tests.kernel.conftest import no_dma_buf_is_left


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    yield
    befall("join")
    befall("thaw")


__all__ = ["no_dma_buf_is_left"]
