"""allocate() and from_fd() with every exporter, real (memfd) or behind the fake kernel."""

import errno
import fcntl
import mmap
import os
import socket
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.memory import Slab, allocate, capacity, exporters, foreign, from_fd
from tests.support import in_child, pattern, raises_errno

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PROBE = exporters.maps_large_pages
HAS_THP = Path("/sys/kernel/mm/transparent_hugepage").is_dir()


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def no_exporters(monkeypatch, tmp_path):
    monkeypatch.setattr(exporters, "UDMABUF", str(tmp_path / "udmabuf"))
    monkeypatch.setattr(exporters, "HEAPS", str(tmp_path / "dma_heap"))
    return tmp_path


# memfd


def test_a_memfd_is_sealed_zeroed_labelled_and_close_on_exec():
    with allocate("1MiB", exporter="memfd", name="label") as buf:
        fd = buf.fileno()
        assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:label (deleted)"
        assert not os.get_inheritable(fd)
        seals = fcntl.fcntl(fd, uapi.F_GET_SEALS)
        wanted = uapi.F_SEAL_SHRINK | uapi.F_SEAL_GROW | uapi.F_SEAL_SEAL
        assert seals & wanted == wanted
        assert os.fstat(fd).st_size == buf.size == MIB
        assert buf.read() == bytes(MIB)
        assert "devices cannot import it" in buf.reason
        assert buf.pin_refusal is None


def test_the_mapping_is_populated():
    with allocate("1MiB", exporter="memfd") as buf:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        start = f"{buf.address:x}-"
        next(line for line in lines if line.startswith(start))
        resident = next(line for line in lines if line.startswith("Rss:"))
        assert int(resident.split()[1]) == 1024


def test_a_kernel_without_noexec_seal_gets_a_memfd_without(monkeypatch):
    create, flags_seen = os.memfd_create, []

    def older(name, flags):
        flags_seen.append(flags)
        if flags & uapi.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    with allocate(1, exporter="memfd"):
        pass
    assert flags_seen == [11, 3]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EINVAL])
def test_a_kernel_without_populate_is_fine(monkeypatch, error):
    monkeypatch.setattr(exporters.lib, "dmb_populate", lambda *_: -error)
    with allocate(1, exporter="memfd") as buf:
        assert buf.read() == bytes(buf.size)


@pytest.mark.parametrize("exporter", ["memfd", "auto"])
@pytest.mark.parametrize(
    ("failing", "number", "text"),
    [
        ("dmb_populate", errno.EFAULT, "populating 4 KiB"),
        ("dmb_bind_node", errno.EINVAL, "binding memory to NUMA node 0"),
    ],
)
def test_a_failure_in_the_middle_leaks_nothing(monkeypatch, exporter, failing, number, text):
    monkeypatch.setattr(capacity, "check_node", lambda node: None)
    for name in ("dmb_populate", "dmb_bind_node"):
        answer = -number if name == failing else 0
        monkeypatch.setattr(exporters.lib, name, lambda *_, answer=answer: answer)
    with raises_errno(number, text):
        allocate(PAGE, exporter=exporter, numa_node=0)


@pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0").exists(), reason="needs a kernel with CONFIG_NUMA"
)
def test_memory_on_a_node():
    with allocate("64KiB", exporter="memfd", numa_node=0) as buf:
        numa_maps = Path("/proc/self/numa_maps").read_text().splitlines()
        line = next(line for line in numa_maps if line.startswith(f"{buf.address:08x} "))
        assert "bind:0" in line


# udmabuf, behind the fake kernel


def test_one_udmabuf(kernel):
    with allocate("1MiB", name="label") as buf:
        assert (buf.exporter, buf.size, len(buf.slabs), buf.is_dmabuf) == ("udmabuf", MIB, 1, True)
        assert buf.fileno() == buf.slabs[0].fd and kernel.labels[buf.fileno()] == b"label"
        assert buf.reason == "udmabuf: any device can import it, and its pages can be pinned"
        assert buf.pin_refusal is None and buf.address is not None
        buf.write(b"through the mapping")
        assert os.pread(buf.fileno(), 19, 0) == b"through the mapping"


