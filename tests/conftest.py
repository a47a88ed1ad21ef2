"""Hypothesis is deterministic, and the suite leaves the process as it found it."""

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dmabuf.audit import PAIRS
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


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files on a disk: /tmp is often a tmpfs, where nothing can go past the cache."""
    if config.option.basetemp is None:
        folder = Path(f"/var/tmp/dmabuf-tests-{os.getpid()}")
        config.option.basetemp = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session", autouse=True)
def nothing_leaks() -> Iterator[None]:
    """As many descriptors, shared mappings and threads after the suite as before it."""
    engine = default_engine()
    with engine._rings[0].lock:  # it has two rings at most: both made now, they are no leak
        engine._pick_ring()
    engine._passthrough_ring()  # and one for NVMe passthrough, one for zram
    engine._copying_ring()
    before = held(), _threads()
    yield
    after = held(), _threads()
    assert after == before


def _threads() -> list[threading.Thread]:
    """All but trio's workers, which end by themselves when they were idle for some time."""
    return [one for one in threading.enumerate() if not one.name.startswith("Trio thread")]


@pytest.fixture(autouse=True)
def no_pair_is_known() -> None:
    """Each test is the first to use its exporter with its device."""
    PAIRS.forget()


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[..., object]:
    """Runs a coroutine function, on each kind of event loop."""
    import anyio

    return functools.partial(anyio.run, backend=request.param)
