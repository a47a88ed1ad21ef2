"""Hand a file from one host to another, through memory that both can access.

    python examples/shared_memory.py put /dev/dax0.0 weights.bin    on the host that writes
    python examples/shared_memory.py get /dev/dax0.0 copy.bin       on a host that reads

The first page of the memory describes the other pages: a serial number, the number of bytes, and
their SHA-256. The writer makes the serial number odd before it changes any other byte, and even
when all bytes have arrived. The reader refuses an odd one, and compares the digest and the
serial number after its own transfer. So it never keeps bytes of a writer that is still at work or
that died, or bytes of cache lines that are out of date. One host writes at a time: hosts agree on
that by other means.
"""

import hashlib
import os
import struct
import sys

import dmabuf

MAGIC = b"handover"
HEAD = struct.Struct("<8sQQ32s")
DATA = 4096
"""Bytes from the start of the memory to the data."""


def main(verb: str, node: str, path: str) -> None:
    with open(node, "r+b", buffering=0) as file, dmabuf.from_fd(file) as memory:
        print(put(memory, path) if verb == "put" else get(memory, path))


def digest(memory: dmabuf.Buffer, size: int) -> bytes:
    with memory.map("r", DATA, size) as view:
        return hashlib.sha256(view).digest()


def put(memory: dmabuf.Buffer, path: str) -> dmabuf.Transfer:
    magic, serial, _, _ = HEAD.unpack(memory.pread(HEAD.size, 0))
    serial = serial | 1 if magic == MAGIC else 1
    memory.pwrite(HEAD.pack(MAGIC, serial, 0, b""), 0)
    with dmabuf.open(path) as file:
        done = file.read_into(memory, buffer_offset=DATA)
        if done.nbytes == memory.size - DATA and done.nbytes != file.size:
            sys.exit(f"{path} does not fit into {memory.size - DATA} bytes")
    found = digest(memory, done.nbytes)
    memory.pwrite(HEAD.pack(MAGIC, serial + 1, done.nbytes, found), 0)
    return done


def get(memory: dmabuf.Buffer, path: str) -> dmabuf.Transfer:
    head = memory.pread(HEAD.size, 0)
    magic, serial, size, expected = HEAD.unpack(head)
    if magic != MAGIC:
        sys.exit("nothing was put into this memory")
    if serial % 2:
        sys.exit("a writer is at work, or died: wait for it, or put the file again")
    part = f"{path}.part"
    with dmabuf.open(part, "w") as file:
        done = file.write_from(memory, size, buffer_offset=DATA)
    if digest(memory, size) != expected or memory.pread(HEAD.size, 0) != head:
        os.unlink(part)
        sys.exit("the memory changed, or cached lines of it are out of date: nothing was kept")
    os.replace(part, path)
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
