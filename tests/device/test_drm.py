"""Memory of displays and GPUs as Buffers, and Buffers on the screen: every byte and pixel."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import drm
from dmabuf.kernel import uapi
from tests import forking, support
from tests.device import screen
from tests.device.conftest import dma_bufs
from tests.guards import drm_node, needs, since, vgem_node
from tests.kernel.vgem import drm as ioctl
from tests.support import assert_same, pattern, poison, raises_errno

WIDTH, HEIGHT = 640, 480
BOCHS, VIRTIO, RENDER = drm_node("bochs-drm"), drm_node("virtio-pci"), drm_node("vgem", "render")
VGEM = vgem_node()
DEBUG = Path("/sys/kernel/debug/dri")
imports = since((6, 13), "bochs takes buffers of others")


def listed() -> list[str]:
    """How many dma-bufs the kernel has, and who has which framebuffers and nodes open."""
    found = [dma_bufs()]
    for node in filter(None, (VGEM, BOCHS, VIRTIO)):
        folder = DEBUG / node.removeprefix("/dev/dri/card")
        for name in ("clients", "framebuffer"):
            if (folder / name).exists():
                lines = (folder / name).read_text().splitlines()
                found += [line for line in lines if not line.startswith("\t")]
    return found


@pytest.fixture
def kernel_lists() -> Callable[[], object]:
    return listed


def no_handle_is_open(card: drm.Card) -> None:
    """The kernel gives the lowest free number to a new handle: 1, where none is open."""
    number = ioctl(card.fileno(), 0xB2, "=IIIIIIQ", 1, 1, 32, 0, 0, 0, 0)[4]
    card.close_handle(number)
    assert number == 1


def pixels(width: int, height: int, seed: int, pitch: int | None = None) -> tuple[bytes, bytes]:
    """A picture as XR24, its rows `pitch` bytes apart, and as red, green and blue bytes."""
    data = pattern(width * height * 4, seed)
    rgb = bytearray(width * height * 3)
    for colour in range(3):
        rgb[colour::3] = data[2 - colour :: 4]
    row = width * 4
    gap = pattern((pitch or row) - row, seed + 1)
    rows = (data[at : at + row] for at in range(0, len(data), row))
    return b"".join(each + gap for each in rows), bytes(rgb)


def shows(expected: bytes, what: str) -> None:
    width, height, got = screen.dump()
    assert (width, height) == (WIDTH, HEIGHT)
    assert_same(got, expected, what)


# -- on the screen


@needs("display", "udmabuf", "dma_heap")
@pytest.mark.parametrize(
    ("exporter", "pitch"),
    [
        pytest.param("udmabuf", None, marks=imports),
        pytest.param("udmabuf", WIDTH * 4 + 64, marks=imports),
        pytest.param("system", None, marks=imports),
        ("the card's own", None),
    ],
)
@pytest.mark.device_table("DRM display", "import")
def test_a_buffer_is_shown(exporter: str, pitch: int | None) -> None:
    data, rgb = pixels(WIDTH, HEIGHT, 1, pitch)
    with drm.Card(BOCHS) as card, made(exporter, card, pitch) as picture:
        assert picture.pitch == (pitch or WIDTH * 4)
        picture.buffer.pwrite(data, 0)
        with card.framebuffer(picture) as framebuffer:
            no_handle_is_open(card)
            card.show(framebuffer)
            shows(rgb, "the screen")
            data, rgb = pixels(WIDTH, HEIGHT, 2, pitch)
            picture.buffer.pwrite(data, 0)
            framebuffer.flush()
            shows(rgb, "the screen after the buffer has changed")
            assert_same(picture.buffer.pread(len(data), 0), data, "the buffer")


def made(exporter: str, card: drm.Card, pitch: int | None = None) -> drm.Image:
    """A picture in memory of an exporter's, or of a card's."""
    if exporter == "the card's own":
        return card.dumb(WIDTH, HEIGHT)
    size = drm.size(WIDTH, HEIGHT, pitch=pitch)
    buffer = dmabuf.allocate(size, exporter=exporter)
    return drm.image(buffer, WIDTH, HEIGHT, pitch=pitch)


@imports
@needs("display", "udmabuf", "nvme")
@pytest.mark.device_table("DRM display", "import", "read", "zero-copy")
def test_from_a_disk_onto_the_screen() -> None:
    """The disk writes into the memory that the display reads."""
    data, rgb = pixels(WIDTH, HEIGHT, 3)
    path = os.environ["DMABUF_TEST_NVME0"]
    with open(path, "r+b", buffering=0) as disk:
        disk.write(data)
        support.drop_cache(disk.fileno())
    with drm.Card(BOCHS) as card, dmabuf.allocate(len(data), exporter="udmabuf") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        with dmabuf.open(path) as file:
            assert file.read_into(buffer, len(data), require="zero-copy").copied == 0
        with card.framebuffer(drm.image(buffer, WIDTH, HEIGHT)) as framebuffer:
            card.show(framebuffer)
            shows(rgb, "the screen")


@imports
@needs("display", "udmabuf")
def test_a_framebuffer_keeps_its_memory() -> None:
    data, rgb = pixels(WIDTH, HEIGHT, 4)
    with drm.Card(BOCHS) as card:
        with dmabuf.allocate(len(data), exporter="udmabuf") as buffer:
            buffer.pwrite(data, 0)
            before = listed()[1:]
            framebuffer = card.framebuffer(drm.image(buffer, WIDTH, HEIGHT))
        with framebuffer:
            card.show(framebuffer, "Virtual-1")
            shows(rgb, "the screen, the buffer being closed")
            assert listed()[1:] != before
        assert listed()[1:] == before, "it is gone before the card is"


@needs("display", "udmabuf")
def test_one_display_and_two_who_want_it() -> None:
    with (
        drm.Card(BOCHS) as first,
        drm.Card(BOCHS) as second,
        first.dumb(WIDTH, HEIGHT) as picture,
    ):
        with first.framebuffer(picture) as one, second.framebuffer(picture) as other:
            first.show(one)
            with pytest.raises(OSError, match="another program has the display") as caught:
                second.show(other)
            assert caught.value.errno in (errno.EBUSY, errno.EINVAL)
            one.close()
            second.show(other)
            with (
                first.framebuffer(picture) as again,
                pytest.raises(ValueError, match="another C"),
            ):
                second.show(again)
            other.close()


# -- GPU memory as Buffers, Buffers as GPU memory


@needs("vgem")
@pytest.mark.device_table("DRM GPU", "export")
def test_a_gpus_memory_is_a_buffer() -> None:
    with drm.Card(VGEM) as card:
        handle, pitch = _vgem_buffer(card)
        with card.export(handle, name="of a GPU") as buffer:
            assert (buffer.size, buffer.name) == (pitch * 64, "of a GPU")
            buffer.pwrite(pattern(buffer.size, 5), 0)
            card.close_handle(handle)  # the buffer does without
            assert_same(buffer.pread(buffer.size, 0), pattern(buffer.size, 5), "the buffer")
        no_handle_is_open(card)


def _vgem_buffer(card: drm.Card) -> tuple[int, int]:
    found = ioctl(card.fileno(), 0xB2, "=IIIIIIQ", 64, 64, 32, 0, 0, 0, 0)
    return found[4], found[5]


@needs("vgem", "udmabuf", "dma_heap")
@pytest.mark.parametrize("exporter", ["udmabuf", "system"])
@pytest.mark.device_table("DRM GPU", "import")
def test_a_buffer_is_a_gpus_memory(exporter: str) -> None:
    """The handle is of the same memory: what it exports is the very dma-buf."""
    with (
        drm.Card(RENDER) as card,
        dmabuf.allocate("1MiB", exporter=exporter) as buffer,
        card.handle(buffer) as one,
    ):
        with card.handle(buffer) as other:
            assert one.number == other.number
        with card.export(one.number) as again:
            assert os.path.sameopenfile(again.fileno(), buffer.fileno())
        buffer.pwrite(poison(buffer.size), 0)
        with pytest.raises(OSError, match="a Handle uses it"):
            card.close_handle(one.number)
        one.close()
        with raises_errno(errno.ENOENT, "no such handle"):
            card.export(one.number)


@needs("vgem")
def test_a_handle_that_was_exported_is_not_closed_with_an_import() -> None:
    with drm.Card(VGEM) as card:
        handle, _ = _vgem_buffer(card)
        with card.export(handle) as buffer:
            card.handle(buffer).close()
            card.export(handle).close()
        card.close_handle(handle)
        no_handle_is_open(card)


@imports
@needs("vgem", "display")
@pytest.mark.device_table("DRM display", "import", "zero-copy")
@pytest.mark.device_table("DRM GPU", "export")
def test_from_one_device_to_another() -> None:
    data, rgb = pixels(WIDTH, HEIGHT, 6)
    with drm.Card(VGEM) as gpu, drm.Card(BOCHS) as card:
        with gpu.dumb(WIDTH, HEIGHT, name="rendered") as picture:
            no_handle_is_open(gpu)
            assert (picture.format, picture.modifier, picture.buffer.name) == (
                "XR24", None, "rendered",
            )  # fmt: skip
            picture.buffer.pwrite(data, 0)
            with card.framebuffer(picture) as framebuffer:
                card.show(framebuffer)
                shows(rgb, "the screen")


# -- what is refused


@needs("virtio_gpu", "udmabuf", "dma_heap", "vgem")
@pytest.mark.parametrize("exporter", ["udmabuf", "system", "the card's own"])
def test_an_import_that_a_driver_refuses(exporter: str) -> None:
    with drm.Card(VIRTIO) as card, drm.Card(VGEM) as gpu:
        with made(exporter, gpu) as picture:
            for attempt in (lambda: card.handle(picture.buffer), lambda: card.framebuffer(picture)):
                with raises_errno(
                    errno.ENODEV, "imports no memory of other devices", filename=VIRTIO
                ):
                    attempt()
        no_handle_is_open(card)
        with card.dumb(WIDTH, HEIGHT) as own, card.framebuffer(own):
            no_handle_is_open(card)


@needs("vgem", "udmabuf")
@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.EIO, "it cannot reach such memory; use memory of the card"),
        (errno.ENOSYS, "it imports no memory of other devices"),
    ],
)
@pytest.mark.parametrize("plane", [0, 1])
def test_what_drivers_may_say_of_an_import(
    number: int, match: str, plane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the second plane: the handle of the first is closed."""
    real, left = uapi.ioctl, plane

    def refusing(fd: int, request: int, argument: object) -> object:
        nonlocal left
        if request == uapi.DRM_IOCTL_PRIME_FD_TO_HANDLE:
            left -= 1
            if left < 0:
                raise OSError(number, os.strerror(number))
        return real(fd, request, argument)

    with (
        drm.Card(VGEM) as card,
        dmabuf.allocate("1MiB", exporter="udmabuf") as luma,
        dmabuf.allocate("1MiB", exporter="udmabuf") as chroma,
    ):
        planes = (drm.Plane(luma, 0, 640), drm.Plane(chroma, 0, 640))
        with monkeypatch.context() as patch:
            patch.setattr(uapi, "ioctl", refusing)
            with pytest.raises(OSError, match=f"import .* into vgem: {match}") as caught:
                card.framebuffer(drm.Image(640, 480, "NV12", planes))
        assert (caught.value.errno, caught.value.filename) == (number, VGEM)
        no_handle_is_open(card)