@pytest.mark.parametrize("limit_file", ["1\n", None])
def test_slabs_within_the_limit(kernel, tmp_path, limit_file):
    """Read from the module's parameter, or found by halving."""
    kernel.limit = MIB
    if limit_file is not None:
        (tmp_path / "size_limit_mb").write_text(limit_file)
    with allocate(MIB * 7 // 2, exporter="udmabuf", name="n") as buf:
        offset = 0
        for slab in buf.slabs:
            assert slab.offset == offset and slab.size <= MIB and slab.size % PAGE == 0
            offset += slab.size
        assert offset == buf.size == MIB * 7 // 2
        assert f"{len(buf.slabs)} slabs, since this kernel caps a udmabuf at" in buf.reason
        assert f"echo 1024 > {tmp_path}/size_limit_mb" in buf.reason
        assert {kernel.labels[slab.fd] for slab in buf.slabs} == {b"n"}
        with pytest.raises(OSError, match=r"4 dma-bufs with a descriptor each: use \.slabs"):
            buf.fileno()
        assert "slabs=4" in repr(buf)


@pytest.mark.parametrize("text", ["0", "-1", "2047", "none"])
def test_a_limit_that_is_none(kernel, tmp_path, text):
    (tmp_path / "size_limit_mb").write_text(text)
    with allocate("4MiB", exporter="udmabuf") as buf:
        assert len(buf.slabs) == 1


def test_slabs_are_of_a_gibibyte_at_most(kernel, monkeypatch):
    monkeypatch.setattr(exporters, "_LARGEST_SLAB", MIB)
    with allocate("3MiB", exporter="udmabuf") as buf:
        assert [slab.size for slab in buf.slabs] == [MIB] * 3
        assert "cannot be used everywhere" in buf.reason


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EPERM])
def test_a_udmabuf_that_fails_in_the_middle_leaks_nothing(kernel, number):
    kernel.limit, kernel.creates_left, kernel.create_error = PAGE, 3, number
    with pytest.raises(OSError, match="making a udmabuf of 4 KiB") as error:
        allocate(10 * PAGE, exporter="udmabuf")
    assert error.value.errno == number and error.value.filename == os.devnull


def test_a_udmabuf_that_is_refused_whatever_its_size(kernel):
    kernel.limit = 0
    with raises_errno(errno.EINVAL, "making a udmabuf of 4 KiB: refused"):
        allocate(4 * PAGE, exporter="udmabuf")


def test_a_missing_udmabuf_says_what_to_do(no_exporters):
    with pytest.raises(FileNotFoundError, match="CONFIG_UDMABUF") as error:
        allocate(1, exporter="udmabuf")
    assert error.value.filename == str(no_exporters / "udmabuf")


@pytest.mark.parametrize("faults", [0, 63, 64, 70])
def test_the_probe_of_large_pages_counts_faults(kernel, monkeypatch, faults):
    """One fault for each of its 64 pages means that udmabuf maps large pages wrongly."""
    counts = iter([1000, 1000 + faults])
    usage = type("Usage", (), {"ru_minflt": property(lambda _: next(counts))})
    monkeypatch.setattr(exporters.resource, "getrusage", lambda _who: usage())
    monkeypatch.setattr(exporters, "maps_large_pages", PROBE)
    PROBE.cache_clear()
    assert exporters.maps_large_pages() == (faults < 64)
    assert exporters.maps_large_pages() == (faults < 64), "it asks once"
    PROBE.cache_clear()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_probe_that_could_not_be_made_is_made_again(kernel, monkeypatch, number):
    monkeypatch.setattr(exporters, "maps_large_pages", PROBE)
    PROBE.cache_clear()
    kernel.creates_left, kernel.create_error = 0, number
    with raises_errno(number):
        allocate(1, exporter="udmabuf")
    kernel.creates_left = -1
    with allocate(1, exporter="udmabuf"):
        pass
    PROBE.cache_clear()


def test_huge_pages_that_importers_would_see_wrong(kernel, monkeypatch):
    monkeypatch.setattr(exporters, "maps_large_pages", lambda: False)
    monkeypatch.setattr(capacity, "huge_page_size", lambda wanted, **_: 2 * MIB if wanted else None)
    monkeypatch.setattr(exporters, "make_memory", lambda *_, **__: pytest.fail("tried"))
    with raises_errno(errno.EOPNOTSUPP, "may get wrong bytes", filename=exporters.UDMABUF) as error:
        allocate(1, exporter="udmabuf", huge_pages=True)
    assert 'exporter="memfd"' in error.value.strerror


