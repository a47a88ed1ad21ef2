"""A file of float32 rows into a shareable buffer, made unit vectors there by NumPy, and back out.

    pip install dmabuf[arrays]
    python examples/arrays.py rows.f32 384 unit.f32 first.f32

The array is the buffer's memory: nothing is copied. The last file gets the first ten rows only,
from where the slice of the array says that they lie.
"""

import os
import sys

import numpy as np

import dmabuf


def main(source: str, width: str, target: str, some: str) -> None:
    size = os.path.getsize(source)
    with dmabuf.allocate(size) as buffer:
        with dmabuf.open(source) as file:
            file.read_into(buffer, size)
        rows = buffer.asarray("<f4", (size // (4 * int(width)), int(width)))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        first = dmabuf.from_dlpack(rows[:10])  # where in which buffer it is
        for path, where in ((target, dmabuf.from_dlpack(rows)), (some, first)):
            with dmabuf.open(path, "w") as file:
                t = file.write_from(where.buffer, where.size, buffer_offset=where.offset)
            print(f"{path}: {t.nbytes:,} bytes, route {t.route}, {t.copied:,} copied by the CPU")
        del rows, first, where  # while an array exists the buffer cannot be closed


if __name__ == "__main__":
    main(*sys.argv[1:])
