"""A process of benchmarks/shared_model.py: it loads a model and computes its checksum, when told.

It imports little beside dmabuf, because its memory is measured.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterable

import numpy  # noqa: F401 - what `load` imports at its first call

from dmabuf import safetensors


def work(path: str, socket: str, orders: Iterable[str], tell: Callable[[str], object]) -> None:
    """Carry out orders: "load" the shared model, load one of its "own", or "compare" all bytes."""
    tell("imported")
    for order in orders:
        begun = time.perf_counter()
        if order == "own\n":
            safetensors.load(path, framework="np")
            tell(f"{time.perf_counter() - begun}")
        elif order == "load\n":
            model = safetensors.load(path, framework="np", shared=socket)
            tell(f"{time.perf_counter() - begun} {len(model.transfers)}")
        else:
            total = 0
            for name in sorted(model):
                total = zlib.crc32(model.raw(name).data, total)
            tell(str(total))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.stdin, lambda text: print(text, flush=True))
