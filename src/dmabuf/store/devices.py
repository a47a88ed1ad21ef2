"""What a peer could have without the store: the devices that make dma-bufs, by mode and ACL."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import PurePath

from dmabuf.exporters import heap, udmabuf
from dmabuf.store.names import READ, WRITE, Peer

_SEARCH = 1
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

    By the owner, mode and ACL (acl(5)) of it and of its folders; False where there is none such.
    """
    if not os.path.exists(device):
        return False
    folders = (str(folder) for folder in PurePath(device).parents)
    return _permits(device, peer, READ, WRITE) and all(_permits(f, peer, _SEARCH) for f in folders)


def _permits(path: str, peer: Peer, *rights: int) -> bool:
    """Whether a peer has one of some rights to a file: its class's, as the kernel looks for it."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    if peer.uid == 0:
        return True
    return any(bits & right for bits in _classes(path, status, peer) for right in rights)


def _classes(path: str, status: os.stat_result, peer: Peer) -> list[int]:
    """The permission bits of a peer; several of groups, each of which will do."""
    groups = (peer.gid, *peer.groups)
    if peer.uid == status.st_uid:
        return [status.st_mode >> 6]
    # With an empty group class the kernel does not look at the ACL (fs/namei.c).
    entries = list(_entries(path)) if status.st_mode & stat.S_IRWXG else []
    mask = next((bits for tag, bits, _ in entries if tag == _MASK), ~0)
    for tag, bits, uid in entries:
        if tag == _USER and uid == peer.uid:
            return [bits & mask]
    own = next((bits for tag, bits, _ in entries if tag == _GROUP_OBJ), status.st_mode >> 3)
    of_groups = [own & mask] if status.st_gid in groups else []
    of_groups += [bits & mask for tag, bits, gid in entries if tag == _GROUP and gid in groups]
    return of_groups or [status.st_mode]


def _entries(path: str) -> Iterator[tuple[int, int, int]]:
    """A file's ACL: tags, permissions and ids; nothing where it has none but its mode."""
    try:
        acl = os.getxattr(path, _ACL)
    except OSError:
        return iter(())
    return _ENTRY.iter_unpack(acl[_VERSION.size :])
