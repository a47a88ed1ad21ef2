"""The bridges to GPU vendors, each over a stand-in for the vendor's library: no GPU is needed."""

import ctypes
import errno
import gc
import io
import os

import pytest

import dmabuf
from dmabuf.devices import gpu, staging
from dmabuf.memory import foreign
from tests import forking
from tests.guards import demand
from tests.resources import held
from tests.support import assert_same, pattern, poison, raises_errno
from tests.unit.fake_gpus import VENDORS
from tests.unit.interrupting import Interruptions

MIB = 1 << 20
SIZE = 3 * MIB + 3000


@pytest.fixture(params=VENDORS)
def driver(request, monkeypatch):
    """The stand-in; at the end nothing of it is left, and nothing was harmed."""
    vendor = VENDORS[request.param]
    demand(*vendor.needs)
    before = held()
    fake = vendor(monkeypatch)
    yield fake
    fake.fail.clear()
    fake.check()
    assert not fake.left()
    assert not gpu.pinned_memory()
    assert held() == before


@pytest.fixture
def device(driver):
    with driver.module.Device(block_size="256KiB", blocks=3) as device:
        yield device


def called(driver, what, since=0):
    """How often a function was called, by the name that the vendors share."""
    return [call[0] for call in driver.calls[since:]].count(driver.calls_of[what])


# -- opening a device


@pytest.mark.parametrize(("ordinal", "count"), [(-1, 1), (1, 1), (7, 1), (0, 0)])
def test_no_such_device(driver, ordinal, count):
    driver.count = count
    text = f"open {driver.runtime} device {ordinal}: this machine has {count}"
    with raises_errno(errno.ENODEV, text):
        driver.module.Device(ordinal)


def test_a_driver_that_does_not_start(driver):
    driver.fail[driver.calls_of["start"]] = driver.illegal
    with raises_errno(errno.EIO, f"start {driver.runtime}: .*{driver.illegal_text}"):
        driver.module.Device()


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
        driver.module.Device(**how)


# -- device memory


def test_allocate(driver, device):
    kind = f"<dmabuf.devices.{driver.name}.Device"
    assert repr(device) == f"{kind} 0 'Fake GPU'>"
    with device.allocate("3MiB") as memory:
        assert memory.size == 4 * MIB
        place = f"4 MiB at {memory.address:#x}"
        assert repr(memory) == f"<dmabuf.devices.gpu.Memory {place} of {driver.name}:0>"
        driver.put(memory.address, pattern(4 * MIB, 1))
        assert driver.left()
    assert memory.closed
    memory.close()
    with pytest.raises(dmabuf.ClosedError):
        memory.export()
    with raises_errno(errno.ENOMEM, "ask for less"):
        device.allocate("1GiB")
    with pytest.raises(ValueError, match="invalid size 0"):
        device.allocate(0)


def test_memory_of_another_owner(driver, device):
    with device.allocate("2MiB") as owner:
        with device.memory(owner.address + 512, MIB) as part:
            assert (part.address, part.size) == (owner.address + 512, MIB)
        driver.put(owner.address, b"still there")
        for address, size, text in [
            (owner.address + MIB, 2 * MIB, "has 1048576 bytes at"),
            (0x1000, 4096, f"{driver.runtime} has no such memory"),
            (0, 4096, "not a device pointer"),
            (1 << 64, 4096, "not a device pointer"),
            (owner.address, 0, "invalid size 0"),
        ]:
            with pytest.raises(ValueError, match=text):
                device.memory(address, size)
        driver.elsewhere(owner.address)
        with pytest.raises(ValueError, match=rf"it is memory of ({driver.name}:1|another device)"):
            device.memory(owner.address, 4096)
    driver.fail[driver.calls_of["find"]] = driver.illegal
    with pytest.raises(OSError, match=rf"{driver.name}:0: 0x1000: .*{driver.illegal_text}"):
        device.memory(0x1000, 4096)
    driver.fail.clear()
    with dmabuf.allocate(4096, exporter="memfd") as buffer, device.register(buffer):
        with pytest.raises(ValueError, match=r"give a Buffer to Device\.register"):
            device.memory(driver.pinned_host(), 4096)


