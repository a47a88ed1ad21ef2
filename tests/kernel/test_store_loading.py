"""Files on NVMe drives that a store of root reads natively for a client of another user.

The server runs in this process: where the kernel has no registered dma-bufs they are emulated, as
in test_native_files.py. The client is a process that may read the file, and not the drive.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import Store
from dmabuf.transfer.engine import _default, default_engine
from tests import emulation
from tests.kernel.conftest import dma_bufs, settled
from tests.kernel.emulation import answer
from tests.kernel.test_filesystems import filesystem
from tests.kernel.test_native_files import write_scattered
from tests.kernel.test_targets import everything
from tests.serving import in_a_thread
from tests.support import in_child

__all__ = ["filesystem"]

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """The server's engine has the native route: the kernel's, or an emulation."""
    if default_engine().no_native() is None:
        yield
        return
    before = _default.pop(os.getpid())
    with emulation.registrar(answer), emulation.native(1 << emulation.lib.DMB_BACKEND_URING):
        yield
        default_engine().close()
        _default[os.getpid()] = before


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "store.sock")


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    before = dma_bufs()
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        os.chmod(path, 0o666)
        yield store
    assert settled(dma_bufs, before) == before


_CLIENT = """
import os, sys
from tests import emulation  # before dmabuf
import dmabuf, dmabuf.store
from dmabuf.transfer.engine import _default, default_engine
from tests.kernel.emulation import answer
from tests.support import assert_same, poison
socket, file, device, exporter = sys.argv[1:]
emulated = emulation.registrar(answer), emulation.native(1 << emulation.lib.DMB_BACKEND_URING)
if default_engine().no_native() is not None:
    _default.clear()
    for one in emulated:
        one.__enter__()
fd = os.open(file, os.O_RDONLY)  # in folders that the user may not search
os.setgroups([]); os.setresgid(4001, 4001, 4001); os.setresuid(4001, 4001, 4001)
try:
    os.open(device, os.O_RDONLY)
except PermissionError:
    pass
else:
    raise AssertionError("the user may open the drive")
expected = os.pread(fd, 1 << 30, 0)
with dmabuf.store.connect(socket) as store:
    buffer, transfer = store.load("mine", fd, exporter=exporter)
    assert (transfer.route, transfer.nbytes) == ("native", len(expected)), transfer
    assert device in transfer.reason, transfer
    got = buffer.pread(buffer.size, 0)
    assert_same(got, expected + bytes(buffer.size - len(expected)), str(transfer))
    with dmabuf.open(fd) as mine:  # the same memory, read by the user itself
        buffer.pwrite(poison(buffer.size), 0)
        itself = mine.read_into(buffer)
        assert_same(buffer.pread(len(expected), 0), expected, str(itself))
    print(itself.route, itself.rejected[dmabuf.Route.NATIVE])
"""


@everything
@pytest.mark.parametrize("exporter", ["system", "udmabuf"])
def test_a_user_without_permission_for_the_drive(
    store: Store, path: Path, filesystem: Path, exporter: str
) -> None:
    file = filesystem / "scattered"
    write_scattered(file, 2 * SIZE)
    device = os.environ[f"DMABUF_TEST_NVME{int(filesystem.name.startswith('xfs'))}"]
    said = in_child(_CLIENT, path, file, device, exporter)
    assert said.startswith("staged reading a file natively needs read permission on its block dev")
    assert f"{device} (Permission denied)" in said and "Store.load()" in said
    assert store.stat("mine").uid == 4001
    store.remove("mine")
