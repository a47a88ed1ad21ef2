"""Buffers as block devices by ublk: every byte, the programs that use them, each way to end."""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
import dmabuf.store
from dmabuf.devices import block
from dmabuf.kernel import ublk
from tests.guards import demand, needs
from tests.kernel.conftest import BUFFERS
from tests.kernel.vgem import Card
from tests.mounting import shell
from tests.serving import as_a_program
from tests.support import (
    PATIENCE,
    assert_same,
    mounted,
    pattern,
    poison,
    run,
    wait_until,
)
from tests.unit.command import Ended, finish, start
from tests.unit.schemas import checked

SIZE = 4 << 20
DISK = 48 << 20


@pytest.fixture(scope="module", autouse=True)
def driver() -> None:
    demand("ublk_drv")


@pytest.fixture(autouse=True)
def no_device_is_left() -> Iterator[None]:
    before = ublk.numbers()
    yield
    wait_until(lambda: ublk.numbers() == before, "the end of all devices")


@contextlib.contextmanager
def direct(path: str, flags: int) -> Iterator[int]:
    """A block device, past its page cache."""
    fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_direct(path: str, size: int, offset: int = 0) -> bytes:
    with direct(path, os.O_RDONLY) as fd, mmap.mmap(-1, size) as memory:
        memory[:] = poison(size)
        assert os.preadv(fd, [memory], offset) == size
        return memory[:]


def write_direct(path: str, data: bytes, offset: int = 0) -> None:
    with direct(path, os.O_WRONLY) as fd, mmap.mmap(-1, len(data)) as memory:
        memory[:] = data
        assert os.pwritev(fd, [memory], offset) == len(data)


# -- the library


@pytest.mark.parametrize("kind", BUFFERS)
def test_each_direction_by_itself(kind: str) -> None:
    """Against the buffer's own map: what it holds is read, and what is written it holds."""
    with BUFFERS[kind](SIZE) as buffer, dmabuf.as_block_device(buffer) as device:
        assert (device.size, device.read_only) == (buffer.size, False)
        assert ublk_size(device.path) == buffer.size
        buffer.pwrite(pattern(SIZE, 1), 0)
        assert_same(read_direct(device.path, SIZE), pattern(SIZE, 1), "read from the device")
        buffer.pwrite(poison(SIZE), 0)
        write_direct(device.path, pattern(SIZE, 2))
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "written by the device")


@pytest.mark.parametrize("kind", BUFFERS)
def test_single_sectors_leave_their_neighbours(kind: str) -> None:
    with BUFFERS[kind](SIZE) as buffer, dmabuf.as_block_device(buffer) as device:
        buffer.pwrite(pattern(SIZE, 1), 0)
        expected = bytearray(pattern(SIZE, 1))
        for sector, count in ((0, 1), (7, 1), (8, 9), (SIZE // 512 - 3, 3)):
            offset, size = sector * 512, count * 512
            got = read_direct(device.path, size, offset)
            assert_same(got, bytes(expected[offset : offset + size]), f"sector {sector}")
            expected[offset : offset + size] = pattern(size, sector)
            write_direct(device.path, pattern(size, sector), offset)
            assert_same(buffer.pread(SIZE, 0), bytes(expected), f"after sector {sector}")


def test_requests_that_cross_dma_bufs(udmabuf_limit: Callable[[int], object]) -> None:
    udmabuf_limit(1)
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
        assert len(buffer.slabs) == 4
        with dmabuf.as_block_device(buffer) as device:
            buffer.pwrite(pattern(SIZE, 1), 0)
            middle, size = (1 << 20) - 4096, 1 << 20
            got = read_direct(device.path, size, middle)
            assert_same(got, pattern(SIZE, 1)[middle : middle + size], "across two")
            write_direct(device.path, pattern(SIZE, 2))
            assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "all")


def ublk_size(path: str) -> int:
    return int(run("blockdev", "--getsize64", path))


def test_a_part_of_a_buffer() -> None:
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        with dmabuf.as_block_device(buffer, size=SIZE - 512) as device:
            assert device.size == ublk_size(device.path) == SIZE - 512
            with pytest.raises(OSError, match="No space left"):
                write_direct(device.path, bytes(512), SIZE - 512)
            write_direct(device.path, bytes(512), SIZE - 1024)
        expected = pattern(SIZE, 1)[: SIZE - 1024] + bytes(512) + pattern(SIZE, 1)[-512:]
        assert_same(buffer.pread(SIZE, 0), expected, "the buffer")


def test_a_buffer_is_not_closed_under_its_device() -> None:
    buffer = dmabuf.allocate(SIZE, exporter="udmabuf")
    with dmabuf.as_block_device(buffer) as device:
        with pytest.raises(dmabuf.BusyError):
            buffer.close()
        write_direct(device.path, pattern(4096, 1))
    assert not os.path.exists(device.path)
    device.close()
    assert buffer.pread(4096, 0) == pattern(4096, 1)
    buffer.close()


def test_two_devices_at_once_and_one_buffer_twice() -> None:
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as one,
        dmabuf.allocate(SIZE, exporter="memfd") as other,
        dmabuf.as_block_device(one) as first,
        dmabuf.as_block_device(other) as second,
        dmabuf.as_block_device(one, read_only=True) as again,
    ):
        assert len({first.path, second.path, again.path}) == 3
        write_direct(first.path, pattern(SIZE, 1))
        write_direct(second.path, pattern(SIZE, 2))
        assert_same(read_direct(again.path, SIZE), pattern(SIZE, 1), "the first one's")
        assert_same(other.pread(SIZE, 0), pattern(SIZE, 2), "the second one's")


