"""NIXL moves the bytes between a node and its client, in a process of its own at each end.

`make integrations` runs this with NIXL; where it is not installed, fake_nixl.py stands in for it.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

import dmabuf
from dmabuf import remote
from dmabuf.remote.pump import Pump
from tests.guards import needs
from tests.nodes import Peer, node, pumps
from tests.serving import as_a_program
from tests.support import assert_same, pattern, poison, ranges, run, wait_until
from tests.unit import fake_nixl
from tests.unit.test_remote_hostile import asked, open_by_hand
from tests.unit.test_remote_network import HOST, link, received  # noqa: F401 - a fixture

STANDS_IN = find_spec("nixl_cu13") is None
MIB = 1 << 20
SIZE = 17 * MIB + 4097  # three blocks of the node
DATA = pattern(SIZE, 21)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(autouse=True)
def nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if STANDS_IN:
        fake_nixl.install(tmp_path / "library", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    made.mkdir()
    (made / "a.bin").write_bytes(DATA)
    return made


@pytest.fixture
def big() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        yield buffer


@pytest.fixture
def there(folder: Path) -> Iterator[remote.Node]:
    with (
        node(folder, trusted_network=True, max_memory=256 * MIB) as listener,
        remote.connect(listener.address, engine="nixl", trusted_network=True) as made,
    ):
        yield made


def granted(pid: int) -> list[str]:
    """The memory files that a process has mapped."""
    lines = Path("/proc", str(pid), "maps").read_text().splitlines()
    return [line.split("/memfd:")[1].split(" (")[0] for line in lines if "/memfd:" in line]


def sockets(pid: int) -> list[tuple[str, str, str]]:
    """The TCP sockets of a process: local and remote address in hexadecimal, and the state."""
    own = {os.readlink(one) for one in Path("/proc", str(pid), "fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [(row[1], row[2], row[3]) for row in rows if f"socket:[{row[9]}]" in own]


def listening(pid: int) -> list[str]:
    return [local for local, _, state in sockets(pid) if state == "0A"]


def test_files_are_read_and_written(there: remote.Node, folder: Path, big: dmabuf.Buffer) -> None:
    assert (there.transport, "both ends have NIXL" in there.reason) == ("ucx_tcp", True)
    told: list[int] = []
    with there.open("a.bin") as file:
        assert file.plan(big).transport == "ucx_tcp"
        for offset, start, size in ranges(7, 8, SIZE, big.size):
            expected = bytearray(poison(big.size))
            expected[start : start + size] = DATA[offset : offset + size]
            big.pwrite(poison(big.size), 0)
            told.clear()
            done = file.read_into(
                big, size, file_offset=offset, buffer_offset=start,
                progress=lambda moved, _: told.append(moved),
            )  # fmt: skip
            assert_same(big.pread(big.size, 0), bytes(expected), f"{offset} {start} {size}")
            assert (done.nbytes, done.copied, done.transport) == (size, size, "ucx_tcp")
            assert done.remote.nbytes == size and told == sorted(told)
            assert "NIXL over TCP" in done.reason or not size
    big.pwrite(DATA, 4096)
    with there.open("b.bin", "x") as file:
        done = file.write_from(big, SIZE, buffer_offset=4096, audit="always")
    assert (done.nbytes, done.transport) == (SIZE, "ucx_tcp") and "checksum" in done.audited
    assert_same((folder / "b.bin").read_bytes(), DATA, "the file at the node")


def test_names_are_published_and_fetched(there: remote.Node, big: dmabuf.Buffer) -> None:
    big.pwrite(DATA, 4096)
    sizes = {"large": 9 * MIB, "small": 3000, "page": 4096}
    for name, size in sizes.items():
        done = there.publish(name, big, size, buffer_offset=4096, audit="always")
        assert (done.transport, done.nbytes) == ("ucx_tcp", size)
    expected, wanted, at = bytearray(poison(big.size)), list[tuple[str, int, int]](), 1
    for name in ("small", "large", "nothing", "page", "small"):
        size = sizes.get(name, 0)
        expected[at : at + size] = DATA[:size]
        wanted.append((name, at, size + 7))
        at += size + 7
    big.pwrite(poison(big.size), 0)
    outcomes = there.fetch_many(wanted, big, audit="always")
    assert_same(big.pread(big.size, 0), bytes(expected), "the buffer after a fetch")
    assert isinstance(outcomes.pop(2), FileNotFoundError)
    assert [one.transport for one in outcomes] == ["ucx_tcp"] * 4
    big.pwrite(poison(big.size), 0)
    assert there.fetch("large", big, buffer_offset=5).nbytes == 9 * MIB
    assert_same(big.pread(9 * MIB, 5), DATA[: 9 * MIB], "one name")


def test_a_name_that_takes_several_transfers(there: remote.Node) -> None:
    content = DATA * 8  # each of NIXL's has 64 MiB at most
    with dmabuf.allocate(len(content) + 4096, exporter="memfd") as buffer:
        buffer.pwrite(content, 0)
        there.publish("huge", buffer, len(content))
        buffer.pwrite(poison(buffer.size), 0)
        done = there.fetch("huge", buffer, buffer_offset=7)
        assert (done.nbytes, done.transport) == (len(content), "ucx_tcp")
        expected = bytearray(poison(buffer.size))
        expected[7 : 7 + len(content)] = content
        assert_same(buffer.pread(buffer.size, 0), bytes(expected), "the buffer")


def test_errors_of_the_node_leave_the_connection_in_order(
    there: remote.Node, folder: Path, big: dmabuf.Buffer
) -> None:
    with there.open("a.bin") as file:
        with pytest.raises(dmabuf.ShortReadError):
            file.read_segments(big, segments([(SIZE - 100, 0, 200)]))
        file.read_segments(big, segments([(5, MIB, 100), (MIB, 3 * MIB, 9 * MIB)]), audit="always")
        assert big.pread(100, MIB) == DATA[5:105]
        assert_same(big.pread(9 * MIB, 3 * MIB), DATA[MIB : 10 * MIB], "a segment")
    with pytest.raises(FileNotFoundError):
        there.open("nothing")


def segments(triples: list[tuple[int, int, int]]) -> memoryview:
    return memoryview(array("Q", [number for one in triples for number in one]))


@pytest.mark.parametrize("local", [True, False])
def test_an_end_that_does_not_trust_the_network_refuses_tcp(folder: Path, local: bool) -> None:
    with node(folder, trusted_network=local) as listener:
        with pytest.raises(PermissionError, match="UCX over TCP obeys whoever reaches it"):
            remote.connect(listener.address, engine="nixl", trusted_network=not local)
        with remote.connect(listener.address, trusted_network=not local) as there:
            assert there.transport == "tcp"
            assert "UCX over TCP obeys whoever reaches it" in there.reason
            with there.open("a.bin") as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
                assert there.reason in file.read_into(buffer).rejected["direct"]
                assert_same(buffer.pread(SIZE, 0), DATA, "the buffer")
    assert not pumps()


@pytest.mark.parametrize("beyond", [MIB, -4096, 1 << 40])
def test_a_client_that_names_memory_it_has_not_granted(folder: Path, beyond: int) -> None:
    with (
        node(folder, trusted_network=True) as listener,
        dmabuf.allocate(MIB, exporter="memfd") as buffer,
        Peer.of(listener.address) as peer,
        contextlib.closing(Pump("tcp", "lo")) as pump,
    ):
        buffer.pwrite(poison(MIB), 0)
        region = pump.grant(buffer.fileno(), MIB, writable=True)
        assert peer.ask(op="nixl", transports=["tcp"], start=60.0) == {"transports": "tcp"}
        assert peer.ask(op="regions", metadata=pump.metadata()) == {}
        number = open_by_hand(peer, "a.bin")
        reply = peer.ask(**asked(number, [0, 8192]), addresses=[region.address + beyond])
        assert reply["broken"] and "NIXL" in reply["error"]["text"]
        assert peer.ask(op="size", file=number)["size"] == SIZE
        assert_same(buffer.pread(MIB, 0), poison(MIB), "the buffer")


def test_a_buffer_that_cannot_be_registered_goes_through_the_socket(
    there: remote.Node, big: dmabuf.Buffer
) -> None:
    big.pin_refusal = "a sentence for the test"
    with there.open("a.bin") as file:
        done = file.read_into(big)
    assert (done.transport, str(done.route)) == ("tcp", "staged")
    assert "NIXL is not used: a sentence for the test" in done.rejected["direct"]
    assert_same(big.pread(SIZE, 0), DATA, "the buffer")


def test_a_pump_has_what_was_granted_and_nothing_else(
    there: remote.Node, big: dmabuf.Buffer
) -> None:
    _, mine = pumps()
    assert not granted(mine)
    with (
        there.open("a.bin") as file,
        dmabuf.allocate("1MiB", exporter="memfd", name="granted") as buffer,
        dmabuf.allocate("1MiB", exporter="memfd", name="not granted"),
    ):
        file.read_into(buffer, "1MiB")
        assert granted(mine) == ["granted"]
        there.revoke(buffer)
        assert not granted(mine)
        buffer.pwrite(poison(MIB), 0)
        file.read_into(buffer, "1MiB", file_offset=77)
        assert_same(buffer.pread(MIB, 0), DATA[77 : 77 + MIB], "the buffer granted again")
        assert granted(mine) == ["granted"]
    assert not granted(mine)  # since it was closed
    for pid in pumps():
        for one in listening(pid):
            assert one.startswith("0100007F:"), "it listens beyond the network of the connection"
        assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
        # With its cache of registrations UCX kept revoked memory pinned, over RDMA.
        assert b"UCX_RCACHE_ENABLE=n" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.parametrize("within", [False, True])
def test_a_buffer_that_is_dropped_is_taken_from_the_node(
    there: remote.Node, big: dmabuf.Buffer, within: bool
) -> None:
    """Also where it is dropped within a request to the pump, as the garbage collector can do."""
    _, mine = pumps()
    dropped = [dmabuf.allocate("1MiB", exporter="memfd", name="dropped")]
    dropped[0].closes_unasked = True  # as Buffers are whose arrays close them

    def drop(frame: object, event: str, argument: object) -> None:
        if frame.f_code.co_qualname == "Pump._receive":
            dropped.clear()

    with there.open("a.bin") as file:
        file.read_into(dropped[0], "1MiB")
        assert granted(mine) == ["dropped"]
        if within:
            sys.setprofile(drop)
        else:
            dropped.clear()
        try:
            file.read_into(big)
        finally:
            sys.setprofile(None)
    assert not dropped and "dropped" not in granted(mine)
    assert_same(big.pread(SIZE, 0), DATA, "the other buffer")


def stop(there: remote.Node, buffer: dmabuf.Buffer) -> Callable[[], None]:
    """Stop the client's pump, so that no bytes arrive; return what waits for a read under way."""
    mine = pumps()[-1]
    [port] = [one.partition(":")[2] for one in listening(mine)]

    def connected() -> bool:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(row[2].endswith(f":{port}") and row[3] == "01" for row in rows)

    with there.open("a.bin") as file:  # grants the buffer, which needs the pump
        file.read_into(buffer, 0)
    os.kill(mine, signal.SIGSTOP)
    return partial(wait_until, connected, "the node to reach the client's pump")


