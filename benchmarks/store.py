"""Measure the store: the latency of opening a name, and what many clients leave behind.

    python benchmarks/store.py [--size 1GiB] [--names 10000] [--opens 100000] [--clients 100]
                               [--messages 1000000] [--exporter auto] [--json]

It starts a server. Prints the machine; the time of `open` by another process, without and with the
first byte read; and the memory and descriptors of the server after half and after all of the opens
and messages.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import machine

import dmabuf.store
from dmabuf.sizes import parse_size

_OPEN = """
import json, sys, time
import dmabuf.store
with dmabuf.store.connect(sys.argv[1]) as store:
    store.open("big").close()
    figures = []
    for _ in range(int(sys.argv[2])):
        begun = time.perf_counter()
        buffer = store.open("big", trusted=sys.argv[3] == "trusted")
        opened = time.perf_counter()
        buffer.pread(1, 0)
        figures.append((opened - begun, time.perf_counter() - begun))
        buffer.close()
print(json.dumps(figures))
"""
_LOAD = """
import sys
import dmabuf.store
path, first, names, opens, messages = sys.argv[1], *map(int, sys.argv[2:])
with dmabuf.store.connect(path) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(opens):
        store.open(f"name{(first + number) % names}").close()
    for _ in range(messages):
        store.stat("big")
"""


class Server:
    """A process of `dmabuf serve`, and its memory and descriptors."""

    def __init__(self, path: str) -> None:
        command = [sys.executable, "-m", "dmabuf.cli", "serve", "--socket", path]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        assert self._process.stderr.readline().startswith("serving")

    def holds(self) -> tuple[int, int]:
        """Return the number of descriptors, and resident KiB."""
        folder = Path(f"/proc/{self._process.pid}")
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return len(os.listdir(folder / "fd")), resident >> 10

    def end(self) -> None:
        """End the server by SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60) == 0


def opening(path: str, count: int, how: str) -> dict[str, float]:
    """Return the milliseconds of opens by another process."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, path, str(count), how], stdout=subprocess.PIPE, check=True
    )
    figures = json.loads(done.stdout)
    opens, firsts = ([1e3 * one[i] for one in figures] for i in (0, 1))
    return {"median": median(opens), "most": max(opens), "with_a_byte": median(firsts)}


def load(path: str, clients: int, names: int, opens: int, messages: int) -> float:
    """Return the seconds that concurrent clients take for all opens and messages."""
    share = [str(names), str(opens // clients), str(messages // clients)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _LOAD, path, str(number * 101), *share],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(clients)
    ]
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == b"ready\n"
    begun = time.perf_counter()
    for one in running:
        assert one.stdin is not None
        one.stdin.write(b"go\n")
        one.stdin.flush()
    for one in running:
        assert one.wait() == 0
    return time.perf_counter() - begun


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--opens", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--exporter", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = os.path.join(folder, "store.sock")
        server = Server(path)
        stack.callback(server.end)
        store = stack.enter_context(dmabuf.store.connect(path))
        how = {"exporter": options.exporter}
        with store.create("big", parse_size(options.size), **how) as buffer:
            result["exporter"] = buffer.exporter
        result["open_ms"] = opening(path, 200, "alone")
        result["open_trusted_ms"] = opening(path, 200, "trusted")
        begun = time.perf_counter()
        for number in range(options.names):
            store.create(f"name{number}", 4096, **how).close()
        result["names_seconds"] = time.perf_counter() - begun
        half = options.opens // 2, options.messages // 2
        for part in ("half", "all"):
            seconds = load(path, options.clients, options.names, *half)
            descriptors, resident = server.holds()
            result[part] = {
                "seconds": seconds,
                "descriptors": descriptors,
                "resident_kib": resident,
            }
        store.list()
        result["usage"] = dataclasses.asdict(store.usage())
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
