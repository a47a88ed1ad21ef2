"""Read a file into far memory: of a NUMA node, of device DAX, or of an NVMe drive.

    python examples/far_memory.py weights.bin 1
    python examples/far_memory.py weights.bin /dev/dax0.0
    python examples/far_memory.py /dev/nvme1n1 p2pmem:0000:65:00.0

The second word is a node without processors, or an exporter. At most 64 MiB are read, and 4 MiB
into memory of a drive.
"""

import sys

import dmabuf


def main(path: str, where: str) -> None:
    most = 4 << 20 if where.startswith("p2pmem:") else 64 << 20
    with dmabuf.open(path) as file:
        size = min(file.size or most, most)
        node = int(where) if where.isdecimal() else None
        exporter = "auto" if where.isdecimal() else where
        with dmabuf.allocate(size, exporter=exporter, numa_node=node) as buffer:
            print(f"{buffer!r}: {buffer.reason}")
            transfer = file.read_into(buffer, size)
            print(transfer)
            for route, why in transfer.rejected.items():
                print(f"  not {route}: {why}")


if __name__ == "__main__":
    main(*sys.argv[1:])
