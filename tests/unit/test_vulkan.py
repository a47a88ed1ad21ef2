"""What dmabuf.devices.vulkan refuses, and that it leaves nothing behind: by a fake driver.

The rest, with a real one, is in tests/device/test_vulkan.py.
"""

import errno
import os
import sys

import pytest

from dmabuf.buffer import Buffer, Slab
from dmabuf.devices import vulkan
from tests.resources import held
from tests.support import in_child
from tests.unit.fake_vulkan import FakeVulkan

SIZE = 1 << 16


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = held()
    yield
    assert held() == before


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
    with pytest.raises(OSError, match=match) as caught:
        make()
    assert caught.value.errno == number
    assert held() == before


# -- opening


def test_the_module_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vulkan", None)
    match = r"needs vulkan .*: pip install dmabuf\[vulkan\]"
    with pytest.raises(ImportError, match=match) as caught:
        vulkan.open()
    assert caught.value.name == "vulkan"


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


def test_importing_it_loads_no_binding():
    loaded = "import sys, dmabuf.devices.vulkan; print('vulkan' in sys.modules)"
    assert in_child(loaded) == "False\n"


def test_there_is_no_driver(fake):
    fake.fails["vkCreateInstance"] = "VkErrorIncompatibleDriver"
    refused(errno.ENODEV, "no Vulkan driver: apt install mesa-vulkan-drivers", vulkan.open)
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
    match = "fake GPU: it has no VK_EXT_external_memory_dma_buf$"
    refused(errno.EOPNOTSUPP, match, vulkan.open)
    fake.version = (1, 0, 9)
    refused(errno.EOPNOTSUPP, "fake GPU: it is older than Vulkan 1.1", vulkan.open)


@pytest.mark.parametrize(
    ("name", "kind", "number", "match"),
    [
        ("vkCreateDevice", "VkErrorOutOfDeviceMemory", errno.ENOMEM, "opening fake GPU: no device"),
        ("vkEnumeratePhysicalDevices", "VkErrorUnknown", errno.EIO, "asking .* the driver failed"),
        ("vkGetDeviceProcAddr", "ProcedureNotFoundError", errno.EOPNOTSUPP, "enable VK_KHR_ext"),
    ],
)
def test_opening_fails_half_way(fake, name, kind, number, match):
    fake.fails[name] = kind
    refused(number, match, vulkan.open)
    assert fake.alive == []


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
        fake_close(fake)


def fake_close(fake):
    """A fake driver took the descriptors over, and keeps them until it is told."""
    for name, arguments in fake.calls:
        if name == "vkAllocateMemory" and hasattr(arguments[1].pNext, "fd"):
            os.close(arguments[1].pNext.fd)
    fake.calls.clear()


# -- importing


@pytest.mark.parametrize(
    "name",
    ["vkCreateBuffer", "vkGetMemoryFdPropertiesKHR", "vkAllocateMemory"],
)
def test_the_driver_refuses_the_import(fake, buf, name):
    with vulkan.open() as device:
        before = list(fake.alive)
        fake.fails[name] = "VkErrorInvalidExternalHandle"
        match = "the driver refuses the descriptor"
        refused(errno.EINVAL, match, lambda: device.import_buffer(buf))
        assert fake.alive == before
    buf.close()  # nobody has it


def test_a_driver_closes_what_it_refuses(fake, buf, monkeypatch):
    """As Mesa 25.0's lavapipe does: the number may be another file's by then."""

    def allocate(device, about, allocator):
        os.close(about.pNext.fd)
        raise fake.error("VkErrorInvalidExternalHandle")

    with vulkan.open() as device:
        monkeypatch.setattr(fake, "vkAllocateMemory", allocate, raising=False)
        refused(errno.EINVAL, "refuses", lambda: device.import_buffer(buf))


def test_binding_fails_after_the_driver_has_the_descriptor(fake, buf):
    with vulkan.open() as device:
        before = list(fake.alive)
        fake.fails["vkBindBufferMemory"] = "VkErrorOutOfDeviceMemory"
        with pytest.raises(OSError, match="no device memory"):
            device.import_buffer(buf)
        assert fake.alive == before
    fake_close(fake)  # it was the driver's, and we closed it not
    buf.close()


def test_a_buffer_too_small_for_the_driver(fake, buf):
    fake.needs = 256
    with vulkan.open() as device:
        match = f"needs {SIZE + 256} bytes for a VkBuffer of {SIZE}, and the buffer has {SIZE}"
        refused(errno.EINVAL, match, lambda: device.import_buffer(buf))
        with device.import_buffer(buf, size=SIZE - 256) as memory:
            assert memory.size == SIZE - 256
    fake_close(fake)


def test_memory_of_no_kind_that_fits(fake, buf):
    fake.memory_types = 0b001
    with vulkan.open() as device:
        refused(errno.EINVAL, "no kind of its memory", lambda: device.import_buffer(buf))


@pytest.mark.parametrize(("features", "direction"), [(2, "import"), (4, "export"), (0, "import")])
def test_a_driver_that_shares_one_way_only(fake, buf, features, direction):
    fake.features = features
    with vulkan.open() as device:
        make = device.import_buffer if direction == "import" else device.allocate
        argument = buf if direction == "import" else SIZE
        match = f"fake GPU can {direction} no dma-buf for buffers of usage 0x23"
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
    fake_close(fake)


def test_a_lost_device_can_be_closed(fake, buf):
    with vulkan.open() as device:
        memory = device.import_buffer(buf)
        fake.fails["vkDeviceWaitIdle"] = "VkErrorDeviceLost"
        refused(errno.ENODEV, "the device is lost", device.wait_idle)
        memory.close()
    fake_close(fake)
    buf.close()