@needs("display", "root")
def test_a_node_without_permission() -> None:
    before = os.stat(BOCHS).st_mode
    os.chmod(BOCHS, 0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="often video or render"):
            drm.Card(BOCHS)
    finally:
        os.seteuid(0)
        os.chmod(BOCHS, stat.S_IMODE(before))


@needs("vgem")
def test_nodes_of_the_wrong_kind() -> None:
    with drm.Card(VGEM) as card, card.dumb(64, 64) as picture:
        for attempt in (card.outputs, lambda: card.framebuffer(picture)):
            with raises_errno(errno.EOPNOTSUPP, "vgem has no displays"):
                attempt()
        no_handle_is_open(card)
        with drm.Card(RENDER) as render:
            for attempt in (
                render.outputs,
                lambda: render.framebuffer(picture),
                lambda: render.dumb(64, 64),
            ):
                with pytest.raises(PermissionError, match=r"a render node .* open /dev/dri/card0"):
                    attempt()


@imports
@needs("display", "udmabuf")
def test_pictures_that_a_display_cannot_show() -> None:
    with (
        drm.Card(BOCHS) as card,
        dmabuf.allocate(drm.size(WIDTH, HEIGHT), exporter="udmabuf") as buffer,
    ):
        for how, match in (
            ({"format": "NV12"}, "bochs-drm refuses the format, the size or pitch 320; try XR24"),
            ({"modifier": (1 << 56) | 1}, "or pitch 1280 with modifier 0x100000000000001"),
        ):
            with raises_errno(errno.EINVAL, match, filename=BOCHS):
                card.framebuffer(drm.image(buffer, 320, 240, **how))
        with card.framebuffer(drm.image(buffer, 333, 240, modifier=0)) as odd:
            with pytest.raises(OSError, match=r"has no mode of 333x240; it has .*640x480"):
                card.show(odd)
            with pytest.raises(OSError, match="no display at HDMI-A-7; its connectors are Virt"):
                card.show(odd, "HDMI-A-7")
        for sides in ((100_000, 100_000), (1, 1 << 31)):
            with pytest.raises(OSError, match="bochs-drm refuses that size"):
                card.dumb(*sides)
        no_handle_is_open(card)


