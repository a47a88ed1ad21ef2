"""Measure one copy of a model for many processes: memory, readiness, page cache, kills.

    python benchmarks/shared_model.py [--size 2GiB] [--workers 8] [--rounds 5] [--folder FOLDER]
                                      [--json]

Each round starts a store on demand and new processes, with the file out of the page cache. The
first process loads the model; the others then call `load` one after the other, and once more in new
processes all at once. Every process reads all bytes and compares their checksum. Then one process
and the store are killed, the others compare again, and a new process loads the model.

Both are measured with processes that are started, and that are forked from one that has imported.
Prints the median of the rounds with the lowest and the highest: the first call, beside an ordinary
load just before; the longest of the others; the proportional set size (smaps_rollup) of all
processes and the store, divided by the size of the model; the part of it that is the model's own
mappings; what the load has added to what the processes had before; and the pages of the file that
are left in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import GIB, MIB, FailedError, Spread, cached, drop, machine
from shared_worker import work

from dmabuf.sizes import parse_size

TENSORS = 256


class Worker:
    """A process that has imported all it needs, and carries out the commands of its parent.

    It is started as a program, or forked from this one.
    """

    def __init__(self, path: Path, socket: Path, forked: bool) -> None:
        orders, self._orders = os.pipe()
        replies, reply = os.pipe()
        if forked:
            self.pid = os.fork()
            if self.pid == 0:
                os.close(self._orders)  # those of other workers stay open: all are killed
                with os.fdopen(orders) as given:
                    work(str(path), str(socket), given, lambda text: _write(reply, text))
                os._exit(0)
        else:
            program = Path(__file__).with_name("shared_worker.py")
            command = [sys.executable, *map(str, (program, path, socket))]
            self._process = subprocess.Popen(command, stdin=orders, stdout=reply)
            self.pid = self._process.pid
        os.close(orders)
        os.close(reply)
        self._replies = os.fdopen(replies)
        self.told()

    def tell(self, what: str) -> None:
        """Tell it to do something."""
        _write(self._orders, what)

    def told(self) -> str:
        """Return its reply."""
        line = self._replies.readline()
        if not line:
            raise FailedError("a worker has ended")
        return line.strip()

    def end(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._orders)
        self._replies.close()


def _write(fd: int, text: str) -> None:
    os.write(fd, f"{text}\n".encode())


def write_model(path: Path, size: int) -> int:
    """Write a model of random bytes, and return the checksum of its tensors."""
    part = size // TENSORS
    names = [f"layer.{number:03d}.weight" for number in range(TENSORS)]
    header = {
        name: {"dtype": "BF16", "shape": [part // 2], "data_offsets": [at * part, (at + 1) * part]}
        for at, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    chance, total = np.random.default_rng(1), 0
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in names:
            data = chance.bytes(part)
            total = zlib.crc32(data, total)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return total


def server_of(socket: Path) -> int:
    """Return the process that serves at a socket."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"serve" in words and os.fsencode(socket) in words:
                return int(folder.name)
    raise FailedError(f"no store serves at {socket}")


def proportional(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a process, and that of its memfds, in bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    total = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    own, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = "/memfd:" in line
        elif counted and line.startswith("Pss:"):
            own += int(line.split()[1])
    return total << 10, own << 10


@contextlib.contextmanager
def working(path: Path, socket: Path, count: int, forked: bool) -> Iterator[list[Worker]]:
    """Give workers that have imported; kill them at the end."""
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(Worker(path, socket, forked))
        yield workers
    finally:
        for one in workers:
            one.end()


def compare(workers: list[Worker], expected: int) -> None:
    """Have each worker read all bytes."""
    for one in workers:
        one.tell("compare")
        if (got := int(one.told())) != expected:
            raise FailedError(f"checksum {got:#x} instead of {expected:#x}")


def measure(path: Path, folder: Path, count: int, expected: int, forked: bool) -> dict[str, float]:
    """Return the figures of one round."""
    drop(str(path))
    socket = folder / "store.sock"
    with working(path, socket, 1, forked) as [one]:
        one.tell("own")
        alone = float(one.told())
    with working(path, socket, count, forked) as workers:
        before = sum(proportional(one.pid)[0] for one in workers)
        calls = []
        for one in workers:
            one.tell("load")
            calls.append(one.told().split())
        if [loaded for _, loaded in calls] != ["1", *["0"] * (count - 1)]:
            raise FailedError(f"not one process has loaded: {calls}")
        server = server_of(socket)
        compare(workers, expected)
        figures = [proportional(pid) for pid in (server, *(one.pid for one in workers))]
        with working(path, socket, count - 1, forked) as others:
            for one in others:
                one.tell("load")
            together = [float(one.told().split()[0]) for one in others]
        pages = cached(str(path))
        workers.pop().end()
        os.kill(server, signal.SIGKILL)
        compare(workers, expected)
        with working(path, socket, 1, forked) as [one]:
            one.tell("load")
            if one.told().split()[1] != "1":
                raise FailedError("the load after the kills has read nothing")
            compare([one], expected)
        os.kill(server_of(socket), signal.SIGTERM)
    size = path.stat().st_size
    seconds = [float(one) for one, _ in calls]
    return {
        "first call, s": seconds[0],
        "a load of its own, s": alone,
        "first call / a load of its own": seconds[0] / alone,
        "longest other call, one by one, ms": 1e3 * max(seconds[1:]),
        "longest other call, all at once, ms": 1e3 * max(together),
        "total PSS / model": sum(total for total, _ in figures) / size,
        "PSS of the model's mappings / model": sum(own for _, own in figures) / size,
        "PSS that the load added / model": (sum(total for total, _ in figures) - before) / size,
        "PSS before the load, MiB": before / MIB,
        "pages in the page cache": pages,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_size, default=2 * GIB)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"started": [], "forked": []}
    gc.freeze()  # a collection in a forked process would copy what it shares
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name, "model.safetensors").absolute()
        expected = write_model(path, options.size)
        for number in range(options.rounds):
            for how, figures in rounds.items():
                folder = path.with_name(f"{how}{number}")
                folder.mkdir()
                forked = how == "forked"
                figures.append(measure(path, folder, options.workers, expected, forked))
    if options.json:
        result: dict[str, Any] = {"machine": machine(), "options": vars(options), "rounds": rounds}
        print(json.dumps(result, indent=2))
        return
    print("\n".join(machine()))
    for how, figures in rounds.items():
        print(f"{options.workers} processes, {how}")
        for key in figures[0]:
            print(f"  {key:<40}{Spread.of([one[key] for one in figures])}")


if __name__ == "__main__":
    main()
