"""What HIP and Level Zero have beside the other vendors: their libraries, and what those lack."""

import ctypes
import errno
import os
import subprocess
import sys

import pytest

import dmabuf
from dmabuf.devices import hip, level_zero
from dmabuf.devices.gpu import Library
from dmabuf.inspect import examine_machine
from tests.guards import needs
from tests.support import assert_same, pattern, raises_errno
from tests.unit.fake_gpus import FOLDER, Hip, LevelZero, compiled
from tests.unit.test_gpu import MIB, natively

EXAMPLE = FOLDER.parents[1] / "examples" / "cuda_memory.py"
BRIDGES = pytest.mark.parametrize(("module", "library"), [(hip, "HIP"), (level_zero, "ZE")])


@BRIDGES
def test_a_machine_without_the_library(monkeypatch, module, library):
    signatures = getattr(module, library).signatures
    monkeypatch.setattr(module, library, Library("libnone.so.2 libnone.so.1", signatures))
    with raises_errno(errno.ENOENT, r"start (HIP|Level Zero): .*libnone\.so\.1.*install"):
        module.Device()


@needs("gcc")
@pytest.mark.parametrize(
    ("module", "library", "lacking"),
    [(hip, "HIP", "hipInit"), (level_zero, "ZE", "zeCommandListHostSynchronize")],
)
def test_a_library_that_lacks_a_function(monkeypatch, module, library, lacking):
    signatures = getattr(module, library).signatures
    libc = Library("libnone.so.1 libc.so.6", signatures)
    monkeypatch.setattr(module, library, libc)
    with raises_errno(errno.ENOSYS, rf"libc\.so\.6 has no {lacking}; install a later version"):
        module.Device()


@pytest.fixture
def amd(monkeypatch):
    fake = Hip(monkeypatch)
    yield fake
    fake.check()
    assert not fake.left()


@pytest.fixture
def intel(monkeypatch):
    fake = LevelZero(monkeypatch)
    yield fake
    fake.check()
    assert not fake.left()


@needs("gcc")
def test_hip_flushes_what_a_disk_wrote(amd, path):
    """By the register that RCCL writes to, too; without one nothing is read natively."""
    flushed = ctypes.c_uint32.in_dll(amd.c, "fake_flushed")
    flushed.value = 0
    moved = []
    with hip.Device() as device, device.allocate("2MiB") as memory, dmabuf.open(path) as file:
        natively(file, memory, moved)
        assert memory.read_from(file, 4096) == "record"
        assert (len(moved), flushed.value) == (1, 1)
        amd.set("flushes", 0)
        try:
            done = memory.read_from(file, 4096)
        finally:
            amd.set("flushes", 1)
        assert "neither orders nor flushes" in done.rejected[dmabuf.Route.NATIVE]
        assert len(moved) == 1


@needs("gcc")
def test_level_zero_reads_nothing_natively(intel, path):
    """Its specification does not say when kernels find what another device wrote."""
    moved = []
    with level_zero.Device() as device, device.allocate("2MiB") as memory:
        with dmabuf.open(path, "r+") as file:
            natively(file, memory, moved)
            done = memory.read_from(file, 4096)
            assert "neither orders nor flushes" in done.rejected[dmabuf.Route.NATIVE]
            assert memory.write_to(file, 4096) == "record"


@needs("gcc")
def test_hip_leaves_a_threads_current_device_as_it_was(amd):
    current = ctypes.c_int(-1)
    amd.c.hipSetDevice(3)
    with hip.Device() as device, device.allocate("2MiB"):
        amd.c.hipGetDevice(ctypes.byref(current))
        assert current.value == 3
    amd.c.hipSetDevice(0)


@needs("gcc")
def test_hip_reports_a_refused_import_as_one(amd):
    """The driver returns hipErrorOutOfMemory for whatever it cannot import."""
    with hip.Device() as device, device.allocate(2 * MIB) as memory:
        amd.fail["hipImportExternalMemory"] = 2
        with raises_errno(
            errno.EOPNOTSUPP, "import a dma-buf of 2101248 bytes: the driver refuses"
        ):
            device.register(memory.export())


@needs("gcc")
def test_an_import_that_hip_cannot_map_is_ended(amd):
    with hip.Device() as device, device.allocate(2 * MIB) as memory:
        amd.fail["hipExternalMemoryGetMappedBuffer"] = 1
        with raises_errno(errno.EINVAL, "import a dma-buf"):
            device.register(memory.export())


@needs("gcc")
def test_rocr_without_exports(amd, monkeypatch):
    monkeypatch.setattr(hip, "ROCR", Library("libnone.so.1", hip.ROCR.signatures))
    with hip.Device() as device, device.allocate(2 * MIB) as memory:
        with raises_errno(errno.EOPNOTSUPP, r"hip:0: export memory: libnone\.so\.1"):
            memory.export()


@needs("gcc")
def test_a_level_zero_driver_without_exports(intel):
    intel.set("exports", 1)
    try:
        with level_zero.Device() as device, device.allocate(2 * MIB) as memory:
            with raises_errno(errno.EOPNOTSUPP, "the driver exports no dma-bufs"):
                memory.export()
    finally:
        intel.set("exports", 2)


@needs("gcc")
def test_a_level_zero_driver_that_is_not_intels(intel):
    intel.set("has_zex", 0)
    try:
        with (
            level_zero.Device() as device,
            dmabuf.allocate(4096, exporter="memfd") as buffer,
            raises_errno(errno.ENOSYS, "no zexDriverImportExternalPointer; use Intel's"),
        ):
            device.register(buffer)
    finally:
        intel.set("has_zex", 1)


@needs("gcc")
@pytest.mark.parametrize("runtime", ["hip", "level_zero"])
def test_doctor_names_the_gpu(request, runtime):
    request.getfixturevalue({"hip": "amd", "level_zero": "intel"}[runtime])
    name = {"hip": "HIP", "level_zero": "Level Zero"}[runtime]
    found = {answer.name: answer for answer in examine_machine().devices}
    assert (found[name].ok, found[name].detail) == (True, "Fake GPU")


@needs("gcc")
@pytest.mark.parametrize(
    ("runtime", "source", "names"),
    [
        ("hip", "libamdhip64", ["libamdhip64.so.6", "libhsa-runtime64.so.1"]),
        ("level_zero", "libze_loader", ["libze_loader.so.1"]),
    ],
)
def test_the_example(tmp_path, runtime, source, names):
    """In a process of its own, which finds the libraries by their names."""
    for name in names:
        (tmp_path / name).symlink_to(compiled(source))
    path, copy = tmp_path / "source", tmp_path / "copy"
    path.write_bytes(pattern(3 * MIB + 3000, 4))
    done = subprocess.run(
        [sys.executable, EXAMPLE, path, copy, runtime],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(copy.read_bytes(), pattern(3 * MIB + 3000, 4), "the copy")
    assert done.stdout.startswith("Fake GPU: 3,148,728 bytes")
    assert done.stdout.count("route staged") == 2


@needs("level-zero-headers")
def test_the_structs_are_those_of_the_header():
    how = ["-DREAL_HEADER", "-fsyntax-only", "-Wno-unused-function", FOLDER / "libze_loader.c"]
    subprocess.run(["gcc", *how], check=True)
