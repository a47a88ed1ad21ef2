"""What a peer could have without the store: the devices that make dma-bufs, by mode and ACL."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator

from dmabuf.exporters import heap, udmabuf
from dmabuf.store.names import READ, WRITE, Peer, rights

_ACL = "system.posix_acl_access"
_VERSION, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_USER, _GROUP_OBJ, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10


def of(exporter: str) -> str | None:
    """The device that makes such memory; None for a memory file, which anyone makes."""
    if exporter == "memfd":
        return None
    return udmabuf.DEVICE if exporter == "udmabuf" else os.path.join(heap.FOLDER, exporter)


def exporters() -> list[str]:
    """Those that have a device here."""
    return [*heap.names(), *(["udmabuf"] if os.path.exists(udmabuf.DEVICE) else [])]


def may_open(device: str, peer: Peer) -> bool:
    """Whether a peer may open a device, for reading or for writing: either makes dma-bufs.

    By its owner, mode and ACL (acl(5)), which the kernel passes over where its mask, the group's
    bits of the mode, is empty; False where there is none such.
    """
    try:
        status = os.stat(device)
    except OSError:
        return False
    entries = list(_entries(device)) if status.st_mode & stat.S_IRWXG else []
    if peer.uid in (0, status.st_uid) or not entries:
        return bool(rights(status.st_uid, status.st_gid, status.st_mode, peer))
    mask = next((bits for tag, bits, _ in entries if tag == _MASK), READ | WRITE)
    for tag, bits, uid in entries:
        if tag == _USER and uid == peer.uid:
            return bool(bits & mask & (READ | WRITE))
    of_groups = [
        bits & mask
        for tag, bits, gid in entries
        if (tag == _GROUP and gid in (peer.gid, *peer.groups))
        or (tag == _GROUP_OBJ and status.st_gid in (peer.gid, *peer.groups))
    ]
    if of_groups:
        return any(bits & (READ | WRITE) for bits in of_groups)
    return bool(status.st_mode & (READ | WRITE))


def _entries(path: str) -> Iterator[tuple[int, int, int]]:
    """A file's ACL: tags, permissions and ids; nothing where it has none but its mode."""
    try:
        acl = os.getxattr(path, _ACL)
    except OSError:
        return iter(())
    return _ENTRY.iter_unpack(acl[_VERSION.size :])