@pytest.mark.device_table(["CUDA", "HIP", "Level Zero"], "export", by="a fake driver")
def test_export(driver, device):
    with device.allocate("4MiB") as memory:
        driver.put(memory.address, pattern(4 * MIB, 2))
        buffer = memory.export()
        assert memory.export() is buffer and memory.offset == driver.lead
        assert [slab[1:] for slab in buffer.slabs] == [(0, driver.lead + 4 * MIB)]
        assert buffer.is_dmabuf and not buffer.readable() and not buffer.writable()
        assert buffer.reason.startswith("memory of Fake GPU")
        assert not os.get_inheritable(buffer.fileno())
        with pytest.raises(io.UnsupportedOperation, match="only devices can read and write it"):
            buffer.pread(1, 0)
        if driver.name != "cuda":  # whose stand-in exports other memory
            with dmabuf.from_fd(buffer) as same, open(f"/proc/self/fd/{same.fileno()}", "rb") as fd:
                fd.seek(driver.lead)
                assert_same(fd.read(), pattern(4 * MIB, 2), "the dma-buf")
        buffer.close()
        again = memory.export()
        assert again is not buffer
    assert again.closed


def test_a_part_is_exported_with_its_allocation(driver, device):
    with device.allocate("4MiB") as whole, device.memory(whole.address + 512, 5000) as part:
        buffer = part.export()
        assert part.offset == driver.lead + 512
        assert buffer.size == driver.lead + 4 * MIB


def test_an_export_that_is_refused(driver, device):
    with device.allocate("2MiB") as memory:
        before = held()
        driver.fail[driver.calls_of["export"]] = driver.unsupported
        with raises_errno(errno.EOPNOTSUPP, f"{driver.name}:0: export memory: "):
            memory.export()
        assert held() == before


# -- tensors on the device


class Tensor:
    """A tensor of bytes as DLPack has it; `stream` notes what it was asked for."""

    def __init__(self, kind, address, offset, shape, strides=None, read_only=False):
        self._kind, self.stream = kind, ()
        c = foreign._capsules()
        counts = (ctypes.c_int64 * len(shape))(*shape)
        steps = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        self._struct = c.Versioned(major=1, minor=0, flags=int(read_only))
        tensor = self._struct.dl_tensor
        tensor.data, tensor.byte_offset, tensor.device_type = address, offset, kind
        tensor.ndim, tensor.bits, tensor.code, tensor.lanes = len(shape), 8, 1, 1
        tensor.shape, tensor.strides = counts, steps

    def __dlpack_device__(self):
        return self._kind, 0

    def __dlpack__(self, *, stream, max_version):
        self.stream = stream
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._struct), b"dltensor_versioned", None)


def test_a_tensor_on_the_device(driver, device, path):
    with device.allocate("4MiB") as owner:
        driver.put(owner.address, poison(4 * MIB))
        tensor = Tensor(driver.dlpack, owner.address, 4096 + 64, (3, 1000))
        with device.from_dlpack(tensor) as memory, dmabuf.open(path) as file:
            assert (memory.address, memory.size) == (owner.address + 4160, 3000)
            assert tensor.stream == (None if driver.name == "level_zero" else -1)
            assert memory.offset == driver.lead + 4160
            assert memory.export().size == driver.lead + 4 * MIB
            assert memory.read_from(file).nbytes == 3000
            whole = bytearray(poison(4 * MIB))
            whole[4160:7160] = pattern(SIZE, 1)[:3000]
            assert_same(driver.get(owner.address, 4 * MIB), bytes(whole), "device memory")
        with device.from_dlpack(Tensor(driver.dlpack, owner.address, 0, (4096,))) as memory:
            assert memory.offset == driver.lead


