"""as_block_device() over a fake ublk driver; tests/kernel has the driver."""

import errno
import os
import threading

import pytest

import dmabuf
from dmabuf._core import ffi, lib
from dmabuf.devices import block
from dmabuf.kernel import ublk
from tests import forking
from tests.support import pattern, raises_errno

SIZE = 64 << 10

COMMANDS = {
    0x02: "describe", 0x04: "add", 0x05: "delete", 0x14: "delete async", 0x06: "start",
    0x07: "stop", 0x08: "size",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("leaves_nothing")


class FakeUblk:
    """The driver's commands. `status` has what the next one of a name returns, or all of them."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.status: dict[str, int] = {}
        self.devices: dict[int, dict] = {}
        self.flags = 0xC0
        self.calls: list[tuple[str, int]] = []
        self.opened = True
        """Whether devtmpfs shows the nodes."""
        self.served = 0

    def control(self, fd, command, number, memory, size, value):
        name = COMMANDS[command & 0xFF]
        self.calls.append((name, number))
        if self.status.get(name):
            return self.status[name]
        data = ffi.buffer(memory, size) if size else None
        if name == "add":
            number = next(one for one in range(9) if one not in self.devices)
            fields = list(ublk._INFO.unpack(data))
            self.make(number, fields[9], state=0)
            fields[5], fields[8] = number, self.flags
            data[:] = ublk._INFO.pack(*fields)
        elif name == "describe":
            about = self.devices[number]
            data[:] = ublk._INFO.pack(
                1, 64, about["state"], 0, 0, number, 0, 0, 0, about["mark"], 0, 0, 0, 0
            )
        elif name == "size":
            _, _, attributes, *_, sectors, _ = ublk._PARAMS.unpack(data)
            self.devices[number] |= {"read only": attributes == 1, "size": 512 * sectors}
        elif name == "start":
            assert value == os.getpid()
            self.devices[number]["state"] = 1
        elif name == "stop":
            self.devices[number]["stop"].set()
        else:
            assert self.devices[number]["stop"].is_set() or not self.devices[number]["state"]
            del self.devices[number]
            (self.folder / f"ublkc{number}").unlink(missing_ok=True)
        return 0

    def make(self, number, mark, state):
        self.devices[number] = {"mark": mark, "state": state, "stop": threading.Event()}
        if self.opened:
            (self.folder / f"ublkc{number}").touch()

    def serve(self, job, depth, fence, ready):
        if self.served:
            return self.served
        number = int(os.readlink(f"/proc/self/fd/{job.fd}")[-1])
        self.content = bytes(ffi.buffer(ffi.cast("char *", job.base), job.size))
        self.slabs = [job.slabs[0]] if job.slabs else []
        ring = os.eventfd(0)
        os.eventfd_write(ready, ring)
        self.devices[number]["stop"].wait()
        os.close(ring)
        return self.devices[number].get("result", 0)


class Library:
    """The C core, but for the fake."""

    def __init__(self, fake):
        self.dmb_ublk_control, self.dmb_ublk_serve = fake.control, fake.serve
        self.dmb_uring_probe = lambda: 0

    def __getattr__(self, name):
        return getattr(lib, name)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    made = FakeUblk(tmp_path)
    for module in (block, ublk):
        monkeypatch.setattr(module, "lib", Library(made))
    (tmp_path / "ublk-control").touch()
    monkeypatch.setattr(ublk, "CONTROL", str(tmp_path / "ublk-control"))
    monkeypatch.setattr(ublk, "SYSFS", str(tmp_path))
    monkeypatch.setattr(ublk, "_DISK", str(tmp_path / "ublkb{}"))
    monkeypatch.setattr(ublk, "_SERVER", str(tmp_path / "ublkc{}"))
    yield made
    assert not made.devices


@pytest.fixture
def buffer(request, kernel):
    with dmabuf.allocate(SIZE, exporter=getattr(request, "param", "memfd")) as made:
        made.pwrite(pattern(SIZE, 1), 0)
        yield made


@pytest.mark.parametrize("buffer", ["memfd", "udmabuf"], indirect=True)
@pytest.mark.parametrize("read_only", [None, True])
def test_a_device_has_the_bytes_of_the_buffer(fake, buffer, read_only):
    with dmabuf.as_block_device(buffer, read_only=read_only, size="60KiB") as device:
        assert device.path == str(fake.folder / "ublkb0")
        assert (device.size, device.read_only) == (60 << 10, bool(read_only))
        about = fake.devices[0]
        assert (about["size"], about["read only"]) == (device.size, device.read_only)
        assert about["state"] and fake.content == pattern(SIZE, 1)[: 60 << 10]
        assert fake.slabs == ([buffer.slabs[0].fd] if buffer.is_dmabuf else [])
        with pytest.raises(dmabuf.BusyError):
            buffer.close()
        with dmabuf.as_block_device(buffer) as other:
            assert other.path.endswith("ublkb1")
    assert repr(device) == f"<dmabuf.BlockDevice {device.path!r} closed>"
    device.close()
    device.wait()
    buffer.close()


def test_a_device_of_a_killed_process_is_deleted_and_no_other(fake, buffer):
    fake.make(0, block._MARK, 0)
    fake.make(1, block._MARK, 1)  # it is served
    fake.make(2, 77, 0)  # of another program
    fake.make(3, block._MARK, 0)
    (fake.folder / "ublkc3").unlink()  # it goes meanwhile
    (fake.folder / "ublkc3").symlink_to(fake.folder / "nothing")
    (fake.folder / "ublkc4x").touch()
    with dmabuf.as_block_device(buffer) as device:
        assert device.path.endswith("ublkb0")
        assert sorted(fake.devices) == [0, 1, 2, 3]
    assert sorted(fake.devices) == [1, 2, 3]
    fake.devices.clear()


@pytest.mark.parametrize(
    ("name", "status", "number", "match"),
    [
        ("add", -errno.EPERM, errno.EPERM, "add a device: not permitted; run it as root"),
        ("add", -errno.ENOSPC, errno.ENOSPC, "add a device: No space left"),
        ("size", -errno.EINVAL, errno.EINVAL, "set its size: Invalid"),
        ("start", -errno.EIO, errno.EIO, "start: Input/output error"),
    ],
)
def test_a_driver_that_refuses_keeps_nothing(fake, buffer, name, status, number, match):
    fake.status[name] = status
    with raises_errno(number, match):
        dmabuf.as_block_device(buffer)
    assert not fake.devices
    buffer.close()


def test_a_server_that_cannot_serve_keeps_nothing(fake, buffer):
    fake.served = -errno.ENOMEM
    with raises_errno(errno.ENOMEM, "serve: Cannot allocate memory"):
        dmabuf.as_block_device(buffer)
    buffer.close()


def test_a_kernel_without_user_copy_and_a_container_without_devtmpfs(fake, buffer):
    fake.flags = 0x40
    with raises_errno(errno.EOPNOTSUPP, r"no user copy; it needs Linux 6\.5"):
        dmabuf.as_block_device(buffer)
    fake.opened = False
    with raises_errno(errno.ENOENT, "the host's devtmpfs must be mounted at /dev"):
        dmabuf.as_block_device(buffer)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, 524])
def test_an_older_kernel_deletes_by_waiting(fake, buffer, number):
    fake.status["delete async"] = -number
    dmabuf.as_block_device(buffer).close()
    assert fake.calls[-2:] == [("delete async", 0), ("delete", 0)]


def test_a_server_that_fails_later_is_reported(fake, buffer):
    with dmabuf.as_block_device(buffer) as device:
        fake.devices[0]["result"] = -errno.EIO
        fake.devices[0]["stop"].set()  # root deletes it
        with raises_errno(errno.EIO, "serve"):
            device.wait()


def test_a_machine_without_devices(fake, monkeypatch):
    monkeypatch.setattr(ublk, "SYSFS", str(fake.folder / "none"))
    assert ublk.numbers() == []


def test_the_child_of_a_fork_leaves_the_device_alone(fake, buffer):
    with dmabuf.as_block_device(buffer) as device:

        def child() -> None:
            device.close()
            assert not any("ublkc" in os.readlink(f"/proc/self/fd/{n}") for n in descriptors())
            assert list(fake.devices) == [0] and ("stop", 0) not in fake.calls

        forking.in_child(child)
        assert fake.devices[0]["state"]


def descriptors():
    numbers = os.listdir("/proc/self/fd")
    return [number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")]