@pytest.mark.parametrize("right", [True, False])
def test_transparent_huge_pages_are_kept_out_where_they_would_be_wrong(kernel, monkeypatch, right):
    monkeypatch.setattr(exporters, "maps_large_pages", lambda: right)
    for exporter in ("udmabuf", "memfd"):
        with allocate(MIB, exporter=exporter) as buf:
            smaps = Path("/proc/self/smaps").read_text()
            flags = smaps[smaps.index(f"{buf.address:x}-") :].partition("VmFlags:")[2]
            kept_out = exporter == "udmabuf" and not right and HAS_THP
            assert ("nh" in flags.partition("\n")[0].split()) == kept_out


@pytest.mark.parametrize("answer", [None, -errno.EINVAL, -errno.ENOMEM])
def test_large_memory_is_collapsed_where_large_pages_are_right(kernel, monkeypatch, answer):
    """And is the same memory where the kernel refuses, or has too few of them."""

    def collapse(address, size):
        asked.append(size)
        return real(address, size) if answer is None else answer

    real, size = exporters.lib.dmb_collapse, 2 * exporters.LARGE_PAGE + PAGE
    asked: list[int] = []
    monkeypatch.setattr(exporters.lib, "dmb_collapse", collapse)
    monkeypatch.setattr(exporters, "maps_large_pages", lambda: right)
    for exporter, right in (("memfd", False), ("udmabuf", True), ("udmabuf", False)):
        with allocate(exporters.LARGE_PAGE - PAGE, exporter=exporter):
            assert not asked
        with allocate(size, exporter=exporter) as buf, buf.map("r+") as view:
            assert asked == [size] * (exporter == "memfd" or right)
            assert buf.size == len(view) == size and view == bytes(size)
            view[:] = bytes(range(256)) * (size // 256)
            assert os.pread(buf.slabs[0].fd, size, 0) == view
        asked.clear()


def test_memory_that_cannot_be_mapped_where_large_pages_may_be(monkeypatch):
    """As under RLIMIT_DATA, which counts what is mapped there first: it is mapped as any."""
    monkeypatch.setattr(exporters.lib, "dmb_map_over", lambda *_: -errno.ENOMEM)
    with allocate(4 * MIB, exporter="memfd") as buf:
        buf.pwrite(bytes(range(256)) * 16384, 0)
        assert buf.pread(4 * MIB, 0) == bytes(range(256)) * 16384


# auto


def test_auto_without_udmabuf_is_memfd_and_says_why(no_exporters):
    with allocate(1) as buf:
        assert buf.exporter == "memfd"
        assert f"{no_exporters}/udmabuf: no such device" in buf.reason
        assert "modprobe udmabuf" in buf.reason


def test_auto_with_a_udmabuf_that_is_refused_is_memfd_and_says_why(kernel):
    kernel.limit = 0
    with allocate(1) as buf:
        assert buf.exporter == "memfd" and "making a udmabuf of 4 KiB: refused" in buf.reason


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_auto_does_not_hide_what_another_exporter_would_not_cure(kernel, number):
    kernel.creates_left, kernel.create_error = 0, number
    with raises_errno(number):
        allocate(1)


# heaps, behind the fake kernel


def test_a_heap(kernel):
    with allocate(5000, exporter="system", name="label") as buf:
        assert (buf.exporter, buf.size, buf.is_dmabuf) == ("system", 2 * PAGE, True)
        assert kernel.labels[buf.fileno()] == b"label"
        assert "O_DIRECT there is EFAULT" in buf.pin_refusal
        buf.write(b"x")
        assert buf.pread(2, 0) == b"x\0"


def test_heaps_that_are_not_there(no_exporters, kernel, tmp_path):
    with pytest.raises(
        ValueError, match="'cma': use one of this machine's: auto, udmabuf, memfd, system"
    ):
        allocate(1, exporter="cma")
    with pytest.raises(ValueError, match="invalid exporter"):
        allocate(1, exporter="../heaps/system")
    (tmp_path / "heaps" / "system").unlink()
    with pytest.raises(FileNotFoundError, match="CONFIG_DMABUF_HEAPS_SYSTEM") as error:
        allocate(1, exporter="system")
    assert error.value.filename == str(tmp_path / "heaps" / "system")
    assert exporters.names() == ["udmabuf", "memfd"]


def test_a_heap_chooses_its_own_pages(kernel, tmp_path):
    with pytest.raises(ValueError, match="a dma-heap chooses its own pages"):
        allocate(1, exporter="system", huge_pages=True)
    (tmp_path / "heaps" / "cma").touch()
    with pytest.raises(ValueError, match=r"numa_node is for .* heap 'cma' chooses its own pages"):
        allocate(1, exporter="cma", numa_node=0)


def test_a_heap_too_is_asked_for_no_more_than_there_is(kernel):
    with raises_errno(errno.ENOMEM, "not tried: 1 PiB"):
        allocate("1PiB", exporter="system")


# What was asked for


@pytest.mark.parametrize("exporter", ["auto", "memfd", "udmabuf", "system"])
def test_bad_requests_are_refused_before_anything_is_made(kernel, exporter):
    kernel.create_error = errno.EIO
    kernel.creates_left = 0
    for size, error, text in [
        (0, ValueError, "invalid size 0"),
        ("0B", ValueError, "invalid size 0"),
        (-1, ValueError, "use 0 or more bytes"),
        ("much", ValueError, "invalid size"),
        (2**63, ValueError, "use at most"),
        (1.5, TypeError, "must be an int"),
        (True, TypeError, "must be an int"),
    ]:
        with pytest.raises(error, match=text):
            allocate(size, exporter=exporter)
    for name in ("", "x" * 32, "ü" * 16, "a\0b"):
        with pytest.raises(ValueError, match="label is 1 to 31 bytes"):
            allocate(1, exporter=exporter, name=name)
    with pytest.raises(TypeError, match="name must be a str"):
        allocate(1, exporter=exporter, name=b"x")
    with pytest.raises(TypeError, match="numa_node must be an int"):
        allocate(1, exporter=exporter, numa_node="0")


def test_a_name_of_31_bytes_fits(kernel):
    with allocate(1, name="ü" * 15 + "x") as buf:
        assert kernel.labels[buf.fileno()] == ("ü" * 15 + "x").encode()


# How much there is: on made-up machines


def machine(tmp_path, files):
    for path, text in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return str(tmp_path)


MEMINFO = "MemTotal: 8388608 kB\nMemAvailable:    4194304 kB\nHugepagesize:       2048 kB\n"
V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "99\n",
    "sys/fs/cgroup/a/memory.max": f"{1 << 30}\n",
    "sys/fs/cgroup/a/memory.current": f"{768 << 20}\n",
    "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {128 << 20}\nactive_file {128 << 20}\n",
}
V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "5:cpu:/\n4:memory:/host/path/pod\n0::/\n",
    "proc/self/mountinfo": (
        "30 23 0:26 / /sys rw - sysfs sysfs rw\n"
        "31 30 0:27 /host/path /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    ),
    "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": f"{512 << 20}\n",
    "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": f"{256 << 20}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
}


