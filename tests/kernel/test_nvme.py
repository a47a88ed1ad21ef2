"""NVMe passthrough by /dev/ngXnY: every byte against the block device by O_DIRECT."""

import errno
import json
import os
import random
from array import array

import pytest

import dmabuf
from dmabuf import Engine, Route
from dmabuf._core import lib
from dmabuf.kernel import uapi
from dmabuf.transfer import audit
from tests.kernel.conftest import BUFFERS, PINNED
from tests.kernel.nvme_drive import everything
from tests.support import Filter, assert_same, pattern, poison, raises_errno
from tests.unit.command import dmabuf as command

AREA = 1 << 20
SIZE = 96 << 10


@pytest.fixture(scope="module", params=["auto", "threads"])
def engine(request):
    with Engine(queue_depth=4, block_size="16KiB", backend=request.param) as engine:
        yield engine


@pytest.fixture(scope="module", params=["udmabuf", "huge pages", "dma-heap"])
def buf(request):
    with BUFFERS[request.param](SIZE) as buffer:
        buffer.kind = request.param
        yield buffer


def close_to(dice, top, unit):
    """A number near a multiple of `unit`, and near either end at times."""
    number = dice.choice([0, top, dice.randrange(top + 1) // unit * unit, dice.randrange(top + 1)])
    return min(max(number + dice.choice([0, 0, 0, -1, 1, 3]), 0), top)


@everything
def test_what_it_is(drive):
    with dmabuf.open(drive.node, "r+") as file, dmabuf.allocate(SIZE) as buffer:
        assert file.kind == "NVMe character device"
        assert file.size == drive.size
        namespace = file.target.namespace
        assert (namespace.nsid, namespace.block) == (1, drive.block)
        assert namespace.disk == os.path.basename(drive.disk)
        assert namespace.limit in (508 << 10, 512 << 10)  # the former on Linux 6.12
        assert namespace.memory_align == 4
        for direction in ("read", "write"):
            assert file.plan(buffer, direction, require="zero-copy").route is Route.DIRECT
            with pytest.raises(dmabuf.RouteUnavailable, match="has none"):
                file.plan(buffer, direction, route="buffered")
            with pytest.raises(dmabuf.RouteUnavailable, match="cannot use registered dma-bufs"):
                file.plan(buffer, direction, route="native")


@everything
@pytest.mark.device_table("NVMe passthrough", "read", "zero-copy")
def test_reads(drive, engine, buf):
    """Any offset and length; the bytes around the range keep what they held."""
    dice, chosen = random.Random(drive.block), set()
    data = pattern(AREA, 5)
    drive.write(data)
    with dmabuf.open(drive.node, engine=engine) as file:
        for number in range(24):
            start = close_to(dice, AREA - SIZE, drive.block)
            at = close_to(dice, SIZE, 512)
            size = close_to(dice, SIZE - at, drive.block)
            if number % 2:  # so that something can go straight
                at = min(at // drive.block * drive.block + start % drive.block, SIZE)
                size = min(size, SIZE - at)
            route = dice.choice([None, None, "staged"])
            expected = bytearray(poison(SIZE))
            expected[at : at + size] = data[start : start + size]
            buf.pwrite(poison(SIZE), 0)
            done = file.read_into(buf, size, file_offset=start, buffer_offset=at, route=route)
            assert_same(buf.pread(SIZE, 0), bytes(expected), f"{(start, at, size)}: {done}")
            assert done.nbytes == size
            chosen |= {done.route} if size else set()
    assert chosen == ({Route.DIRECT, Route.STAGED} if buf.kind in PINNED else {Route.STAGED})


@everything
@pytest.mark.device_table("NVMe passthrough", "write", "zero-copy")
def test_writes(drive, engine, buf):
    """Whole blocks from any address; no byte beside them changes."""
    dice, chosen, block = random.Random(drive.block), set(), drive.block
    expected = bytearray(pattern(AREA, 6))
    drive.write(expected)
    with dmabuf.open(drive.node, "r+", engine=engine) as file:
        for number in range(12):
            content = pattern(SIZE, 100 + number)
            buf.pwrite(content, 0)
            at = dice.choice([0, 4, 512, 4096, 8, 2, 1])
            size = dice.randrange(0, (SIZE - at) // block + 1) * block
            start = dice.randrange((AREA - SIZE) // block) * block
            expected[start : start + size] = content[at : at + size]
            done = file.write_from(
                buf, size, file_offset=start, buffer_offset=at, sync=not number % 4
            )
            assert_same(drive.read(AREA), bytes(expected), f"{(start, at, size)}: {done}")
            assert_same(buf.pread(SIZE, 0), content, "the buffer")
            straight = buf.kind in PINNED and not at % 4
            assert not size or done.route is (Route.DIRECT if straight else Route.STAGED)
            assert done.copied == (size if done.route is Route.STAGED else 0)
            chosen |= {done.route} if size else set()
    assert chosen == ({Route.DIRECT, Route.STAGED} if buf.kind in PINNED else {Route.STAGED})


@everything
def test_segments(drive, engine, buf):
    block, data = drive.block, pattern(AREA, 7)
    drive.write(data)
    expected, triples = bytearray(poison(SIZE)), array("Q")
    for number in range(SIZE // 8192):
        start, at = (number * 37 % 120) * 8192 + block, number * 8192
        triples.extend((start, at, 4096))
        expected[at : at + 4096] = data[start : start + 4096]
    buf.pwrite(poison(SIZE), 0)
    with dmabuf.open(drive.node, "r+", engine=engine) as file:
        file.read_segments(buf, triples)
        assert_same(buf.pread(SIZE, 0), bytes(expected), "the buffer")
        after = bytearray(data)
        content = pattern(SIZE, 8)
        buf.pwrite(content, 0)
        file.write_segments(buf, triples, sync=True)
        for i in range(0, len(triples), 3):
            start, at, size = triples[i : i + 3]
            after[start : start + size] = content[at : at + size]
        assert_same(drive.read(AREA), bytes(after), "the namespace")


@everything
@pytest.mark.parametrize(("offset", "size"), [(0, 100), (1, 4096), (2048, 4097), (256, 4096)])
def test_a_write_of_less_than_a_block_is_refused(drive, offset, size):
    drive.write(pattern(AREA, 9))
    with dmabuf.open(drive.node, "r+") as file, dmabuf.allocate(SIZE) as buffer:
        for route in (None, "staged", "buffered"):
            with raises_errno(errno.EINVAL, f"whole blocks of {drive.block} bytes", nbytes=0):
                file.write_from(buffer, size, file_offset=offset, route=route)
        with raises_errno(errno.EINVAL, "whole blocks"):
            file.write_segments(buffer, array("Q", (8192, 0, 4096, offset, 8192, size)))
        with pytest.raises(OSError, match="whole blocks"):
            file.plan(buffer, "write", size=size, file_offset=offset)
    assert_same(drive.read(AREA), pattern(AREA, 9), "the namespace")


@everything
@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_requests_are_split_at_the_limit(drive, backend):
    """The kernel splits none, and refuses one that is larger; from an odd address too."""
    size = 4 << 20
    drive.write(data := pattern(size, 10))
    with (
        Engine(block_size="8MiB", backend=backend) as engine,
        dmabuf.open(drive.node, "r+", engine=engine) as file,
        dmabuf.allocate(size + 4096, exporter="udmabuf") as buffer,
    ):
        for at in (0, 4, 2052):
            buffer.pwrite(bytes(size), at)
            file.read_into(buffer, 4096)  # so that there is a ring to look at
            with Filter(lambda completion: completion.result) as filter_:
                done = file.read_into(buffer, size, buffer_offset=at, require="zero-copy")
            lengths = sorted((length for _, length, _ in filter_.seen), reverse=True)
            limit = file.target.namespace.limit
            whole, rest = divmod(size, limit)
            assert lengths == [limit] * whole + [rest] * bool(rest)
            assert done.requests == len(lengths)
            assert_same(buffer.pread(size, at), data, "the buffer")
            drive.write(bytes(size))
            file.write_from(buffer, size, buffer_offset=at, require="zero-copy")
            assert_same(drive.read(size), data, "the namespace")


@everything
def test_registered_and_not(drive):
    drive.write(data := pattern(AREA, 11))
    with (
        Engine(block_size="16KiB", queue_depth=8) as engine,
        dmabuf.open(drive.node, engine=engine) as file,
        dmabuf.allocate(AREA, exporter="udmabuf") as buffer,
    ):
        few = file.read_into(buffer, 16384)
        assert (few.registered, engine._passthrough is not None) == (False, True)
        buffer.pwrite(poison(AREA), 0)
        many = file.read_into(buffer)
        assert many.registered, many.registration
        assert_same(buffer.pread(AREA, 0), data, "the buffer")


@everything
def test_registered_memory_is_what_requests_name(drive):
    """With another buffer's slot the kernel finds the address outside of it: EFAULT, so staged."""
    with (
        Engine(block_size="16KiB", queue_depth=8) as engine,
        dmabuf.open(drive.node, engine=engine) as file,
        dmabuf.allocate(AREA, exporter="udmabuf") as buffer,
        dmabuf.allocate(AREA, exporter="udmabuf") as other,
    ):
        for each in (buffer, other):
            assert file.read_into(each).registered
        slots = engine._passthrough.registration(buffer).slots
        own, slots[0] = slots[0], engine._passthrough.registration(other).slots[0]
        wrong = file.read_into(buffer)
        slots[0] = own
        assert wrong.route is Route.STAGED
        assert "EFAULT" in wrong.rejected[Route.DIRECT]


@everything
def test_both_at_once_on_the_default_engine(drive):
    """A block device and its character device, by a ring each."""
    drive.write(data := pattern(AREA, 12))
    with (
        dmabuf.open(drive.node) as passed,
        dmabuf.open(drive.disk) as blocks,
        dmabuf.allocate(2 * AREA) as buffer,
    ):
        passed.read_into(buffer, AREA)
        blocks.read_into(buffer, AREA, buffer_offset=AREA)
        assert_same(buffer.pread(2 * AREA, 0), data * 2, "the buffer")


@everything
def test_the_end(drive, engine):
    size, end = 64 << 10, drive.size
    drive.write(data := pattern(size, 13), end - size)
    with (
        dmabuf.open(drive.node, "r+", engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
    ):
        for start in (end - size, end - drive.block, end - 100, end - drive.block - 1):
            buffer.pwrite(poison(SIZE), 0)
            done = file.read_into(buffer, SIZE, file_offset=start)
            there = end - start
            assert done.nbytes == there
            expected = data[size - there :] + poison(SIZE)[there:]
            assert_same(buffer.pread(SIZE, 0), expected, "the buffer")
        assert file.read_into(buffer, 4096, file_offset=end).nbytes == 0
        assert file.read_into(buffer, 4096, file_offset=end + (1 << 40) + 1).nbytes == 0
        with pytest.raises(dmabuf.ShortReadError) as short:
            file.read_segments(buffer, array("Q", (0, 0, 4096, end - 512, 4096, 4096)))
        assert (short.value.index, short.value.nbytes) == (1, 4096 + 512)
        for start in (end, end - size + 4096, end + (1 << 50)):
            with raises_errno(errno.ENOSPC, f"ends at {end}", nbytes=0):
                file.write_from(buffer, size, file_offset=start)
    assert_same(drive.read(size, end - size), data, "the namespace")


@everything
def test_what_the_device_refuses_is_named(drive, engine):
    """Past the end, where the library believes that there is more."""
    with (
        dmabuf.open(drive.node, "r+", engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
    ):
        namespace, end = file.target.namespace, drive.size
        file.target.namespace = namespace._replace(size=end + (1 << 30))
        drive.write(data := pattern(16384, 14), end - 16384)
        expected = r"at file offset .*: LBA out of range \(NVMe status 0x0080\)"
        with raises_errno(errno.EINVAL, expected, filename=drive.node):
            file.read_into(buffer, 65536, file_offset=end - 16384)
        with raises_errno(errno.ENOSPC, expected, nbytes=0) as caught:
            file.write_from(buffer, 65536, file_offset=end)
        assert f"file offset {end}," in str(caught.value)
        file.target.namespace = namespace
        buffer.pwrite(poison(SIZE), 0)
        file.read_into(buffer, 16384, file_offset=end - 16384)
        assert_same(buffer.pread(16384, 0), data, "the ring works on")


@everything
def test_a_bad_block_is_found(drive, engine):
    bad = 10 * 4096

    def judge(completion):
        start, end = completion.offset, completion.offset + completion.size
        return -errno.EIO if start <= bad < end else completion.result

    drive.write(data := pattern(SIZE, 15))
    with (
        dmabuf.open(drive.node, engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
    ):
        file.read_into(buffer, 4096)
        buffer.pwrite(poison(SIZE), 0)
        with Filter(judge), raises_errno(errno.EIO, f"file offset {bad},", nbytes=bad):
            file.read_into(buffer, SIZE)
        assert_same(buffer.pread(bad, 0), data[:bad], "what lies before it")


class Wrong(dmabuf.Engine):
    """Changes the last byte of what its jobs moved, behind the back of whoever asked for them."""

    drive = None

    def run(self, job):
        outcome = super().run(job)
        offset, at, size = job.segments[0:3]
        if self.drive is None:
            return outcome
        if job.core.direction == lib.DMB_WRITE:
            end = (offset + size) // self.drive.block * self.drive.block
            block = self.drive.read(self.drive.block, end - self.drive.block)
            self.drive.write(block[:-1] + bytes([block[-1] ^ 1]), end - self.drive.block)
        else:
            last = job.buffer.pread(1, at + size - 1)
            job.buffer.pwrite(bytes([last[0] ^ 1]), at + size - 1)
        return outcome


@everything
def test_audit(drive, buf):
    """By Read commands of their own: a character device has no pread."""
    drive.write(data := pattern(AREA, 18))
    end = drive.size
    with Wrong() as engine, dmabuf.open(drive.node, "r+", engine=engine) as file:
        for offset, at, size in ((0, 0, SIZE), (513, 17, 70001), (end - 5000, 0, 5000)):
            done = file.read_into(buf, size, file_offset=offset, buffer_offset=at, audit="always")
            assert done.audited.endswith("compared, read by separate NVMe Read commands")
            if offset < AREA:
                assert_same(buf.pread(size, at), data[offset : offset + size], "the buffer")
        buf.pwrite(data[:SIZE], 0)
        done = file.write_from(buf, SIZE, file_offset=AREA, audit="always")
        assert done.audited == "every byte of 96 KiB compared, read by separate NVMe Read commands"
        engine.drive = drive
        for verb in (file.read_into, file.write_from):
            audit.PAIRS.forget()  # the route is refused after a failure, and a heap has one only
            with pytest.raises(dmabuf.IntegrityError) as caught:
                verb(buf, SIZE, file_offset=AREA, audit="always")
            assert (caught.value.offset, caught.value.filename) == (AREA + SIZE - 1, drive.node)


@everything
def test_verify(drive, capsys):
    ended = command(capsys, "verify", "--rounds", 1, "--seed", 1, "--json", drive.node)
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["ok"] and told["reference"] == "by separate NVMe Read commands"
    assert {row["route"] for row in told["results"] if row["transfers"]} == {"direct", "staged"}
    before = drive.read(AREA)
    ended = command(capsys, "verify", "--destroy", "--region", "0+1MiB", drive.node)
    assert ended.status == 1 and ended.err.strip().endswith(f"name {drive.disk}")
    assert_same(drive.read(AREA), before, "the namespace")


@everything
def test_sync_is_a_flush(drive, monkeypatch):
    seen, ioctl = [], uapi.ioctl

    def watched(fd, request, argument):
        if request == uapi.NVME_IOCTL_IO_CMD:
            seen.append(uapi.NVME_CMD_STRUCT.unpack(argument)[:4])
        return ioctl(fd, request, argument)

    monkeypatch.setattr(uapi, "ioctl", watched)
    with dmabuf.open(drive.node, "r+") as file, dmabuf.allocate(SIZE) as buffer:
        file.write_from(buffer)
        assert seen == []
        file.write_from(buffer, sync=True)
        assert seen == [(0, 0, 0, 1)]  # opcode, flags, reserved, nsid


@everything
def test_copy(drive, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(pattern(3 << 20, 16))
    drive.write(bytes(4 << 20))
    dmabuf.copy(source, drive.node, sync=True)
    assert_same(drive.read(4 << 20), pattern(3 << 20, 16) + bytes(1 << 20), "the namespace")
    source.write_bytes(pattern(5000, 17))
    with pytest.raises(OSError, match="whole blocks"):
        dmabuf.copy(source, drive.node)
    assert_same(drive.read(8192), pattern(3 << 20, 16)[:8192], "the namespace")
    with pytest.raises(OSError, match="same"):
        dmabuf.copy(drive.disk, drive.node)
    with pytest.raises(OSError, match="same"):
        dmabuf.copy(drive.node, drive.disk)
