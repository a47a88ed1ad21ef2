"""dmabuf.devices.cuda over a fake driver: no GPU is needed."""

import errno
import gc
import io

import pytest

import dmabuf
from dmabuf.devices import cuda, staging
from tests import forking
from tests.resources import held
from tests.support import assert_same, pattern, poison, raises_errno
from tests.unit.fake_cuda import CUdevice_attribute, CUresult, FakeCuda, host_bytes, install
from tests.unit.fake_device import BASE
from tests.unit.interrupting import Interruptions

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


# -- opening a device


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


@pytest.mark.parametrize(("ordinal", "count"), [(-1, 1), (1, 1), (7, 1), (0, 0)])
def test_no_such_device(driver, ordinal, count):
    driver.count = count
    with raises_errno(errno.ENODEV, f"open CUDA device {ordinal}: this machine has {count}"):
        cuda.Device(ordinal)


@pytest.mark.parametrize("missing", ["the driver's function", "the binding's function"])
def test_an_old_driver_and_old_bindings(driver, gpu, monkeypatch, missing):
    if missing == "the driver's function":
        driver.fail["cuMemAlloc"] = RuntimeError('Function "cuMemAlloc_v2" not found')
    else:
        monkeypatch.delattr(FakeCuda, "cuMemAlloc")
    with raises_errno(errno.ENOSYS, "cuMemAlloc"):
        gpu.allocate("2MiB")


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"ordinal": "0"}, TypeError),
        ({"ordinal": True}, TypeError),
        ({"block_size": 1}, ValueError),
        ({"blocks": 0}, ValueError),
    ],
)
def test_invalid_arguments(driver, how, error):
    with pytest.raises(error):
        cuda.Device(**how)
    assert not driver.retained


# -- device memory


def test_allocate(driver, gpu):
    assert repr(gpu) == "<dmabuf.devices.cuda.Device 0 'Fake GPU'>"
    with gpu.allocate("3MiB") as memory:
        assert (memory.size, memory.address) == (4 * MIB, BASE)
        assert repr(memory) == f"<dmabuf.devices.cuda.Memory 4 MiB at {BASE:#x} of cuda:0>"
        assert driver.allocated == {BASE: 4 * MIB}
    assert memory.closed and not driver.allocated
    memory.close()
    with pytest.raises(dmabuf.ClosedError):
        memory.export()
    with raises_errno(errno.ENOMEM, "ask for less"):
        gpu.allocate("1GiB")
    with pytest.raises(ValueError, match="size is 0"):
        gpu.allocate(0)


def test_memory_of_another_owner(driver, gpu):
    with gpu.allocate("2MiB") as owner:
        with gpu.memory(owner.address + 512, MIB) as part:
            assert (part.address, part.size) == (BASE + 512, MIB)
        assert driver.allocated
        for address, size, text in [
            (owner.address + MIB, 2 * MIB, "has 1048576 bytes at"),
            (0x1000, 4096, "CUDA has no such memory"),
            (0, 4096, "not a device pointer"),
            (1 << 64, 4096, "not a device pointer"),
            (owner.address, 0, "size is 0"),
        ]:
            with pytest.raises(ValueError, match=text):
                gpu.memory(address, size)
        driver.ordinals[owner.address] = 1
        with pytest.raises(ValueError, match="it is memory of cuda:1"):
            gpu.memory(owner.address, 4096)
    driver.fail["cuPointerGetAttribute"] = ILLEGAL
    with pytest.raises(OSError, match="cuda:0: 0x1000: illegal address"):
        gpu.memory(0x1000, 4096)
    driver.fail.clear()
    with dmabuf.allocate(4096, exporter="memfd") as buffer, gpu.register(buffer):
        (host,) = driver.gpu.pinned
        with pytest.raises(ValueError, match=r"give a Buffer to Device\.register"):
            gpu.memory(host, 4096)