def in_flight(there: remote.Node, buffer: dmabuf.Buffer) -> tuple[threading.Thread, list[object]]:
    """Start a read whose bytes cannot arrive, since the client's pump is stopped."""
    ended: list[object] = []

    def read() -> None:
        try:
            with there.open("a.bin") as file:
                ended.append(file.read_into(buffer))
        except BaseException as error:
            ended.append(error)

    wait = stop(there, buffer)
    thread = threading.Thread(target=read)
    thread.start()
    wait()
    return thread, ended


def test_a_buffer_cannot_be_closed_while_the_node_moves_it(
    there: remote.Node, big: dmabuf.Buffer
) -> None:
    thread, ended = in_flight(there, big)
    try:
        with pytest.raises(dmabuf.BusyError):
            big.close()
    finally:
        os.kill(pumps()[-1], signal.SIGCONT)
        thread.join()
    [done] = ended
    assert done.nbytes == SIZE
    assert_same(big.pread(SIZE, 0), DATA, "the buffer")


@pytest.mark.parametrize("victim", ["node's pump", "client's pump"])
@pytest.mark.parametrize("busy", [True, False])
def test_a_pump_that_is_killed(there: remote.Node, victim: str, busy: bool) -> None:
    if not busy and victim == "client's pump" and STANDS_IN:
        pytest.skip("needs nixl_cu13: the node's stand-in may report the loss first (EIO)")
    with dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer, there.open("a.bin") as file:
        if busy:
            thread, ended = in_flight(there, buffer)
        else:
            file.read_into(buffer)
        pid = pumps()[0 if victim == "node's pump" else -1]
        os.kill(pid, signal.SIGKILL)
        if busy:
            thread.join()
        else:
            status = Path(f"/proc/{pid}/stat")
            wait_until(lambda: ") Z " in status.read_text(), "the end of the pump")
            with pytest.raises(OSError) as caught:
                file.read_into(buffer)
            ended = [caught.value]
        check_ended(there, ended, buffer)
    wait_until(lambda: not pumps(), "the end of the pumps")


