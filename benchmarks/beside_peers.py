"""dmabuf beside other loaders: one cold file into memory, on disk and on ext4 over zram.

    make benchmarks                                     installs the loaders, and runs this
    python benchmarks/beside_peers.py --runs 5          where they are installed
    python benchmarks/beside_peers.py --report DIR      draws again what DIR/peers.json has

The file is safetensors of random bytes, beside it one of torch.save with the same tensors. Each
load is a process of its own, in which only the load is timed; before it the file is dropped from
the page cache, and cachestat(2) has to agree. Runs are interleaved: every loader once, then all
once more. A first round, which is not counted, compares the digest of what was loaded. CPU seconds
are those of the process by wait4(2), and those of the load by getrusage(2) around it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import model
import peers
import report
from beside_fio import run_fio
from common import (
    GIB,
    MIB,
    FailedError,
    cached,
    drop,
    fio_version,
    folder_in,
    machine,
    no_zram,
    run,
    zram_folder,
)
from ours import Measure

FIO = "fio"
KEYS = ("seconds", "cpu_of_load", "cpu", "peak", "pages")


def one(name: str, path: str, how: str) -> dict[str, Any]:
    """One process: what it measured, what it cost, and what it left in the page cache."""
    drop(path)
    if name == FIO:
        size = os.path.getsize(path)
        measure = Measure(FIO, False, False, MIB, 32, size, span=size)
        idle, done = run_fio(path, measure.idle(), True), run_fio(path, measure, True)
        process = done.process
        answer = {"seconds": size / done.speed, "cpu_of_load": process.cpu - idle.process.cpu}
    else:
        process = run([sys.executable, peers.__file__, name, path, how])
        answer = json.loads(process.output.splitlines()[-1])
    return answer | {"cpu": process.cpu, "peak": process.peak, "pages": cached(path)}


def measure(names: list[str], paths: dict[bool, str], digest: str, runs: int) -> Iterator[Any]:
    """A row for each loader, of `runs` rounds over all of them; prints how far it is."""
    samples: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(1)
    for name in names:
        path = paths[name in peers.PEERS and peers.PEERS[name].torch_file]
        try:
            found = one(name, path, "verify").get("digest")
            if name != FIO and found != digest:
                raise FailedError("what it loaded is not what the file holds")
            samples[name] = []
        except FailedError as error:
            print(f"  {name}: skipped: {error}", file=sys.stderr)
            yield {"name": name, "skipped": str(error)}
    for number in range(runs):
        print(f"  round {number + 1} of {runs}", file=sys.stderr)
        for name in order.sample(list(samples), len(samples)):
            path = paths[name in peers.PEERS and peers.PEERS[name].torch_file]
            samples[name].append(one(name, path, "load"))
    for name, runs_of in samples.items():
        yield {"name": name} | {key: [sample[key] for sample in runs_of] for key in KEYS}


@contextlib.contextmanager
def places(directory: str, room: int, wanted: list[str]) -> Iterator[dict[str, str]]:
    """Folders by the name of what they are on; those that cannot be had are left out, and told."""
    with contextlib.ExitStack() as stack:
        found = {}
        if "zram" in wanted:
            if (reason := no_zram()) is not None:
                print(f"zram: skipped: {reason}", file=sys.stderr)
            else:
                found["zram"] = stack.enter_context(zram_folder(room))
        if "disk" in wanted:
            found["disk"] = stack.enter_context(folder_in(directory))
        yield found


def versions() -> list[str]:
    """Of fio and of every package that takes part."""
    packages = sorted({peer.package for peer in peers.PEERS.values() if peer.package})
    found = [fio_version()]
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--out", default="docs/benchmarks", help="where table and charts go")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=2048, help="MiB of tensors, a multiple of 32")
    parser.add_argument("--on", default="zram,disk", help="where the file is, commas between")
    every = [FIO, *peers.PEERS]
    parser.add_argument("--only", default=",".join(every), help="loaders, commas between")
    parser.add_argument("--report", metavar="DIR", help="measure nothing, draw what is there")
    how = parser.parse_args()
    if how.report:
        report.write(Path(how.report), json.loads((Path(how.report) / "peers.json").read_text()))
        return
    names = how.only.split(",")
    if unknown := set(names) - set(every):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {', '.join(every)}")
    size = how.size * MIB
    result: dict[str, Any] = {
        "machine": machine(versions()), "size": size + model.HEADER, "runs": how.runs, "on": {},
    }  # fmt: skip
    files = 2 if any(name in peers.PEERS and peers.PEERS[name].torch_file for name in names) else 1
    room = files * (size + 64 * MIB) + size // 16 + GIB // 8
    for place in how.on.split(","):
        with places(how.dir, room, [place]) as found:
            for folder in found.values():
                print(place, file=sys.stderr)
                paths = {False: f"{folder}/model.safetensors", True: f"{folder}/model.pt"}
                digest = model.write(paths[False], size)
                if files == 2:
                    run([sys.executable, peers.__file__, "convert", paths[False], paths[True]])
                result["on"][place] = list(measure(names, paths, digest, how.runs))
    Path(how.out).mkdir(parents=True, exist_ok=True)
    (Path(how.out) / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write(Path(how.out), result)


if __name__ == "__main__":
    main()
