"""Filesystems on the NVMe drives, with every kind of buffer."""

import os

import pytest

import dmabuf
from tests.kernel.conftest import PINNED, native
from tests.kernel.test_targets import ALL, LIMIT, best, buf, check, engine, everything, pair
from tests.support import assert_same, cached, drop_cache, mounted, pattern, poison

__all__ = ["buf", "engine", "pair"]


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def filesystem(request, tmp_path_factory):
    """ext4 on one NVMe drive, xfs on the other."""
    drive = "DMABUF_TEST_NVME0" if request.param == "ext4" else "DMABUF_TEST_NVME1"
    folder = tmp_path_factory.mktemp(request.param)
    with mounted(os.environ[drive], request.param, folder):
        yield folder


@everything
def test_filesystems(filesystem, buf, engine):
    path = filesystem / "file"
    path.write_bytes(bytes(LIMIT))
    check(path, buf, engine)
    path.unlink()


def test_statx_is_believed_here(filesystem):
    """Lanes need not see first that the page cache stays as it is."""
    path = filesystem / "warm"
    path.write_bytes(pattern(LIMIT, 1))
    with dmabuf.open(path) as file:
        assert file.target.direct().proven


@everything
@pytest.mark.parametrize("route", [None, *ALL])
def test_a_file_that_grows(filesystem, buf, engine, route):
    if route == "direct" and buf.kind not in PINNED:
        return
    path = filesystem / "grown"
    buf.pwrite(poison(buf.size), 0)
    where = {"file_offset": 777, "buffer_offset": 777}
    with dmabuf.open(path, "w", engine=engine) as file:
        transfer = file.write_from(buf, LIMIT - 1234, route=route, sync=True, **where)
        assert transfer.route == (route or best(buf))
        drop_cache(file.fileno())
    expected = bytes(777) + poison(LIMIT)[777 : LIMIT - 457]
    assert_same(path.read_bytes(), expected, f"{transfer}")


@everything
def test_the_page_cache_stays_as_it_was(filesystem, buf, engine):
    path = filesystem / "cold"
    path.write_bytes(pattern(LIMIT, 1))
    fd = os.open(path, os.O_RDWR)
    drop_cache(fd)
    for route in {best(buf), "staged"}:
        with dmabuf.open(path, "r+", engine=engine) as file:
            file.read_into(buf, LIMIT - 777, file_offset=512, buffer_offset=512, route=route)
            assert cached(fd) == 0
            file.write_from(buf, LIMIT - 777, file_offset=513, buffer_offset=513, route=route)
            assert cached(fd) == 0
            natively = native(buf, engine) and buf.kind not in PINNED
            assert file.plan(buf).route == ("native" if natively else best(buf))
    os.close(fd)
