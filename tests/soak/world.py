"""The memories and targets of the soak, each with a model of its content."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dmabuf
from tests import emulation
from tests.guards import problem_with, required
from tests.support import assert_same, drop_cache, fill, loop_device, mounted, zram

LIMIT = 1 << 20
"""The number of bytes of each target that are used."""
BLOCK = 4096
_NOISE = random.Random(0).randbytes(4 << 20)


def noise(dice: random.Random, size: int) -> bytes:
    """Return bytes that differ from call to call."""
    start = dice.randrange(len(_NOISE) - size)
    return _NOISE[start : start + size]


@dataclass
class Memory:
    """A Buffer and its expected content; two Buffers of one memory share the model."""

    kind: str
    buffer: dmabuf.Buffer
    model: bytearray
    close: Callable[[], object]

    @property
    def size(self) -> int:
        return len(self.model)

    def put(self, data: bytes, offset: int) -> None:
        self.buffer.pwrite(data, offset)
        self.model[offset : offset + len(data)] = data

    def check(self, what: object) -> None:
        """Compare every byte."""
        got = self.buffer.pread(self.size, 0)
        if got != self.model:
            assert_same(got, bytes(self.model), f"{self.buffer} after {what}")

    def settle(self, offset: int, wanted: bytes, sure: int, what: object) -> None:
        """Update the model after a failure: `sure` bytes arrived, later ones are old or new."""
        got = self.buffer.pread(self.size, 0)
        _old_or_new(self.model, got, offset, wanted, sure, what)
        self.check(what)


def _old_or_new(
    model: bytearray, got: bytes, offset: int, wanted: bytes, sure: int, what: object
) -> None:
    """Copy the content after a failed transfer to the model; each byte must be old or new."""
    assert got[offset : offset + sure] == wanted[:sure], f"what arrived by {what}"
    for at in range(sure, min(len(wanted), len(got) - offset)):
        seen = got[offset + at]
        assert seen in (wanted[at], model[offset + at]), f"byte {offset + at} after {what}"
    end = min(offset + len(wanted), len(got))
    model[offset:end] = got[offset:end]


@dataclass
class Target:
    """A file or device, its expected content, and its File."""

    name: str
    path: str
    grows: bool
    """Whether the target is a regular file."""
    ends: bool = True
    """Whether the model covers the whole target."""
    block: int = 1
    """Writes are multiples of this size."""
    disk: str = ""
    """The path for plain reads, if it is not `path`."""
    model: bytearray = field(default_factory=bytearray)
    file: dmabuf.File | None = None
    fd: int = -1

    def begin(self, dice: random.Random) -> None:
        self.fd = os.open(self.disk or self.path, os.O_RDWR | os.O_CLOEXEC)
        self.model = bytearray(noise(dice, LIMIT))
        fill(self.fd, bytes(self.model))
        drop_cache(self.fd)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        os.close(self.fd)

    def put(self, data: bytes, offset: int) -> None:
        """Update the model for a write."""
        if data and len(self.model) < offset:
            self.model += bytes(offset - len(self.model))
        self.model[offset : offset + len(data)] = data

    def check(
        self, what: object, offset: int = 0, size: int = LIMIT, *, deep: bool = False
    ) -> None:
        """Compare every byte from two pages before a range to two after it, and the length."""
        start, end = max(0, offset - 2 * BLOCK), min(offset + size + 2 * BLOCK, len(self.model))
        if deep or self.disk:
            drop_cache(self.fd)
        got = os.pread(self.fd, max(end - start, 0), start)
        wanted = self.model[start:end]
        if got != wanted:
            assert_same(got, bytes(wanted), f"{self.name} from {start} on, after {what}")
        if self.grows:
            assert os.fstat(self.fd).st_size == len(self.model), f"{self.name} after {what}"

    def settle(self, offset: int, wanted: bytes, sure: int, what: object) -> None:
        """Update the model after a failure, as for memory; a file that grew was cut back."""
        drop_cache(self.fd)
        if self.grows and sure and offset + sure > len(self.model):
            self.model += bytes(offset + sure - len(self.model))
        got = os.pread(self.fd, len(self.model), 0)
        _old_or_new(self.model, got, offset, wanted, sure, what)
        self.check(what)


class Emulating(dmabuf.Engine):
    """An engine of threads that emulates the native route by mapping the dma-buf."""

    def __init__(self, **how: Any) -> None:
        with emulation.native():
            super().__init__(**how)


@contextlib.contextmanager
def targets(folder: Path, dice: random.Random) -> Iterator[list[Target]]:
    """Yield all targets that this machine has; they are overwritten."""
    with contextlib.ExitStack() as stack:
        made = [Target("file", str(folder / "file"), True)]
        shm = Path("/dev/shm", f"dmabuf-soak-{os.getpid()}")
        if shm.parent.is_dir():
            made.append(Target("tmpfs", str(shm), True))
            stack.callback(lambda: shm.unlink(missing_ok=True))
        if problem_with("loop") is None:
            device = stack.enter_context(loop_device(folder / "image", LIMIT))
            made.append(Target("loop", device, False))
        if problem_with("zram") is None:
            made.append(Target("zram", stack.enter_context(zram(LIMIT)), False))
            if problem_with("ext4") is None:
                disk = stack.enter_context(zram(32 << 20))
                place = stack.enter_context(mounted(disk, "ext4", folder / "ext4"))
                made.append(Target("ext4", str(place / "file"), True))
        if problem_with("nvme") is None:
            first, second = (os.environ[f"DMABUF_TEST_NVME{number}"] for number in (0, 1))
            made.append(Target("nvme", first, False, ends=False))
            node = second.replace("/nvme", "/ng")
            made.append(Target("ng", node, False, ends=False, block=4096, disk=second))
        for target in made:
            if target.grows:
                Path(target.path).touch()
            target.begin(dice)
            stack.callback(target.close)
        yield made


def exporters() -> dict[str, Callable[[int], object]]:
    """Return functions that make Buffers on this machine, of at least the given size."""
    made: dict[str, Callable[[int], object]] = {
        "memfd": lambda size: dmabuf.allocate(size, exporter="memfd"),
        "auto": dmabuf.allocate,
    }
    if required("hugepages") and problem_with("hugepages") is None:  # else others may take them
        made["huge pages"] = lambda size: dmabuf.allocate(size, huge_pages="2MiB")
    if problem_with("dma_heap") is None:
        made["dma-heap"] = lambda size: dmabuf.allocate(size, exporter="system")
    if problem_with("vgem") is None:
        from tests.kernel.conftest import vgem

        made["vgem"] = vgem
    return made