def test_a_read_only_device_cannot_be_written() -> None:
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer, read_only=True) as device,
    ):
        buffer.pwrite(pattern(SIZE, 1), 0)
        with contextlib.suppress(OSError):  # a kernel refuses to open it, or to write
            write_direct(device.path, bytes(4096))
        assert_same(read_direct(device.path, SIZE), pattern(SIZE, 1), "the device")
        assert run("blockdev", "--getro", device.path) == "1"


def test_discard_is_refused_and_zeroing_writes() -> None:
    """A discard of the memory file would separate its pages from the dma-buf."""
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer) as device,
    ):
        buffer.pwrite(pattern(SIZE, 1), 0)
        done = subprocess.run(["blkdiscard", device.path], capture_output=True, text=True)
        assert done.returncode != 0, "not refused"
        assert "Operation not supported" in done.stderr
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "after the discard")
        run("blkdiscard", "--zeroout", "--offset", 4096, "--length", 8192, device.path)
        expected = bytearray(pattern(SIZE, 1))
        expected[4096:12288] = bytes(8192)
        assert_same(buffer.pread(SIZE, 0), bytes(expected), "after zeroing")


@pytest.mark.device_table("ublk", "fence")
@needs("vgem")
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_request_waits_for_the_device_that_uses_the_memory(card: Card, access: str) -> None:
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer) as device,
    ):
        buffer.pwrite(pattern(SIZE, 1), 0)
        fence, fd = card.sync_file()
        buffer.import_fence(fd, "write")
        os.close(fd)
        ended = threading.Event()

        def work() -> None:
            if access == "read":
                read_direct(device.path, 4096)
            else:
                write_direct(device.path, pattern(4096, 2))
            ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not ended.wait(1)
        card.done(fence)
        thread.join()
        expected = pattern(4096, 2 if access == "write" else 1)[:4096]
        assert buffer.pread(4096, 0) == expected


@needs("vgem")
def test_a_device_that_never_ends_is_an_error(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "FENCE_MS", 100)
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer) as device,
    ):
        buffer.pwrite(pattern(SIZE, 1), 0)
        fence, fd = card.sync_file()
        buffer.import_fence(fd, "write")
        os.close(fd)
        with pytest.raises(OSError):
            read_direct(device.path, 4096)
        with pytest.raises(OSError):
            write_direct(device.path, bytes(4096))
        card.done(fence)
        assert_same(read_direct(device.path, SIZE), pattern(SIZE, 1), "afterwards")


