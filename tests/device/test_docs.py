"""What docs/ quotes of refusals is what the code says, word for word, and none is left out."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import drm, v4l2, vfio
from tests.device.vivid import OUTPUT, SINGLE
from tests.guards import drm_node, needs, since, vfio_address, vgem_node
from tests.kernel.conftest import heap_read_only, native
from tests.support import in_child

DOCS = Path(__file__).parents[2] / "docs"
BOCHS, VIRTIO = drm_node("bochs-drm"), drm_node("virtio-pci")


def refused(page: str) -> str:
    """What a page says of refusals."""
    return (DOCS / page).read_text().partition("\n## What is refused")[2].partition("\n## ")[0]


def fenced(text: str) -> list[str]:
    """The lines of the first block of code."""
    return text.split("```")[1].split("\n", 1)[1].splitlines()


def alike(text: str) -> str:
    """Without what is another on another machine: addresses, nodes, Mesa's versions."""
    text = re.sub(r"0000:\w\w:\w\w\.\d", "ADDRESS", text)
    text = re.sub(r"/dev/dri/card\d|/dev/video\d|/dev/nvme\dn\d", "NODE", text)
    return re.sub(r"llvmpipe \([^)]*\)", "llvmpipe", text)


def told(attempt: Callable[[], object]) -> str:
    """The last line of the traceback, the error's module left out."""
    with pytest.raises((OSError, ValueError)) as caught:
        attempt()
    error = caught.value
    error.__traceback__ = None
    return alike(f"{type(error).__name__}: {error}")


def same(found: list[str], quoted: list[str]) -> None:
    assert found == list(map(alike, quoted))


@since((6, 19), "VFIO exports BARs")
@needs("display", "virtio_gpu", "vgem", "vfio", "udmabuf")
def test_displays() -> None:
    with (
        dmabuf.allocate(drm.size(640, 480), exporter="udmabuf") as buffer,
        drm.Card(BOCHS) as bochs,
        drm.Card(VIRTIO) as virtio,
        drm.Card(vgem_node()) as vgem,
        vfio.Device(vfio_address()) as device,
        device.bar(2) as bar,
    ):
        picture = drm.image(buffer, 640, 480)
        found = [
            told(lambda: drm.Card("/dev/null")),
            told(lambda: drm.image(buffer, 1920, 1080)),
            told(lambda: bochs.framebuffer(drm.image(buffer, 320, 240, "NV12"))),
            told(lambda: virtio.handle(buffer)),
            told(lambda: vgem.framebuffer(picture)),
            told(lambda: bochs.handle(bar)),
        ]
    same(found, fenced(refused("displays.md")))


@since((6, 19), "VFIO exports BARs")
@needs("vfio", "nvme")
def test_memory_of_pci_devices() -> None:
    drive = os.environ["DMABUF_TEST_NVME0"]
    nvme = Path("/sys/class/block", Path(drive).name, "device/device").resolve().name
    with vfio.Device(vfio_address()) as device:
        found = [
            told(lambda: vfio.Device(nvme)),
            told(lambda: device.bar(1)),
            told(lambda: device.bar(0)),
        ]
        same(found, fenced(refused("pci.md")))
        text = (DOCS / "pci.md").read_text()
        with device.bar(2) as buffer, dmabuf.open(drive) as file:
            shown = f"{device} {device.bars()}\n{buffer!r} {buffer.mode!r}\n"
            assert alike(shown) in alike(text)
            native_or_nothing = [told(lambda: buffer.map("r").__enter__())]
            if not native(buffer):
                native_or_nothing.append(told(lambda: file.plan(buffer)))
        for line in native_or_nothing:
            assert line in map(alike, text.splitlines())


@needs("cameras", "udmabuf")
def test_cameras(tmp_path: Path) -> None:
    block = fenced(refused("cameras.md"))
    found = []
    with v4l2.capture(SINGLE, format="YUYV", width=640, height=480):
        pass  # a camera keeps its format: here the one that it has at first
    for words in (["/dev/null"], [OUTPUT], [SINGLE, "--size", "650x480"]):
        command = ["dmabuf", "record", words[0], "x", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode and not done.stdout
        found += [alike(f"$ {' '.join(command)}"), alike(done.stderr.rstrip("\n"))]
    same(found, block)
    how = {"format": "RGB3", "width": 320, "height": 180, "fps": 30}
    with v4l2.capture(SINGLE, **how) as camera, next(camera) as frame:
        lines = (DOCS / "cameras.md").read_text().splitlines()
        for shown in (repr(camera), repr(frame)):
            assert any(alike(line).startswith(alike(shown)) for line in lines), shown


_VULKAN = """
from dmabuf.devices import vulkan
try:
    vulkan.open()
except OSError as error:
    print(f"{type(error).__name__}: {error}")
"""


@needs("vulkan", "udmabuf", "dma_heap")
def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import vulkan as vk

    from dmabuf.devices import vulkan

    def slabs(buffer: dmabuf.Buffer) -> dmabuf.Buffer:
        first, second = (buffer.slabs[0]._replace(fd=os.dup(buffer.fileno())) for _ in range(2))
        both = [first, second._replace(offset=first.size)]
        return dmabuf.Buffer(both, None, exporter="udmabuf", reason="two of them")

    with (
        vulkan.open() as gpu,
        dmabuf.allocate("1MiB", exporter="udmabuf") as buffer,
        dmabuf.allocate("1MiB", exporter="memfd") as memfd,
        heap_read_only(1 << 20) as reading,
        slabs(buffer) as two,
        open("/dev/null") as null,
    ):
        found = [
            told(lambda: vulkan.open("radeon")),
            told(lambda: gpu.import_buffer(memfd)),
            told(lambda: gpu.import_buffer(buffer, size="2MiB")),
            told(lambda: gpu.import_buffer(reading)),
            told(lambda: gpu.import_buffer(two)),
            told(lambda: gpu.import_buffer(reading, usage=vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT)),
            told(lambda: gpu.allocate("1TiB")),
            told(lambda: gpu.semaphore(null.fileno())).replace(str(null.fileno()), "7"),
        ]
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere.json")
    found.append(in_child(_VULKAN).rstrip("\n"))
    quoted = map(alike, re.findall(r"`(\w+: [^`]*)`", refused("gpus.md")))
    assert set(found) <= set(quoted), "\n".join(found)
