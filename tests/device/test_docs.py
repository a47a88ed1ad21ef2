"""The errors that docs/ quotes are those of the code, word for word."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import drm, v4l2, vfio
from tests.device.vivid import OUTPUT, SINGLE
from tests.guards import drm_node, needs, since, vfio_address, vgem_node
from tests.kernel.conftest import heap_read_only
from tests.support import in_child
from tests.unit.command import dmabuf as command

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
    same(found, fenced(refused("guides/displays.md")))


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
        same(found, fenced(refused("guides/pci.md")))
        text = (DOCS / "guides/pci.md").read_text()
        with device.bar(2) as buffer:
            shown = f"{device} {device.bars()}\n{buffer!r} {buffer.mode!r}\n"
            assert alike(shown) in alike(text)
            assert told(lambda: buffer.map("r").__enter__()) in text.splitlines()


@needs("cameras", "udmabuf")
def test_cameras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = fenced(refused("guides/cameras.md"))
    found = []
    monkeypatch.chdir(tmp_path)
    with v4l2.capture(SINGLE, format="YUYV", width=640, height=480):
        pass  # a camera keeps its format
    for words in (["/dev/null", "x"], [OUTPUT, "x"], [SINGLE, "x", "--size", "650x480"]):
        ended = command(capsys, "record", *words)
        assert ended.status and not ended.out
        found += [alike(f"$ dmabuf record {' '.join(words)}"), alike(ended.err.rstrip("\n"))]
    same(found, block)
    how = {"format": "RGB3", "width": 320, "height": 180, "fps": 30}
    with v4l2.capture(SINGLE, **how) as camera, next(camera) as frame:
        lines = (DOCS / "guides/cameras.md").read_text().splitlines()
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

    with (
        vulkan.open() as gpu,
        dmabuf.allocate("1MiB", exporter="udmabuf") as buffer,
        dmabuf.allocate("1MiB", exporter="memfd") as memfd,
        heap_read_only(1 << 20) as reading,
        open("/dev/null") as null,
    ):
        found = [
            told(lambda: vulkan.open("radeon")),
            told(lambda: gpu.import_buffer(memfd)),
            told(lambda: gpu.import_buffer(buffer, size="2MiB")),
            told(lambda: gpu.import_buffer(reading)),
            told(lambda: gpu.import_buffer(reading, usage=vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT)),
            told(lambda: gpu.allocate("1TiB")),
            told(lambda: gpu.semaphore(null.fileno())).replace(
                f"descriptor {null.fileno()}:", "descriptor 7:"
            ),
        ]
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere.json")
    found.append(in_child(_VULKAN).rstrip("\n"))
    quoted = map(alike, re.findall(r"`(\w+: [^`]*)`", refused("guides/gpus.md")))
    assert set(found) <= set(quoted), "\n".join(found)