_FORKED = """
import os, signal, sys, time
import dmabuf

buffer = dmabuf.allocate(1 << 20, exporter="udmabuf")
device = dmabuf.as_block_device(buffer)
child = os.fork()
if child == 0:
    device.close()  # the parent's: nothing happens
    buffer.close()
    print(device.path, os.path.exists(device.path), flush=True)
    signal.pause()
print(child, flush=True)
signal.pause()
"""


def test_a_forked_child_does_not_keep_the_device() -> None:
    process = subprocess.Popen([sys.executable, "-c", _FORKED], stdout=subprocess.PIPE, text=True)
    words = " ".join(process.stdout.readline() for _ in range(2)).split()
    child = next(int(word) for word in words if word.isdigit())
    path = next(word for word in words if word.startswith("/dev/"))
    assert "True" in words
    try:
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: not os.path.exists(path), "the end of the device")
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
    number = int(path.removeprefix("/dev/ublkb"))

    def deleted() -> bool:
        """Export another one, which deletes what nobody has open."""
        with dmabuf.allocate(4096) as buffer, dmabuf.as_block_device(buffer):
            pass
        return number not in ublk.numbers()

    wait_until(deleted, "the end of the child")


def test_a_device_that_root_deletes() -> None:
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer) as device,
    ):
        control = ublk.open_control()
        try:
            ublk.delete(control, int(device.path.removeprefix("/dev/ublkb")), None)
        finally:
            os.close(control)
        device.wait()
        assert not os.path.exists(device.path)


# -- programs


@pytest.fixture
def disk() -> Iterator[tuple[dmabuf.Buffer, str]]:
    with (
        dmabuf.allocate(DISK, exporter="udmabuf") as buffer,
        dmabuf.as_block_device(buffer) as device,
    ):
        yield buffer, device.path


@needs("ext4")
def test_a_filesystem(tmp_path: Path) -> None:
    """What is written on a mount is found by a second one, and by a loop device over a copy."""
    contents = {f"file {n}": pattern(n * 300_001, n) for n in range(12)}
    with dmabuf.allocate(DISK, exporter="udmabuf") as buffer:
        with dmabuf.as_block_device(buffer) as device:
            with mounted(device.path, "ext4", tmp_path / "mnt") as folder:
                for name, content in contents.items():
                    (folder / name).write_bytes(content)
        image = tmp_path / "image"
        image.write_bytes(buffer.pread(DISK, 0))
        with dmabuf.as_block_device(buffer, read_only=True) as device:
            for source, how in ((device.path, "ro"), (image, "loop,ro")):
                run("mount", "-t", "ext4", "-o", how, source, tmp_path / "mnt")
                try:
                    found = {path.name: path.read_bytes() for path in (tmp_path / "mnt").glob("f*")}
                    assert sorted(found) == sorted(contents)
                    for name, content in contents.items():
                        assert_same(found[name], content, f"{name} of {source}")
                finally:
                    run("umount", tmp_path / "mnt")


def test_dd(disk: tuple[dmabuf.Buffer, str], tmp_path: Path) -> None:
    buffer, path = disk
    source = tmp_path / "source"
    source.write_bytes(pattern(SIZE, 1))
    for flags in ("oflag=direct", "conv=fsync"):
        buffer.pwrite(poison(DISK), 0)
        shell("dd if=$1 of=$2 bs=64k seek=16 status=none $3", tmp_path, source, path, flags)
        expected = bytearray(poison(DISK))
        expected[1 << 20 : (1 << 20) + SIZE] = pattern(SIZE, 1)
        assert_same(buffer.pread(DISK, 0), bytes(expected), f"dd {flags}")
    for flags in ("iflag=direct", "iflag=fullblock"):
        (tmp_path / "back").unlink(missing_ok=True)
        shell("dd if=$1 of=back bs=1M skip=1 count=4 status=none $2", tmp_path, path, flags)
        assert_same((tmp_path / "back").read_bytes(), pattern(SIZE, 1), f"dd {flags}")


@needs("fio")
@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
def test_fio_verifies_what_it_wrote(disk: tuple[dmabuf.Buffer, str], engine: str) -> None:
    options = (
        "--direct=1 --iodepth=64 --verify=crc32c --do_verify=1 --verify_fatal=1 --size=4M"
        f" --ioengine={engine}"
    )
    for how in ("--rw=randwrite --bs=4k", "--rw=write --bs=1M", "--rw=randrw --bsrange=512-256k"):
        shell(
            f"fio --name=x --minimal --filename=$1 {options} {how}",
            Path("/tmp"),
            disk[1],
            timeout=600,
        )