@pytest.mark.parametrize(
    ("files", "most", "where"),
    [
        ({"proc/meminfo": MEMINFO}, 4 << 30, "MemAvailable in /proc/meminfo"),
        (V2, 512 << 20, "the memory cgroup at /sys/fs/cgroup/a "),
        (V1, 256 << 20, "the memory cgroup at /sys/fs/cgroup/memory/pod "),
        (
            V1 | {"proc/self/cgroup": "4:memory:/elsewhere\n"},
            4 << 30,
            "MemAvailable in /proc/meminfo",
        ),
    ],
)
def test_the_least_of_what_is_available_and_the_cgroups_allow(tmp_path, files, most, where):
    root = machine(tmp_path, files)
    capacity.check_memory(most, root=root)
    with raises_errno(errno.ENOMEM, where) as error:
        capacity.check_memory(most + 1, root=root)
    assert f"({most + 1} bytes)" in str(error.value) and f"({most} bytes)" in str(error.value)


def test_a_node_has_its_own_limit(tmp_path):
    node = "Node 1 MemTotal: 9999 kB\nNode 1 MemFree: 1024 kB\nNode 1 Inactive(file): 1024 kB\n"
    files = {"proc/meminfo": MEMINFO, "sys/devices/system/node/node1/meminfo": node}
    root = machine(tmp_path, files)
    capacity.check_memory(2 * MIB, 1, root=root)
    with pytest.raises(OSError, match=r"2 MiB .* that NUMA node 1 allows"):
        capacity.check_memory(2 * MIB + 1, 1, root=root)


