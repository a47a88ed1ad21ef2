"""The mount on real dma-bufs: their memory, their fences, and the programs that use the files."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guards import demand, needs
from tests.kernel.vgem import Card
from tests.mounting import Mounted, attributes, mount
from tests.support import assert_same, pattern, raises_errno
from tests.unit import test_mount_tools as tools

SIZE = (5 << 20) + 123
Check = Callable[[Mounted, Path], None]


@pytest.fixture(scope="module", autouse=True)
def udmabuf() -> None:
    demand("udmabuf")


def test_a_file_is_a_udmabuf(files: Mounted) -> None:
    path = files.path / "x"
    path.write_bytes(pattern(SIZE, 1))
    assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")
    told = attributes(path)
    assert (told["user.dmabuf.exporter"], told["user.dmabuf.is_dmabuf"]) == ("udmabuf", "yes")
    with files.store.open("x", "r+") as buffer:
        assert buffer.is_dmabuf
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "the dma-buf")
        buffer.pwrite(pattern(70000, 2), 4000)
        for mode in ("rb", "r+b"):
            with path.open(mode, buffering=0) as file:
                assert_same(os.pread(file.fileno(), 70000, 4000), pattern(70000, 2), "the change")


@needs("dma_heap")
def test_memory_without_pages_is_copied(files: Mounted) -> None:
    files.store.create("heap", SIZE, exporter="system", mode=0o600).close()
    path = files.path / "heap"
    assert attributes(path)["user.dmabuf.exporter"] == "system"
    assert_same(path.read_bytes(), bytes(SIZE), "new memory")
    with path.open("r+b", buffering=0) as file:
        assert file.write(pattern(1 << 20, 1)) == 1 << 20
        os.pwrite(file.fileno(), pattern(999, 2), SIZE - 999)
    expected = bytearray(SIZE)
    expected[: 1 << 20], expected[-999:] = pattern(1 << 20, 1), pattern(999, 2)
    assert_same(path.read_bytes(), bytes(expected), "the file")
    with files.store.open("heap") as buffer:
        assert_same(buffer.pread(SIZE, 0), bytes(expected), "the dma-buf")


@needs("vgem")
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_request_waits_for_the_device_and_others_do_not(
    files: Mounted, card: Card, access: str
) -> None:
    (files.path / "other").write_bytes(b"other")
    with files.store.create("busy", 1 << 20) as buffer:
        fence, fd = card.sync_file()
        buffer.import_fence(fd, "write")
        os.close(fd)
        done: list[object] = []

        def work() -> None:
            with (files.path / "busy").open("r+b", buffering=0) as file:
                done.append(
                    os.pread(file.fileno(), 5, 0)
                    if access == "read"
                    else os.pwrite(file.fileno(), b"there", 0)
                )

        thread = threading.Thread(target=work)
        thread.start()
        begun = time.monotonic()
        while time.monotonic() - begun < 1:
            assert (files.path / "other").read_bytes() == b"other"
        assert done == []
        card.done(fence)
        thread.join()
        assert done == [bytes(5) if access == "read" else 5]
        assert buffer.pread(5, 0) == (bytes(5) if access == "read" else b"there")


_HURRIED = """
import sys
from dmabuf.cli import main
from dmabuf.mount import access
access.FENCE_SECONDS = 2.0
sys.exit(main(sys.argv[1:]))
"""
"""A mount that gives up long before the kernel does, whose vgem fence ends after ten seconds."""


@needs("vgem")
def test_a_device_that_never_ends_is_a_timeout(files: Mounted, card: Card, tmp_path: Path) -> None:
    hurried, socket = tmp_path / "hurried", files.path.parent / "store.sock"
    hurried.mkdir()
    with (
        files.store.create("busy", 1 << 20) as buffer,
        mount(hurried, socket, program=["-c", _HURRIED]),
    ):
        _, fd = card.sync_file()
        buffer.import_fence(fd, "write")
        os.close(fd)
        with raises_errno(errno.ETIMEDOUT):
            (hurried / "busy").read_bytes()


@pytest.mark.parametrize("check", [tools.test_dd, tools.test_cp_cmp_and_sums])
def test_programs_on_a_file(files: Mounted, tmp_path: Path, check: Check) -> None:
    source = tmp_path / "source"
    source.write_bytes(pattern(tools.SIZE, 1))
    check(files, source)


@pytest.mark.parametrize(
    "check", [tools.test_tar_extracts_to_it_and_packs_it, tools.test_rsync_both_ways_and_again]
)
def test_programs_on_a_folder(files: Mounted, tmp_path: Path, check: Check) -> None:
    check(files, tmp_path)


@pytest.mark.parametrize(
    "check", [tools.test_a_shells_redirections, tools.test_fio_verifies_what_it_wrote]
)
def test_programs(files: Mounted, check: Callable[[Mounted], None]) -> None:
    check(files)
