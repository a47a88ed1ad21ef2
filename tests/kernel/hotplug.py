"""The drive of DMABUF_TEST_NVME0 as one that is reset, pulled out and put back, by sysfs."""

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.support import drop_cache, fill, let_go, run, wait_until

MIB = 1 << 20
_BLKPG, _ADD, _DELETE = 0x1269, 1, 2
_WHERE = {"partition": MIB}
"""Where on the disk a kind of target begins, in bytes, if not at 0."""


def _partition(operation: int, disk: int, start: int, size: int) -> None:
    """Number 1, in the kernel's list alone: struct blkpg_ioctl_arg and blkpg_partition."""
    entry = ctypes.create_string_buffer(struct.pack("=qqi64s64s4x", start, size, 1, b"", b""))
    argument = struct.pack("=iiixxxxQ", operation, 0, len(entry) - 1, ctypes.addressof(entry))
    fcntl.ioctl(disk, _BLKPG, argument)


class Slot:
    """Where the drive sits. It may come back as another controller; its serial number stays."""

    def __init__(self) -> None:
        self.first = os.environ["DMABUF_TEST_NVME0"]
        self._serial = Path("/sys/block", Path(self.first).name, "device/serial").read_text()
        self._pci = os.path.realpath(self._controller() / "device")

    def _controller(self) -> Path:
        for one in Path("/sys/class/nvme").glob("nvme*"):
            with contextlib.suppress(OSError):
                if (one / "serial").read_text() == self._serial:
                    return one
        raise FileNotFoundError("the drive is not there")

    def _namespace(self, pattern: str) -> str:
        """Of its one namespace, which gets another number while somebody has the old one open."""
        found = list(self._controller().glob(pattern))
        if not found:
            raise FileNotFoundError("the drive shows no namespace yet")
        return f"/dev/{found[0].name}"

    @property
    def disk(self) -> str:
        """Its block device."""
        return self._namespace("nvme*n[0-9]*")

    @property
    def node(self) -> str:
        """Its character device, for passthrough."""
        return self._namespace("ng*n[0-9]*")

    def reset(self) -> None:
        """Reset the controller; returns when it is back."""
        (self._controller() / "reset_controller").write_text("1")

    def pull(self) -> None:
        """Take the device from the bus; returns when the driver has let go of it."""
        Path(self._pci, "remove").write_text("1")

    def plug(self) -> None:
        """Put it back; returns when its nodes can be opened."""
        Path("/sys/bus/pci/rescan").write_text("1")
        self.wait()

    def wait(self) -> None:
        """Return when its nodes can be opened."""

        def there() -> bool:
            try:
                for path in (self.disk, self.node):
                    os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            except OSError:
                return False
            return True

        wait_until(there, "the drive's nodes")

    def restore(self) -> None:
        """As it was found: there, and by its first name."""
        if not os.path.exists(self._pci):
            self.plug()

        def by_its_first_name() -> bool:
            if self.disk != self.first:  # somebody still held its name
                self.pull()
                self.plug()
            return self.disk == self.first

        wait_until(by_its_first_name, f"{self.first}, the drive's first name,")

    # -- what is read and written on it

    @contextlib.contextmanager
    def target(self, kind: str, data: bytes, folder: Path) -> Iterator[str]:
        """The path of a "disk", "partition", "file" on it, or its "node", beginning with data."""
        if kind == "file":
            run("mkfs.ext4", "-F", "-q", self.disk)
            with self._mounted(folder) as path:
                with open(path, "wb") as file:
                    fill(file.fileno(), data)
                    drop_cache(file.fileno())
                yield path
            return
        fd = os.open(self.disk, os.O_RDWR | os.O_CLOEXEC)
        fill(fd, data, _WHERE.get(kind, 0))
        drop_cache(fd)
        if kind == "partition":
            _partition(_ADD, fd, MIB, 128 * MIB)
        try:
            yield {"disk": self.disk, "partition": f"{self.disk}p1", "node": self.node}[kind]
        finally:
            if kind == "partition" and os.path.exists(f"{self.first}p1"):  # it was not pulled
                _partition(_DELETE, fd, 0, 0)
            os.close(fd)

    @contextlib.contextmanager
    def again(self, kind: str, folder: Path) -> Iterator[str]:
        """The path of the same bytes once the drive is back, whatever its name; partitions gone."""
        if kind == "file":
            with self._mounted(folder) as path:
                yield path
        else:
            yield self.node if kind == "node" else self.disk

    @contextlib.contextmanager
    def _mounted(self, folder: Path) -> Iterator[str]:
        folder.mkdir(exist_ok=True)
        run("mount", "-t", "ext4", self.disk, folder)
        try:
            yield str(folder / "file")
        finally:
            let_go(lambda: run("umount", folder))

    def start(self, kind: str) -> int:
        """Where the target's bytes begin in what `again` gives."""
        return _WHERE.get(kind, 0)
