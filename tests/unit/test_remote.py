"""Files and names of other nodes, as clients use them."""

import errno
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import remote
from dmabuf.remote import Node
from tests.guards import demand
from tests.nodes import certificates, node, sizes, url_of
from tests.serving import as_a_program
from tests.support import (
    assert_same,
    drop_cache,
    in_child,
    pattern,
    poison,
    ranges,
    wait_until,
)
from tests.unit.command import dmabuf as command

SIZE = (9 << 20) + 4097
DATA = pattern(SIZE, 5)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    made.mkdir()
    (made / "a.bin").write_bytes(DATA)
    return made


@pytest.fixture
def there(folder: Path) -> Iterator[Node]:
    with node(folder) as listener, remote.connect(listener.address) as made:
        yield made


@pytest.fixture
def big() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        yield buffer


def check_reads(there: Node, big: dmabuf.Buffer, path: Path, **how: object) -> set[str]:
    """Read many ranges into poison, compare all of the buffer, and return the node's routes."""
    routes = set()
    with there.open("a.bin") as file:
        assert file.size == SIZE
        for offset, start, size in ranges(3, 12, SIZE, big.size):
            if how.get("require") == "uncached":
                with path.open("rb") as plain:
                    drop_cache(plain.fileno())
            expected = bytearray(poison(big.size))
            expected[start : start + size] = DATA[offset : offset + size]
            big.pwrite(poison(big.size), 0)
            done = file.read_into(big, size, file_offset=offset, buffer_offset=start, **how)
            assert_same(big.pread(big.size, 0), bytes(expected), f"{offset} {start} {size}")
            assert done.nbytes == done.remote.nbytes == done.copied == size
            assert done.transport == there.transport
            routes |= {str(done.remote.route)} if size else set()
    return routes


@pytest.mark.parametrize("transport", ["tcp", "unix", "tls"])
def test_a_file_is_read_and_written_over(
    transport: str, folder: Path, tmp_path: Path, big: dmabuf.Buffer
) -> None:
    if transport == "tls":
        demand("openssl")
    address = f"unix:{tmp_path / 'node.sock'}" if transport == "unix" else "127.0.0.1:0"
    known = certificates(tmp_path, "node") if transport == "tls" else None
    mine = certificates(tmp_path, "client") if transport == "tls" else None
    with (
        node(folder, address, certificates=known) as listener,
        remote.connect(listener.address, certificates=mine) as there,
    ):
        assert there.transport == transport
        if transport == "unix":
            assert stat.S_IMODE(os.stat(tmp_path / "node.sock").st_mode) == 0o600
        check_reads(there, big, folder / "a.bin")
        big.pwrite(DATA, 4096)
        with there.open("b.bin", "x") as file:
            done = file.write_from(big, SIZE, buffer_offset=4096, audit="always")
            assert (done.nbytes, done.remote.nbytes) == (SIZE, SIZE)
            assert "checksum" in done.audited
        assert_same((folder / "b.bin").read_bytes(), DATA, "the file at the node")
        there.publish("name", big, SIZE, buffer_offset=4096, audit="always")
        big.pwrite(poison(big.size), 0)
        assert there.fetch("name", big, buffer_offset=1, audit="always").nbytes == SIZE
        expected = bytearray(poison(big.size))
        expected[1 : 1 + SIZE] = DATA
        assert_same(big.pread(big.size, 0), bytes(expected), "the buffer after a fetch")
    wait_until(lambda: not listener.clients)


def test_what_is_cached_is_sent_from_there_and_uncached_is_read_past_it(
    there: Node, folder: Path, big: dmabuf.Buffer
) -> None:
    assert check_reads(there, big, folder / "a.bin") == {"buffered"}
    with there.open("a.bin") as file:
        plan = file.plan(big)
        assert (plan.route, plan.remote.route) == ("staged", "buffered")
        assert file.read_into(big).remote.copied == 0
        local = dmabuf.open(folder / "a.bin")
        with local:
            route = local.plan(big, require="any").route
        if route == "direct":
            routes = check_reads(there, big, folder / "a.bin", require="uncached")
            assert "direct" in routes
            assert "buffered" not in routes
            assert file.plan(big, require="uncached").remote.route == "direct"
            (folder / "a.bin").read_bytes()  # it is in the page cache again
            assert file.read_into(big, route="staged").remote.route == "staged"


