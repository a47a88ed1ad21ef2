"""Compare what 200,000 small tensors cost: load and save, dmabuf beside the safetensors package.

    python benchmarks/headers.py --runs 5

All of it is Python and JSON: a tensor has 32 bytes. Each run is a process of its own, which loads
or saves twice and reports the CPU and the time of the second alone; the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import Spread, machine, run

WAYS = ("load", "save")


def worker(library: str, way: str, path: str, count: int) -> None:
    """Load or save once, and print the seconds of CPU and of time."""
    import numpy
    import safetensors.numpy as theirs

    import dmabuf.safetensors as ours

    tensors = {f"model.layers.{n}.weight": numpy.full(8, n, "<f4") for n in range(count)}
    if way == "load":
        del tensors
    for _ in range(2):  # the first one imports what is imported late
        cpu, begun = time.process_time(), time.perf_counter()
        if way == "save":
            (ours if library == "dmabuf" else theirs).save_file(tensors, path)
        elif library == "dmabuf":
            found = ours.load_file(path, framework="np")
        else:
            found = theirs.load_file(path)
        done = time.process_time() - cpu, time.perf_counter() - begun
        if way == "load":
            assert len(found) == count
            del found
    json.dump(done, sys.stdout)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=200_000, help="tensors")
    parser.add_argument("--dir", default="/var/tmp", help="where the file is")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.worker:
        library, way, path, count = how.worker
        worker(library, way, path, int(count))
        return
    print("\n".join(machine()))
    with tempfile.TemporaryDirectory(dir=how.dir) as folder:
        path = os.path.join(folder, "model")
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(how.runs):
            for way in reversed(WAYS):
                for library in ("dmabuf", "safetensors"):
                    command = [sys.executable, str(Path(__file__)), "--worker", library, way]
                    done = json.loads(run([*command, path, str(how.count)]).output)
                    found.setdefault((library, way), []).append(done)
    print("| way | dmabuf CPU s | safetensors CPU s | CPU ratio | time ratio |")
    print("| --- | --- | --- | --- | --- |")
    for way in WAYS:
        ours, theirs = found["dmabuf", way], found["safetensors", way]
        pairs = list(zip(ours, theirs, strict=True))
        cpu = Spread.of([a[0] / b[0] for a, b in pairs])
        spent = Spread.of([a[1] / b[1] for a, b in pairs])
        mine, other = Spread.of([a[0] for a in ours]), Spread.of([b[0] for b in theirs])
        print(f"| {way} | {mine} | {other} | {cpu} | {spent} |")


if __name__ == "__main__":
    main()
