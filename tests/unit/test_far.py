"""Device DAX and peer memory behind made-up nodes and sysfs: what allocate() makes and refuses."""

import errno
import io
import mmap
import os
import re
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import pci
from dmabuf.memory import allocate, exporters, far
from dmabuf.store import memory as store_memory
from dmabuf.transfer import audit
from tests.support import (
    Filter,
    assert_same,
    in_child,
    pattern,
    poison,
    raises_errno,
    read_and_compare,
)

PAGE = mmap.PAGESIZE
MIB = 1 << 20
SIZE = 2 * MIB
ADDRESS = "0000:65:00.0"
PEER = f"p2pmem:{ADDRESS}"

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a DAX device of 8 MiB, a file here, and a drive with 2 MiB of memory."""
    sys = tmp_path / "sys"
    put(tmp_path / "dax0.0", poison(8 * MIB))
    put(sys / "bus/dax/drivers/device_dax/dax0.0/uevent", "")
    device = sys / "dev/char/0:0"  # the number of a file that is no device
    for name, text in {"size": f"{8 * MIB}\n", "align": f"{2 * MIB}\n"}.items():
        put(device / name, text)
    (device / "subsystem").symlink_to(sys / "bus/dax")
    memory = sys / f"bus/pci/devices/{ADDRESS}/p2pmem"
    put(memory / "allocate", poison(SIZE))
    put(memory / "available", f"{SIZE}\n")
    put(sys / "bus/pci/devices/0000:00:02.0/vendor", "")
    monkeypatch.setattr(far, "SYSFS", str(sys))
    monkeypatch.setattr(far, "DAX", str(tmp_path / "dax"))
    return tmp_path


def test_the_exporters_are_listed(machine: Path) -> None:
    assert far.names() == [f"{machine}/dax0.0", PEER]
    assert exporters.names()[-2:] == far.names()


def test_a_buffer_of_device_dax_is_zeroed_and_rounded(machine: Path) -> None:
    dax = f"{machine}/dax0.0"
    with allocate(3 * MIB, exporter=dax, name="far") as buffer:
        assert (buffer.size, buffer.exporter, buffer.name) == (4 * MIB, dax, "far")
        assert not buffer.is_dmabuf and buffer.reason.endswith("it is not a dma-buf")
        assert buffer.pin_refusal is None and buffer.registration_refusal is None
        assert_same(buffer.pread(4 * MIB, 0), bytes(4 * MIB), "zeroed")
        buffer.write(pattern(4 * MIB, 1))
    there = Path(dax).read_bytes()
    assert_same(there, pattern(4 * MIB, 1) + poison(8 * MIB)[4 * MIB :], "nothing beyond it")


def test_one_buffer_has_a_device_at_a_time(machine: Path) -> None:
    dax = f"{machine}/dax0.0"
    with allocate(1, exporter=dax):
        with raises_errno(errno.EBUSY, "another Buffer has it; share it by from_fd", filename=dax):
            allocate(1, exporter=dax)
    allocate(1, exporter=dax).close()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_descriptor_of_device_dax_is_the_whole_device_as_it_is(machine: Path, flags: int) -> None:
    fd = os.open(machine / "dax0.0", flags)
    with dmabuf.from_fd(fd) as buffer:
        os.close(fd)
        assert (buffer.size, buffer.writable()) == (8 * MIB, flags == os.O_RDWR)
        assert_same(buffer.pread(8 * MIB, 0), poison(8 * MIB), "kept")


def test_peer_memory_is_zeroed_and_not_shared(machine: Path) -> None:
    with allocate(PAGE + 1, exporter=PEER) as buffer:
        assert (buffer.size, buffer.exporter, buffer.peer) == (2 * PAGE, PEER, ADDRESS)
        assert_same(buffer.pread(2 * PAGE, 0), bytes(2 * PAGE), "zeroed")
        for attempt in (dmabuf.as_file, ForkingPickler.dumps):
            with pytest.raises(io.UnsupportedOperation, match=f"share memory of {ADDRESS}"):
                attempt(buffer)


@pytest.mark.parametrize("size", [PAGE, SIZE], ids=["small", "large"])
@pytest.mark.parametrize("verb", ["read_into", "write_from"])
@pytest.mark.parametrize("kind", ["dax", "peer"])
def test_memory_that_was_taken_away(
    machine: Path, path: Path, kind: str, verb: str, size: int
) -> None:
    """A mapping beyond the end of its file fails as one whose device is gone."""
    exporter, file = {
        "dax": (f"{machine}/dax0.0", machine / "dax0.0"),
        "peer": (PEER, machine / f"sys/bus/pci/devices/{ADDRESS}/p2pmem/allocate"),
    }[kind]
    with allocate(SIZE, exporter=exporter) as buffer, dmabuf.open(path, "r+") as other:
        os.truncate(file, 0)
        why = f"{exporter} was taken away, and its memory with it; close the buffer"
        with pytest.raises(dmabuf.RouteUnavailable) as caught:
            getattr(other, verb)(buffer, size)
        assert f"direct, staged, buffered: {why}" in str(caught.value)
        with pytest.raises(io.UnsupportedOperation, match=re.escape(why)):
            buffer.pread(1, 0)
    assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")


@pytest.mark.parametrize(
    ("exporter", "size", "number", "text"),
    [
        ("{}/dax1.0", 1, errno.ENOENT, "no such device; daxctl list shows them"),
        ("{}/dax2.0", 1, errno.ENOENT, "it is ordinary memory now; use numa_node=3"),
        ("{}/dax0.0", "1GiB", errno.ENOMEM, "allocate 1 GiB: the device has 8 MiB"),
        ("p2pmem:0000:00:02.0", 1, errno.ENOENT, "this device shares no memory; p2pmem needs"),
        (PEER, "3MiB", errno.ENOMEM, "allocate 3 MiB: the device has 2 MiB left"),
    ],
)
def test_what_is_not_there_is_refused(
    machine: Path, exporter: str, size: int | str, number: int, text: str
) -> None:
    put(machine / "sys/bus/dax/devices/dax2.0/target_node", "3\n")
    put(machine / "sys/bus/dax/drivers/kmem/dax2.0/uevent", "")
    with raises_errno(number, text):
        allocate(size, exporter=exporter.format(machine))


def test_no_permission_names_the_node(machine: Path) -> None:
    (machine / "dax0.0").chmod(0)
    seen = in_child(
        "import os, sys, dmabuf\n"
        "from dmabuf.memory import far\n"
        "far.DAX, far.SYSFS, path = sys.argv[1:]\n"
        "if os.geteuid() == 0:\n"
        "    os.chmod(os.path.dirname(path), 0o755); os.setuid(65534)\n"
        "try:\n"
        "    dmabuf.allocate(1, exporter=path)\n"
        "except PermissionError as error:\n"
        "    print(error)\n",
        far.DAX,
        far.SYSFS,
        machine / "dax0.0",
    )
    assert "allocate: permission denied; be root, or have root chown it to you" in seen


def test_wrong_words_are_refused(machine: Path) -> None:
    for address in ("65:00.0", "nvme0", "../../../etc", "0000:65:00.8"):
        with pytest.raises(ValueError, match=r"invalid exporter .* use p2pmem:0000:65:00\.0"):
            allocate(1, exporter=f"p2pmem:{address}")
    for wrong in ({"huge_pages": True}, {"numa_node": 0}):
        with pytest.raises(ValueError, match="huge_pages and numa_node are not for p2pmem:"):
            allocate(1, exporter=PEER, **wrong)
    with pytest.raises(ValueError, match="of a store: use udmabuf, memfd or a dma-heap"):
        store_memory.make(PAGE, PEER, "name", False)
    assert (machine / f"sys/bus/pci/devices/{ADDRESS}/p2pmem/allocate").read_bytes() == poison(SIZE)


# -- drives that cannot reach the memory


@pytest.fixture
def refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dmabuf.Buffer]:
    """Peer memory, and a bus where `switch` and `nvme0n1` have the place that a test gives them."""
    place = machine / f"sys/devices/pci0000:00/0000:00:03.0/0000:60:00.0/{ADDRESS}"
    place.mkdir(parents=True)
    monkeypatch.setattr(pci, "SYSFS", str(machine / "links"))
    (machine / "links/bus/pci/devices").mkdir(parents=True)
    (machine / f"links/bus/pci/devices/{ADDRESS}").symlink_to(place)
    with allocate(SIZE, exporter=PEER) as buffer:
        yield buffer


@pytest.mark.parametrize("number", [errno.EREMOTEIO, errno.EINVAL])
@pytest.mark.parametrize(
    ("place", "why"),
    [
        (
            "pci0000:00/0000:00:04.0/nvme/nvme0/nvme0n1",
            f"nvme0n1 (0000:00:04.0) and the memory of {ADDRESS} share no PCIe switch; "
            "use a drive behind the same one",
        ),
        (
            "pci0000:00/0000:00:03.0/0000:60:00.0/0000:66:00.0/nvme/nvme0/nvme0n1",
            f"nvme0n1 (0000:66:00.0) cannot access memory of {ADDRESS}: its driver cannot, "
            "or ACS of their switch forbids it",
        ),
        (
            "virtual/block/loop0",
            f"sysfs has no PCI device behind loop0, which could access memory of {ADDRESS}",
        ),
    ],
)
def test_a_drive_that_cannot_reach_the_memory_is_named(
    refused: dmabuf.Buffer,
    machine: Path,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    place: str,
    why: str,
) -> None:
    monkeypatch.setattr(audit, "device_of", lambda fd: str(machine / "sys/devices" / place))

    def judge(completion):  # type: ignore[no-untyped-def]
        return -number if completion.straight else completion.result

    with dmabuf.open(path, "r+") as file:
        with Filter(judge):
            read = read_and_compare(file, file.fileno(), refused, SIZE)
            assert (read.route, read.copied, read.rejected["direct"]) == ("staged", SIZE, why)
            with pytest.raises(dmabuf.RouteUnavailable, match=re.escape(why)) as caught:
                file.write_from(refused, SIZE, require="zero-copy")
            assert caught.value.filename == str(path) and len(why) <= 120
        with allocate(SIZE, exporter="memfd") as other:
            assert read_and_compare(file, file.fileno(), other, SIZE).route == "direct"