def test_export(driver, gpu, monkeypatch):
    assert cuda.SLAB == 1 << 30
    monkeypatch.setattr(cuda, "SLAB", 2 * MIB)
    with gpu.allocate("6MiB") as memory:
        buffer = memory.export()
        assert memory.export() is buffer
        places = [(at * MIB, 2 * MIB) for at in (0, 2, 4)]
        assert [slab[1:] for slab in buffer.slabs] == places
        exported = [call[1:3] for call in driver.calls if "HandleForAddress" in call[0]]
        assert exported == [(BASE + at, size) for at, size in places]
        assert buffer.is_dmabuf and not buffer.readable() and not buffer.writable()
        assert buffer.reason == "memory of Fake GPU, in dma-bufs of at most 2 MiB"
        with pytest.raises(io.UnsupportedOperation, match="no single mapping"), buffer.map():
            pass
        buffer.close()
        again = memory.export()
        assert again is not buffer
    assert again.closed
    with gpu.allocate("2MiB") as memory:
        buffer = memory.export()
        assert buffer.fileno() == buffer.slabs[0].fd and buffer.size == 2 * MIB
        with pytest.raises(io.UnsupportedOperation, match="only devices can read and write it"):
            buffer.pread(1, 0)


def test_memory_that_cannot_be_exported(driver, gpu):
    with gpu.allocate("2MiB") as memory:
        driver.attributes[attribute("DMA_BUF_SUPPORTED")] = 0
        with raises_errno(errno.EOPNOTSUPP, r"DMA_BUF_SUPPORTED is 0; .*open kernel"):
            memory.export()
        driver.attributes[attribute("DMA_BUF_SUPPORTED")] = 1
        for offset, size in ((512, 4096), (4096, 5000)):
            with gpu.memory(memory.address + offset, size) as part:
                with raises_errno(errno.EINVAL, "begin and end at pages"):
                    part.export()


@pytest.mark.parametrize("number", [1, 3])
def test_an_export_that_fails_leaves_no_descriptor(driver, gpu, monkeypatch, number):
    monkeypatch.setattr(cuda, "SLAB", 2 * MIB)
    before = held()
    real = FakeCuda.cuMemGetHandleForAddressRange
    left = [number]

    def failing(self, *arguments):
        left[0] -= 1
        return (CUresult.CUDA_ERROR_NOT_SUPPORTED,) if not left[0] else real(self, *arguments)

    monkeypatch.setattr(FakeCuda, "cuMemGetHandleForAddressRange", failing)
    with gpu.allocate("6MiB") as memory:
        with raises_errno(errno.EOPNOTSUPP, "export memory"):
            memory.export()
        assert held() == before


# -- transfers


def test_read_and_write(driver, gpu, path, tmp_path):
    with gpu.allocate("4MiB") as memory:
        with dmabuf.open(path) as file:
            done = memory.read_from(file, buffer_offset=512)
        assert (done.nbytes, done.route) == (SIZE, "staged")
        whole = bytearray(poison(4 * MIB))
        whole[512 : 512 + SIZE] = pattern(SIZE, 1)
        assert_same(bytes(driver.gpu.memory[: 4 * MIB]), bytes(whole), "device memory")
        driver.gpu.memory[: 4 * MIB] = data = pattern(4 * MIB, 2)
        with dmabuf.open(tmp_path / "new", "w") as file:
            done = memory.write_to(file, sync=True)
            assert (done.nbytes, done.route) == (4 * MIB, "staged")
            memory.write_to(file, "4KiB", file_offset="4MiB", buffer_offset=7)
        assert_same((tmp_path / "new").read_bytes(), data + data[7 : 7 + 4096], "the file")
    assert not driver.stack


def test_part_of_a_file(driver, gpu, path):
    with gpu.allocate("4MiB") as memory, dmabuf.open(path) as file:
        assert memory.read_from(file, file_offset=MIB + 3).nbytes == SIZE - MIB - 3
        got = bytes(driver.gpu.memory[: SIZE - MIB - 3])
        assert_same(got, pattern(SIZE, 1)[MIB + 3 :], "device memory")
        assert memory.read_from(file, file_offset=4 * MIB).nbytes == 0
        assert memory.read_from(file, "1MiB", buffer_offset=3 * MIB).nbytes == MIB
        for how in ({"size": 1, "buffer_offset": 4 * MIB}, {"size": 5 * MIB}):
            with pytest.raises(ValueError, match="are not within the 4194304"):
                memory.read_from(file, **how)
        for how in ({"buffer_offset": -1}, {"file_offset": -1}):
            with pytest.raises(ValueError, match=next(iter(how))):
                memory.read_from(file, **how)
        with pytest.raises(TypeError, match=r"a dmabuf\.File is needed"):
            memory.read_from(path)
        with pytest.raises(TypeError, match="stream must be an int"):
            memory.read_from(file, stream=None)


