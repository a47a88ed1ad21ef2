"""Read float32 rows into a buffer, make them unit vectors there with NumPy, and write them.

    pip install dmabuf[arrays]
    python examples/arrays.py rows.f32 384 unit.f32 first.f32

The array uses the buffer's memory: nothing is copied. The last file gets the first ten rows only;
from_dlpack() finds where in the buffer that slice of the array lies.
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
        first = dmabuf.from_dlpack(rows[:10])  # its buffer, offset and size
        for path, where in ((target, dmabuf.from_dlpack(rows)), (some, first)):
            with dmabuf.open(path, "w") as file:
                t = file.write_from(where.buffer, where.size, buffer_offset=where.offset)
            print(f"{path}: {t.nbytes:,} bytes, route {t.route}, {t.copied:,} copied by the CPU")
        del rows, first, where  # the buffer cannot be closed while an array exists


if __name__ == "__main__":
    main(*sys.argv[1:])
