"""The process behind a file by FUSE: started by `_as_file.py`, it ends with the file.

It is a program of its own, and not a fork, so that it holds the buffer's descriptors and nothing
else of its starter's: no memory, no other file, no lock. It is nobody's child and in a session of
its own, so a Ctrl-C at the terminal ends the program that uses the file first.
"""

import errno
import json
import mmap
import os
import socket
import sys

from dmabuf._ffi import ffi, lib
from dmabuf._mapping import address_of

_FIXES = {
    lib.DMB_FUSE_DEVICE: "opening /dev/fuse: {} (modprobe fuse as root, or a container that is "
    "given the device; and chmod 666 /dev/fuse, as udev has it)",
    lib.DMB_FUSE_NAMESPACES: "a namespace to mount FUSE in: {} (as root: sysctl "
    "user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1 on Debian, "
    "kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu; or be root)",
    lib.DMB_FUSE_MOUNT: "mounting FUSE: {} (Linux 5.4 with CONFIG_FUSE_FS, and in a container the "
    "right to mount)",
}


def main(connection: int, writable: bool, slabs: list[tuple[int, int, bool]]) -> None:
    """Send the file over ``connection``, or why there is none, and then answer for it.

    ``slabs`` are (descriptor, bytes, whether it is a dma-buf).
    """
    with socket.socket(fileno=connection) as peer:
        try:
            device, root, memories = _start(writable, slabs)
        except OSError as error:
            peer.sendall(json.dumps([error.errno, error.strerror]).encode())
            return
        socket.send_fds(peer, [b"[]"], [root])
        os.close(root)
    if os.fork():
        os._exit(0)  # its starter waits for this; what goes on is nobody's child
    os.setsid()
    table = ffi.new("struct dmb_fuse_slab[]", len(slabs))
    for entry, memory, (fd, size, is_dmabuf) in zip(table, memories, slabs, strict=True):
        entry.memory = ffi.cast("void *", address_of(memory))
        entry.size, entry.dmabuf = size, fd if is_dmabuf else -1
    sys.exit(lib.dmb_fuse_serve(device, table, len(slabs), writable) != 0)


def _start(writable: bool, slabs: list[tuple[int, int, bool]]) -> tuple[int, int, list[mmap.mmap]]:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memories = [mmap.mmap(fd, size, mmap.MAP_SHARED, protection) for fd, size, _ in slabs]
    device, root, step = ffi.new("int *"), ffi.new("int *"), ffi.new("int *")
    rc = lib.dmb_fuse_mount(device, root, step)
    if rc:
        raise OSError(errno.EOPNOTSUPP, _FIXES[step[0]].format(os.strerror(-rc)))
    return device[0], root[0], memories
