"""Buffers of a process that clients fetch, without a store."""

import errno
from pathlib import Path

import pytest

import dmabuf
from dmabuf import remote
from tests.guards import demand
from tests.nodes import certificates
from tests.support import assert_same, pattern, poison, raises_errno

SIZE = (3 << 20) + 4096
DATA = pattern(SIZE, 51)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
def test_clients_fetch_what_is_lent(tmp_path: Path, transport: str) -> None:
    if transport == "tls":
        demand("openssl")
    known = [certificates(tmp_path, one) for one in ("node", "client") if transport == "tls"]
    address = f"unix:{tmp_path / 'n'}" if transport == "unix" else "127.0.0.1:0"
    lending = remote.Lending()
    with (
        dmabuf.allocate(SIZE, exporter="memfd") as source,
        dmabuf.allocate(SIZE + 4096, exporter="memfd") as target,
        remote.serving(
            address, store=lending, certificates=known[0] if known else None
        ) as listener,
        remote.connect(listener.address, certificates=known[1] if known else None) as there,
    ):
        source.pwrite(DATA, 0)
        lending.add("a", source)
        for audit in ("first", "always", "off"):
            target.pwrite(poison(target.size), 0)
            done = there.fetch("a", target, buffer_offset=4096, audit=audit)
            assert (done.nbytes, done.transport) == (SIZE, transport)
            assert_same(target.pread(target.size, 0), poison(4096) + DATA, "the target")
        with raises_errno(errno.ENOENT, "no buffer has this name"):
            there.fetch("b", target)
        with raises_errno(errno.ENOSPC, "do not fit"):
            there.fetch("a", target, buffer_offset=8192)
        for refused in (lambda: there.publish("c", target), there.ls, lambda: there.remove("a")):
            with raises_errno(errno.EOPNOTSUPP, "the node has no store"):
                refused()
        lending.remove("a")
        lending.remove("a")
        with raises_errno(errno.ENOENT):
            there.fetch("a", target)


def test_a_buffer_that_was_closed_is_an_error_and_the_connection_goes_on(tmp_path: Path) -> None:
    lending = remote.Lending()
    source = dmabuf.allocate(SIZE, exporter="memfd")
    with (
        dmabuf.allocate(SIZE, exporter="memfd") as target,
        remote.serving("127.0.0.1:0", store=lending) as listener,
        remote.connect(listener.address) as there,
    ):
        lending.add("a", source)
        assert there.fetch("a", target).nbytes == SIZE
        source.close()
        with pytest.raises(OSError, match="closed"):
            there.fetch("a", target)
        with raises_errno(errno.ENOENT):
            there.fetch("b", target)
