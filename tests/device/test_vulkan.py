"""Jobs of a real Vulkan driver, Mesa's lavapipe, on Buffers; tests of refusals: test_docs.py."""

import array
import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf import BusyError, ClosedError
from dmabuf.memory import exporters
from tests.guards import needs
from tests.kernel.conftest import BUFFERS
from tests.kernel.vgem import PATIENCE, Card
from tests.resources import held
from tests.support import assert_same, drop_cache, fill, mounted, pattern, poison, raises_errno

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = 1 << 20
WORD = 0xC0FFEE42
FILLED = array.array("I", [WORD]).tobytes() * (SIZE // 4)


@pytest.fixture
def gpu():
    from dmabuf.devices import vulkan

    with vulkan.open() as device:
        yield device


@pytest.fixture
def jobs(gpu):
    from tests.device.gpu_jobs import Jobs

    made = Jobs(gpu)
    yield made
    made.close()


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
        buffer.pwrite(poison(SIZE), 0)
        yield buffer


@pytest.fixture
def card():
    made = Card()
    yield made
    made.close()


def shown(device, size):
    """The first bytes of a block device, from the device itself."""
    fd = os.open(device, os.O_RDONLY)
    try:
        drop_cache(fd)
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def put(device, data):
    """Bytes at the start of a block device, on the device itself."""
    fd = os.open(device, os.O_RDWR)
    try:
        fill(fd, data)
        drop_cache(fd)
    finally:
        os.close(fd)


# -- the whole way


def swapped(data):
    words = array.array("I", data)
    words.byteswap()
    return words.tobytes()


@needs("vulkan", "nvme", "udmabuf")
@pytest.mark.device_table("Vulkan, by lavapipe", "import", "read", "write", "zero-copy")
def test_the_example_from_drive_to_drive(tmp_path):
    with mounted(os.environ["DMABUF_TEST_NVME0"], "ext4", tmp_path / "drive") as drive:
        source, target = drive / "in.raw", drive / "out.raw"
        source.write_bytes(pattern(4 * SIZE, 1))
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / "gpu_swap.py", source, target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stderr, done.returncode) == ("", 0)
        assert_same(target.read_bytes(), swapped(pattern(4 * SIZE, 1)), "what the GPU made")
    _, read, written = done.stdout.splitlines()
    assert read.endswith("4,194,304 bytes, direct, 0 bytes copied by the CPU")
    assert written.endswith("4,194,304 bytes, direct, 0 bytes copied by the CPU")


@needs("vulkan")
def test_the_shader_is_what_its_source_compiles_to(tmp_path):
    made = tmp_path / "swap.spv"
    source = EXAMPLES / "swap.comp"
    subprocess.run(["glslangValidator", "-V", source, "-o", made], check=True, capture_output=True)
    assert without_generator(made) == without_generator(EXAMPLES / "swap.spv")


def without_generator(path):
    """A SPIR-V module's words, but for the compiler's version (the third of its header)."""
    words = array.array("I", path.read_bytes())
    del words[2]
    return words


# -- memory


@needs("vulkan", "udmabuf", "dma_heap", "vgem", "hugepages")
@pytest.mark.parametrize("kind", [kind for kind in BUFFERS if kind != "memfd"])
@pytest.mark.device_table("Vulkan, by lavapipe", "import")
def test_the_gpu_reads_and_writes_each_kind_of_buffer(gpu, jobs, buf, kind):
    size = 2 * SIZE if kind == "huge pages" else SIZE
    with BUFFERS[kind](size) as other:
        if not other.is_dmabuf:
            assert kind == "huge pages" and not exporters.maps_large_pages()
            return
        with gpu.import_buffer(other, size=SIZE) as theirs, gpu.import_buffer(buf) as ours:
            other.pwrite(pattern(size, 2), 0)
            jobs.copy(theirs, ours)
            gpu.wait_idle()
            assert_same(buf.pread(SIZE, 0), pattern(size, 2)[:SIZE], f"what the GPU read of {kind}")
            buf.pwrite(pattern(SIZE, 3), 0)
            jobs.copy(ours, theirs)
            gpu.wait_idle()
            expected = pattern(SIZE, 3) + pattern(size, 2)[SIZE:]
            assert_same(other.pread(size, 0), expected, f"what the GPU wrote into {kind}")


