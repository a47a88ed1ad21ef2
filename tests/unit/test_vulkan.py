"""dmabuf.devices.vulkan on a fake driver: what it refuses, and that it leaves nothing behind.

tests/device/test_vulkan.py has the tests with a real driver.
"""

import errno
import gc
import io
import os
import sys
from functools import partial

import pytest

from dmabuf import BusyError, ClosedError
from dmabuf.devices import vulkan
from dmabuf.devices import vulkan as vulkan_module
from dmabuf.kernel import uapi
from dmabuf.memory import Buffer, Slab
from tests import forking
from tests.resources import held
from tests.support import in_child, raises_errno
from tests.unit.fake_vulkan import DMA_BUF, FakeVulkan

SIZE = 1 << 16
READ_AND_WRITE = FakeVulkan.VK_ACCESS_MEMORY_READ_BIT | FakeVulkan.VK_ACCESS_MEMORY_WRITE_BIT


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def fake(monkeypatch):
    made = FakeVulkan()
    monkeypatch.setitem(sys.modules, "vulkan", made)
    yield made
    assert made.alive == []


@pytest.fixture
def buf():
    """A Buffer of a dma-buf, as far as the fake can tell."""
    fd = os.memfd_create("a dma-buf")
    with Buffer([Slab(fd, 0, SIZE)], None, exporter="test", reason="made by hand") as buffer:
        yield buffer


def refused(number, match, make):
    before = held()
    with raises_errno(number, match):
        make()
    assert held() == before


# -- opening


def test_there_is_no_loader(tmp_path):
    (tmp_path / "vulkan.py").write_text("raise OSError('Cannot find Vulkan SDK version')\n")
    said = in_child(
        """
import sys
sys.path.insert(0, sys.argv[1])
from dmabuf.devices import vulkan
try:
    vulkan.open()
except FileNotFoundError as error:
    print(error.filename, error.strerror)
""",
        tmp_path,
    )
    assert said == "libvulkan.so.1 there is no Vulkan loader: apt install libvulkan1\n"


def test_there_is_no_driver(fake):
    fake.fails["vkCreateInstance"] = "VkErrorIncompatibleDriver"
    refused(
        errno.ENODEV,
        "no Vulkan driver .*; apt install mesa-vulkan-drivers",
        vulkan.open,
    )
    fake.fails = {}
    fake.devices = []
    refused(errno.ENODEV, "no Vulkan device: apt install mesa-vulkan-drivers", vulkan.open)


def test_the_first_device_that_can_is_opened(fake):
    fake.devices = ["old GPU", "new GPU"]
    with vulkan.open() as device:
        assert (device.name, device.queue_family) == ("old GPU", 1)
    with vulkan.open("NEW") as device:
        assert device.name == "new GPU"
    match = "no Vulkan device is named 'other': there is old GPU, new GPU"
    refused(errno.ENODEV, match, lambda: vulkan.open("other"))


def test_no_device_can(fake):
    fake.extensions.discard("VK_EXT_external_memory_dma_buf")
    match = "fake GPU has no VK_EXT_external_memory_dma_buf$"
    refused(errno.EOPNOTSUPP, match, vulkan.open)
    fake.version = (1, 0, 9)
    refused(errno.EOPNOTSUPP, "fake GPU is older than Vulkan 1.1", vulkan.open)


@pytest.mark.parametrize(
    ("name", "kind", "number", "match"),
    [
        ("vkCreateDevice", "VkErrorOutOfDeviceMemory", errno.ENOMEM, "open fake GPU: not enough"),
        ("vkEnumeratePhysicalDevices", "VkErrorUnknown", errno.EIO, "list .* the driver failed"),
        ("vkGetDeviceProcAddr", "ProcedureNotFoundError", errno.EOPNOTSUPP, "enable VK_KHR_ext"),
    ],
)
def test_opening_fails_half_way(fake, name, kind, number, match):
    fake.fails[name] = kind
    refused(number, match, vulkan.open)
    assert fake.alive == []


def test_what_the_device_is_opened_with(fake):
    with vulkan.open() as device:
        (about,) = [arguments[1] for name, arguments in fake.calls if name == "vkCreateDevice"]
        assert set(about.ppEnabledExtensionNames) == set(vulkan.EXTENSIONS[:-1])
        (queue,) = about.pQueueCreateInfos
        assert queue.queueFamilyIndex == device.queue_family == 1  # the one that computes


