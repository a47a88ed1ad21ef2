"""RDMA by soft RoCE: Buffers as memory of a network card, by verbs and between two machines."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Route, remote
from tests.guards import needs
from tests.guests.peer import THERE, carrying, python, running
from tests.nodes import pumps
from tests.support import assert_same, pattern, poison, run, wait_until

everything = needs("rdma", "peer", "udmabuf")

MIB = 1 << 20
SIZE, SEED = 4 * MIB, 51
DATA = pattern(SIZE, SEED)
SOURCE, TARGET = range(2)


def pinned(process: object = "self") -> int:
    """The bytes that a process has pinned, by the kernel's account (VmPin)."""
    fields = Path(f"/proc/{process}/status").read_text().split()
    return int(fields[fields.index("VmPin:") + 1]) << 10


# -- verbs


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


# -- NIXL

FOLDER, PORT = "/var/tmp/card", 7778
_MAKE = """
import os, random, sys
os.makedirs(sys.argv[1], exist_ok=True)
with open(f"{sys.argv[1]}/a.bin", "wb") as file:
    file.write(random.Random(int(sys.argv[2])).randbytes(int(sys.argv[3])))
"""
PRELOAD = "libibverbs.so.1"
"""NIXL's own copy of it does not find the system's driver of the card."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A node in the second guest, which serves a file of DATA."""
    python(_MAKE, FOLDER, SEED, SIZE)
    listen = ["--socket", "/run/card", "--listen", f"{THERE}:{PORT}", "--trusted-network"]
    serve = ["dmabuf", "serve", *listen, "--files", FOLDER]
    with running("env", f"LD_PRELOAD={PRELOAD}", *serve) as process:
        assert process.stderr.readline().startswith("serving at")
        assert process.stderr.readline().startswith("listening at")
        yield f"{THERE}:{PORT}"


@pytest.fixture
def node(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[remote.Node]:
    monkeypatch.setenv("LD_PRELOAD", PRELOAD)
    with remote.connect(address, engine="nixl", trusted_network=True, timeout=300) as made:
        yield made


@pytest.fixture
def nothing_loaded() -> None:
    """Neither machine has /dev/infiniband yet: no program has used the card."""
    unload = "modprobe -r ib_uverbs 2>&1; test -e /sys/module/ib_uverbs; echo $?"

    def unloaded(*inside: str) -> bool:  # it is in use until the last pump has ended
        return run(*inside, "sh", "-c", unload).endswith("1")

    wait_until(unloaded, "the end of ib_uverbs")
    wait_until(lambda: unloaded("lab-peer"), "the end of ib_uverbs in the second guest")
    assert not Path("/dev/infiniband").exists()


@everything
def test_the_first_connection_has_the_kernel_load_the_driver(
    nothing_loaded: None, node: remote.Node, buffers
) -> None:
    with node.open("a.bin") as file:
        done = file.read_into(buffers[TARGET], require="zero-copy")
    assert (done.transport, done.remote.copied) == ("rc_verbs", 0)
    assert_same(buffers[TARGET].pread(SIZE, 0), DATA, "the buffer")


@everything
def test_a_card_moves_files_of_another_machine(node: remote.Node, buffers) -> None:
    target = buffers[TARGET]
    with carrying(SIZE), node.open("a.bin") as file:
        done = file.read_into(target, require="zero-copy")
    assert (done.transport, done.route, done.copied) == ("rc_verbs", Route.DIRECT, 0)
    assert (done.remote.route, done.remote.copied) == ("direct", 0)
    assert_same(target.pread(SIZE, 0), DATA, "the buffer")
    with node.open("b.bin", "w") as file:
        file.write_from(buffers[SOURCE])
    target.pwrite(poison(SIZE), 0)
    with node.open("b.bin") as file:
        file.read_into(target, audit="always")
    assert_same(target.pread(SIZE, 0), DATA, "what came back")


@everything
@pytest.mark.parametrize("by", ["revoke", "close"])
def test_what_is_revoked_is_not_pinned_any_more(node: remote.Node, by: str) -> None:
    [pump] = pumps()
    before = pinned(pump)
    with node.open("a.bin") as file:
        for _ in range(3):
            with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
                buffer.pwrite(poison(SIZE), 0)
                file.read_into(buffer)
                assert_same(buffer.pread(SIZE, 0), DATA, "the buffer")
                assert pinned(pump) == before + SIZE
                if by == "revoke":
                    node.revoke(buffer)
                else:
                    buffer.close()
                assert pinned(pump) == before
