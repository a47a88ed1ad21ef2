"""Hypothesis is deterministic, and the suite leaves the process as it found it."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from dmabuf.engine import default_engine
from tests.resources import held

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("deterministic")


@pytest.fixture(scope="session", autouse=True)
def nothing_leaks() -> Iterator[None]:
    """As many descriptors, shared mappings and threads after the suite as before it."""
    engine = default_engine()
    with engine._rings[0].lock:  # it has two rings at most: both made now, they are no leak
        engine._pick_ring()
    before = held(), threading.active_count()
    yield
    after = held(), threading.active_count()
    assert after == before
