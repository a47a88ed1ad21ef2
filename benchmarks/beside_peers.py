"""Compare dmabuf with other loaders: a cold file into memory, on disk and on ext4 over zram.

    make benchmarks                                     installs the loaders and runs this
    python benchmarks/beside_peers.py --runs 5          where they are installed
    python benchmarks/beside_peers.py --report DIR      writes the report of DIR/peers.json again

The file is safetensors of random bytes; a file of torch.save has the same tensors. Each load is a
process, in which only the load is timed. The file is dropped from the page cache before it, checked
with cachestat(2). Each round runs every loader once, in a new order. A first round, which does not
count, compares the digest of the loaded tensors. CPU seconds are those of the process by wait4(2),
and those of the load by getrusage(2). The table, charts and figures go into docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import model
import report
from beside_fio import run_fio
from common import (
    GIB,
    MIB,
    FailedError,
    SkippedError,
    cached,
    drop,
    fio_version,
    machine,
    names,
    run,
    stop_tidily,
)
from ours import Measure
from peers import FORMATS, PEERS
from report import KEYS
from targets import folder_in, zram_folder

FIO = "fio"
EVERY = [FIO, *PEERS]
SCRIPT = str(Path(__file__).with_name("peers.py"))


@functools.cache
def driver() -> dict[str, str]:
    """Return what to add to the environment of KvikIO, which loads a CUDA driver in any case.

    On a machine without one it is libcuda.c, whose functions fail.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
        return {}
    except OSError:
        folder = tempfile.mkdtemp(prefix="dmabuf-bench-")
        atexit.register(shutil.rmtree, folder)
    how = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
    run(["cc", *how, str(Path(__file__).with_name("libcuda.c"))])
    return {"LD_LIBRARY_PATH": folder}


def one(name: str, path: str, how: str) -> dict[str, Any]:
    """Run one process; return its figures, its cost and its pages in the page cache."""
    drop(path)
    if name == FIO:
        size = os.path.getsize(path) // MIB * MIB
        measure = Measure(FIO, False, False, MIB, 32, size, span=size)
        idle, done = run_fio(path, measure.idle(), True), run_fio(path, measure, True)
        process = done.process
        answer = {
            "seconds": os.path.getsize(path) / done.speed,
            "cpu_of_load": process.cpu - idle.process.cpu,
        }
    else:
        env = os.environ | (driver() if name == "kvikio" else {})
        process = run([sys.executable, SCRIPT, name, path, how], env=env)
        answer = json.loads(process.output.splitlines()[-1])
    return answer | {"cpu": process.cpu, "peak": process.peak, "pages": cached(path)}


def format_of(name: str) -> str:
    """Return the format of the file that a loader, or fio, loads."""
    return PEERS[name].format if name in PEERS else "safetensors"


class Loaders(contextlib.ExitStack):
    """Loaders of a file with `size` bytes of tensors, at each requested place."""

    PLACES = ("zram", "disk")

    def __init__(self, directory: str, size: int, wanted: Sequence[str]) -> None:
        super().__init__()
        self._directory, self.size, self._wanted = directory, size, wanted
        self._order = random.Random(1)
        self._paths: dict[str, dict[str, str]] = {}
        self._rounds: dict[str, list[dict[str, dict[str, Any]]]] = {}
        self.skipped: dict[str, dict[str, str]] = {}
        """The reason why a loader was skipped, by place and name."""

    def round(self, place: str, number: int) -> dict[str, dict[str, Any]]:
        """Return the figures of each loader in a round, which is run once. Raises SkippedError.

        Without PyTorch, which most loaders need, nothing is measured.
        """
        if importlib.util.find_spec("torch") is None:
            raise SkippedError("make .venv-peers/ready, and run it by .venv-peers/bin/python")
        if place not in self._paths:
            self._begin(place)
        done = self._rounds[place]
        while len(done) <= number:
            print(f"  {place}: round {len(done) + 1}", file=sys.stderr)
            able = [name for name in self._wanted if name not in self.skipped[place]]
            order = self._order.sample(able, len(able))
            done.append({name: one(name, self._path(place, name), "load") for name in order})
        return done[number]

    def rows(self, place: str) -> list[dict[str, Any]]:
        """Return a row for each loader: the figures of all rounds, or why it was skipped."""
        found: list[dict[str, Any]] = []
        for name in self._wanted:
            if name in self.skipped[place]:
                found.append({"name": name, "skipped": self.skipped[place][name]})
            else:
                runs = [done[name] for done in self._rounds[place]]
                found.append({"name": name} | {key: [one[key] for one in runs] for key in KEYS})
        return found

    def _path(self, place: str, name: str) -> str:
        return self._paths[place][format_of(name)]

    def _begin(self, place: str) -> None:
        formats = {"safetensors"} | {format_of(name) for name in self._wanted}
        room = len(formats) * (self.size + 64 * MIB) + self.size // 16 + GIB // 8
        where = zram_folder(room) if place == "zram" else folder_in(self._directory, room)
        folder = self.enter_context(where)
        paths = {name: f"{folder}/model.{FORMATS[name]}" for name in formats}
        source = paths["safetensors"]
        digest = model.write(source, self.size)
        for path in paths.values():
            if path != source:
                run([sys.executable, SCRIPT, "convert", source, path])
        self._paths[place], self._rounds[place], self.skipped[place] = paths, [], {}
        for name in self._wanted:
            try:
                found = one(name, self._path(place, name), "verify").get("digest", digest)
                if found != digest:
                    raise FailedError("what it loaded is not what the file holds")
            except (FailedError, SkippedError) as error:
                print(f"  {place}: {name}: skipped: {error}", file=sys.stderr)
                self.skipped[place][name] = str(error)


def versions() -> list[str]:
    """Return the versions of fio and of every package that was measured."""
    found = []
    with contextlib.suppress(SkippedError):
        found.append(fio_version())
    for package in sorted({peer.package for peer in PEERS.values() if peer.package}):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--out", default="docs/benchmarks", help="where table and charts go")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=2048, help="MiB of tensors, a multiple of 32")
    parser.add_argument("--on", type=names(Loaders.PLACES), default=list(Loaders.PLACES),
                        help="where the file is, of zram,disk")  # fmt: skip
    parser.add_argument("--only", type=names(EVERY), default=EVERY, metavar="LOADERS",
                        help=f"of {','.join(EVERY)}")  # fmt: skip
    parser.add_argument("--report", metavar="DIR", help="measure nothing, draw what is there")
    how = parser.parse_args()
    if how.report:
        report.write(Path(how.report), json.loads((Path(how.report) / "peers.json").read_text()))
        return
    if how.size <= 0 or how.size * MIB % model.TENSOR:
        parser.error("--size: a multiple of 32")
    stop_tidily()
    size = how.size * MIB
    result: dict[str, Any] = {
        "machine": machine(versions()), "size": size + model.HEADER, "runs": how.runs, "on": {},
    }  # fmt: skip
    print("\n".join(result["machine"]), file=sys.stderr)
    for place in how.on:
        with Loaders(how.dir, size, how.only) as loaders:
            try:
                for number in range(how.runs):
                    loaders.round(place, number)
                result["on"][place] = loaders.rows(place)
            except SkippedError as error:
                print(f"{place}: skipped: {error}", file=sys.stderr)
    if not result["on"]:
        sys.exit("nothing was measured")
    out = Path(how.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write(out, result)
    print(f"{out / 'peers.md'}, its charts and peers.json are written", file=sys.stderr)


if __name__ == "__main__":
    main()