def test_tensors_that_cannot_be_used(driver, device, path):
    with device.allocate("2MiB") as owner, dmabuf.open(path) as file:
        place = driver.dlpack, owner.address, 0
        for tensor, error, text in (
            (Tensor(1, owner.address, 0, (8,)), BufferError, f"of DLPack type 1, not {place[0]}"),
            (Tensor(*place, (4, 8), strides=(16, 1)), BufferError, "not contiguous"),
            (Tensor(*place, (0,)), ValueError, "invalid size 0"),
            (Tensor(*place, (3 * MIB,)), ValueError, "the allocation has"),
            (Tensor(driver.dlpack, 4096, 0, (8,)), ValueError, "has no such memory"),
            (b"bytes", TypeError, "a tensor with __dlpack__ is needed"),
        ):
            with pytest.raises(error, match=text):
                device.from_dlpack(tensor)
        with device.from_dlpack(Tensor(*place, (4096,), read_only=True)) as memory:
            with raises_errno(errno.EACCES, "the tensor is read-only"):
                memory.read_from(file)
        with pytest.raises(BufferError, match=rf"dmabuf\.devices\.{driver.name}\.Device"):
            dmabuf.from_dlpack(Tensor(*place, (8,)))


# -- transfers


@pytest.mark.device_table(["CUDA", "HIP", "Level Zero"], "read", "write", by="a fake driver")
def test_read_and_write(driver, device, path, tmp_path):
    with device.allocate("4MiB") as memory:
        driver.put(memory.address, poison(4 * MIB))
        with dmabuf.open(path) as file:
            done = memory.read_from(file, buffer_offset=512)
        assert (done.nbytes, done.route) == (SIZE, "staged")
        whole = bytearray(poison(4 * MIB))
        whole[512 : 512 + SIZE] = pattern(SIZE, 1)
        assert_same(driver.get(memory.address, 4 * MIB), bytes(whole), "device memory")
        data = pattern(4 * MIB, 2)
        driver.put(memory.address, data)
        with dmabuf.open(tmp_path / "new", "w") as file:
            done = memory.write_to(file, sync=True)
            assert (done.nbytes, done.route) == (4 * MIB, "staged")
            memory.write_to(file, "4KiB", file_offset="4MiB", buffer_offset=7)
        assert_same((tmp_path / "new").read_bytes(), data + data[7 : 7 + 4096], "the file")


def test_part_of_a_file(driver, device, path):
    with device.allocate("4MiB") as memory, dmabuf.open(path) as file:
        assert memory.read_from(file, file_offset=MIB + 3).nbytes == SIZE - MIB - 3
        got = driver.get(memory.address, SIZE - MIB - 3)
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


def test_why_it_is_not_native(driver, device, path):
    with device.allocate("4MiB") as memory, dmabuf.open(path, "r+") as file:
        done = memory.read_from(file, MIB)
        assert "io_uring" in done.rejected[dmabuf.Route.NATIVE]
        assert "no route" not in done.rejected[dmabuf.Route.NATIVE]
        for move in (memory.read_from, memory.write_to):
            with pytest.raises(dmabuf.RouteUnavailable, match="zero-copy"):
                move(file, MIB, require="zero-copy")
        with device.memory(memory.address, memory.size) as again:
            again.export()
            memory.export().close()
            driver.fail[driver.calls_of["export"]] = driver.unsupported
            done = memory.read_from(file, MIB)
            assert "export memory" in done.rejected[dmabuf.Route.NATIVE]
        done = memory.write_to(file, MIB, route="staged")
        assert done.rejected == {} and done.route is dmabuf.Route.STAGED
        assert memory.write_to(file, MIB, route="buffered").route is dmabuf.Route.BUFFERED


def natively(file, memory, moved):
    """Let a file plan and make native transfers of a memory, which `moved` lists."""
    ask, read_into = file.plan, file.read_into
    planned = []

    def plan(*args, **how):
        if how["route"] != "native":
            return ask(*args, **how)
        planned.append((how["size"], how["file_offset"], how["buffer_offset"]))
        return None

    def native(buffer, size, **how):
        if how["route"] != "native":
            return read_into(buffer, size, **how)
        assert buffer is memory.export()
        assert planned[-1] == (size, how["file_offset"], how["buffer_offset"])
        moved.append((size, how))
        return "record"

    file.plan, file.read_into, file.write_from = plan, native, native