def check_ended(there: remote.Node, ended: list[object], buffer: dmabuf.Buffer) -> None:
    """The transfer failed, the connection is closed, and nobody writes to the buffer."""
    [error] = ended
    assert isinstance(error, dmabuf.TransferError), error
    assert isinstance(error, ConnectionResetError), error
    assert "content of the buffer's range is undefined" in str(error)
    assert there.closed
    buffer.pwrite(poison(buffer.size), 0)
    with pytest.raises(dmabuf.ClosedError):
        there.open("a.bin")
    assert_same(buffer.pread(buffer.size, 0), poison(buffer.size), "the buffer afterwards")


def test_a_node_that_is_killed(folder: Path, tmp_path: Path) -> None:
    options = ["--listen", "127.0.0.1:0", "--trusted-network", "--files", folder]
    with as_a_program(tmp_path / "s", *options) as program:
        address = program.stderr.readline().split()[2].rstrip(",")
        with (
            dmabuf.allocate(SIZE, exporter="memfd") as buffer,
            remote.connect(address, engine="nixl", trusted_network=True) as there,
        ):
            thread, ended = in_flight(there, buffer)
            program.kill()
            thread.join()
            check_ended(there, ended, buffer)
            assert not pumps()


KILLED = """
import os, sys, dmabuf
from dmabuf import remote
from dmabuf.remote.pump import Pump
node = remote.connect(sys.argv[1], engine="nixl", trusted_network=True)
buffer = dmabuf.allocate("1MiB", exporter="memfd")
node.open("a.bin").read_into(buffer, "1MiB")
children = open(f"/proc/self/task/{os.getpid()}/children").read()
print(children, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_pump_of_a_killed_client_ends(folder: Path) -> None:
    with node(folder, trusted_network=True) as listener:
        command = [sys.executable, "-c", KILLED, listener.address]
        done = subprocess.run(command, capture_output=True, text=True)
        [pump] = done.stdout.split()
        wait_until(lambda: not Path("/proc", pump).exists(), "the end of its pump")
        wait_until(lambda: not pumps(), "the end of the node's pump")


def test_an_interrupt_ends_the_pump_first(there: remote.Node, big: dmabuf.Buffer) -> None:
    wait, mine = stop(there, big), pumps()[-1]

    def interrupt() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with there.open("a.bin") as file, pytest.raises(KeyboardInterrupt):
        thread.start()
        file.read_into(big)
    thread.join()
    assert not Path("/proc", str(mine)).exists()
    assert there.closed
    big.pwrite(poison(big.size), 0)
    wait_until(lambda: not pumps(), "the end of the node's pump")
    assert_same(big.pread(big.size, 0), poison(big.size), "the buffer afterwards")


def test_the_child_of_a_fork_leaves_the_pump_alone(there: remote.Node, big: dmabuf.Buffer) -> None:
    with there.open("a.bin") as file:
        file.read_into(big)
        child = os.fork()
        if not child:
            there.close()
            os._exit(0 if there.closed else 1)
        assert os.waitpid(child, 0)[1] == 0
        big.pwrite(poison(big.size), 0)
        file.read_into(big, audit="always")
    assert_same(big.pread(SIZE, 0), DATA, "the buffer")


CLIENT = """
import hashlib, sys
import dmabuf
from dmabuf import remote
from dmabuf.remote.pump import Pump
how = {"engine": "nixl", "trusted_network": True, "timeout": float(sys.argv[2])}
with remote.connect(sys.argv[1], **how) as there, there.open("a.bin") as file:
    with dmabuf.allocate(file.size, exporter="memfd") as buffer:
        size = file.size
        try:
            done = file.read_into(buffer, size, progress=lambda *_: print("moving", flush=True))
            print(done.transport)
        except TimeoutError as error:
            print(type(error).__mro__[1].__name__, there.closed)
        print(hashlib.sha256(buffer.pread(size, 0)).hexdigest())