def test_zero_copy_is_refused_at_both_ends_before_anything_is_touched(
    there: Node, folder: Path, big: dmabuf.Buffer
) -> None:
    for mode, verb in (("r", "read_into"), ("r+", "write_from")):
        with there.open("a.bin", mode) as file:
            for call in (getattr(file, verb), file.plan):
                arguments = ["write"] if call == file.plan and verb == "write_from" else []
                with pytest.raises(dmabuf.RouteUnavailable, match="use require='uncached'"):
                    call(big, *arguments, require="zero-copy")
    assert_same(big.pread(big.size, 0), poison(big.size), "the buffer")
    assert_same((folder / "a.bin").read_bytes(), DATA, "the file")


def test_a_node_without_direct_io_refuses_uncached(there: Node, big: dmabuf.Buffer) -> None:
    shared = Path("/dev/shm") / f"dmabuf-remote-{os.getpid()}"
    shared.mkdir()
    try:
        (shared / "a").write_bytes(DATA[:9000])
        with (
            remote.serving("127.0.0.1:0", shared) as listener,
            remote.connect(listener.address) as other,
            other.open("a") as file,
        ):
            with pytest.raises(dmabuf.RouteUnavailable, match="on the node"):
                file.read_into(big, require="uncached")
            assert file.read_into(big).remote.route == "buffered"
            assert_same(big.pread(9000, 0), DATA[:9000], "the buffer")
    finally:
        (shared / "a").unlink()
        shared.rmdir()


def test_segments(there: Node, folder: Path, big: dmabuf.Buffer) -> None:
    wanted = [(0, 100, 10), (5, 0, 7), (1 << 20, 4096, 3 << 20), (SIZE - 3, 9 << 20, 3), (9, 50, 0)]
    for require in ("any", "uncached"):
        expected = bytearray(poison(big.size))
        for offset, start, size in wanted:
            expected[start : start + size] = DATA[offset : offset + size]
        big.pwrite(poison(big.size), 0)
        with there.open("a.bin") as file:
            done = file.read_segments(big, array("Q", sum(wanted, ())), require=require)
        assert done.nbytes == sum(size for *_, size in wanted)
        assert_same(big.pread(big.size, 0), bytes(expected), require)

    expected = bytearray(DATA)
    for offset, start, size in wanted:
        expected[offset : offset + size] = poison(big.size)[start : start + size]
    big.pwrite(poison(big.size), 0)
    with there.open("a.bin", "r+") as file:
        with pytest.raises(ValueError, match="two segments write"):
            file.write_segments(big, array("Q", [0, 0, 5, 4, 9, 2]))
        flat = array("Q", sum((one for one in wanted if one != (5, 0, 7)), ()))
        expected[5:12] = poison(big.size)[105:110] + DATA[10:12]
        file.write_segments(big, flat, audit="always")
    assert_same((folder / "a.bin").read_bytes(), bytes(expected), "the file")


def test_destinations_that_overlap_are_not_audited(there: Node, big: dmabuf.Buffer) -> None:
    segments = array("Q", [0, 0, 100, 5000, 50, 100])
    with there.open("a.bin") as file:
        file.read_segments(big, segments)
        assert big.pread(50, 0) == DATA[:50]
        assert big.pread(50, 100) == DATA[5050:5100]
        with pytest.raises(dmabuf.RouteUnavailable, match="destinations overlap"):
            file.read_segments(big, segments, audit="always")
        assert "checksum" in file.read_into(big).audited


