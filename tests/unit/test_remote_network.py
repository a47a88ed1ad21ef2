"""A node and its client in two network namespaces, over a link that is counted, and cut."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards import needs
from tests.nodes import certificates
from tests.support import pattern, run, wait_until

MIB = 1 << 20
SIZE = 24 * MIB
DATA = pattern(SIZE, 9)
HOST, OTHER = "10.77.78.1", "10.77.78.2"

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[str, str]]:
    """Two namespaces; the link between them carries 100 Mbit/s."""
    names = f"dmabuf-{os.getpid()}-a", f"dmabuf-{os.getpid()}-b"
    try:
        for name in names:
            run("ip", "netns", "add", name)
        ends = ["veth0", "netns", names[0], "type", "veth", "peer", "veth1", "netns", names[1]]
        run("ip", "link", "add", *ends)
        for name, end, address in zip(names, ("veth0", "veth1"), (HOST, OTHER), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
        tbf = ["tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms"]
        run("tc", "-n", names[0], "qdisc", "add", "dev", "veth0", "root", *tbf)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def address(link: tuple[str, str], tmp_path: Path) -> Iterator[str]:
    """A node beyond this machine, with certificates."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    known = certificates(tmp_path, "node", host=HOST)
    command = ["ip", "netns", "exec", link[0], sys.executable, "-m", "dmabuf.cli", "serve"]
    command += ["--socket", tmp_path / "s", "--listen", f"{HOST}:0", "--files", tmp_path / "served"]
    command += ["--certificate", known.certificate, "--key", known.key]
    command += ["--authority", known.authority]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr.readline().startswith("serving at")
            yield process.stderr.readline().split()[2].rstrip(",")
        finally:
            process.terminate()


CLIENT = """
import hashlib, sys
import dmabuf, dmabuf.remote
with dmabuf.remote.connect(sys.argv[1], timeout=float(sys.argv[2])) as node:
    assert node.transport == "tls"
    with node.open("a.bin") as file, dmabuf.allocate(file.size, exporter="memfd") as buffer:
        size = file.size
        try:
            file.read_into(buffer, size, progress=lambda *_: print("moving", flush=True))
        except TimeoutError as error:
            print(type(error).__mro__[1].__name__, node.closed, flush=True)
        print(hashlib.sha256(buffer.pread(size, 0)).hexdigest(), flush=True)
"""


def client(link: tuple[str, str], tmp_path: Path, address: str, timeout: float):
    """Start a client in the other namespace, and return it when its bytes are moving."""
    known = certificates(tmp_path, "client")
    names = {
        "DMABUF_CERTIFICATE": known.certificate,
        "DMABUF_KEY": known.key,
        "DMABUF_AUTHORITY": known.authority,
    }
    command = ["ip", "netns", "exec", link[1], sys.executable, "-c", CLIENT, address, str(timeout)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | names)
    assert started.stdout.readline() == "moving\n"
    return started


def received(link: tuple[str, str]) -> int:
    path = "/sys/class/net/veth1/statistics/rx_bytes"
    return int(run("ip", "netns", "exec", link[1], "cat", path))


@needs("netns", "openssl")
def test_the_bytes_cross_the_link_and_a_cut_of_a_moment_delays_them(
    link: tuple[str, str], tmp_path: Path, address: str
) -> None:
    before = received(link)
    with client(link, tmp_path, address, 100) as moving:
        run("ip", "-n", link[0], "link", "set", "veth0", "down")
        at = received(link)
        assert at - before < SIZE
        run("ip", "-n", link[0], "link", "set", "veth0", "up")
        told = moving.stdout.read().split()
    assert moving.returncode == 0
    assert told[-1] == hashlib.sha256(DATA).hexdigest()
    assert received(link) - before > SIZE


@needs("netns", "openssl")
def test_a_link_that_is_cut_for_ever(link: tuple[str, str], tmp_path: Path, address: str) -> None:
    with client(link, tmp_path, address, 1) as moving:
        run("ip", "-n", link[0], "link", "set", "veth0", "down")
        try:
            told = moving.stdout.read().split()
        finally:
            run("ip", "-n", link[0], "link", "set", "veth0", "up")
    assert moving.returncode == 0
    assert told[-3:-1] == ["TransferError", "True"]
    assert told[-1] != hashlib.sha256(DATA).hexdigest()


@needs("netns")
def test_beyond_this_machine_nothing_goes_without_certificates(
    link: tuple[str, str], tmp_path: Path
) -> None:
    serve = [sys.executable, "-m", "dmabuf.cli", "serve", "--socket", str(tmp_path / "s")]
    ended = subprocess.run(
        ["ip", "netns", "exec", link[0], *serve, "--listen", f"{HOST}:0", "--files", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "certificates are needed beyond this machine" in ended.stderr
    wait_until(lambda: not (tmp_path / "s").exists())
