"""A fake /proc and /sys with dma-bufs."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

FIRST_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True)
class Made:
    """A dma-buf, and the text that the kernel shows of it."""

    inode: int
    size: int = 4096
    exporter: str = "system"
    name: str | None = None
    references: int = 1
    devices: tuple[str, ...] = ()
    fences: tuple[str, ...] = ()

    def fdinfo(self) -> bytes:
        text = f"pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t{self.inode}\nsize:\t{self.size}\n"
        text += f"count:\t{self.references}\nexp_name:\t{self.exporter}\n"
        text += "" if self.name is None else f"name:\t{self.name}\n"
        return text.encode(errors="surrogateescape")

    def listed(self) -> str:
        name = "<none>" if self.name is None else self.name
        lines = [
            f"{self.size:08}\t02000002\t02080007\t{self.references:08}\t{self.exporter}\t"
            f"{self.inode:08}\t{name}",
            *(f"\tkernel fence:{fence}" for fence in self.fences),
            "\tAttached Devices:",
            *(f"\t{device}" for device in self.devices),
            f"Total {len(self.devices)} devices attached",
        ]
        return "\n".join(lines) + "\n\n"

    def mapped(self, address: int, nbytes: int, device: str = "00:0e") -> str:
        label = (self.name or "").replace("\n", "\\012")
        head = f"{address:x}-{address + nbytes:x} rw-s 100000000 {device} {self.inode} "
        return f"{head:<73}/dmabuf:{label}\n"


@contextmanager
def statted(fd: Path, made: Made) -> Iterator[None]:
    """Let stat(2) of a descriptor return the fields of a dma-buf; no other one may be asked."""
    real = os.stat
    fields = list(real("/"))
    fields[1:3] = made.inode, os.makedev(0, 14)

    def status(path, *arguments, **how):
        if "/fd/" not in str(path):
            return real(path, *arguments, **how)
        assert path == str(fd)
        return os.stat_result(fields)

    with mock.patch.object(os, "stat", status):
        yield


def bufinfo(made: Iterable[Made]) -> str:
    """Return the text of dma_buf_debug_show (drivers/dma-buf/dma-buf.c)."""
    made = list(made)
    total = f"\nTotal {len(made)} objects, {sum(one.size for one in made)} bytes\n"
    head = "size    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n"
    return "\nDma-buf Objects:\n" + head + "".join(one.listed() for one in made) + total


class FakeMachine:
    """A tree at `root` with `proc`, which has a process 1, and an empty `sys`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process(1, "init")
        (root / "proc/1/ns").mkdir()
        (root / "proc/1/ns/pid").symlink_to(FIRST_NAMESPACE)
        (root / "sys/kernel/debug").mkdir(parents=True)

    def process(
        self,
        pid: int,
        command: str = "worker",
        *,
        fds: dict[int, Made] | None = None,
        maps: Iterable[str] = (),
        state: str = "S",
        flags: int = 0,
        threads: int = 1,
        started: int = 100,
        folder: str | None = None,
    ) -> Path:
        """Add a process with standard output, descriptors and mappings; return its directory."""
        path = self.root / "proc" / (folder or str(pid))
        for part in ("fd", "fdinfo"):
            (path / part).mkdir(parents=True, exist_ok=True)
        for old in (*(path / "fd").iterdir(), *(path / "fdinfo").iterdir()):
            old.unlink()
        rest = [state, 1, 1, 1, 0, -1, flags, *[0] * 10, threads, 0, started, 0]
        stat = f"{pid} ({command}) {' '.join(map(str, rest))}\n"
        (path / "stat").write_bytes(stat.encode(errors="surrogateescape"))
        alive = state != "Z" and not flags
        if alive:
            (path / "fd/1").symlink_to("/dev/null")
            (path / "fdinfo/1").write_text("pos:\t0\nflags:\t02\nmnt_id:\t5\nino:\t4\n")
        for fd, made in (fds or {}).items():
            label = made.name or ""
            (path / f"fd/{fd}").symlink_to(
                f"/dmabuf:{label}".encode(errors="surrogateescape").decode(errors="surrogateescape")
            )
            (path / f"fdinfo/{fd}").write_bytes(made.fdinfo())
        text = "7f0000000000-7f0000001000 r--p 00000000 fe:00 4      /usr/bin/worker\n"
        text = (text if alive else "") + "".join(maps)
        (path / "maps").write_bytes(text.encode(errors="surrogateescape"))
        return path

    def list(self, *made: Made) -> None:
        """Make debugfs appear, with these dma-bufs in its list."""
        folder = self.root / "sys/kernel/debug/dma_buf"
        folder.mkdir(exist_ok=True)
        (folder / "bufinfo").write_bytes(bufinfo(made).encode(errors="surrogateescape"))
