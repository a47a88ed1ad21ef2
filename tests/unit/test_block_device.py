"""as_block_device() and `dmabuf export` where the kernel or the buffer refuses."""

import errno
import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
import dmabuf.store
from dmabuf.kernel import ublk
from tests.serving import as_a_program
from tests.support import in_child, raises_errno
from tests.unit.command import Ended
from tests.unit.command import dmabuf as command

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def buffer() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(8192, exporter="memfd") as buffer:
        yield buffer


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As where the module is not loaded."""
    monkeypatch.setattr(ublk, "CONTROL", str(tmp_path / "ublk-control"))
    return tmp_path / "ublk-control"


def _without_a_driver(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


MODPROBE = "the kernel has no ublk, or has not loaded it; as root: modprobe ublk_drv"


@pytest.mark.parametrize(
    ("make", "number"),
    [(lambda path: None, errno.ENOENT), (_without_a_driver, errno.ENXIO)],
    ids=["no node", "a node without a driver"],
)
def test_a_kernel_without_ublk(
    buffer: dmabuf.Buffer, no_driver: Path, make: Callable[[Path], object], number: int
) -> None:
    make(no_driver)
    with raises_errno(number, MODPROBE, filename=str(no_driver)):
        dmabuf.as_block_device(buffer)
    assert buffer.writable()  # and it closes: nothing holds it


_REFUSED = """
import sys
import dmabuf
from dmabuf.kernel import ublk
from tests.sandbox import forbid

ublk.CONTROL = sys.argv[1]
forbid(425)  # io_uring_setup
with dmabuf.allocate(4096, exporter="memfd") as buffer:
    try:
        dmabuf.as_block_device(buffer)
    except PermissionError as error:
        print(error.strerror, end="")
"""


def test_a_sandbox_without_io_uring(no_driver: Path) -> None:
    no_driver.write_bytes(b"")
    text = "io_uring is refused (kernel.io_uring_disabled, or a seccomp filter), and ublk needs it"
    assert in_child(_REFUSED, no_driver) == f"{text}: Operation not permitted"


@pytest.mark.parametrize("size", [0, 511, 4097, 8192 + 512])
def test_sizes_that_are_not_sectors_of_the_buffer(buffer: dmabuf.Buffer, size: int) -> None:
    text = f"size {size}: a block device has whole sectors of 512 bytes, at most the buffer's 8192"
    with pytest.raises(ValueError, match=text):
        dmabuf.as_block_device(buffer, size=size)


def test_a_buffer_that_may_not_be_written(buffer: dmabuf.Buffer) -> None:
    fd = os.open(f"/proc/self/fd/{buffer.fileno()}", os.O_RDONLY)
    try:
        with dmabuf.from_fd(fd) as reader, pytest.raises(PermissionError, match="read-only"):
            dmabuf.as_block_device(reader, read_only=False)
    finally:
        os.close(fd)


def test_memory_without_a_mapping_and_a_closed_buffer() -> None:
    slab = dmabuf.Slab(os.memfd_create("x"), 0, 4096)
    how = {"exporter": "x", "reason": "", "map_refusal": "only devices can"}
    with (
        dmabuf.Buffer([slab], None, **how) as unmapped,
        pytest.raises(io.UnsupportedOperation, match="only devices can"),
    ):
        dmabuf.as_block_device(unmapped)
    with pytest.raises(dmabuf.ClosedError):
        dmabuf.as_block_device(unmapped)


# -- the command


def test_the_command_refuses(
    no_driver: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with as_a_program(tmp_path / "s"), dmabuf.store.connect(tmp_path / "s") as store:
        store.create("even", 8192).close()
        store.create("odd", 1000).close()
        for words, ended in (
            (
                ["even"],
                Ended(
                    2,
                    "",
                    "error: export needs --block: a buffer becomes a block device, and nothing "
                    "else\ntry 'dmabuf export --help'\n",
                ),
            ),
            (["--block", "even"], Ended(1, "", f"error: {no_driver}: {MODPROBE}\n")),
            (
                ["--block", "odd"],
                Ended(
                    1,
                    "",
                    "error: odd: its 1000 bytes are not whole sectors; put a file that "
                    "`truncate -s %512 FILE` has made longer\n",
                ),
            ),
            (["--block", "none"], Ended(1, "", "error: none: there is no such buffer\n")),
        ):
            assert command(capsys, "export", "--socket", tmp_path / "s", *words) == ended
