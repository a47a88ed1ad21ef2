"""Compare how models are saved: safetensors, PyTorch and dmabuf, to bytes that are on the medium.

    python benchmarks/saving.py --dir /var/tmp --runs 5     with PyTorch and safetensors installed

The tensors are PyTorch's, of random bytes, in ordinary memory or in a Buffer. Each save is a
process of its own, in which only the save is timed, with the fsync(2) of the file and its folder.
CPU seconds are those of the save by getrusage(2), threads included. The kernel's own threads, which
write back dirty pages, are not in any figure. Each round runs every way once, in a new order. A
first round, which does not count, compares the tensors that the file holds. "odd" has a file whose
size is not a multiple of a block.

fio writes as many bytes to a new file, 1 MiB at a time, 32 in flight, past the page cache, followed
by fsync(2): what the target takes at all. "even" is zram with tensors that are each one number over
and over: zram keeps no data of pages with one value, so it is a fast device.
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
from contextlib import AbstractContextManager
from typing import Any

from common import GIB, MIB, FailedError, Spread, fio_version, machine, names, run, stop_tidily
from targets import folder_in, zram_folder

ODD = 1000
"""Bytes of one more tensor, so that the file does not end at a block."""
EACH = 32 * MIB
"""Bytes of each other tensor."""
PLACES = ("disk", "tmpfs", "zram", "even")
FIO = "fio, the same bytes"


def tensors(size: int, odd: bool, even: bool) -> dict[str, Any]:
    """Return tensors of `size` bytes, in ordinary memory."""
    import torch

    chance = torch.Generator().manual_seed(1)
    shape = (EACH // 8192, 1024)

    def content(number: int) -> Any:
        if even:
            return torch.full(shape, number)
        return torch.randint(-(1 << 63), (1 << 63) - 1, shape, generator=chance)

    found = {f"layer.{number:03}.weight": content(number) for number in range(size // EACH)}
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
BASES = ("safetensors save_file", "torch.save")
"""What the others are compared with."""


def by_fio(path: str, size: int, even: bool) -> dict[str, float]:
    """Return the figures of fio, which writes a new file and flushes it."""
    command = [
        "fio", "--name=limit", f"--filename={path}", "--rw=write", "--bs=1M", "--iodepth=32",
        "--ioengine=io_uring", "--direct=1", f"--size={size}", "--fallocate=posix", "--end_fsync=1",
        "--mem=mmapshared", "--thread=1", "--output-format=json",
    ] + ["--buffer_pattern=0x5a"] * even  # fmt: skip
    process = run(command)
    job = json.loads(process.output[process.output.index("{") :])["jobs"][0]
    return {"seconds": job["job_runtime"] / 1000, "cpu": process.cpu, "bytes": size}


def worker(name: str, path: str, size: int, verify: bool, even: bool) -> None:
    """Save once in this process, and print the figures."""
    import safetensors.torch  # noqa: F401 - importing it is not timed

    import dmabuf.safetensors as ours

    save, in_buffer, odd = WAYS[name]
    model = tensors(size, odd, even)
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
    parser.add_argument("--on", type=names(PLACES), default=["disk"], metavar="PLACES",
                        help=f"of {','.join(PLACES)}")  # fmt: skip
    parser.add_argument("--only", action="append", choices=WAYS, help="repeatable; default: all")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.worker:
        name, path, size, verify, place = how.worker
        worker(name, path, int(size), verify == "1", place == "even")
        return
    stop_tidily()
    print("\n".join(machine([fio_version()])))
    order = random.Random(1)
    wanted = [FIO, *(name for name in WAYS if name in (how.only or WAYS))]
    for place in how.on:
        size = how.size * MIB
        with folder_on(place, how.dir, size + GIB) as folder:
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(how.runs + 1):
                done = {}
                for name in order.sample(wanted, len(wanted)):
                    path = os.path.join(folder, "model")
                    if name == FIO:
                        done[name] = by_fio(path, size, place == "even")
                    else:
                        verify = str(int(number == 0))
                        command = [sys.executable, __file__, "--worker", name, path, str(size)]
                        done[name] = json.loads(run([*command, verify, place]).output)
                    os.unlink(path)
                    os.sync()
                if number:
                    rounds.append(done)
            report(place, rounds)


def folder_on(place: str, directory: str, size: int) -> AbstractContextManager[str]:
    """Make a folder with room for `size` bytes, which is removed at the end."""
    if place in ("zram", "even"):
        return zram_folder(size)
    return folder_in("/dev/shm" if place == "tmpfs" else directory, size)


def report(place: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    """Print a table, with ratios of the same round."""
    print(f"\n{place}\n| way | GB/s | of fio | CPU s/GiB", end="")
    bases = [name for name in BASES if name in rounds[0]]
    for base in bases:
        print(f" | times as fast as {base} | of its CPU", end="")
    print(" |\n|" + " --- |" * (4 + 2 * len(bases)))
    for name in [FIO, *(name for name in WAYS if name in rounds[0])]:
        speed = Spread.of([one[name]["bytes"] / one[name]["seconds"] / 1e9 for one in rounds])
        cpu = Spread.of([one[name]["cpu"] / one[name]["bytes"] * GIB for one in rounds])
        cells = [name, speed, ratio(rounds, "seconds", FIO, name), cpu]
        for base in bases:
            faster, cheaper = (base, name), (name, base)
            cells += [ratio(rounds, "seconds", *faster), ratio(rounds, "cpu", *cheaper)]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def ratio(rounds: list[dict[str, dict[str, float]]], key: str, over: str, under: str) -> Spread:
    """Return how a figure of two ways compares in the same round."""
    return Spread.of([one[over][key] / one[under][key] for one in rounds])


if __name__ == "__main__":
    main()
