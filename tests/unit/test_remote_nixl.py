"""The engine nixl where NIXL is not installed; tests/unit/test_nixl.py has it."""

import errno
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf import remote
from tests.nodes import node, pumps
from tests.support import assert_same, pattern, raises_errno

DATA = pattern(1 << 20, 31)
MISSING = "NIXL is not installed; pip install --no-deps nixl-cu13"

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A node that trusts the network; neither it nor its client finds NIXL."""
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    with node(tmp_path / "served", trusted_network=True) as listener:
        yield listener.address


def test_it_is_refused_with_the_command_that_installs_it(address: str) -> None:
    with raises_errno(errno.EOPNOTSUPP, MISSING):
        remote.connect(address, engine="nixl", trusted_network=True)


def test_auto_uses_tcp_and_reports_why(address: str) -> None:
    with (
        remote.connect(address, trusted_network=True) as there,
        there.open("a.bin") as file,
        dmabuf.allocate(len(DATA), exporter="memfd") as buffer,
    ):
        done = file.read_into(buffer)
        assert (there.transport, done.transport) == ("tcp", "tcp")
        assert MISSING in there.reason and MISSING in done.rejected["direct"]
        assert_same(buffer.pread(len(DATA), 0), DATA, "the buffer")
        there.revoke(buffer)  # nothing was granted


@pytest.fixture
def slow_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A node as above, where both ends have a NIXL whose start never ends."""
    library = tmp_path / "library" / "nixl_cu13"
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    (library / "_api.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.syspath_prepend(str(library.parent))
    monkeypatch.setenv("UCX_TLS", "tcp")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    with node(tmp_path / "served", trusted_network=True) as listener:
        yield listener.address


def test_auto_does_not_wait_long_for_a_nixl_that_is_slow_to_start(slow_address: str) -> None:
    with (
        remote.connect(slow_address, trusted_network=True, timeout=30) as there,
        there.open("a.bin") as file,
        dmabuf.allocate(len(DATA), exporter="memfd") as buffer,
    ):
        assert there.transport == "tcp"
        assert there.reason == "NIXL is not used: NIXL: start its process: nothing came in 10 s"
        assert not pumps()  # at either end
        file.read_into(buffer)
        assert_same(buffer.pread(len(DATA), 0), DATA, "the buffer")


def test_another_engine_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="use 'auto', 'tcp' or 'nixl'"):
        remote.connect(address, engine="quic")
