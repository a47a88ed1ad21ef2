"""Who could make dma-bufs without the store: what is read of modes and ACLs, against the kernel."""

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.store import devices
from dmabuf.store.names import Peer
from tests.unit.test_store_names import IN_GROUP, MEMBER, OWNER, ROOT, SECOND, opens

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")

STRANGER = Peer(1010, 1011, frozenset({1011}))
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NO_ID = 2**32 - 1


def acl(user: int, group: int, groups: int, mask: int, other: int) -> bytes:
    """Of an owner with both rights: one more user's, two more groups', the mask."""
    entries = [
        (_USER_OBJ, 6, _NO_ID), (_USER, user, SECOND.uid), (_GROUP_OBJ, group, _NO_ID),
        (_GROUP, groups, 1007), (_GROUP, 0, 1011), (_MASK, mask, _NO_ID), (_OTHER, other, _NO_ID),
    ]  # fmt: skip
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp", f"device-{os.getpid()}")
    path.touch()
    os.chown(path, OWNER.uid, MEMBER.gid)
    yield path
    path.unlink()


@pytest.mark.parametrize("peer", [OWNER, MEMBER, SECOND, IN_GROUP, STRANGER, ROOT])
def test_who_may_open_is_who_the_kernel_lets(path: Path, peer: Peer) -> None:
    def agree(how: object) -> None:
        kernel = opens(path, peer, os.O_RDONLY) or opens(path, peer, os.O_WRONLY)
        assert devices.may_open(str(path), peer) == kernel, how

    for mode in (0, 0o600, 0o060, 0o006, 0o666, 0o400, 0o020):
        os.chmod(path, mode)
        agree(oct(mode))
    for bits in itertools.product((0, 6), (0, 4), (0, 2), (0, 6), (0, 6)):
        os.setxattr(path, "system.posix_acl_access", acl(*bits))
        agree(bits)


def test_no_device_is_nobodys() -> None:
    assert not devices.may_open("/dev/dma_heap/none", ROOT)
    assert not devices.may_open("/dev/null/x", ROOT)