"""


@needs("netns")
@pytest.mark.parametrize("cut", [False, True])
def test_the_bytes_cross_a_link_that_may_be_cut(
    link: tuple[str, str],  # noqa: F811
    folder: Path,
    tmp_path: Path,
    cut: bool,
) -> None:
    inside = ["ip", "netns", "exec"]
    for name in link:
        run("ip", "-n", name, "link", "set", "lo", "up")  # UCX connects to itself
    serve = [
        *inside,
        link[0],
        sys.executable,
        "-m",
        "dmabuf.cli",
        "serve",
        "--socket",
        tmp_path / "s",
    ]
    serve += ["--listen", f"{HOST}:0", "--trusted-network", "--files", folder]
    with subprocess.Popen(list(map(str, serve)), stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stderr.readline().startswith("serving at")
            address = program.stderr.readline().split()[2].rstrip(",")
            before = received(link)
            client = [
                *inside,
                link[1],
                sys.executable,
                "-c",
                CLIENT,
                address,
                "5" if cut else "100",
            ]
            with subprocess.Popen(client, stdout=subprocess.PIPE, text=True) as moving:
                assert moving.stdout.readline() == "moving\n"
                if cut:
                    run("ip", "-n", link[0], "link", "set", "veth0", "down")
                *_, outcome, digest = moving.stdout.read().splitlines()
            assert moving.returncode == 0
            same = digest == hashlib.sha256(DATA).hexdigest()
            assert (outcome, same) == (("TransferError True", False) if cut else ("ucx_tcp", True))
            assert cut or received(link) - before > SIZE
        finally:
            if cut:
                run("ip", "-n", link[0], "link", "set", "veth0", "up")
            program.terminate()