def test_the_foreign_queue_family_is_named_where_it_can_be(fake, buf):
    fake.VK_QUEUE_FAMILY_FOREIGN_EXT, fake.VK_QUEUE_FAMILY_EXTERNAL = 77, 78
    for extension, outside in ((None, 78), (vulkan.EXTENSIONS[-1], 77)):
        if extension:
            fake.extensions.add(extension)
        with vulkan.open() as device, device.import_buffer(buf) as memory:
            for record, expected in (
                (memory.acquire, (outside, 1)),
                (memory.release, (1, outside)),
            ):
                record("a command buffer")
                (barrier,) = fake.calls[-1][1][7]
                found = barrier.srcQueueFamilyIndex, barrier.dstQueueFamilyIndex
                assert found == expected
                assert (barrier.buffer, barrier.size) == (memory.vk_buffer, SIZE)
                ours = vars(barrier)[("dst" if record == memory.acquire else "src") + "AccessMask"]
                assert ours == READ_AND_WRITE


# -- importing


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("vkCreateBuffer", "VkErrorInvalidExternalHandle", errno.EINVAL),
        ("vkGetMemoryFdPropertiesKHR", "VkErrorInvalidExternalHandle", errno.EINVAL),
        ("vkAllocateMemory", "VkErrorInvalidExternalHandle", errno.EINVAL),
        ("vkBindBufferMemory", "VkErrorOutOfDeviceMemory", errno.ENOMEM),
    ],
)
def test_the_driver_refuses_the_import(fake, buf, name, kind, number):
    with vulkan.open() as device:
        before = list(fake.alive)
        fake.fails[name] = kind
        refused(number, "the driver refuses|not enough", lambda: device.import_buffer(buf))
        assert fake.alive == before
    buf.close()  # nothing holds it


def test_a_driver_closes_what_it_refuses(fake, buf, monkeypatch):
    """As Mesa 25.0's lavapipe does: the number may be another file's by then."""
    others = []

    def allocate(device, about, allocator):
        os.close(about.pNext.fd)
        if again:
            others.append(os.memfd_create("another"))
            assert others == [about.pNext.fd]
        raise fake.error("VkErrorInvalidExternalHandle")

    with vulkan.open() as device:
        monkeypatch.setattr(fake, "vkAllocateMemory", allocate, raising=False)
        again = False
        refused(errno.EINVAL, "refuses", lambda: device.import_buffer(buf))
        again = True
        with pytest.raises(OSError, match="refuses"):
            device.import_buffer(buf)
    os.close(others[0])  # it is open still


def test_an_interrupt_in_the_driver(fake, buf, monkeypatch):
    def allocate(*_):
        raise KeyboardInterrupt

    with vulkan.open() as device:
        before = held(), list(fake.alive)
        monkeypatch.setattr(fake, "vkAllocateMemory", allocate, raising=False)
        with pytest.raises(KeyboardInterrupt):
            device.import_buffer(buf)
        assert (held(), fake.alive) == before