@pytest.mark.device_table("ublk", "read", "write")
def test_dmabuf_itself_reads_and_writes_it(disk: tuple[dmabuf.Buffer, str]) -> None:
    """A transfer between two buffers by the device of one of them."""
    buffer, path = disk
    buffer.pwrite(pattern(SIZE, 1), 0)
    with dmabuf.allocate(SIZE, exporter="udmabuf") as other, dmabuf.open(path, "r+") as file:
        other.pwrite(poison(SIZE), 0)
        file.read_into(other, SIZE, route="direct")
        assert_same(other.pread(SIZE, 0), pattern(SIZE, 1), "read")
        other.pwrite(pattern(SIZE, 2), 0)
        file.write_from(other, SIZE, route="direct")
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "written")


# -- the command


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dmabuf.store.Store]:
    with as_a_program(tmp_path / "s"), dmabuf.store.connect(tmp_path / "s") as store:
        yield store


@contextlib.contextmanager
def exported(
    store: dmabuf.store.Store, name: str, *options: str
) -> Iterator[tuple[subprocess.Popen, str]]:
    """`dmabuf export`, once the device is there; SIGTERM at the end, unless it has ended."""
    process = start("export", "--block", "--socket", store.path, *options, name)
    first = process.stdout.readline().decode()
    if not first.startswith(f"{name}: "):
        pytest.fail(f"{first}{process.stderr.read().decode()}")
    try:
        yield process, first.split()[1].rstrip(",")
    finally:
        process.send_signal(signal.SIGTERM)
        assert finish(process).err == ""


def refused(store: dmabuf.store.Store, name: str, *options: str, **how: object) -> Ended:
    return finish(start("export", "--block", "--socket", store.path, *options, name, **how))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_name_of_the_store(store: dmabuf.store.Store, number: signal.Signals) -> None:
    with store.create("disk", SIZE) as buffer, exported(store, "disk") as (process, path):
        buffer.pwrite(pattern(SIZE, 1), 0)
        assert_same(read_direct(path, SIZE), pattern(SIZE, 1), "the device")
        write_direct(path, pattern(SIZE, 2))
        process.send_signal(number)
        assert finish(process) == Ended(0, "", "")
        assert not os.path.exists(path)
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "the buffer")


def test_a_signal_while_systemd_is_slow(store: dmabuf.store.Store, tmp_path: Path) -> None:
    """The device is announced, so the signal is its regular end, even before the command waits."""
    store.create("disk", SIZE).close()
    path = str(tmp_path / "notify")
    kind = socket.SOCK_DGRAM
    with socket.socket(socket.AF_UNIX, kind) as systemd, socket.socket(socket.AF_UNIX, kind) as one:
        systemd.bind(path)
        one.connect(path)
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(b"another one's")
        how = {"env": os.environ | {"NOTIFY_SOCKET": path}}
        process = start("export", "--block", "--socket", store.path, "disk", **how)
        assert process.stdout.readline().startswith(b"disk: /dev/ublkb")
        process.send_signal(signal.SIGTERM)
        assert finish(process) == Ended(0, "", "")


def test_content_that_is_final_becomes_a_read_only_device(store: dmabuf.store.Store) -> None:
    with store.create(None, SIZE, exporter="memfd") as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        store.link(buffer, "final", cached=True)
    with exported(store, "final") as (_, path):
        assert run("blockdev", "--getro", path) == "1"
        assert_same(read_direct(path, SIZE), pattern(SIZE, 1), "the device")


def test_content_that_is_not_whole_sectors(store: dmabuf.store.Store) -> None:
    store.create("odd", 1000).close()
    ended = refused(store, "odd")
    fix = "put a file that `truncate -s %512 FILE` has made longer"
    assert ended == Ended(1, "", f"error: odd: its 1000 bytes are not whole sectors; {fix}\n")