def test_a_machine_that_tells_nothing_refuses_nothing(tmp_path):
    capacity.check_memory(1 << 60, root=str(tmp_path))


def test_nodes_that_have_memory(tmp_path):
    root = machine(tmp_path, {"sys/devices/system/node/has_memory": "0-1,3\n"})
    for node in (0, 1, 3):
        capacity.check_node(node, root=root)
    for node in (2, 4, -1):
        with pytest.raises(ValueError, match=f"invalid numa_node {node}: .* 0, 1, 3"):
            capacity.check_node(node, root=root)
    with pytest.raises(ValueError, match="no CONFIG_NUMA"):
        capacity.check_node(0, root=str(tmp_path / "none"))


def huge(size_kb, **numbers):
    folder = f"sys/kernel/mm/hugepages/hugepages-{size_kb}kB"
    return {f"{folder}/{key}": f"{value}\n" for key, value in numbers.items()}


HUGE = {"proc/meminfo": MEMINFO} | huge(
    2048, nr_hugepages=10, free_hugepages=6, resv_hugepages=1, nr_overcommit_hugepages=3
)
HUGE |= huge(1048576, nr_hugepages=0, free_hugepages=0)


def test_sizes_of_huge_pages(tmp_path):
    root = machine(tmp_path, HUGE)
    assert capacity.huge_page_size(False, root=root) is None
    assert capacity.huge_page_size(True, root=root) == 2 * MIB
    assert capacity.huge_page_size("2MiB", root=root) == 2 * MIB
    assert capacity.huge_page_size("1GiB", root=root) == 1 << 30
    with pytest.raises(
        ValueError, match="no huge pages of 16 MiB; use a size that it has: 2 MiB, 1 GiB"
    ):
        capacity.huge_page_size("16MiB", root=root)
    with pytest.raises(ValueError, match="use a size that it has: none"):
        capacity.huge_page_size(True, root=str(tmp_path / "none"))


def test_free_huge_pages_are_counted(tmp_path):
    root = machine(tmp_path, HUGE)
    capacity.check_huge_pages(16 * MIB, 2 * MIB, root=root)
    with raises_errno(errno.ENOMEM, "9 huge pages of 2 MiB are needed and 8 are free") as error:
        capacity.check_huge_pages(16 * MIB + 1, 2 * MIB, root=root)
    assert "echo 11 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages" in str(error.value)


def test_free_huge_pages_of_a_node_are_counted(tmp_path):
    node = "sys/devices/system/node/node1/hugepages/hugepages-2048kB"
    files = {f"{node}/free_hugepages": "2\n", f"{node}/nr_hugepages": "2\n"}
    root = machine(tmp_path, HUGE | files)
    capacity.check_huge_pages(4 * MIB, 2 * MIB, 1, root=root)
    with pytest.raises(OSError, match=f"on NUMA node 1 and 2 are free .* echo 3 > /{node}/"):
        capacity.check_huge_pages(6 * MIB, 2 * MIB, 1, root=root)


def test_too_much_is_refused_before_it_is_tried(no_exporters, monkeypatch):
    monkeypatch.setattr(os, "memfd_create", lambda *_: pytest.fail("tried"))
    for exporter in ("auto", "memfd"):
        with raises_errno(errno.ENOMEM, "not tried: 1 PiB"):
            allocate("1PiB", exporter=exporter)


# from_fd


@pytest.fixture
def dmabufs(kernel, monkeypatch, tmp_path):
    """Makes descriptors of memfds that fdinfo tells to be dma-bufs."""
    (tmp_path / "fdinfo").mkdir()
    monkeypatch.setattr(foreign, "FDINFO", str(tmp_path / "fdinfo"))
    real_dup = fcntl.fcntl
    identity = {}

    def dup(fd, command, *args):
        result = real_dup(fd, command, *args)
        if command == fcntl.F_DUPFD_CLOEXEC and fd in identity:
            (tmp_path / "fdinfo" / str(result)).write_text(identity[fd])
        return result

    monkeypatch.setattr(foreign.fcntl, "fcntl", dup)
    made = []

    def make(size=2 * PAGE, mode=os.O_RDWR, label="theirs"):
        first = os.memfd_create("theirs")
        os.ftruncate(first, size)
        fd = os.open(f"/proc/self/fd/{first}", mode | os.O_CLOEXEC)
        os.close(first)
        made.append(fd)
        text = f"pos:\t0\nflags:\t02\nsize:\t{size}\ncount:\t1\nexp_name:\ttheirs\n"
        identity[fd] = text + (f"name:\t{label}\n" if label else "")
        return fd

    yield make
    for fd in made:
        os.close(fd)