@needs("vgem", "udmabuf")
def test_buffers_that_are_not_one_dma_buf() -> None:
    with drm.Card(VGEM) as card, dmabuf.allocate(4096, exporter="memfd") as buffer:
        with pytest.raises(OSError, match=r'a memfd is not a dma-buf; allocate with exporter="udm'):
            card.handle(buffer)
        with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed, not int"):
            card.handle(buffer.fileno())
        for number in (-1, 1 << 32):
            for use in (card.export, card.close_handle):
                with pytest.raises(ValueError, match="use a GEM handle, a number of 32 bits"):
                    use(number)
    with pytest.raises(dmabuf.ClosedError):
        card.handle(buffer)


# -- lifetimes


@needs("vgem", "udmabuf")
def test_a_fork_leaves_the_parents_handles_alone() -> None:
    with drm.Card(VGEM) as card, dmabuf.allocate(4096, exporter="udmabuf") as buffer:
        with card.handle(buffer) as handle:

            def child() -> None:
                handle.close()
                with pytest.raises(dmabuf.ClosedError, match="before fork"):
                    card.handle(buffer)
                card.close()

            forking.in_child(child)
            card.export(handle.number).close()
        no_handle_is_open(card)


@needs("vgem", "udmabuf")
def test_what_is_dropped_is_closed_with_a_warning() -> None:
    with drm.Card(VGEM) as card, dmabuf.allocate(4096, exporter="udmabuf") as buffer:
        with pytest.warns(ResourceWarning, match="unclosed <dmabuf.Handle 1 of"):
            card.handle(buffer)
        no_handle_is_open(card)
    with pytest.warns(ResourceWarning, match="unclosed <dmabuf.Card /dev/dri/card. vgem>"):
        drm.Card(VGEM)
    with pytest.raises(dmabuf.ClosedError):
        card.fileno()


@imports
@needs("display", "udmabuf")
def test_the_example(tmp_path: Path) -> None:
    data, rgb = pixels(WIDTH, HEIGHT, 7)
    (tmp_path / "picture.raw").write_bytes(data)
    words = [sys.executable, "examples/display.py", BOCHS, tmp_path / "picture.raw", "640", "480"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        line = process.stdout.readline()
        assert line == b"bochs-drm shows 640x480 XR24, route direct: Enter ends\n"
        shows(rgb, "the screen")
        process.communicate(b"\n")
    assert process.returncode == 0
