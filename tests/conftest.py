"""Shared fixtures; Hypothesis is deterministic, and the suite leaves the process as it was."""

import functools
import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import core  # before dmabuf

# isort: split

import dmabuf
from dmabuf._core import lib
from dmabuf.transfer.audit import PAIRS
from dmabuf.transfer.engine import Engine, default_engine
from tests.device_table import plug_in
from tests.guards import demand
from tests.mounting import Mounted, mounted
from tests.resources import held
from tests.support import drop_cache, pattern, poison, wait_until

assert isinstance(core.lib, core.Core), "dmabuf was imported before its core was replaced"

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
    """Put temporary files on a disk: /tmp is often a tmpfs, which has no O_DIRECT.

    Undo that a shell ignores Ctrl-C for its background jobs, because tests send it.
    """
    plug_in(config)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.basetemp is None:
        folder = Path(f"/var/tmp/dmabuf-tests-{os.getpid()}")
        config.option.basetemp = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


RING = "anon_inode:[io_uring]"
RINGS = 2
"""The default engine's rings that are made when first needed: a second, one for passthrough."""


@pytest.fixture(scope="session", autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail if the suite leaves a descriptor, a thread, or a mapping of a memfd or dma-buf."""
    default_engine()
    before = _left()
    yield
    _check_left(before)


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick() -> None:
    """Have garbage collections skip what lives already: many tests collect, to see what is left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fail the test if it leaves a descriptor, a thread, or a mapping of a memfd or dma-buf.

    For all tests of a file: ``pytestmark = pytest.mark.usefixtures("leaves_nothing")``.
    """
    before = _left()
    yield
    _check_left(before)


def _left() -> tuple[list[str], list[str], list[threading.Thread]]:
    """Return what the process holds. Idle workers of trio are left out: they end by themselves."""
    threads = [one for one in threading.enumerate() if not one.name.startswith("Trio thread")]
    return *held(), threads


def _check_left(before: tuple[list[str], list[str], list[threading.Thread]]) -> None:
    after = _left()
    for _ in range(RINGS):
        if after[0].count(RING) > before[0].count(RING):
            after[0].remove(RING)
    assert after == before


def _size(request: pytest.FixtureRequest) -> int:
    return getattr(request.module, "SIZE", 1 << 16)


@pytest.fixture
def buf(request: pytest.FixtureRequest) -> Iterator[dmabuf.Buffer]:
    """A memfd buffer of the test module's SIZE in bytes (64 KiB), filled with poison."""
    size = _size(request)
    with dmabuf.allocate(size, exporter="memfd") as buffer:
        buffer.pwrite(poison(size), 0)
        yield buffer


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of the test module's SIZE in bytes (64 KiB) with the content of pattern(SIZE, 1)."""
    path = tmp_path / "file"
    path.write_bytes(pattern(_size(request), 1))
    return path


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with the content of the test module's DATA."""
    path = tmp_path / "source"
    path.write_bytes(request.module.DATA)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A store and its mount, both for all tests of the module."""
    demand("fuse", "pyfuse3")
    with mounted(tmp_path_factory.mktemp("mount")) as made:
        yield made


@pytest.fixture
def files(world: Mounted) -> Iterator[Mounted]:
    """The mount of an empty store; at the end it is empty again, and has all its memory."""
    yield world
    for status in world.store.list():
        world.store.remove(status.name)
    wait_until(lambda: world.store.usage().charged == 0)  # a last close is reported after close(2)
    assert world.store.usage().names == 0


@pytest.fixture
def cold_path(path: Path) -> Path:
    """The file of `path`, none of whose pages are in the page cache."""
    with path.open("rb") as file:
        drop_cache(file.fileno())
    return path


@pytest.fixture(autouse=True)
def no_pair_is_known() -> None:
    """Let each test be the first to use its exporter with its device."""
    PAIRS.forget()


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[..., object]:
    """A function that runs a coroutine function, on each kind of event loop."""
    import anyio

    return functools.partial(anyio.run, backend=request.param)


@pytest.fixture(params=["io_uring or threads", "threads"])
def loop_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the engines of event loops with what the machine has, and with threads."""
    if request.param == "threads":
        monkeypatch.setattr(
            Engine, "_choose_backend", lambda self, asked: int(lib.DMB_BACKEND_THREADS)
        )
    return str(request.param)
