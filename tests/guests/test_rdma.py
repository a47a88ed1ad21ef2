"""RDMA by soft RoCE: Buffers as memory of a network card, by verbs."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from tests.guards import needs
from tests.support import assert_same, pattern, poison, wait_until

everything = needs("rdma", "peer", "udmabuf")

MIB = 1 << 20
SIZE = 4 * MIB
DATA = pattern(SIZE, 51)
SOURCE, TARGET = range(2)


def pinned() -> int:
    """The bytes that this process has pinned, by the kernel's account (VmPin)."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmPin:") + 1]) << 10


class Card:
    """Two connected queue pairs of one card."""

    def __init__(self) -> None:
        from pyverbs import libibverbs_enums as enums
        from pyverbs.addr import AHAttr, GlobalRoute
        from pyverbs.cq import CQ
        from pyverbs.device import Context, get_device_list
        from pyverbs.pd import PD
        from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr

        self.enums = enums
        self.access = (
            enums.IBV_ACCESS_LOCAL_WRITE
            | enums.IBV_ACCESS_REMOTE_WRITE
            | enums.IBV_ACCESS_REMOTE_READ
        )
        self.context = Context(name=get_device_list()[0].name.decode())
        self.domain, self.completions = PD(self.context), CQ(self.context, 4)
        gids = [self.context.query_gid(1, index) for index in range(4)]
        index = next(index for index, one in enumerate(gids) if ":ffff:" in one.gid)  # of IPv4
        ends = self.completions
        how = QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=ends, rcq=ends, cap=QPCap(max_send_wr=4))
        pairs = []
        for _ in range(2):
            attributes = QPAttr(port_num=1)
            attributes.qp_access_flags = self.access
            pairs.append(QP(self.domain, how, attributes))
        for pair, other in (pairs, pairs[::-1]):
            attributes = QPAttr(port_num=1)
            attributes.qp_access_flags = self.access
            attributes.dest_qp_num = other.qp_num
            attributes.path_mtu = enums.IBV_MTU_1024
            attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
            attributes.min_rnr_timer, attributes.timeout = 12, 20
            attributes.retry_cnt = attributes.rnr_retry = 7
            route = GlobalRoute(dgid=gids[index], sgid_index=index)
            attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
            pair.to_rts(attributes)
        self.pairs = pairs

    def register(self, buffer: dmabuf.Buffer, size: int):
        """Register the beginning of a buffer's mapping."""
        from pyverbs.mr import MR

        return MR(self.domain, size, self.access, address=buffer.address)

    def move(self, operation: int, local, remote, address: int, size: int) -> int:
        """Have the card move bytes between memory regions; return the status."""
        from pyverbs.wr import SGE, SendWR

        signal = self.enums.IBV_SEND_SIGNALED
        parts = [SGE(local.buf, size, local.lkey)]
        request = SendWR(opcode=operation, num_sge=1, sg=parts, send_flags=signal)
        request.set_wr_rdma(remote.rkey, address)
        self.pairs[0].post_send(request)
        found = []
        wait_until(lambda: found.extend(self.completions.poll()[1]) or found, "a completion")
        return found[0].status

    def close(self) -> None:
        for one in (*self.pairs, self.completions, self.domain, self.context):
            one.close()


@pytest.fixture
def card() -> Iterator[Card]:
    made = Card()
    yield made
    made.close()


@pytest.fixture
def buffers() -> Iterator[list[dmabuf.Buffer]]:
    with (
        dmabuf.allocate(SIZE, exporter="udmabuf") as source,
        dmabuf.allocate(SIZE, exporter="udmabuf") as target,
    ):
        source.pwrite(DATA, 0)
        target.pwrite(poison(SIZE), 0)
        yield [source, target]


@everything
@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_a_card_moves_bytes_between_buffers(card: Card, buffers, write: bool) -> None:
    before = pinned()
    regions = [card.register(one, SIZE) for one in buffers]
    assert pinned() == before + 2 * SIZE
    opcode = "IBV_WR_RDMA_WRITE" if write else "IBV_WR_RDMA_READ"
    here, there = (SOURCE, TARGET) if write else (TARGET, SOURCE)
    address = buffers[there].address
    assert not card.move(getattr(card.enums, opcode), regions[here], regions[there], address, SIZE)
    assert_same(buffers[TARGET].pread(SIZE, 0), DATA, "the target")
    assert_same(buffers[SOURCE].pread(SIZE, 0), DATA, "the source")
    for region in regions:
        region.close()
    assert pinned() == before


@everything
def test_a_card_reaches_nothing_beyond_its_region(card: Card, buffers) -> None:
    here, there = card.register(buffers[SOURCE], SIZE), card.register(buffers[TARGET], SIZE // 2)
    try:
        address = buffers[TARGET].address + SIZE // 2 - 4096
        write = card.enums.IBV_WR_RDMA_WRITE
        status = card.move(write, here, there, address, 8192)
        assert status == card.enums.IBV_WC_REM_ACCESS_ERR
        assert_same(buffers[TARGET].pread(SIZE, 0), poison(SIZE), "the target")
    finally:
        here.close()
        there.close()


@everything
def test_rxe_registers_no_dma_buf(card: Card, buffers) -> None:
    from pyverbs.mr import DmaBufMR
    from pyverbs.pyverbs_error import PyverbsRDMAError

    with pytest.raises(PyverbsRDMAError) as caught:
        DmaBufMR(card.domain, SIZE, card.access, dmabuf=buffers[SOURCE].slabs[0].fd)
    assert caught.value.error_code == errno.EOPNOTSUPP
