"""The throughput that sampled audits cost: python -m tests.audit_cost.

The native route is emulated. Transfers with ``audit="first"`` and ``audit="off"`` alternate.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time

from tests import emulation  # before dmabuf

# isort: split

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.transfer.audit import PAIRS
from tests.unit.lying import dma_buf

SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
COUNTS = {"4 KiB": 20000, "1 MiB": 2000, "64 MiB": 60}
"""Transfers of each way."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit_cost", description=__doc__)
    parser.add_argument("--folder", default="/var/tmp", help="on a disk, for the file (/var/tmp)")
    options = parser.parse_args()
    uapi.sync = lambda fd, flags: None  # the buffers' memfds pass for dma-bufs
    largest = max(SIZES.values())
    with (
        tempfile.NamedTemporaryFile(dir=options.folder) as file,
        emulation.engine() as engine,
        dma_buf(largest) as buffer,
    ):
        for _ in range(largest >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
        with dmabuf.open(file.name, "r+", engine=engine) as target:
            for name, size in SIZES.items():
                for move in (target.read_into, target.write_from):
                    measure(
                        f"{move.__name__} {name}", target.target, move, buffer, size, COUNTS[name]
                    )
    return 0


def measure(what: str, target, move, buffer, size: int, count: int) -> None:
    """Make transfers of both ways in turn; print what audits take.

    Medians compare those that are not audited with those without audits. The time of the samples
    themselves is what their ledger has, in parts of the time of the transfers.
    """
    plain: list[float] = []
    passed: list[float] = []
    PAIRS.forget()
    move(buffer, size, route="native")
    samples = 0
    for _ in range(count):
        for audit in ("first", "off"):
            begun = time.perf_counter()
            done = move(buffer, size, audit=audit, route="native")
            taken = time.perf_counter() - begun
            if audit == "off":
                plain.append(taken)
            elif "compared" in done.audited:
                samples += 1
            else:
                passed.append(taken)
    usual = statistics.median(passed)
    medians = [usual / statistics.median(plain) - 1]
    medians += [
        statistics.median(random.choices(passed, k=len(passed)))
        / statistics.median(random.choices(plain, k=len(plain)))
        - 1
        for _ in range(200)
    ]
    low, high = sorted(medians[1:])[5], sorted(medians[1:])[-5]
    ledger = PAIRS.ledger(buffer.exporter, target.device(), "read" if "read" in what else "write")
    print(
        f"{what:18} {statistics.median(plain) * 1e6:.1f} us without; not audited {medians[0]:+.1%} "
        f"({low:+.1%} to {high:+.1%}); {samples} samples of {count} transfers, "
        f"{ledger.sampling / ledger.moving:.2%} of the time",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
