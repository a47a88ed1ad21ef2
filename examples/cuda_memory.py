"""Read a file into a GPU's memory, write it to another file, and compare the two.

    python examples/cuda_memory.py model.safetensors copy.safetensors [cuda|hip|level_zero]

Prints for each direction the route of the bytes, the reason and the speed. Then it reads the file
into a buffer that kernels can use where it is. Needs a GPU with its driver, and for CUDA
`pip install dmabuf[cuda]`.
"""

import filecmp
import importlib
import os
import sys

import dmabuf


def show(what: str, transfer: dmabuf.Transfer) -> None:
    speed = transfer.nbytes / transfer.seconds / 1e9
    print(f"{what}: {transfer.nbytes:,} bytes, {speed:.2f} GB/s, route {transfer.route}")
    print(f"  {transfer.reason}; {transfer.copied:,} bytes copied by the CPU")
    for route, why in transfer.rejected.items():
        print(f"  not {route}: {why}")


def main(source: str, copy: str, runtime: str = "cuda") -> None:
    size = os.path.getsize(source)
    with importlib.import_module(f"dmabuf.devices.{runtime}").Device(0) as gpu:
        print(f"{gpu.name}: {size:,} bytes of its memory")
        with gpu.allocate(size) as memory:
            with dmabuf.open(source) as file:
                show("file to device", memory.read_from(file))
            with dmabuf.open(copy, "w") as file:
                show("device to file", memory.write_to(file, size, sync=True))
        with dmabuf.allocate(size) as buffer, gpu.register(buffer) as registered:
            with dmabuf.open(source) as file:
                show("file to registered buffer", file.read_into(buffer))
            print(f"  kernels can read it at {registered.address:#x}")
    if not filecmp.cmp(source, copy, shallow=False):
        sys.exit("the copy differs")
    print(f"{copy} is byte for byte {source}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