def test_from_fd(dmabufs):
    fd = dmabufs()
    os.pwrite(fd, b"their bytes", 0)
    with from_fd(fd) as buf:
        assert (buf.exporter, buf.name, buf.size) == ("theirs", "theirs", 2 * PAGE)
        assert buf.fileno() != fd and not os.get_inheritable(buf.fileno())
        assert buf.reason == f"made from descriptor {fd}, a dma-buf of theirs"
        assert buf.read(11) == b"their bytes" and buf.mode == "rb+"
        assert "a dma-buf from theirs has no pages to pin" in buf.pin_refusal
    os.fstat(fd)


def test_from_fd_takes_what_has_a_fileno_and_relabels(dmabufs, kernel):
    with from_fd(dmabufs(label=None)) as buf, from_fd(buf, name="ours") as twin:
        assert buf.name is None and twin.name == "ours"
        assert kernel.labels[twin.fileno()] == b"ours"


def test_a_label_cannot_pose_as_an_exporter(dmabufs):
    with from_fd(dmabufs(label="x\nexp_name:\tsystem")) as buf:
        assert (buf.exporter, buf.name) == ("theirs", "x\nexp_name:\tsystem")


def test_a_read_only_descriptor_makes_a_read_only_buffer(dmabufs):
    with from_fd(dmabufs(mode=os.O_RDONLY)) as buf:
        assert buf.readable() and not buf.writable() and buf.mode == "rb"
        assert buf.read(2) == b"\0\0"
        for call in (
            lambda: buf.write(b"x"),
            lambda: buf.pwritev([b"x"], 0),
            lambda: buf.truncate(buf.size),
        ):
            with pytest.raises(OSError, match="not writable: its descriptor is read-only"):
                call()
        for mode in ("w", "r+"):
            with pytest.raises(PermissionError, match="needs O_RDWR") as error:
                buf.map(mode).__enter__()
            assert error.value.errno == errno.EACCES
            with pytest.raises(PermissionError, match="needs O_RDWR"):
                buf.open(mode)
        with buf.map("r") as view, buf.open() as window:
            assert view.readonly and window.mode == "rb"
        assert buf.view(0, 1).readonly
        assert buf.address is not None


