"""Users who could make no dma-bufs get some of the store, and keep none that count no more."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.exporters import udmabuf
from dmabuf.store import Store
from tests.guards import needs, since
from tests.kernel.conftest import dma_bufs, settled
from tests.kernel.test_store import HEAP, MIB, SIZE, everything, for_everyone, path, store
from tests.serving import as_a_program
from tests.support import assert_same, pattern
from tests.unit.test_store_users import become

__all__ = ["path", "store"]

_KEEP = """
import socket
assert not os.access("/dev/udmabuf", os.R_OK) and not os.access("/dev/udmabuf", os.W_OK)
with store.open("shared", "r+") as buffer:
    assert foreign.identify(buffer.fileno()).exporter == "udmabuf"
    reference = os.open(f"/proc/self/fd/{buffer.fileno()}", os.O_PATH)
with socket.socket(socket.AF_UNIX) as other:
    other.connect(f"{sys.argv[1]}.kept")
    socket.send_fds(other, [b"x"], [reference])
"""


def kept_by_a_stranger(path: Path) -> int:
    """An O_PATH descriptor of the dma-buf of "shared", by a user who could make none."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.kept")
        listener.listen()
        os.chmod(f"{path}.kept", 0o666)
        become(_KEEP, path, "4001,4002")
        with listener.accept()[0] as connection:
            (reference,) = socket.recv_fds(connection, 1, 1)[1]
    os.unlink(f"{path}.kept")
    return reference


@everything
@pytest.mark.parametrize(
    "huge_pages",
    [
        False,
        pytest.param("2MiB", marks=since((6, 13), "udmabufs of huge pages that can be mapped")),
    ],
)
@pytest.mark.parametrize("reader", [False, True])
def test_a_stranger_keeps_nothing_that_does_not_count(
    path: Path, huge_pages: bool | str, reader: bool
) -> None:
    """Nor when others had the memory file for reading."""
    before, size = dma_bufs(), 8 * MIB
    how = {"mode": 0o666, "exporter": "udmabuf", "huge_pages": huge_pages}
    with as_a_program(path, "--max-memory", size), dmabuf.store.connect(path) as store:
        store.create("shared", size, **how).close()
        reference = kept_by_a_stranger(path)
        if reader:
            store.chmod("shared", 0o644)
            become('store.open("shared").close()', path, "4005,4006")
        store.remove("shared")
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                store.create("two", 4096, exporter="memfd")
            assert caught.value.errno == errno.ENOSPC
            time.sleep(0.3)
        assert store.usage().charged == size
        os.close(reference)
        assert settled(lambda: store.usage().charged, 0) == 0
        store.create("shared", size, **how).close()
        os.close(kept_by_a_stranger(path))
        store.remove("shared")
        store.create("two", size, exporter="memfd").close()  # which waits for what is free
        assert store.usage().charged == size
    assert settled(dma_bufs, before) == before


@everything
def test_what_a_stranger_keeps_holds_up_nobody(path: Path) -> None:
    """To ask about one takes 0.15 s; each of these has to wait until the one before is free."""

    def make_twenty() -> float:
        began = time.monotonic()
        for _ in range(20):
            store.create("mine", MIB, exporter="udmabuf").close()
            store.remove("mine")
        return time.monotonic() - began

    with as_a_program(path, "--max-memory", "6MiB"), dmabuf.store.connect(path) as store:
        references = []
        for _ in range(5):
            store.create("shared", MIB, mode=0o666, exporter="udmabuf").close()
            references.append(kept_by_a_stranger(path))
            store.remove("shared")
        held = make_twenty()
        assert store.usage().charged == 5 * MIB
        for reference in references:
            os.close(reference)
        assert settled(lambda: store.usage().charged, 0) == 0
        assert held < make_twenty() + 20 * 0.1


@everything
def test_what_is_for_those_who_could_make_it(store: Store, path: Path) -> None:
    """Memory whose keepers nothing tells of."""
    store.create("heap", 4096, mode=0o666, exporter="system").close()
    refusals = """
heap = refused(errno.EACCES, store.open, "heap", "r+")
made = refused(errno.EACCES, store.create, "n", 4096, exporter="system")
trusted = refused(errno.EPERM, store.create, "n", 4096, trusted=True)
print(heap.strerror, made.strerror, trusted.strerror, sep="\\n")
with store.create("mine", 4096, exporter="udmabuf") as buffer:
    assert buffer.is_dmabuf and not [line for line in open("/proc/self/maps") if "/memfd:" in line]
refused(errno.EPERM, store.open, "mine", "r+", trusted=True)
"""
    heap, made, trusted = become(refusals, path, "4001,4002").splitlines()
    assert heap == made
    assert "memory of system is for those who may open /dev/dma_heap/system" in heap
    assert "trusted=True is for those who may open /dev/udmabuf" in trusted
    assert store.usage().names == 2, "refused before anything is made"
    with for_everyone(udmabuf.DEVICE, HEAP):
        allowed = """
store.open("heap", "r+").close()
store.create("other", 4096, exporter="system").close()
store.open("mine", "r+", trusted=True).close()
"""
        become(allowed, path, "4001,4002")


@needs("udmabuf")
def test_a_stranger_puts_and_gets_without_the_memory_file(store: Store, path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(pattern(SIZE, 6))
    os.chmod(source, 0o644)
    script = f"""
from dmabuf.cli import get, put
source, rest = {str(source)!r}, (sys.argv[1], False, False, False)
put.run(put.Options(source, "n", None, 0o600, "udmabuf", *rest))
get.run(get.Options("n", source + ".got", None, False, False, *rest))
"""
    put, got = become(script, path, "4001,4002").splitlines()
    assert put.endswith(", udmabuf")
    assert got.endswith(", udmabuf")
    assert_same(source.with_name("source.got").read_bytes(), pattern(SIZE, 6), "what came back")