def test_a_native_transfer_is_of_the_allocations_dma_buf(driver, device, path):
    """At the memory's place in it."""
    moved = []
    with device.allocate("4MiB") as whole, device.memory(whole.address + 4096, 2 * MIB) as memory:
        with dmabuf.open(path, "r+") as file:
            natively(file, memory, moved)
            assert memory.write_to(file, MIB, buffer_offset=8192, sync=True) == "record"
    at = driver.lead + 4096 + 8192
    how = {"file_offset": 0, "buffer_offset": at, "route": "native", "sync": True}
    assert moved == [(MIB, how)]


def test_it_waits_for_the_callers_stream(driver, device, path):
    driver.busy = 5
    ask = driver.calls_of["ask"]
    if driver.name == "level_zero":
        ask = "zeCommandQueueSynchronize"
    with device.allocate("2MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file, 4096, stream=0xABC)
    names = [call[0] for call in driver.calls]
    before = driver.calls[: names.index(driver.calls_of["copy in"])]
    streams = [call for call in before if 0xABC in call]
    assert streams and [call[0] for call in before].count(ask) == 6


@pytest.mark.parametrize("what", ["copy in", "record", "ask"])
def test_a_copy_that_fails(driver, device, path, what):
    with device.allocate("4MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file)
        name, left = driver.calls_of[what], [8]
        function = driver.fail_later(name, left)
        with raises_errno(errno.EIO, rf"{driver.name}:0: .*{driver.illegal_text}") as caught:
            memory.read_from(file)
        assert 0 <= caught.value.nbytes < SIZE and not left[0]
        function()
        driver.check()
        assert memory.read_from(file).nbytes == SIZE


def test_an_interrupt_at_any_moment(driver, device, path):
    modules = driver.module, gpu, staging
    with device.allocate("4MiB") as memory, dmabuf.open(path) as file:
        memory.read_from(file, MIB >> 1)
        driver.mark()
        with Interruptions((), *modules) as counted:
            memory.read_from(file, MIB >> 1)
        assert counted.seen > 150
        for number in range(1, counted.seen, 3):
            with Interruptions({number}, *modules), pytest.raises(KeyboardInterrupt):
                memory.read_from(file, MIB >> 1)
            driver.check()  # no copy is in flight
            driver.forget_events()
        assert memory.read_from(file).nbytes == SIZE


# -- registered buffers


@pytest.mark.device_table(["CUDA", "HIP", "Level Zero"], "import", by="a fake driver")
def test_register(driver, device):
    with dmabuf.allocate(2 * MIB, exporter="memfd") as buffer:
        buffer.pwrite(pattern(2 * MIB, 3), 0)
        with device.register(buffer) as registered:
            assert registered.buffer is buffer and not registered.imported
            got = driver.as_kernel(registered.address, 2 * MIB)
            assert_same(got, pattern(2 * MIB, 3), "a kernel's")
            with pytest.raises(BufferError, match="cannot close"):
                buffer.close()
            with raises_errno(errno.EBUSY, "unregister it first"):
                device.register(buffer)
            with dmabuf.open("/dev/zero") as file:
                file.read_into(buffer, 4096)
            assert driver.as_kernel(registered.address, 4096) == bytes(4096)
        assert registered.closed
        registered.close()
        with pytest.raises(dmabuf.ClosedError), registered:
            pass
        device.register(buffer).close()


def test_a_dma_buf_is_imported(driver, device):
    """The memory of one device, for the kernels of another: it has no pages to pin."""
    with device.allocate("2MiB") as memory:
        driver.put(memory.address, pattern(2 * MIB, 4))
        buffer = memory.export()
        if not driver.imports:
            with pytest.raises(io.UnsupportedOperation, match="only devices can read"):
                device.register(buffer)
            return
        with device.register(buffer) as registered:
            assert registered.imported and not called(driver, "pin")
            got = driver.as_kernel(registered.address + driver.lead, 2 * MIB)
            assert_same(got, pattern(2 * MIB, 4), "a kernel's")
            with pytest.raises(BufferError):
                memory.close()
        driver.fail[driver.calls_of["import"]] = driver.unsupported
        with raises_errno(errno.EOPNOTSUPP, driver.name):
            device.register(buffer)
        assert not buffer.closed


def test_a_buffer_is_open_until_it_is_unregistered(driver, device):
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        registered, seen = device.register(buffer), []

        def closing(*arguments):
            with pytest.raises(BufferError, match="cannot close"):
                buffer.close()
            seen.append(arguments)

        driver.before(driver.calls_of["unpin"], closing)
        registered.close()
        assert len(seen) == 1


def test_a_buffer_that_cannot_be_registered(device):
    with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed"):
        device.register(bytearray(4096))
    buffer = dmabuf.allocate(4096, exporter="memfd")
    buffer.close()
    with pytest.raises(dmabuf.ClosedError):
        device.register(buffer)


def test_a_read_only_buffer(device, monkeypatch):
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        monkeypatch.setattr(buffer, "writable", lambda: False)
        with raises_errno(errno.EOPNOTSUPP, "needs writable memory"):
            device.register(buffer)


@pytest.mark.parametrize("what", ["pin", "pointer"])
@pytest.mark.parametrize("error", ["a refusal", "an interrupt"])
def test_a_registration_that_fails_leaves_nothing(driver, device, what, error):
    if what not in driver.calls_of:
        return  # Level Zero has no such call
    interrupted = error == "an interrupt"
    name = driver.calls_of[what]
    (driver.after if interrupted else driver.fail)[name] = (
        KeyboardInterrupt() if interrupted else driver.unsupported
    )
    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.raises(KeyboardInterrupt if interrupted else OSError):
            device.register(buffer)
        driver.fail.clear()
        device.register(buffer).close()
    device.close()  # nothing of it is in use


# -- closing


def test_close(driver):
    device = driver.module.Device()
    memory = device.allocate("2MiB")
    with pytest.raises(dmabuf.BusyError, match="1 of its memories and registrations are open"):
        device.close()
    assert not device.closed
    address = memory.address
    memory.close()
    device.close()
    device.close()
    assert device.closed and repr(device).endswith("closed>")
    for use in (lambda: device.allocate(1), device.__enter__, lambda: device.memory(address, 1)):
        with pytest.raises(dmabuf.ClosedError, match="it is closed"):
            use()


def test_memory_is_not_freed_during_a_transfer(device, path):
    with device.allocate("4MiB") as memory, dmabuf.open(path) as file:
        read_into = file.read_into

        def closing(*args, **how):
            with pytest.raises(dmabuf.BusyError, match="a transfer is running"):
                memory.close()
            return read_into(*args, **how)

        file.read_into = closing
        assert memory.read_from(file).nbytes == SIZE


def test_memory_that_the_driver_does_not_free(driver):
    with driver.module.Device() as device:
        memory = device.allocate("2MiB")
        driver.fail[driver.calls_of["free"]] = driver.illegal
        with pytest.raises(
            OSError, match=rf"{driver.name}:0: free memory: .*{driver.illegal_text}"
        ):
            memory.close()
        assert memory.closed
        memory.close()
    driver.forget()


@pytest.mark.parametrize("first", ["device", "made"])
def test_garbage_is_released_in_order(driver, first):
    """The garbage collector may finalize the device before what was made of it."""

    class Model:
        def __init__(self):
            self.itself = self
            device = driver.module.Device()
            made = device.allocate("2MiB"), device.register(buffer)
            self.parts = (device, made) if first == "device" else (made, device)

    with dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.warns(ResourceWarning, match="unclosed") as told:
            Model()
            gc.collect()
        texts = sorted(str(one.message).split(" ")[1] for one in told)
        shared = [f"<dmabuf.devices.gpu.{name}" for name in ("Memory", "Registered")]
        assert texts == sorted([f"<dmabuf.devices.{driver.name}.Device", *shared])
        assert not driver.left()


def test_after_a_fork(driver, device):
    with (
        device.allocate("2MiB") as memory,
        dmabuf.allocate(4096, exporter="memfd") as buffer,
        device.register(buffer) as registered,
    ):

        def child():
            calls = len(driver.calls)
            for use in (lambda: device.allocate(1), memory.export):
                with pytest.raises(dmabuf.ClosedError, match="before fork"):
                    use()
            for one in (registered, memory, device, buffer):
                one.close()
            assert len(driver.calls) == calls

        forking.in_child(child)
        memory.export()
