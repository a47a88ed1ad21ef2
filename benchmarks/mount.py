"""Compare reads and writes through `dmabuf mount` with memcpy of the same memory.

    python benchmarks/mount.py
    python benchmarks/mount.py --size 1GiB --rounds 21 --json

It starts a store and a mount, with one buffer of --size. Each round makes four passes over the
buffer in requests of 1 MiB, one at a time and from one descriptor: memcpy out of the mapping of the
buffer, pread(2) through the mount, memcpy into the mapping, pwrite(2) through the mount. All four
use the same block of other memory. The bytes are compared after each pass. Printed are medians; the
ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import MIB, machine, stop_tidily

import dmabuf.store
from dmabuf.sizes import parse_size

BAR = 0.2
"""The required part of memcpy's speed, for reads and for writes."""


@contextmanager
def program(*arguments: object) -> Iterator[None]:
    """Run a command of dmabuf, from its first line until SIGTERM."""
    command = [sys.executable, "-m", "dmabuf.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first.startswith(("serving", "mounted")):
            raise SystemExit(first + process.stdout.read())
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stdout.close()


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """Return the bytes a second of each pass, round by round."""
    rates: dict[str, list[float]] = {"memcpy out": [], "read": [], "memcpy in": [], "write": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmabuf-mount-")))
        directory, socket = folder / "mnt", folder / "store.sock"
        directory.mkdir()
        stack.enter_context(program("serve", "--socket", socket, "--max-memory", 2 * size))
        store = stack.enter_context(dmabuf.store.connect(socket))
        buffer = stack.enter_context(store.create("x", size, trusted=True))
        stack.enter_context(program("mount", "--socket", socket, directory))
        fd = os.open(directory / "x", os.O_RDWR)
        stack.callback(os.close, fd)
        view = stack.enter_context(buffer.map("r+"))
        block = mmap.mmap(-1, MIB)
        stack.callback(block.close)
        words = memoryview(block)
        stack.callback(words.release)

        def copy_out(at: int) -> None:
            words[:] = view[at : at + MIB]

        def read(at: int) -> None:
            if os.preadv(fd, [block], at) != MIB:
                raise SystemExit("a short read")

        def copy_in(at: int) -> None:
            view[at : at + MIB] = words

        def write(at: int) -> None:
            if os.pwrite(fd, block, at) != MIB:
                raise SystemExit("a short write")

        turns = dict(zip(rates, (copy_out, read, copy_in, write), strict=True))
        for number in range(rounds + 1):
            for name, turn in turns.items():
                words[:] = bytes(MIB) if turn in (copy_out, read) else os.urandom(MIB)
                seconds = _timed(turn, size)
                if number:  # the first fills page tables
                    rates[name].append(size / seconds)
                if view[size - MIB :] != words or view[:MIB] != words:
                    raise SystemExit(f"{name}: what arrived differs")
    return rates


def _timed(turn: Callable[[int], None], size: int) -> float:
    start = time.perf_counter()
    for at in range(0, size, MIB):
        turn(at)
    return time.perf_counter() - start


def main() -> int:
    """Run it; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="256MiB", help="of the buffer (256MiB)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (15)")
    parser.add_argument("--json", action="store_true", help="the result for programs")
    arguments = parser.parse_args()
    size = parse_size(arguments.size, "--size") // MIB * MIB
    stop_tidily()
    rates = measure(size, arguments.rounds)
    told = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates[beside], strict=True))
        for name, beside in (("read", "memcpy out"), ("write", "memcpy in"))
    }
    if arguments.json:
        print(json.dumps({"machine": machine(), "bytes_per_second": told, "of_memcpy": ratios}))
    else:
        print(*machine(), sep="\n")
        for name, rate in told.items():
            ratio = f", {ratios[name]:.2f} of memcpy (bar {BAR})" if name in ratios else ""
            print(f"{name:10}  {rate / 1e9:6.2f} GB/s{ratio}")
    return int(min(ratios.values()) < BAR)


if __name__ == "__main__":
    sys.exit(main())
