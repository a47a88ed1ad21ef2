"""Compare how models are saved: safetensors, PyTorch and dmabuf, to bytes that are on the medium.

    python benchmarks/saving.py --dir /var/tmp --runs 5     with PyTorch and safetensors installed

The tensors are PyTorch's, of random bytes, in ordinary memory or in a Buffer. Each save is a
process of its own, in which only the save is timed, with the fsync(2) of the file and its folder.
CPU seconds are those of the save by getrusage(2), threads included. The kernel's own threads, which
write back dirty pages, are not in any figure. Each round runs every way once, in a new order. A
first round, which does not count, compares the tensors that the file holds. "odd" has a file whose
size is not a multiple of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from common import GIB, MIB, FailedError, Spread, machine, run, stop_tidily
from targets import folder_in, zram_folder

ODD = 1000
"""Bytes of one more tensor, so that the file does not end at a block."""


def tensors(size: int, odd: bool) -> dict[str, Any]:
    """Return tensors of `size` bytes, in ordinary memory."""
    import torch

    chance = torch.Generator().manual_seed(1)
    each = 32 * MIB
    found = {
        f"layer.{number:03}.weight": torch.randint(
            -(1 << 63), (1 << 63) - 1, (each // 8192, 1024), generator=chance
        )
        for number in range(size // each)
    }
    if odd:
        found["odd"] = torch.randint(0, 255, (ODD,), generator=chance, dtype=torch.uint8)
    return found


def flushed(path: str) -> None:
    """Have a file and its name on the medium."""
    for one, flags in ((path, os.O_RDONLY), (os.path.dirname(path), os.O_DIRECTORY)):
        fd = os.open(one, flags)
        os.fsync(fd)
        os.close(fd)


def by_safetensors(model: dict[str, Any], path: str) -> None:
    """Save with safetensors.torch."""
    import safetensors.torch

    safetensors.torch.save_file(model, path)
    flushed(path)


def by_torch(model: dict[str, Any], path: str) -> None:
    """Save with torch.save."""
    import torch

    torch.save(model, path)
    flushed(path)


def by_dmabuf(model: dict[str, Any], path: str) -> None:
    """Save with dmabuf, which flushes both itself."""
    from dmabuf import safetensors

    safetensors.save(model, path)


def by_dmabuf_async(model: dict[str, Any], path: str) -> None:
    """Save with dmabuf in the background, and wait for it."""
    from dmabuf import safetensors

    safetensors.save_async(model, path).result()


def snapshot(model: dict[str, Any], path: str) -> None:
    """Begin a save in the background, without waiting: how long training stands still."""
    from dmabuf import safetensors

    safetensors.save_async(model, path)


WAYS: dict[str, tuple[Callable[[dict[str, Any], str], None], bool, bool]] = {
    "safetensors save_file": (by_safetensors, False, False),
    "torch.save": (by_torch, False, False),
    "dmabuf save": (by_dmabuf, False, False),
    "dmabuf save, odd": (by_dmabuf, False, True),
    "dmabuf save, from a Buffer": (by_dmabuf, True, False),
    "dmabuf save_async, awaited": (by_dmabuf_async, False, False),
    "dmabuf save_async, not awaited": (snapshot, False, False),
}
"""How, whether the tensors lie in a Buffer, and whether the file's size is odd."""


def worker(name: str, path: str, size: int, verify: bool) -> None:
    """Save once in this process, and print the figures."""
    import safetensors.torch  # noqa: F401 - importing it is not timed

    import dmabuf.safetensors as ours

    save, in_buffer, odd = WAYS[name]
    model = tensors(size, odd)
    if in_buffer:
        ours.save(model, path)
        model = dict(ours.load(path))
        os.unlink(path)
        os.sync()
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    save(model, path)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if verify and save is not snapshot:
        check(model, path)
    nbytes = sum(tensor.nbytes for tensor in model.values())
    json.dump({"seconds": seconds, "cpu": cpu, "bytes": nbytes}, sys.stdout)


def check(model: dict[str, Any], path: str) -> None:
    """Raise FailedError unless the file holds the tensors."""
    import safetensors.torch
    import torch

    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    found = torch.load(path, mmap=True) if is_zip else safetensors.torch.load_file(path)
    if found.keys() != model.keys() or not all(torch.equal(found[k], model[k]) for k in model):
        raise FailedError(f"{path} does not hold the tensors")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=2048, help="MiB of tensors")
    parser.add_argument("--on", default="disk", help="disk, zram or both: disk,zram")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.worker:
        name, path, size, verify = how.worker
        worker(name, path, int(size), verify == "1")
        return
    stop_tidily()
    print("\n".join(machine()))
    order = random.Random(1)
    for place in how.on.split(","):
        size = how.size * MIB
        where = zram_folder(size + GIB) if place == "zram" else folder_in(how.dir, size + GIB)
        with where as folder:
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(how.runs + 1):
                done = {}
                for name in order.sample(sorted(WAYS), len(WAYS)):
                    path = os.path.join(folder, "model")
                    command = [sys.executable, __file__, "--worker", name, path, str(size)]
                    done[name] = json.loads(run([*command, str(int(number == 0))]).output)
                    os.unlink(path)
                    os.sync()
                if number:
                    rounds.append(done)
            report(place, rounds)


def report(place: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    """Print a table, with ratios of the same round."""
    print(f"\n{place}\n| way | GB/s | CPU s/GiB | time to safetensors' | its CPU |")
    print("| --- | --- | --- | --- | --- |")
    base = "safetensors save_file"
    for name in WAYS:
        speed = Spread.of([one[name]["bytes"] / one[name]["seconds"] / 1e9 for one in rounds])
        cpu = Spread.of([one[name]["cpu"] / one[name]["bytes"] * GIB for one in rounds])
        ratio = Spread.of([one[base]["seconds"] / one[name]["seconds"] for one in rounds])
        less = Spread.of([one[name]["cpu"] / one[base]["cpu"] for one in rounds])
        print(f"| {name} | {speed} | {cpu} | {ratio} x faster | {less} |")


if __name__ == "__main__":
    main()