def test_a_read_ends_with_the_file_and_a_segment_must_not(there: Node, big: dmabuf.Buffer) -> None:
    with there.open("a.bin") as file:
        assert file.read_into(big, 100, file_offset=SIZE - 10).nbytes == 10
        assert file.read_into(big, 100, file_offset=SIZE + 10).nbytes == 0
        big.pwrite(poison(big.size), 0)
        with pytest.raises(dmabuf.ShortReadError) as caught:
            file.read_segments(big, array("Q", [0, 0, 9, SIZE - 1, 9, 2]))
        assert caught.value.index == 1
        assert_same(big.pread(big.size, 0), poison(big.size), "the buffer")
        for wrong in ({"buffer_offset": big.size}, {"file_offset": 2**63 - 10}):
            with pytest.raises(ValueError, match=r"ends past|leaves the"):
                file.read_into(big, 100, **wrong)
        assert file.read_into(big, 5).nbytes == 5


def test_the_modes_of_open(there: Node, folder: Path, big: dmabuf.Buffer) -> None:
    with pytest.raises(FileExistsError):
        there.open("a.bin", "x")
    with pytest.raises(FileNotFoundError):
        there.open("no", "r+")
    with pytest.raises(ValueError, match="invalid mode"):
        there.open("a.bin", "rw")
    with there.open("a.bin") as file, pytest.raises(OSError, match="not open for writing"):
        file.write_from(big, 1)
    with there.open("a.bin", "w") as file:
        assert file.size == 0
        with pytest.raises(OSError, match="not open for reading"):
            file.read_into(big, 1)
        file.write_from(big, 3, file_offset=2, sync=True)
    with pytest.raises(dmabuf.ClosedError):
        file.write_from(big, 3)
    assert (folder / "a.bin").read_bytes() == b"\0\0" + poison(3)


