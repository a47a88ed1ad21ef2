"""`dmabuf cp` and `doctor` on real filesystems, block devices and dma-buf exporters."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.copying import copy
from tests.guards import needs
from tests.kernel.conftest import small
from tests.support import assert_same, loop_device, mounted, pattern, whole
from tests.unit.command import dmabuf, finish, start

SIZE = 12_000_003
DATA = pattern(SIZE, 21)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def little_room(tmp_path: Path) -> Iterator[None]:
    """The lab's temporary folder is memory: give it back."""
    yield
    shutil.rmtree(tmp_path)


def content(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return whole(fd)
    finally:
        os.close(fd)


@needs("loop")
@pytest.mark.parametrize("block", [512, 4096])
def test_to_and_from_a_block_device(
    block: int, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    with loop_device(tmp_path / "image", 16 << 20, block) as device:
        ended = dmabuf(capsys, "cp", "--verify", "--json", source, device)
        assert (ended.status, ended.err) == (0, "")
        told = json.loads(ended.out)
        assert told["write"]["route"] in ("native", "direct")
        assert told["verified"]["uncached"]
        assert_same(content(device)[:SIZE], DATA, "the device")
        ended = dmabuf(capsys, "cp", "--json", device, tmp_path / "t")
        assert (ended.status, ended.err) == (0, "")
        assert json.loads(ended.out)["read"]["route"] in ("native", "direct")
        assert_same((tmp_path / "t").read_bytes(), content(device), "the file")


@needs("loop")
def test_a_device_too_small_is_left_alone(source: Path, tmp_path: Path, capsys: Capture) -> None:
    with loop_device(tmp_path / "image", 8 << 20) as device:
        ended = dmabuf(capsys, "cp", source, device)
        assert ended.status == 1
        assert f"{SIZE} bytes do not fit into the {8 << 20}" in ended.err
        assert content(device) == bytes(8 << 20)
        piped = finish(start("cp", "-", device, stdin=subprocess.PIPE), DATA)
        assert piped.status == 1
        assert "(8388608 whole bytes were copied)" in piped.err
        assert_same(content(device), DATA[: 8 << 20], "all that fits")


@needs("ext4")
def test_a_mounted_device_is_refused(source: Path, tmp_path: Path, capsys: Capture) -> None:
    with (
        loop_device(tmp_path / "image", 64 << 20) as device,
        mounted(device, "ext4", tmp_path / "mnt") as folder,
    ):
        (folder / "precious").write_bytes(b"data")
        ended = dmabuf(capsys, "cp", source, device)
        assert ended.status == 1
        assert "mounted" in ended.err
        assert "give --force" in ended.err
        told = json.loads(dmabuf(capsys, "doctor", "--json", device).out)["path"]
        assert told["kind"] == "block device"
        assert told["read"]["ok"]
        assert not told["write"]["ok"]
        assert "mounted" in told["write"]["reason"]
        assert (folder / "precious").read_bytes() == b"data"


@needs("loop")
def test_a_disk_and_its_partition_are_the_same(tmp_path: Path) -> None:
    """And two nodes of one device are."""
    with loop_device(tmp_path / "image", 16 << 20) as device:
        number = os.stat(device).st_rdev
        os.mknod(tmp_path / "twin", 0o600 | 0o060000, number)
        with pytest.raises(OSError, match="the same file"):
            copy(device, tmp_path / "twin")


@needs("ext4")
@pytest.mark.parametrize(("filesystem", "known"), [("ext4", True), ("tmpfs", False)])
def test_a_full_disk(filesystem: str, known: bool, source: Path, tmp_path: Path) -> None:
    with small(filesystem, tmp_path) as folder:
        target = folder / "t"
        target.write_bytes(b"old" * 1000)
        room = os.statvfs(folder)
        with (folder / "filler").open("wb") as filler:
            taken = room.f_bfree * room.f_frsize - 10_000_000
            os.posix_fallocate(filler.fileno(), 0, taken)
        if known:
            ended = finish(start("cp", source, target))
        else:
            ended = finish(start("cp", "-", target, stdin=subprocess.PIPE), DATA)
        assert (ended.status, ended.out) == (1, "")
        assert f"error: {target}: " in ended.err
        assert "No space left on device" in ended.err
        so_far = "" if known else "after 8388608 whole bytes; "
        assert f"({so_far}the old file is unchanged)" in ended.err
        assert target.read_bytes() == b"old" * 1000
        assert not [name for name in os.listdir(folder) if name.startswith(".dmabuf")]
        # The library writes in place, and leaves what is whole.
        with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat:
            with pytest.raises(OSError, match="No space left") as caught:
                copy(cat.stdout.fileno(), target)
        assert caught.value.nbytes == 8388608
        assert_same(target.read_bytes(), DATA[:8388608], "what is whole")


@needs("ext4", "xfs")
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_verify_reads_the_medium_and_not_the_cache(
    filesystem: str, tmp_path: Path, capsys: Capture, monkeypatch
) -> None:
    """The bytes are changed on the disk image, below the filesystem and its cache."""
    image = tmp_path / "image"
    mark = b"here is the place that will rot " * 128  # one page, somewhere on the image
    data = pattern(1 << 20, 5) + mark + pattern(1 << 20, 6)
    (tmp_path / "source").write_bytes(data)
    flush = os.fdatasync

    def rot(fd: int) -> None:
        """What is flushed before the comparison changes behind the filesystem's back."""
        flush(fd)
        at = image.read_bytes().find(mark)
        assert at > 0
        with image.open("r+b") as file:
            file.seek(at + 100)
            file.write(b"\0")

    size = 320 << 20 if filesystem == "xfs" else 64 << 20
    with (
        loop_device(image, size) as device,
        mounted(device, filesystem, tmp_path / "mnt") as folder,
    ):
        monkeypatch.setattr(os, "fdatasync", rot)
        ended = dmabuf(
            capsys, "cp", "--verify", "--route", "buffered", tmp_path / "source", folder / "t"
        )
        assert ended.status == 1
        assert f"differs from the source at offset {(1 << 20) + 100}" in ended.err
        assert not (folder / "t").exists()


@needs("root")
def test_owner_of_the_old_file_is_kept(source: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t").write_bytes(b"old")
    os.chown(tmp_path / "t", 1234, 2345)
    assert dmabuf(capsys, "cp", source, tmp_path / "t").status == 0
    status = (tmp_path / "t").stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)


def exporters_that_work(capsys: Capture) -> set[str]:
    """The exporters that the doctor finds."""
    machine = json.loads(dmabuf(capsys, "doctor", "--json").out)["machine"]
    return {answer["name"] for answer in machine["exporters"] if answer["ok"]}


@needs("udmabuf")
@pytest.mark.parametrize("exporter", ["udmabuf", "auto"])
def test_by_way_of_a_udmabuf(exporter: str, source: Path, tmp_path: Path, capsys: Capture) -> None:
    ended = dmabuf(capsys, "cp", "--exporter", exporter, "--json", source, tmp_path / "t")
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out)["exporter"] == "udmabuf"
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
    assert exporters_that_work(capsys) >= {"udmabuf", "memfd"}


@needs("dma_heap")
def test_by_way_of_a_dma_heap(source: Path, tmp_path: Path, capsys: Capture) -> None:
    ended = dmabuf(capsys, "cp", "--exporter", "system", "--json", source, tmp_path / "t")
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["exporter"] == "system"
    assert told["read"]["route"] in ("staged", "buffered")
    assert_same((tmp_path / "t").read_bytes(), DATA, "the target")
    assert "dma-heap system" in exporters_that_work(capsys)


@needs("udmabuf")
def test_a_dmabuf_by_its_descriptor(source: Path, tmp_path: Path) -> None:
    import dmabuf as package

    with package.allocate(SIZE, exporter="udmabuf") as buffer:
        assert len(buffer.slabs) == 1
        record = copy(source, buffer.slabs[0].fd)
        assert record.nbytes == SIZE
        assert record.exporter is None, "no pool: the dma-buf itself is the target"
        assert_same(buffer.pread(SIZE, 0), DATA, "the dma-buf")
        with pytest.raises(OSError, match="the same memory"):
            copy(buffer.slabs[0].fd, buffer)
        copy(buffer.slabs[0].fd, tmp_path / "t", size=SIZE)
        assert_same((tmp_path / "t").read_bytes(), DATA, "the file")


@needs("nvme")
def test_to_and_from_an_nvme_drive(source: Path, tmp_path: Path, capsys: Capture) -> None:
    device = os.environ["DMABUF_TEST_NVME0"]
    ended = dmabuf(capsys, "cp", "--verify", "--json", source, device)
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["write"]["route"] in ("native", "direct")
    assert told["verified"]["uncached"]
    ended = dmabuf(capsys, "cp", "--size", SIZE, device, tmp_path / "t")
    assert (ended.status, ended.err) == (0, "")
    assert_same((tmp_path / "t").read_bytes(), DATA, "there and back")
    told = json.loads(dmabuf(capsys, "doctor", "--json", device).out)["path"]
    assert told["read"]["zero_copy"]
    assert told["write"]["zero_copy"]
