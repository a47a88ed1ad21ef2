"""What differs in the tests of other libraries."""

import gc
from collections.abc import Iterator

import pytest

from tests.resources import held


@pytest.fixture(scope="session", autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail if a mapping of a memfd or dma-buf is left; other libraries keep threads and files."""
    before = held()[1]
    yield
    gc.collect()
    assert held()[1] == before