def test_what_the_driver_is_told_of_an_import(fake, buf):
    with vulkan.open() as device, device.import_buffer(buf, size=SIZE // 2) as memory:
        asked = {name: arguments[1] for name, arguments in fake.calls if len(arguments) > 1}
        made, source = asked["vkCreateBuffer"], asked["vkAllocateMemory"]
        assert (made.size, made.usage) == (SIZE // 2, 0x23)
        assert made.pNext.handleTypes == source.pNext.handleType == DMA_BUF
        assert (source.allocationSize, source.memoryTypeIndex) == (SIZE, 1)
        assert inode(fake.taken[memory.vk_memory]) == inode(buf.fileno())
        assert fake.taken[memory.vk_memory] != buf.fileno()


def test_a_read_only_descriptor(fake):
    whole = os.memfd_create("a dma-buf")
    fd = os.open(f"/proc/self/fd/{whole}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(whole)
    with (
        Buffer([Slab(fd, 0, SIZE)], None, exporter="test", reason="", writable=False) as buffer,
        vulkan.open() as device,
    ):
        refused(errno.EACCES, "give a usage= that only reads", lambda: device.import_buffer(buffer))
        device.import_buffer(buffer, usage=fake.VK_BUFFER_USAGE_TRANSFER_SRC_BIT).close()


def test_arguments_that_are_not_buffers(fake, buf):
    with vulkan.open() as device:
        for other in (None, buf.fileno(), b"bytes"):
            with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed"):
                device.import_buffer(other)
        slabs = [Slab(os.dup(buf.fileno()), at, SIZE) for at in (0, SIZE)]
        with Buffer(slabs, None, exporter="test", reason="two of them") as two:
            with pytest.raises(io.UnsupportedOperation, match=r"2 dma-bufs .* use \.slabs"):
                device.import_buffer(two)
        refused(errno.EINVAL, "size= is 0", lambda: device.import_buffer(buf, size=0))
        with pytest.raises(ValueError, match="invalid size 0"):
            device.allocate(0)
        for usage in (0, -1, 1 << 32):
            with pytest.raises(
                ValueError, match=f"invalid usage {usage}: use one or more VkBufferUsageFlags"
            ):
                device.import_buffer(buf, usage=usage)
        for fd in (-1, 1 << 40):
            refused(errno.EBADF, f"descriptor {fd}: Bad file", partial(device.semaphore, fd))


def test_a_buffer_too_small_for_the_driver(fake, buf):
    fake.needs = 256
    with vulkan.open() as device:
        match = f"it has {SIZE} bytes, fake GPU needs {SIZE + 256}; allocate that many"
        refused(errno.EINVAL, match, lambda: device.import_buffer(buf))
        with device.import_buffer(buf, size=SIZE - 256) as memory:
            assert memory.size == SIZE - 256


def test_memory_of_no_kind_that_fits(fake, buf):
    fake.memory_types = 0b001
    with vulkan.open() as device:
        refused(errno.EINVAL, "no memory type suits", lambda: device.import_buffer(buf))


@pytest.mark.parametrize(("features", "direction"), [(2, "import"), (4, "export"), (0, "import")])
def test_a_driver_that_shares_one_way_only(fake, buf, features, direction):
    fake.features = features
    with vulkan.open() as device:
        make = device.import_buffer if direction == "import" else device.allocate
        argument = buf if direction == "import" else SIZE
        match = f"fake GPU cannot {direction} a dma-buf for buffers of usage 0x23"
        refused(errno.EOPNOTSUPP, match, lambda: make(argument))


@pytest.mark.parametrize("features", [4, 5])
def test_memory_is_dedicated_only_where_it_must_be(fake, buf, features):
    fake.features = features
    with vulkan.open() as device, device.import_buffer(buf) as memory:
        (source,) = [c[1][1].pNext for c in fake.calls if c[0] == "vkAllocateMemory"]
        if features & 1:
            assert source.pNext.kind == "VkMemoryDedicatedAllocateInfo"
            assert source.pNext.buffer == memory.vk_buffer
        else:
            assert source.pNext is None


# -- memory of the device's own


@pytest.fixture
def exported(fake, monkeypatch):
    """The descriptor that the driver hands out, as a Buffer; and the names it is given."""
    names = []

    def from_fd(fd, name):
        names.append(name)
        return Buffer([Slab(os.dup(fd), 0, SIZE)], None, exporter="test", reason="exported")

    fake.exported = lambda: os.memfd_create("exported")
    monkeypatch.setattr(vulkan_module, "from_fd", from_fd)
    return names


@pytest.mark.parametrize(("own", "kind"), [(0b1000, 1), (0b100, 2), (0b110, 1)])
def test_memory_of_the_devices_own(fake, exported, own, kind):
    fake.own_memory = own  # a VkBuffer may be in kinds 1 and 2
    with vulkan.open() as device, device.allocate(SIZE, name="ours") as memory:
        (about,) = [arguments[1] for name, arguments in fake.calls if name == "vkAllocateMemory"]
        assert (about.memoryTypeIndex, about.allocationSize) == (kind, SIZE)
        assert about.pNext.handleTypes == FakeVulkan.VK_EXTERNAL_MEMORY_HANDLE_TYPE_DMA_BUF_BIT_EXT
        assert exported == ["ours"]
        with pytest.raises(BusyError, match="a device has it"):
            memory.buffer.close()
    assert memory.buffer.closed


@pytest.mark.parametrize("name", ["vkAllocateMemory", "vkBindBufferMemory", "vkGetMemoryFdKHR"])
def test_the_driver_has_no_memory(fake, exported, name):
    with vulkan.open() as device:
        before = list(fake.alive)
        fake.fails[name] = "VkErrorOutOfDeviceMemory"
        refused(errno.ENOMEM, "fake GPU: not enough device memory", lambda: device.allocate(SIZE))
        assert fake.alive == before


# -- fences


class Fences:
    """A kernel whose sync files are memfds: which went where, by inode and direction."""

    def __init__(self):
        self.imported, self.exported = [], []

    def export_sync_file(self, fd, flags):
        made = self.make()
        self.exported.append((inode(fd), flags, inode(made)))
        return made

    def import_sync_file(self, fd, flags, sync_file):
        self.imported.append((inode(fd), flags, inode(sync_file)))

    def merge_sync_files(self, one, other):
        assert one == other
        return os.dup(one)

    @staticmethod
    def make():
        return os.memfd_create("a sync file")


def inode(fd):
    return os.fstat(fd).st_ino


@pytest.fixture
def fences(monkeypatch):
    made = Fences()
    for name in ("export_sync_file", "import_sync_file", "merge_sync_files"):
        monkeypatch.setattr(uapi, name, getattr(made, name))
    return made


FLAGS = {"read": uapi.DMA_BUF_SYNC_READ, "write": uapi.DMA_BUF_SYNC_WRITE}


@pytest.mark.parametrize("access", ["read", "write"])
def test_the_jobs_fence_is_added_to_the_buffer(fake, buf, fences, access):
    """Of lavapipe's nobody could tell: its jobs have ended before it hands a fence out."""
    handed = []

    def exported():
        fd = fences.make()
        handed.append(inode(fd))
        return fd

    fake.exported = exported
    with vulkan.open() as device, device.import_buffer(buf) as memory, device.semaphore() as done:
        memory.add_fence(done, access)
        assert fences.imported == [(inode(buf.fileno()), FLAGS[access], handed[0])]
        name, (_, wanted) = fake.calls[-1]
        assert (name, wanted.semaphore) == ("vkGetSemaphoreFdKHR", done.handle)
        assert wanted.handleType == fake.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        fake.exported = lambda: -1  # the job has ended
        memory.add_fence(done, access)
        assert len(fences.imported) == 1


def test_a_sync_file_is_the_callers(fake):
    fake.exported = lambda: os.memfd_create("a sync file", 0)  # inheritable
    with vulkan.open() as device, device.semaphore() as done:
        fd = done.sync_file()
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_a_fence_that_is_refused_is_closed(fake, buf, fences, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTTY, "not here")

    fake.exported = fences.make
    monkeypatch.setattr(uapi, "import_sync_file", refuse)
    with vulkan.open() as device, device.import_buffer(buf) as memory, device.semaphore() as done:
        refused(errno.ENOTTY, "Linux 6.0", lambda: memory.add_fence(done, "write"))


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_job_waits_for_the_buffers_fences(fake, buf, fences, access):
    with vulkan.open() as device, device.import_buffer(buf) as memory:
        with memory.wait_semaphore(access) as before:
            ((of, flags, sync_file),) = fences.exported
            assert (of, flags) == (inode(buf.fileno()), FLAGS[access])
            assert inode(fake.taken[before.handle]) == sync_file
            (_, source) = next(args for name, args in fake.calls if "ImportSemaphore" in name)
            assert source.flags == fake.VK_SEMAPHORE_IMPORT_TEMPORARY_BIT
            assert source.handleType == fake.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
        assert before.handle not in fake.taken


def test_only_a_semaphore_for_a_job_to_signal_can_be_exported(fake, fences):
    fd = fences.make()
    with vulkan.open() as device, device.semaphore(), device.semaphore(fd):
        chains = [args[1].pNext for name, args in fake.calls if name == "vkCreateSemaphore"]
    os.close(fd)  # it stayed ours
    assert chains[0].handleTypes == fake.VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT
    assert chains[1] is None


@pytest.mark.parametrize("name", ["vkCreateSemaphore", "vkImportSemaphoreFdKHR"])
def test_the_driver_refuses_a_semaphore(fake, fences, name):
    fd = fences.make()
    with vulkan.open() as device:
        before = list(fake.alive)
        fake.fails[name] = "VkErrorInvalidExternalHandle"
        refused(errno.EINVAL, "make a semaphore of fake GPU", lambda: device.semaphore(fd))
        assert fake.alive == before
    os.close(fd)


# -- the end


def test_nothing_is_taken_of_what_cannot_be_used(fake, buf, fences):
    with vulkan.open() as device, device.semaphore() as done:
        memory = device.import_buffer(buf)
        calls = len(fake.calls)
        for use in (memory.wait_semaphore, lambda access: memory.add_fence(done, access)):
            with pytest.raises(ValueError, match="invalid direction 'rw'"):
                use("rw")
        memory.close()
        for use in (memory.wait_semaphore, lambda access: memory.add_fence(done, access)):
            with pytest.raises(ClosedError):
                use("read")
        with pytest.raises(ClosedError):
            memory.acquire("a command buffer")
    took = [name for name, _ in fake.calls[calls:]]
    assert not {"vkGetSemaphoreFdKHR", "vkCreateSemaphore", "vkCmdPipelineBarrier"} & set(took)
    assert not fences.exported


def test_a_forks_child_leaves_the_driver_alone(fake, buf):
    with vulkan.open() as device, device.import_buffer(buf) as memory, device.semaphore() as done:

        def child():
            fake.calls.clear()
            for one in (memory, done, device):
                with pytest.raises(ClosedError, match="before fork"):
                    one.__enter__()
                one.close()
            assert fake.calls == []

        forking.in_child(child)


@pytest.mark.parametrize("what", ["import", "allocate", "semaphore", "device"])
def test_nothing_is_given_back_under_a_job(fake, buf, exported, what):
    device = vulkan.open()
    make = {
        "import": lambda: device.import_buffer(buf),
        "allocate": lambda: device.allocate(SIZE),
        "semaphore": device.semaphore,
        "device": lambda: device,
    }
    made = make[what]()
    before = list(fake.alive)
    fake.running = True
    fake.fails["vkDeviceWaitIdle"] = "VkErrorOutOfDeviceMemory"  # that is no end of the job
    with pytest.raises(OSError, match="wait for fake GPU: not enough device memory"):
        made.close()
    assert fake.alive == before
    if what in ("import", "allocate"):
        with pytest.raises(BusyError):
            made.buffer.close()
    fake.fails = {}
    made.close()  # the fake would tell
    device.close()


def test_a_buffer_is_held_until_the_driver_has_let_go(fake, buf):
    seen = []
    destroy = fake._destroy

    def watching(name, what):
        if what[0] in ("Buffer", "Memory"):
            with pytest.raises(BusyError, match="a device has it"):
                buf.close()
            seen.append(name)
        destroy(name, what)

    fake._destroy = watching
    with vulkan.open() as device:
        device.import_buffer(buf).close()
        assert [kind for kind, _ in fake.alive] == ["Instance", "Device"]
    assert sorted(seen) == ["vkDestroyBuffer", "vkFreeMemory"]
    buf.close()


@pytest.mark.parametrize("first", ["device", "made"])
def test_garbage_is_given_back_in_order(fake, buf, first):
    """The garbage collector may come to the device first, and its weak references are gone then."""

    class Renderer:
        def __init__(self):
            self.itself = self
            device = vulkan.open()
            made = device.import_buffer(buf), device.semaphore()
            self.parts = (device, made) if first == "device" else (made, device)

    fake.running = True
    with pytest.warns(ResourceWarning, match="unclosed") as told:
        Renderer()
        gc.collect()
    assert len(told) == 3
    assert fake.alive == []  # the fake would tell of a device that goes before what was made of it
    buf.close()


def test_a_closed_device_closes_what_was_made_of_it(fake, buf, exported):
    device = vulkan.open()
    made = device.import_buffer(buf), device.allocate(SIZE), device.semaphore()
    fake.running = True
    device.close()
    assert fake.alive == []
    for one in made:
        one.close()
        with pytest.raises(ClosedError):
            one.__enter__()
    buf.close()


def test_a_lost_device_can_be_closed(fake, buf):
    with vulkan.open() as device:
        memory = device.import_buffer(buf)
        fake.fails["vkDeviceWaitIdle"] = "VkErrorDeviceLost"
        refused(errno.ENODEV, "the device is lost", device.wait_idle)
        memory.close()
    buf.close()
