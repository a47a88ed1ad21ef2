"""The store's memory by itself: what is refused leaves nothing, and what is freed is gone."""

import errno
import os
import threading
import time

import pytest

from dmabuf._ffi import lib
from dmabuf.buffer import Slab
from dmabuf.exporters import memfd, udmabuf
from dmabuf.store import memory
from dmabuf.store.marks import Marks
from tests import resources

MIB = 1 << 20


def test_more_dmabufs_than_go_into_a_message_leave_nothing(monkeypatch) -> None:
    """As where the udmabuf module's size_limit_mb is small."""

    def of_many(
        size: int, *, name: str | None, huge_pages: bool | int, open_to_seals: bool
    ) -> udmabuf.Made:
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


def test_others_go_on_while_memory_is_emptied(monkeypatch) -> None:
    """What holds Python's lock meanwhile has a pause as long as it takes, at each try."""
    took = []

    class Lib:
        @staticmethod
        def dmb_punch(fd: int, size: int) -> int:
            began = time.monotonic()
            rc = lib.dmb_punch(fd, size)
            took.append(time.monotonic() - began)
            return rc

    monkeypatch.setattr(memory, "lib", Lib)
    marked, pauses = Marks(1), []
    for _ in range(5):
        made = memory.make(256 * MIB, "memfd", None, False)
        os.close(made.grant("r+", 0, stranger=False, may_write=True, trusted=True)[1][0])
        emptying = threading.Thread(target=made.let_go, args=(marked,))
        emptying.start()
        last, pause = time.monotonic(), 0.0
        while not took or emptying.is_alive():
            now = time.monotonic()
            last, pause = now, max(pause, now - last)
        emptying.join()
        pauses.append(pause / took.pop())
        if pauses[-1] < 0.25:
            break
    marked.close()
    assert min(pauses) < 0.25
