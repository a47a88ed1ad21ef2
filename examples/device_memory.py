"""Read a file into the memory of a PCI device, from the disk to the device without the CPU.

    python examples/device_memory.py 0000:65:00.0 2 weights.bin

The device must be bound to vfio-pci, and the kernel must have dma-buf registered buffers. Without
them no route leads to this memory, and the error states so.
"""

import os
import sys

import dmabuf
from dmabuf.devices import vfio


def main(address: str, bar: str, path: str) -> None:
    size = os.path.getsize(path)
    with vfio.Device(address) as device:
        for each in device.bars():
            print(f"BAR {each.number}: {each.size:,} bytes")
        with device.bar(int(bar)) as buffer, dmabuf.open(path) as file:
            print(f"{buffer!r}: {buffer.reason}", flush=True)
            try:
                t = file.read_into(buffer, size)
            except dmabuf.RouteUnavailable as error:
                sys.exit(str(error))
            print(f"{t.nbytes:,} bytes, route {t.route}: {t.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
