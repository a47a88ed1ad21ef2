"""The store's memory by itself: what is refused leaves nothing, and what is freed is gone."""

import errno
import os

import pytest

from dmabuf.buffer import Slab
from dmabuf.exporters import memfd, udmabuf
from dmabuf.store import memory
from tests import resources

MIB = 1 << 20


def test_more_dmabufs_than_go_into_a_message_leave_nothing(monkeypatch) -> None:
    """As where the udmabuf module's size_limit_mb is small."""

    def of_many(size: int, *, name: str | None, huge_pages: bool | int) -> udmabuf.Made:
        fd, mapping, page = memfd.make_memory(
            size, name=name, huge_pages=huge_pages, numa_node=None
        )
        slabs = [Slab(os.open(os.devnull, os.O_RDONLY), at * page, page) for at in range(253)]
        return udmabuf.Made(fd, mapping, slabs, "")

    monkeypatch.setattr(udmabuf, "make", of_many)
    before = resources.held()
    with pytest.raises(OSError, match="253 dma-bufs do not go into one message") as caught:
        memory.make(MIB, "udmabuf", None, False)
    assert caught.value.errno == errno.E2BIG
    assert resources.held() == before
