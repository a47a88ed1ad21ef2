"""dmabuf.devices.cuda on the real cuda-bindings: their names, and with a libcuda of our own."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmabuf.devices import cuda
from tests.guards import needs
from tests.support import in_child, pattern
from tests.unit import fake_cuda

EXAMPLE = Path(__file__).parents[2] / "examples" / "cuda_memory.py"
SIZE = (3 << 20) + 3000


def no_driver():
    """Whether the bindings find no libcuda here."""
    return in_child("""
import cuda.bindings.driver
try:
    cuda.bindings.driver.cuInit(0)
except RuntimeError:
    print("none")
""")


@pytest.fixture
def libcuda(tmp_path, monkeypatch):
    """Have child processes find tests/unit/libcuda.c as their driver."""
    library, source = tmp_path / "libcuda.so.1", Path(__file__).with_name("libcuda.c")
    how = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *how, "-o", library, source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


@needs("cuda-bindings")
def test_what_is_called_is_there():
    from cuda.bindings import driver

    functions = set(re.findall(r'"(cu[A-Z]\w+)"', inspect.getsource(cuda)))
    assert len(functions) > 20
    for name in functions:
        assert callable(getattr(driver, name)), name
        assert callable(getattr(fake_cuda.FakeCuda, name)), name


@needs("cuda-bindings")
def test_the_fake_has_the_real_numbers():
    from cuda.bindings import driver

    for name, kind in fake_cuda.ENUMERATIONS.items():
        for member in kind:
            assert int(getattr(getattr(driver, name), member.name)) == member, member
    for name in ("CU_MEMHOSTREGISTER_DEVICEMAP", "CU_MEMHOSTREGISTER_READ_ONLY"):
        assert getattr(driver, name) == getattr(fake_cuda.FakeCuda, name)
    options = driver.CUflushGPUDirectRDMAWritesOptions
    assert int(options.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST) == 1
    ordering = driver.CUGPUDirectRDMAWritesOrdering.CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
    assert int(ordering) == 100


_ALL_OF_IT = """
import ctypes, os, sys
import dmabuf
from dmabuf.devices import cuda
from tests.resources import held
from tests.support import assert_same, pattern, poison
path, size = sys.argv[1], int(sys.argv[2])
def use():
    with open(path, "wb") as plain:
        plain.write(pattern(size, 1))
    with cuda.Device(0, block_size="256KiB", blocks=3) as gpu:
        assert gpu.name == "Test GPU 0", gpu.name
        with gpu.allocate("4MiB") as memory, dmabuf.open(path, "r+") as file:
            ctypes.memmove(memory.address, poison(4 << 20), 4 << 20)
            done = memory.read_from(file)
            assert (done.nbytes, done.route) == (size, "staged")
            expected = pattern(size, 1) + poison(4 << 20)[size:]
            assert_same(ctypes.string_at(memory.address, 4 << 20), expected, "device memory")
            ctypes.memmove(memory.address, pattern(size, 2), size)
            assert memory.write_to(file, size, sync=True).nbytes == size
            with open(path, "rb") as plain:
                assert_same(plain.read(), pattern(size, 2), "the file")
            buffer = memory.export()
            assert os.fstat(buffer.fileno()).st_size == buffer.size == 4 << 20
            assert not os.get_inheritable(buffer.fileno())
            with gpu.memory(memory.address + 4096, 4096) as part:
                assert part.read_from(file).nbytes == 4096
                place = ctypes.string_at(part.address, 4096)
                assert_same(place, pattern(size, 2)[:4096], "part of it")
            for address in (4096, memory.address + memory.size):
                try:
                    gpu.memory(address, 4096)
                except ValueError as error:
                    print(error)
        with dmabuf.allocate(8192, exporter="memfd") as buffer, gpu.register(buffer) as registered:
            buffer.pwrite(poison(8192), 0)
            assert ctypes.string_at(registered.address, 8192) == buffer.pread(8192, 0)
            try:
                gpu.register(buffer)
            except OSError as error:
                print(error)
            try:
                gpu.allocate(1 << 62)
            except OSError as error:
                print(error)
use()
before = held()  # with the default engine's ring
use()
assert held() == before
"""


@needs("cuda-bindings", "gcc")
def test_all_of_it_with_a_driver_of_our_own(libcuda, tmp_path):
    """What the bindings take and give, no fake can tell."""
    said = in_child(_ALL_OF_IT, tmp_path / "file", SIZE)
    assert said.count("CUDA has no such memory") == 4
    assert "[Errno 16] cuda:0: pin 8192 bytes of host memory: a part of this" in said
    assert "[Errno 12] cuda:0: allocate 4 EiB of device memory" in said


# -- the example


def example(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=600
    )


@needs("cuda-bindings", "gcc")
def test_the_example(libcuda, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(pattern(SIZE, 4))
    done = example(source, copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert copy.read_bytes() == pattern(SIZE, 4)
    assert done.stdout.startswith(f"Test GPU 0: {SIZE:,} bytes")
    assert done.stdout.count("route staged") == 2
    assert done.stdout.endswith(f"{copy} is byte for byte {source}\n")


@needs("cuda-bindings")
def test_the_example_without_a_driver(tmp_path):
    if not no_driver():
        pytest.skip("there is a driver here: this is for machines without")
    shutil.copy(EXAMPLE, tmp_path / "source")
    done = example(tmp_path / "source", tmp_path / "copy")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: [Errno 2] start CUDA: no NVIDIA driver")
    assert "libcuda.so.1" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "copy").exists()