def test_nothing_outside_the_folder_is_opened(there: Node, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("../secret")
    (folder / "in").symlink_to("sub/../a.bin")
    (folder / "magic").symlink_to("/proc/self/exe")
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("../..")
    os.mkfifo(folder / "fifo")
    outside = ["../secret", str(tmp_path / "secret"), "out", "up", "magic", "sub/up/secret"]
    for path in [*outside, "sub/../../secret", "/a.bin"]:
        for mode in ("r", "r+", "w"):
            with pytest.raises(PermissionError, match="leads out of the directory"):
                there.open(path, mode)
        with pytest.raises(OSError), there.replacing(path):
            pytest.fail("a new file was made outside")
    assert (tmp_path / "secret").read_text() == "secret"
    for path, number in (("sub", errno.EISDIR), ("fifo", errno.EINVAL), ("a\0b", errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            there.open(path)
        assert caught.value.errno == number
    with there.open("in") as file:
        assert file.size == SIZE
    (folder / os.fsdecode(b"\xff \xc3\xa4")).write_bytes(b"odd")
    with there.open(os.fsdecode(b"\xff \xc3\xa4")) as file:
        assert file.size == 3
    assert sorted(os.listdir(tmp_path)) == ["secret", "served", "store.sock"]


def test_a_node_for_reading_changes_nothing(folder: Path, big: dmabuf.Buffer) -> None:
    with node(folder, read_only=True) as listener, remote.connect(listener.address) as there:
        for act in (
            lambda: there.open("a.bin", "r+"),
            lambda: there.open("new", "x"),
            lambda: there.replacing("a.bin").__enter__(),
            lambda: there.publish("name", big),
            lambda: there.remove("name"),
        ):
            with pytest.raises(OSError) as caught:
                act()
            assert caught.value.errno == errno.EROFS
        with there.open("a.bin") as file:
            assert file.read_into(big).nbytes == SIZE
    assert sizes(folder) == {"a.bin": SIZE}


def test_an_address_beyond_this_machine_needs_certificates(folder: Path) -> None:
    for address in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(PermissionError, match="certificates are needed"):
            remote.serving(address, folder).__enter__()
    with pytest.raises(PermissionError, match="certificates are needed"):
        remote.connect("192.0.2.1:7777")
    with remote.serving("localhost:0", folder) as listener:
        with remote.connect(listener.address) as there, there.open("a.bin") as file:
            assert file.size == SIZE
    for wrong in ("host", "host:", "1:2:3", "unix:", "host:99999", ":80"):
        with pytest.raises(ValueError, match="invalid address"):
            remote.connect(wrong)
    with (
        remote.serving("0.0.0.0:0", folder, trusted_network=True) as listener,
        remote.connect(f"127.0.0.1:{listener.address.rpartition(':')[2]}") as there,
    ):
        assert there.open("a.bin").size == SIZE
    with pytest.raises(ConnectionRefusedError, match="dmabuf serve --listen"):
        remote.connect(f"127.0.0.1:{listener.address.rpartition(':')[2]}")


def test_a_file_is_replaced_whole_or_not_at_all(
    there: Node, folder: Path, big: dmabuf.Buffer
) -> None:
    os.chmod(folder / "a.bin", 0o640)
    with pytest.raises(ZeroDivisionError), there.replacing("a.bin") as file:
        file.write_from(big)
        assert len(sizes(folder)) == 2
        raise ZeroDivisionError
    assert sizes(folder) == {"a.bin": SIZE}
    with there.replacing("a.bin", sync=True) as file:
        file.write_from(big, 100)
        file.flush()
        assert_same((folder / "a.bin").read_bytes(), DATA, "the old file")
    assert sizes(folder) == {"a.bin": 100}
    assert stat.S_IMODE(os.stat(folder / "a.bin").st_mode) == 0o640


def test_names_of_the_store(there: Node, folder: Path, big: dmabuf.Buffer) -> None:
    assert there.ls() == []
    done = there.publish("two", big, 5000, mode=0o640)
    there.publish("one", big, 10, buffer_offset=7)
    assert (done.nbytes, done.transport) == (5000, "tcp")
    assert [(one.name, one.length, one.mode) for one in there.ls()] == [
        ("one", 10, 0o600),
        ("two", 5000, 0o640),
    ]
    with pytest.raises(FileExistsError):
        there.publish("one", big, 1, replace=False)
    there.publish("one", big, 20)
    for name, number in (("none", errno.ENOENT), ("a/b", errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            there.publish(name, big, 1) if "/" in name else there.fetch(name, big)
        assert caught.value.errno == number
    with dmabuf.store.connect(folder.parent / "store.sock") as store:
        with store.open("one") as buffer:
            assert_same(buffer.pread(20, 0), poison(20), "the name in the node's store")
    for act in (
        lambda: there.fetch(5, big),
        lambda: there.publish("a\0", big, 1),
        lambda: there.remove(""),
        lambda: there.publish("a", big, 1, mode=0o7777),
        lambda: there.publish("a", big, 0),
    ):
        with pytest.raises((OSError, ValueError), match=r"invalid|no bytes"):
            act()
    there.remove("one")
    with pytest.raises(FileNotFoundError):
        there.remove("one")
    assert [one.name for one in there.ls()] == ["two"]


def test_many_names_are_fetched_in_order_with_an_outcome_for_each(
    there: Node, big: dmabuf.Buffer
) -> None:
    big.pwrite(DATA, 0)
    for number in range(150):
        there.publish(f"n{number}", big, 1000 + number, buffer_offset=number)
    big.pwrite(poison(big.size), 0)
    expected = bytearray(poison(big.size))
    wanted = [("none", 0, 10)]
    for number in range(150):
        start, room = 2048 * number, 2048 if number != 77 else 1000
        wanted.append((f"n{number}", start, room))
        if number != 77:
            expected[start : start + 1000 + number] = DATA[number : 1000 + 2 * number]
    outcomes = there.fetch_many(wanted, big)
    assert_same(big.pread(big.size, 0), bytes(expected), "the buffer")
    assert isinstance(outcomes.pop(0), FileNotFoundError)
    assert outcomes.pop(77).errno == errno.ENOSPC
    assert [one.nbytes for one in outcomes] == [1000 + at for at in range(150) if at != 77]
    assert there.fetch_many([], big) == []
    with pytest.raises(ValueError, match="ends past the buffer"):
        there.fetch_many([("n1", big.size, 1)], big)


def test_a_full_store_is_reported_before_the_bytes_are_sent(
    folder: Path, big: dmabuf.Buffer
) -> None:
    with node(folder, max_memory=4 << 20) as listener, remote.connect(listener.address) as there:
        there.publish("kept", big, 1 << 20)
        with pytest.raises(OSError, match="the store is full") as caught:
            there.publish("large", big)
        assert caught.value.errno == errno.ENOSPC
        assert [one.name for one in there.ls()] == ["kept"]
        there.publish("kept", big, 2 << 20)


def test_a_copy_between_a_node_and_a_file(there: Node, folder: Path, tmp_path: Path) -> None:
    with there.open("a.bin") as file:
        done = dmabuf.copy(file, tmp_path / "here", src_offset=5)
    assert_same((tmp_path / "here").read_bytes(), DATA[5:], "the copy")
    assert "at the node" in done.read.rejected["direct"]
    with there.open("back", "x") as file:
        dmabuf.copy(tmp_path / "here", file, dst_offset=3, sync=True)
    assert_same((folder / "back").read_bytes(), bytes(3) + DATA[5:], "the copy of the copy")


FORK = """
import os, sys
import dmabuf, dmabuf.remote
with dmabuf.remote.connect(sys.argv[1]) as there, there.open("a.bin") as file:
    pid = os.fork()
    if not pid:
        os._exit(0 if there.closed and file.closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print(file.size)
"""


def test_the_child_of_a_fork_has_no_connection(there: Node) -> None:
    assert int(in_child(FORK, there.address)) == SIZE


def test_import_is_cheap() -> None:
    loaded = "import sys, dmabuf; print('ssl' in sys.modules or 'dmabuf.remote' in sys.modules)"
    assert in_child(loaded).strip() == "False"


# -- the command


def test_cp_to_and_from_a_node(folder: Path, tmp_path: Path, capsys) -> None:
    with as_a_program(
        tmp_path / "s.sock", "--listen", f"unix:{tmp_path}/n.sock", "--files", folder
    ) as process:
        assert process.stderr.readline().startswith("listening at unix:")
        host = url_of(tmp_path / "n.sock")
        ended = command(capsys, "cp", "--verify", f"{host}/a.bin", tmp_path)
        assert (ended.status, ended.err) == (0, "")
        assert "at the node" in ended.out
        assert "verified: every byte is the same" in ended.out
        assert_same((tmp_path / "a.bin").read_bytes(), DATA, "the copy")
        ended = command(capsys, "cp", "--verify", "--sync", tmp_path / "a.bin", f"{host}/b.bin")
        assert (ended.status, ended.err) == (0, "")
        assert_same((folder / "b.bin").read_bytes(), DATA, "the copy at the node")
        for words, told in (
            ([f"{host}/none", "x"], "No such file"),
            (["-p", f"{host}/a.bin", tmp_path / "x"], "--preserve needs a source on this machine"),
            ([tmp_path / "a.bin", f"{host}/../x"], "leads out"),
            (["dmabuf://", "x"], "invalid URL"),
        ):
            ended = command(capsys, "cp", *words)
            assert ended.status == 1
            assert told in ended.err
        assert sizes(folder) == {"a.bin": SIZE, "b.bin": SIZE}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--files", "."], "need --listen"),
        (["--listen", "nonsense"], "invalid address 'nonsense'"),
        (["--listen", "127.0.0.1:0", "--key", "x"], "belong together"),
    ],
)
def test_options_of_serve_that_do_not_fit(words: list[str], told: str, capsys) -> None:
    ended = command(capsys, "serve", *words)
    assert ended.status == 2
    assert told in ended.err