def test_memory_that_the_cpu_cannot_map(dmabufs, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    fd = dmabufs()
    monkeypatch.setattr(foreign.mmap, "mmap", refuse)
    with from_fd(fd) as buf:
        assert not buf.readable() and not buf.writable() and buf.mode == ""
        assert buf.address is None and buf.fileno() >= 0 and buf.size == 2 * PAGE
        assert buf.pin_refusal == buf.map_refusal
        for call in (
            lambda: buf.read(1),
            lambda: buf.write(b"x"),
            lambda: buf.pread(1, 0),
            lambda: buf.map().__enter__(),
            buf.open,
            lambda: buf.view(0, 1),
        ):
            with pytest.raises(OSError, match="the CPU cannot map this dma-buf of theirs"):
                call()


def test_a_mapping_that_fails_for_another_reason_is_its_own_error(dmabufs, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    fd = dmabufs()
    monkeypatch.setattr(foreign.mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        from_fd(fd)


def test_what_is_no_dma_buf_is_told_what_it_is(tmp_path):
    (tmp_path / "file").touch()
    ends = os.pipe()
    sock = socket.socket()
    with (tmp_path / "file").open() as file, sock:
        for fd, text in [
            (file, "a regular file"),
            (ends[0], "a pipe"),
            (sock, "a socket"),
        ]:
            with raises_errno(errno.EINVAL, f"is not a dma-buf but {text}"):
                from_fd(fd)
    for end in ends:
        os.close(end)
    null = os.open(os.devnull, os.O_RDWR)
    with pytest.raises(OSError, match="a character device"):
        from_fd(null)
    os.close(null)
    with raises_errno(errno.EBADF, f"descriptor {null}: Bad file descriptor"):
        from_fd(null)
    for wrong in (True, "3", None):
        with pytest.raises(TypeError):
            from_fd(wrong)
    for wrong in (-1, 2**40):
        with raises_errno(errno.EBADF, f"descriptor {wrong}: Bad"):
            from_fd(wrong)
    with pytest.raises(ValueError, match="label is 1 to 31"):
        from_fd(0, name="x" * 40)


def test_without_proc_a_dma_buf_is_known_by_what_it_does(dmabufs, kernel, monkeypatch, tmp_path):
    fd = dmabufs()
    monkeypatch.setattr(foreign, "FDINFO", str(tmp_path / "nowhere"))
    with from_fd(fd) as buf:
        assert buf.exporter == "unknown"
    assert kernel.calls == []
    kernel.undirected_sync_error = errno.ENOTTY
    with from_fd(fd) as buf:
        assert buf.exporter == "memfd" and not buf.is_dmabuf


def test_from_fd_of_a_memfd():
    with allocate(8192, exporter="memfd", name="ours") as buffer:
        with from_fd(buffer) as again:
            again.pwrite(b"shared", 0)
            assert (again.name, again.exporter, again.is_dmabuf) == ("ours", "memfd", False)
        assert buffer.pread(6, 0) == b"shared"
        fd = os.open(f"/proc/self/fd/{buffer.fileno()}", os.O_RDONLY)
        with from_fd(fd, name="label") as again:
            assert again.mode == "rb" and again.name == "label"
        os.close(fd)


@pytest.mark.parametrize("seals", [0, uapi.F_SEAL_WRITE, uapi.F_SEAL_FUTURE_WRITE])
def test_from_fd_of_a_memfd_of_another_program(tmp_path, seals):
    (tmp_path / "file").write_bytes(pattern(5000, 1))
    fd = os.memfd_create("gst-shm", os.MFD_ALLOW_SEALING)
    with pytest.raises(OSError, match="it is empty"):
        from_fd(fd)
    os.truncate(fd, 5000)
    fcntl.fcntl(fd, uapi.F_ADD_SEALS, seals)
    with from_fd(fd) as buffer, dmabuf.open(tmp_path / "file") as file:
        assert buffer.size == 5000 and "nobody may shrink it" in buffer.reason
        assert buffer.writable() == (not seals)
        if not seals:
            assert file.read_into(buffer).nbytes == 5000
            assert buffer[:] == pattern(5000, 1)
    os.close(fd)


def test_a_device_node_is_asked_nothing(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(foreign, "FDINFO", str(tmp_path / "nowhere"))
    monkeypatch.setattr(uapi, "ioctl", lambda *_: pytest.fail("asked"))
    null = os.open(os.devnull, os.O_RDWR)
    with pytest.raises(OSError, match="a character device"):
        from_fd(null)
    os.close(null)


def test_several_slabs_are_one_mapping():
    fds = [os.memfd_create("slab") for _ in range(3)]
    sizes = [8192, 4096, 12288]
    slabs, offset = [], 0
    for fd, size in zip(fds, sizes, strict=True):
        os.truncate(fd, size)
        os.pwrite(fd, bytes([fd]) * size, 0)
        slabs.append(Slab(fd, offset, size))
        offset += size
    for writable in (True, False):
        memory, refusal = foreign.map_slabs(slabs, "test", writable=writable)
        assert refusal is None
        with memory:
            assert memory[:] == b"".join(bytes([fd]) * size for fd, size in zip(fds, sizes))  # noqa: B905
            if writable:
                memory[8192] = 7
                assert os.pread(fds[1], 2, 0) == bytes([7, fds[1]])
                memory[8192] = fds[1]
            else:
                with pytest.raises(TypeError):
                    memory[0] = 1
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("exporter", ["memfd", "auto"])
def test_a_limit_of_the_file_size_is_named(exporter):
    said = in_child(
        """
import resource, sys, dmabuf
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    dmabuf.allocate("2MiB", exporter=sys.argv[1])
except OSError as error:
    print(error.errno, error.strerror)
dmabuf.allocate("1MiB", exporter=sys.argv[1]).close()
""",
        exporter,
    )
    assert said.startswith(f"{errno.EFBIG} allocate 2 MiB of shared memory: RLIMIT_FSIZE")
