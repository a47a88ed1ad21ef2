"""Memory on a NUMA node that the machine need not have: policies, zones, and pages that moved."""

import errno
import mmap

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.memory import allocate, capacity, exporters
from tests.support import pattern, raises_errno

PAGE = mmap.PAGESIZE
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def node(monkeypatch):
    """Node 5 exists, as far as this package knows; its pages are wherever the kernel puts them."""
    monkeypatch.setattr(capacity, "check_node", lambda node: None)
    monkeypatch.setattr(capacity, "has_normal", lambda node: True)
    monkeypatch.setattr(capacity, "has_movable", lambda node: False)
    for name in ("dmb_bind_node", "dmb_count_elsewhere"):
        monkeypatch.setattr(exporters.lib, name, lambda *_: 0)
    return 5


def test_a_heap_allocates_under_the_policy_of_the_thread(kernel, node, monkeypatch):
    seen, alloc = [], uapi.heap_alloc
    real = exporters.lib.dmb_policy_restore
    monkeypatch.setattr(exporters.lib, "dmb_policy_bind", lambda node, _: seen.append(node) or 0)
    monkeypatch.setattr(uapi, "heap_alloc", lambda *how: seen.append("heap") or alloc(*how))
    monkeypatch.setattr(
        exporters.lib, "dmb_policy_restore", lambda saved: seen.append("back") or real(saved)
    )
    allocate(1, exporter="system", numa_node=node).close()
    assert seen == [5, "heap", "back"]


def test_a_heap_is_not_asked_for_movable_memory(kernel, node, monkeypatch):
    monkeypatch.setattr(capacity, "has_normal", lambda node: False)
    with raises_errno(
        errno.EOPNOTSUPP, 'node 5 is all ZONE_MOVABLE, .*; exporter="memfd"'
    ) as error:
        allocate(1, exporter="system", numa_node=node)
    assert error.value.filename.endswith("/system") and len(error.value.strerror) <= 120


def test_a_udmabuf_whose_pages_were_moved_is_refused_and_a_memfd_instead(kernel, node, monkeypatch):
    monkeypatch.setattr(capacity, "has_movable", lambda node: True)
    monkeypatch.setattr(exporters.lib, "dmb_count_elsewhere", lambda *_: 3)
    moved = "pinning moves 3 of 4 pages off NUMA node 5, which is ZONE_MOVABLE"
    with raises_errno(errno.EOPNOTSUPP, moved, filename=exporters.UDMABUF) as error:
        allocate(4 * PAGE, exporter="udmabuf", numa_node=node)
    assert len(error.value.strerror) <= 120
    with allocate(4 * PAGE, numa_node=node) as buffer:
        assert buffer.exporter == "memfd" and moved in buffer.reason
    kernel.creates_left, kernel.create_error = 0, errno.ENOMEM  # as for huge pages
    with raises_errno(errno.EOPNOTSUPP, "pinning moves 4 of 4 pages off NUMA node 5"):
        allocate(4 * PAGE, exporter="udmabuf", numa_node=node)
    monkeypatch.setattr(capacity, "has_movable", lambda node: False)
    with raises_errno(errno.ENOMEM, "making a udmabuf of 16 KiB"):
        allocate(4 * PAGE, exporter="udmabuf", numa_node=node)


def test_movable_pages_of_a_memfd_are_not_registered(node, monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "has_movable", lambda node: True)
    size = 16 * MIB
    (tmp_path / "file").write_bytes(pattern(size, 1))
    with (
        allocate(size, exporter="memfd", numa_node=node) as buffer,
        dmabuf.open(tmp_path / "file") as file,
    ):
        why = "pinning pages for long moves them off NUMA node 5, which is ZONE_MOVABLE"
        assert why in buffer.reason
        transfer = file.read_into(buffer, route="direct")
        assert (transfer.registered, transfer.registration) == (False, why)
        assert buffer.pread(size, 0) == pattern(size, 1)


ZONES = """\
Node 0, zone      DMA
  pages free     3840
        managed  3840
Node 0, zone  Movable
  pages free     0
        spanned  0
        managed  0
Node 1, zone   Normal
  pages free     64
        managed  65536
Node 1, zone  Movable
  pages free     64
        managed  65536
"""


def test_zones_of_nodes(tmp_path):
    normal = tmp_path / "sys/devices/system/node/has_normal_memory"
    for path, text in ((tmp_path / "proc/zoneinfo", ZONES), (normal, "0-1\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    root = str(tmp_path)
    assert [capacity.has_movable(node, root=root) for node in range(3)] == [False, True, False]
    assert [capacity.has_normal(node, root=root) for node in range(3)] == [True, True, False]
    normal.with_name("has_memory").write_text("0-2\n")
    normal.with_name("has_cpu").write_text("0\n")
    assert capacity.nodes_without_processors(root=root) == [1, 2]