def test_why_it_is_not_native(driver, gpu, path):
    with gpu.allocate("4MiB") as memory, dmabuf.open(path, "r+") as file:
        done = memory.read_from(file, MIB)
        assert "io_uring" in done.rejected[dmabuf.Route.NATIVE]
        assert "no route" not in done.rejected[dmabuf.Route.NATIVE]
        for move in (memory.read_from, memory.write_to):
            with pytest.raises(dmabuf.RouteUnavailable, match="zero-copy"):
                move(file, MIB, require="zero-copy")
        driver.attributes[attribute("DMA_BUF_SUPPORTED")] = 0
        with gpu.memory(memory.address, memory.size) as again:
            done = again.read_from(file, MIB)
            assert "DMA_BUF_SUPPORTED is 0" in done.rejected[dmabuf.Route.NATIVE]
        done = memory.write_to(file, MIB, route="staged")
        assert done.rejected == {} and done.route is dmabuf.Route.STAGED
        assert memory.write_to(file, MIB, route="buffered").route is dmabuf.Route.BUFFERED


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


def test_it_waits_for_the_callers_stream(driver, gpu, path):
    driver.busy = 5
    with gpu.allocate("2MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file, 4096, stream=0xABC)
    names = [call[0] for call in driver.calls]
    record = names.index("cuEventRecord")
    assert driver.calls[record][2] == 0xABC
    assert names[record : names.index("cuMemcpyHtoDAsync")].count("cuEventQuery") == 6


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuEventQuery"])
def test_a_copy_that_fails(driver, gpu, path, name):
    with gpu.allocate("4MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file)
        real = getattr(FakeCuda, name)
        count = [0]

        def failing(*arguments):
            count[0] += 1
            return real(driver, *arguments) if count[0] < 8 else (ILLEGAL,)

        object.__setattr__(driver, name, failing)
        with raises_errno(errno.EIO, r"cuda:0: .*illegal address") as caught:
            memory.read_from(file)
        assert 0 <= caught.value.nbytes < SIZE and not driver.gpu.flying
        object.__delattr__(driver, name)
        assert memory.read_from(file).nbytes == SIZE


def test_an_interrupt_at_any_moment(driver, gpu, path):
    with gpu.allocate("4MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file, MIB >> 1)
        kept = set(driver.events)
        with Interruptions((), cuda, staging) as counted:
            memory.read_from(file, MIB >> 1)
        assert counted.seen > 300
        for number in range(1, counted.seen, 3):
            with Interruptions({number}, cuda, staging), pytest.raises(KeyboardInterrupt):
                memory.read_from(file, MIB >> 1)
            driver.gpu.check()  # no copy is in flight
            # A signal may leave an event or the thread's context behind, and no more.
            driver.stack.clear()
            driver.events &= kept
        assert memory.read_from(file).nbytes == SIZE


# -- registered buffers


def test_register(driver, gpu):
    with dmabuf.allocate(2 * MIB, exporter="memfd") as buffer:
        buffer.pwrite(pattern(2 * MIB, 3), 0)
        with gpu.register(buffer) as registered:
            assert registered.buffer is buffer
            assert_same(host_bytes(registered.address, 2 * MIB), pattern(2 * MIB, 3), "a kernel's")
            assert list(driver.flags.values()) == [2]
            with pytest.raises(BufferError, match="cannot close"):
                buffer.close()
            with raises_errno(errno.EBUSY, "unregister it first"):
                gpu.register(buffer)
            assert driver.gpu.pinned  # the first registration stays
            with dmabuf.open("/dev/zero") as file:
                file.read_into(buffer, 4096)
            assert host_bytes(registered.address, 4096) == bytes(4096)
        assert registered.closed and not driver.gpu.pinned
        registered.close()
        with pytest.raises(dmabuf.ClosedError), registered:
            pass


def test_a_buffer_is_open_until_it_is_unregistered(driver, gpu):
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        unregister, seen = driver.cuMemHostUnregister, []

        def closing(address):
            with pytest.raises(BufferError, match="cannot close"):
                buffer.close()
            seen.append(address)
            return unregister(address)

        registered = gpu.register(buffer)
        object.__setattr__(driver, "cuMemHostUnregister", closing)
        registered.close()
        assert len(seen) == 1


def test_a_buffer_that_cannot_be_registered(driver, gpu):
    with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed"):
        gpu.register(bytearray(4096))
    buffer = dmabuf.allocate(4096, exporter="memfd")
    buffer.close()
    with pytest.raises(dmabuf.ClosedError):
        gpu.register(buffer)
    with gpu.allocate("2MiB") as memory:
        with pytest.raises(io.UnsupportedOperation, match="only devices can read"):
            gpu.register(memory.export())


def test_a_read_only_buffer(driver, gpu, monkeypatch):
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        monkeypatch.setattr(buffer, "writable", lambda: False)
        with raises_errno(errno.EOPNOTSUPP, "needs writable memory"):
            gpu.register(buffer)
        driver.attributes[attribute("READ_ONLY_HOST_REGISTER_SUPPORTED")] = 1
        with gpu.register(buffer):
            assert list(driver.flags.values()) == [2 | 8]


@pytest.mark.parametrize("name", ["cuMemHostRegister", "cuMemHostGetDevicePointer"])
@pytest.mark.parametrize("error", [CUresult.CUDA_ERROR_NOT_SUPPORTED, KeyboardInterrupt()])
def test_a_registration_that_fails_leaves_nothing(driver, gpu, name, error):
    interrupted = isinstance(error, BaseException)
    (driver.after if interrupted else driver.fail)[name] = error
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.raises(KeyboardInterrupt if interrupted else OSError):
            gpu.register(buffer)
        assert not driver.gpu.pinned
    gpu.close()  # nothing of it is in use


# -- closing


def test_close(driver):
    gpu = cuda.Device()
    memory = gpu.allocate("2MiB")
    with pytest.raises(dmabuf.BusyError, match="1 of its memories and registrations are open"):
        gpu.close()
    assert not gpu.closed and driver.retained == 1
    memory.close()
    gpu.close()
    gpu.close()
    assert gpu.closed and repr(gpu).endswith("closed>")
    for use in (lambda: gpu.allocate(1), gpu.__enter__, lambda: gpu.memory(BASE, 1)):
        with pytest.raises(dmabuf.ClosedError, match="it is closed"):
            use()


def test_memory_is_not_freed_during_a_transfer(driver, gpu, path):
    with gpu.allocate("4MiB") as memory, dmabuf.open(path) as file:
        read_into = file.read_into

        def closing(*args, **how):
            with pytest.raises(dmabuf.BusyError, match="a transfer is running"):
                memory.close()
            return read_into(*args, **how)

        file.read_into = closing
        assert memory.read_from(file).nbytes == SIZE


def test_memory_that_the_driver_does_not_free(driver):
    with cuda.Device() as gpu:
        memory = gpu.allocate("2MiB")
        driver.fail["cuMemFree"] = ILLEGAL
        with pytest.raises(OSError, match="cuda:0: free memory: illegal address"):
            memory.close()
        assert memory.closed
        memory.close()
    driver.allocated.clear()


@pytest.mark.parametrize("first", ["device", "made"])
def test_garbage_is_released_in_order(driver, first):
    """The garbage collector may finalize the device before what was made of it."""

    class Model:
        def __init__(self):
            self.itself = self
            device = cuda.Device()
            made = device.allocate("2MiB"), device.register(buffer)
            self.parts = (device, made) if first == "device" else (made, device)

    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.warns(ResourceWarning, match="unclosed") as told:
            Model()
            gc.collect()
        texts = sorted(str(one.message).split(" ")[1] for one in told)
        assert texts == [f"<dmabuf.devices.cuda.{n}" for n in ("Device", "Memory", "Registered")]
        assert driver.left() == {}


def test_after_a_fork(driver, gpu):
    with (
        gpu.allocate("2MiB") as memory,
        dmabuf.allocate(4096, exporter="memfd") as buffer,
        gpu.register(buffer) as registered,
    ):

        def child():
            calls = len(driver.calls)
            for use in (lambda: gpu.allocate(1), memory.export):
                with pytest.raises(dmabuf.ClosedError, match="before fork"):
                    use()
            for one in (registered, memory, gpu, buffer):
                one.close()
            assert len(driver.calls) == calls

        forking.in_child(child)
        memory.export()
