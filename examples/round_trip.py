"""Read a file into a buffer, write it to another file, and compare the two.

    python examples/round_trip.py model.safetensors copy.safetensors

Prints for each direction the route of the bytes, the reason and the speed.
"""

import filecmp
import os
import sys

import dmabuf


def show(what: str, transfer: dmabuf.Transfer) -> None:
    speed = transfer.nbytes / transfer.seconds / 1e9
    print(f"{what}: {transfer.nbytes:,} bytes in {transfer.seconds * 1e3:.0f} ms, {speed:.2f} GB/s")
    print(
        f"  route {transfer.route}: {transfer.reason}; {transfer.copied:,} bytes copied by the CPU"
    )
    for route, why in transfer.rejected.items():
        print(f"  not {route}: {why}")


def main(source: str, copy: str) -> None:
    size = os.path.getsize(source)
    with dmabuf.allocate(size, name="model") as buffer:
        print(f"{buffer.exporter} buffer of {buffer.size:,} bytes: {buffer.reason}")
        with dmabuf.open(source) as file:
            show("file to buffer", file.read_into(buffer))
        with dmabuf.open(copy, "w") as file:
            show("buffer to file", file.write_from(buffer, size, sync=True))
    if not filecmp.cmp(source, copy, shallow=False):
        sys.exit("the copy differs")
    print(f"{copy} is byte for byte {source}")


if __name__ == "__main__":
    main(*sys.argv[1:])
