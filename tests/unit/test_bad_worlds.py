"""Each allocation of Python fails, one after the other, and /proc is read-only or missing.

test_every_step.py has each system call that fails.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import dmabuf
from tests import forking
from tests.guards import needs
from tests.resources import held
from tests.support import assert_same, pattern, poison

SIZE = 40 << 10
NEW = pattern(SIZE, 72)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A file to read, and one to write to."""
    (tmp_path / "source").write_bytes(NEW)
    return tmp_path / "source", tmp_path / "target"


def test_every_allocation_of_python_fails_once(paths: tuple[Path, Path]) -> None:
    """Either a MemoryError or every byte; nothing stays in use, and the next transfer is right."""
    hooks = pytest.importorskip("_testcapi", reason="needs CPython's test modules: install them")

    def child() -> None:
        with dmabuf.Engine() as engine, dmabuf.open(paths[0], engine=engine) as file:
            with dmabuf.allocate(SIZE, exporter="memfd") as first:
                file.read_into(first)
            before, failed = held(), 0
            for number in itertools.count(1):
                raised: type[BaseException] | None = None
                with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
                    buffer.pwrite(poison(SIZE), 0)
                    hooks.set_nomemory(number, number + 1)
                    try:
                        file.read_into(buffer, route="direct")
                    except (MemoryError, OSError) as error:
                        raised = type(error)
                    finally:
                        hooks.remove_mem_hooks()
                    if raised is None:
                        assert_same(buffer.pread(SIZE, 0), NEW, f"allocation {number}")
                    buffer.pwrite(poison(SIZE), 0)
                    file.read_into(buffer)
                    assert_same(buffer.pread(SIZE, 0), NEW, f"after allocation {number}")
                failed += raised is not None
                if raised is None and number > 2 * failed + 20:
                    break
            assert failed > 10 and held() == before

    forking.in_child(child)


_USE = """
import sys, dmabuf
source, target = sys.argv[1:]
with dmabuf.allocate(40 << 10, exporter="memfd") as buffer:
    with dmabuf.open(source) as file:
        print(file.read_into(buffer))
    dmabuf.copy(buffer, target)
with open(target, "rb") as file:
    assert file.read() == open(source, "rb").read()
"""


@needs("root")
@pytest.mark.parametrize(
    "how", ["-o remount,bind,ro /proc", "-t tmpfs none /proc", "-t tmpfs none /sys"]
)
def test_a_proc_that_is_read_only_or_missing(how: str, paths: tuple[Path, Path]) -> None:
    """Files cannot be opened again without /proc; their bytes go through the page cache then."""
    script = f'mount {how} && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    run = subprocess.run(
        [*command, sys.executable, "-c", _USE, *paths], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert_same(paths[1].read_bytes(), NEW, run.stdout)
