"""What CUDA has beside the other vendors, over a fake driver: see test_gpu.py for the rest."""

import errno
import io

import pytest

import dmabuf
from dmabuf.devices import cuda
from tests.resources import held
from tests.support import poison, raises_errno
from tests.unit.fake_cuda import CUdevice_attribute, CUresult, FakeCuda, install
from tests.unit.fake_device import BASE

MIB = 1 << 20
SIZE = 3 * MIB + 3000
ILLEGAL = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS


def attribute(name):
    return CUdevice_attribute[f"CU_DEVICE_ATTRIBUTE_{name}"]


@pytest.fixture
def driver(monkeypatch):
    """The fake; at the end nothing of it is left, and nothing was harmed."""
    before = held()
    fake = FakeCuda()
    fake.gpu.memory[:] = poison(len(fake.gpu.memory))
    install(monkeypatch, fake)
    yield fake
    fake.gpu.check()
    assert fake.left() == {}
    assert held() == before


@pytest.fixture
def gpu(driver):
    with cuda.Device(block_size="256KiB", blocks=3) as gpu:
        yield gpu


@pytest.mark.parametrize(
    ("refusal", "number", "text"),
    [
        (RuntimeError("Failed to dlopen libcuda.so.1"), errno.ENOENT, r"no NVIDIA driver .*dlopen"),
        (CUresult.CUDA_ERROR_STUB_LIBRARY, errno.ENOSYS, "LD_LIBRARY_PATH"),
        (CUresult.CUDA_ERROR_NO_DEVICE, errno.ENODEV, "see nvidia-smi"),
        (CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, errno.ENOSYS, "restart after an upgrade"),
        (ILLEGAL, errno.EIO, r"illegal address \(CUDA_ERROR_ILLEGAL_ADDRESS\)"),
    ],
)
def test_a_driver_that_does_not_start(monkeypatch, refusal, number, text):
    fake = FakeCuda()
    fake.fail["cuInit"] = refusal
    install(monkeypatch, fake)
    with raises_errno(number, text):
        cuda.Device()


@pytest.mark.parametrize("missing", ["the driver's function", "the binding's function"])
def test_an_old_driver_and_old_bindings(driver, gpu, monkeypatch, missing):
    if missing == "the driver's function":
        driver.fail["cuMemAlloc"] = RuntimeError('Function "cuMemAlloc_v2" not found')
    else:
        monkeypatch.delattr(FakeCuda, "cuMemAlloc")
    with raises_errno(errno.ENOSYS, "cuMemAlloc"):
        gpu.allocate("2MiB")


@pytest.fixture
def small_slabs(monkeypatch):
    assert cuda.SLAB == 1 << 30
    monkeypatch.setattr(cuda, "SLAB", 2 * MIB)


def test_an_export_has_a_slab_for_each_gib(driver, small_slabs):
    with cuda.Device() as gpu, gpu.allocate("6MiB") as memory:
        buffer = memory.export()
        places = [(at * MIB, 2 * MIB) for at in (0, 2, 4)]
        assert [slab[1:] for slab in buffer.slabs] == places
        exported = [call[1:3] for call in driver.calls if "HandleForAddress" in call[0]]
        assert exported == [(BASE + at, size) for at, size in places]
        assert buffer.reason == "memory of Fake GPU, in dma-bufs of at most 2 MiB"
        with pytest.raises(io.UnsupportedOperation, match="no single mapping"), buffer.map():
            pass


def test_memory_that_cannot_be_exported(driver, gpu):
    with gpu.allocate("2MiB") as memory:
        driver.attributes[attribute("DMA_BUF_SUPPORTED")] = 0
        with raises_errno(errno.EOPNOTSUPP, r"DMA_BUF_SUPPORTED is 0; .*open kernel"):
            memory.export()
        driver.attributes[attribute("DMA_BUF_SUPPORTED")] = 1
    for address, size in ((BASE + 512, 4096), (BASE + 4096, 5000)):
        driver.allocated = {address: size}  # by another owner, within a page
        with gpu.memory(address, size) as memory:
            with raises_errno(errno.EINVAL, "begin and end at pages"):
                memory.export()
    driver.allocated.clear()


@pytest.mark.parametrize("number", [1, 3])
def test_an_export_that_fails_leaves_no_descriptor(driver, small_slabs, monkeypatch, number):
    before = held()
    real = FakeCuda.cuMemGetHandleForAddressRange
    left = [number]

    def failing(self, *arguments):
        left[0] -= 1
        return (CUresult.CUDA_ERROR_NOT_SUPPORTED,) if not left[0] else real(self, *arguments)

    monkeypatch.setattr(FakeCuda, "cuMemGetHandleForAddressRange", failing)
    with cuda.Device() as gpu, gpu.allocate("6MiB") as memory:
        with raises_errno(errno.EOPNOTSUPP, "export memory"):
            memory.export()
        assert held() == before


@pytest.mark.parametrize(("ordering", "options"), [(100, 0), (0, 1), (0, 0)])
def test_native_where_the_kernel_has_it(driver, gpu, path, ordering, options):
    """Writes of another device are flushed for kernels, unless the hardware orders them."""
    driver.attributes[attribute("GPU_DIRECT_RDMA_WRITES_ORDERING")] = ordering
    driver.attributes[attribute("GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS")] = options
    moved = []
    with gpu.allocate("4MiB") as memory, dmabuf.open(path, "r+") as file:
        plan, read_into = file.plan, file.read_into
        file.plan = lambda *args, **how: how["route"] == "native" or plan(*args, **how)

        def native(buffer, size, **how):
            if how["route"] != "native":
                return read_into(buffer, size, **how)
            assert buffer is memory.export()
            driver.calls.append(("native",))
            moved.append((size, how))
            return "record"

        file.read_into = file.write_from = native
        if not (ordering or options):
            done = memory.read_from(file, MIB)
            assert "neither orders" in done.rejected[dmabuf.Route.NATIVE]
        else:
            assert memory.read_from(file, MIB, file_offset=4096, buffer_offset=8192) == "record"
            place = {"file_offset": 4096, "buffer_offset": 8192, "route": "native"}
            assert moved == [(MIB, place)]
            names = [call[0] for call in driver.calls]
            at = names.index("native")
            assert names[:at].count("cuEventQuery") == 1  # of the caller's stream
            assert ("cuFlushGPUDirectRDMAWrites" in names[at:]) == (not ordering)
            assert "cuFlushGPUDirectRDMAWrites" not in names[:at]
            assert memory.read_from(file, file_offset=MIB) == "record"
            assert moved[-1][0] == SIZE - MIB  # what the file has
        calls = len(driver.calls)
        assert memory.write_to(file, MIB, sync=True) == "record"
        assert moved[-1][1]["sync"] is True
        assert not any("Flush" in call[0] for call in driver.calls[calls:])


def test_a_read_only_buffer(driver, gpu, monkeypatch):
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        monkeypatch.setattr(buffer, "writable", lambda: False)
        with raises_errno(errno.EOPNOTSUPP, "needs writable memory"):
            gpu.register(buffer)
        driver.attributes[attribute("READ_ONLY_HOST_REGISTER_SUPPORTED")] = 1
        with gpu.register(buffer):
            assert list(driver.flags.values()) == [2 | 8]