@needs("vulkan", "udmabuf")
def test_a_part_at_the_start_leaves_the_rest(gpu, jobs, buf):
    with gpu.import_buffer(buf, size="64KiB") as memory:
        assert (memory.size, memory.buffer) == (65536, buf)
        jobs.fill(memory, WORD)
        gpu.wait_idle()
    assert_same(buf.pread(SIZE, 0), FILLED[:65536] + poison(SIZE)[65536:], "the buffer")


@needs("vulkan", "nvme", "udmabuf")
@pytest.mark.device_table("Vulkan, by lavapipe", "export", "read", "write")
def test_the_gpus_own_memory_is_a_buffer(gpu, jobs, buf):
    device = os.environ["DMABUF_TEST_NVME0"]
    put(device, pattern(SIZE, 4))
    with gpu.allocate(SIZE, name="of the GPU") as memory, gpu.import_buffer(buf) as ours:
        shared = memory.buffer
        assert shared.size >= memory.size == SIZE
        assert (shared.is_dmabuf, shared.name) == (True, "of the GPU")
        shared.pwrite(poison(SIZE), 0)
        with dmabuf.open(device, "r+") as file:
            assert file.read_into(shared, SIZE).nbytes == SIZE
            jobs.copy(memory, ours)
            gpu.wait_idle()
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 4), "what the GPU has of the drive")
            jobs.fill(memory, WORD)
            gpu.wait_idle()
            file.write_from(shared, SIZE, sync=True)
        assert_same(shown(device, SIZE), FILLED, "what the drive has of the GPU")
        with pytest.raises(BusyError, match="a device has it"):
            shared.close()
        kept = dmabuf.from_fd(shared)
    assert shared.closed
    with kept:
        assert_same(kept.pread(SIZE, 0), FILLED, "the memory after the GPU let it go")


@needs("vulkan", "udmabuf")
def test_memory_of_ones_own_is_exported(gpu, buf):
    with gpu.allocate(SIZE) as memory:
        memory.buffer.pwrite(pattern(SIZE, 5), 0)
        with gpu.export_memory(memory.vk_memory) as again:
            assert_same(again.pread(SIZE, 0), pattern(SIZE, 5), "the same memory")


@needs("vulkan", "udmabuf")
def test_a_device_of_ones_own(gpu, buf):
    from dmabuf.devices import vulkan
    from tests.device.gpu_jobs import Jobs

    with vulkan.Device(gpu.physical_device, gpu.handle) as mine:
        own = Jobs(mine)
        with mine.import_buffer(buf) as memory:
            own.fill(memory, WORD)
            assert own.ended(PATIENCE)
        own.close()
    assert_same(buf.pread(SIZE, 0), FILLED, "the buffer")
    gpu.wait_idle()  # it is there still


@needs("vulkan")
def test_a_device_without_the_extensions(gpu):
    import vulkan as vk

    from dmabuf.devices import vulkan

    queue = vk.VkDeviceQueueCreateInfo(queueCount=1, pQueuePriorities=[1.0])
    about = vk.VkDeviceCreateInfo(pQueueCreateInfos=[queue])
    bare = vk.vkCreateDevice(gpu.physical_device, about, None)
    try:
        with raises_errno(errno.EOPNOTSUPP, "enable VK_KHR_external_memory_fd when"):
            vulkan.Device(gpu.physical_device, bare)
    finally:
        vk.vkDestroyDevice(bare, None)


# -- fences


@needs("vulkan", "vgem", "nvme", "udmabuf")
@pytest.mark.device_table("Vulkan, by lavapipe", "import", "fence", "write", "zero-copy")
def test_storage_waits_for_the_gpu(gpu, jobs, buf, card):
    """The job cannot run before another's fence; the transfer comes after it all the same."""
    device = os.environ["DMABUF_TEST_NVME0"]
    put(device, pattern(SIZE, 6))
    fence, fd = card.sync_file()
    with gpu.import_buffer(buf) as memory, gpu.semaphore(fd) as before, gpu.semaphore() as done:
        os.close(fd)
        jobs.fill(memory, WORD, wait=before, signal=done)
        assert not jobs.ended(0.05)
        assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer before the job")
        with dmabuf.open(device, "r+") as file, card.ending(fence):
            memory.add_fence(done, "write")
            transfer = file.write_from(buf, timeout=PATIENCE, sync=True)
        assert (transfer.route, transfer.copied) == (dmabuf.Route.DIRECT, 0)
    assert_same(shown(device, SIZE), FILLED, "what the drive has of the GPU")