def test_users_without_rights(store: dmabuf.store.Store) -> None:
    store.create("disk", SIZE).close()
    with exported(store, "disk", "--read-only"):
        limited = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"]
        command = [*limited, sys.executable, "-m", "dmabuf.cli", "export", "--block"]
        done = subprocess.run(
            [*command, "--socket", store.path, "disk"], capture_output=True, text=True
        )
    text = "add a device: not permitted; run it as root, with CAP_SYS_ADMIN"
    assert (done.returncode, done.stderr) == (1, f"error: /dev/ublk-control: {text}\n")


_AS_NOBODY = """
import dmabuf
with dmabuf.allocate(4096, exporter="memfd") as buffer:
    try:
        dmabuf.as_block_device(buffer)
    except PermissionError as error:
        print(error)
"""


def test_a_user_who_may_not_open_the_driver() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY], user=65534, cwd="/", capture_output=True, text=True
    )
    text = "[Errno 13] permission denied; block devices are for root: '/dev/ublk-control'\n"
    assert (done.stdout, done.stderr) == (text, "")


def test_the_report_for_programs(store: dmabuf.store.Store) -> None:
    store.create("disk", SIZE).close()
    process = start("export", "--block", "--json", "--read-only", "--socket", store.path, "disk")
    told = b""
    while not told.endswith(b"}\n"):
        told += process.stdout.readline()
    document = checked(told.decode())
    path = document["device"]
    assert document == {
        "format": "dmabuf-export/1", "name": "disk", "device": path, "size": SIZE,
        "read_only": True,
    }  # fmt: skip
    assert ublk_size(path) == SIZE
    process.send_signal(signal.SIGTERM)
    assert finish(process) == Ended(0, "", "")


def test_a_killed_server(store: dmabuf.store.Store, tmp_path: Path) -> None:
    """Its device ends, what used it gets an error, and the next export deletes what is left."""
    with store.create("disk", SIZE) as buffer:
        with exported(store, "disk") as (process, path):
            dd = "dd if=/dev/urandom of=$1 bs=1M count=4 oflag=direct conv=nocreat 2>&1"
            command = ["bash", "-c", f"while {dd}; do :; done", "bash", path]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
                for _ in range(3):
                    assert writer.stdout.readline()
                process.kill()
                out, _ = writer.communicate(timeout=PATIENCE)
                assert "error" in out or "No such" in out, out
            wait_until(lambda: not os.path.exists(path), "the end of the device")
        buffer.pwrite(pattern(SIZE, 1), 0)
        left = ublk.numbers()
        with exported(store, "disk") as (_, path):
            assert left, "nothing to delete"
            assert len(ublk.numbers()) == 1
            assert_same(read_direct(path, SIZE), pattern(SIZE, 1), "the next device")


def test_a_killed_server_under_a_mount(store: dmabuf.store.Store, tmp_path: Path) -> None:
    store.create("disk", DISK).close()
    with exported(store, "disk") as (process, path):
        with mounted(path, "ext4", tmp_path / "mnt") as folder:
            (folder / "file").write_bytes(pattern(SIZE, 1))
            process.kill()
            wait_until(lambda: not os.path.exists(path), "the end of the device")
            with pytest.raises(OSError):
                (folder / "new").write_bytes(b"x")
                os.sync()
                (folder / "newer").write_bytes(b"x")
    with exported(store, "disk"):
        pass


def test_a_device_that_is_mounted_when_its_server_stops(
    store: dmabuf.store.Store, tmp_path: Path
) -> None:
    """The filesystem is written back first, without a sync, and fails afterwards."""
    folder = tmp_path / "mnt"
    store.create("disk", DISK).close()
    with exported(store, "disk") as (process, path):
        with mounted(path, "ext4", folder):
            (folder / "file").write_bytes(pattern(SIZE, 1))
            process.send_signal(signal.SIGTERM)
            assert finish(process) == Ended(0, "", "")
            assert not os.path.exists(path)
            with pytest.raises(OSError):
                (folder / "new").write_bytes(b"x")
    with exported(store, "disk") as (_, path):
        run("mount", path, folder)
        try:
            assert_same((folder / "file").read_bytes(), pattern(SIZE, 1), "the file")
        finally:
            run("umount", folder)