@needs("vulkan", "vgem", "udmabuf")
@pytest.mark.device_table("Vulkan, by lavapipe", "import", "fence")
def test_a_job_waits_for_who_writes_the_buffer(gpu, jobs, buf, card):
    with dmabuf.from_fd(card.fd) as theirs, contextlib.ExitStack() as stack:
        memory = stack.enter_context(gpu.import_buffer(theirs))
        ours = stack.enter_context(gpu.import_buffer(buf, size=memory.size))
        theirs.pwrite(pattern(theirs.size, 7), 0)
        fence = card.job("write")
        before = stack.enter_context(memory.wait_semaphore("read"))
        jobs.copy(memory, ours, wait=before)
        assert not jobs.ended(0.05)
        assert_same(buf.pread(SIZE, 0), poison(SIZE), "the target before the job")
        card.done(fence)
        assert jobs.ended(PATIENCE)
        copied = pattern(theirs.size, 7) + poison(SIZE)[theirs.size :]
        assert_same(buf.pread(SIZE, 0), copied, "the target after it")


@needs("vulkan", "vgem")
def test_a_reading_job_runs_beside_readers_and_a_writing_one_does_not(gpu, jobs, card):
    with dmabuf.from_fd(card.fd) as theirs, gpu.import_buffer(theirs) as memory:
        fence = card.job("read")
        with memory.wait_semaphore("read") as before:
            jobs.submit([memory], lambda job: None, wait=before)
            assert jobs.ended(PATIENCE)
        with memory.wait_semaphore("write") as before:
            jobs.fill(memory, WORD, wait=before)
            assert not jobs.ended(0.05)
            card.done(fence)
            assert jobs.ended(PATIENCE)
        assert theirs.pread(4, 0) == FILLED[:4]


@needs("vulkan", "vgem", "udmabuf")
def test_a_semaphore_hands_its_sync_file_on(gpu, jobs, buf, card):
    """What lavapipe hands on has signalled: it waits for the job first. Others may not."""
    _, fd = card.sync_file()
    with gpu.import_buffer(buf) as memory, gpu.semaphore(fd) as before, gpu.semaphore() as done:
        os.close(fd)
        for _ in range(2):  # it serves the next job again
            jobs.fill(memory, WORD, wait=before, signal=done)
            with card.ending(*card.fences):
                got = done.sync_file()
                if got is not None:
                    assert not os.get_inheritable(got)
                    buf.import_fence(got, "write")
                    os.close(got)
                buf.wait("read", PATIENCE)
            assert_same(buf.pread(SIZE, 0), FILLED, "the buffer after the fence")
            before = None  # had been waited for


@needs("vulkan", "udmabuf", "vgem")
def test_what_is_no_sync_file(gpu, card):
    for make in (lambda: os.open("/dev/null", os.O_RDONLY), lambda: os.dup(card.fd)):
        fd = make()
        before = held()
        with raises_errno(errno.EINVAL, f"descriptor {fd}: not a sync file"):
            gpu.semaphore(fd)
        assert held() == before
        os.close(fd)
        with raises_errno(errno.EBADF):
            gpu.semaphore(fd)


# -- lifetimes


@needs("vulkan", "udmabuf")
def test_a_buffer_stays_open_under_the_gpu(gpu, jobs, buf):
    first, second = gpu.import_buffer(buf), gpu.import_buffer(buf)
    for memory in (first, second):
        with pytest.raises(BusyError, match="a device has it"):
            buf.close()
        jobs.fill(memory, WORD)
        gpu.wait_idle()
        assert_same(buf.pread(SIZE, 0), FILLED, "the buffer")
        memory.close()
        memory.close()
    buf.close()
    with pytest.raises(ClosedError):
        gpu.import_buffer(buf)


@needs("vulkan", "udmabuf", "vgem")
def test_closing_waits_for_the_job(gpu, jobs, buf, card):
    fence, fd = card.sync_file()
    before = gpu.semaphore(fd)
    os.close(fd)
    memory = gpu.import_buffer(buf)
    jobs.fill(memory, WORD, wait=before)
    with card.ending(fence):
        memory.close()
    assert_same(buf.pread(SIZE, 0), FILLED, "the buffer when the memory is closed")
    before.close()


# -- refusals


_OPEN = """
import os, sys
from dmabuf.devices import vulkan
try:
    vulkan.open(*sys.argv[1:])
except OSError as error:
    print(error.errno, error.filename, error.strerror)
"""
