"""VA-API through libva's own loader, on a driver of the tests: memory in both directions.

The driver (va_driver.c) keeps surfaces in udmabufs, maps what it imports, and copies one surface
to another in a thread that ends when the test says so.
"""

import contextlib
import ctypes
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import dmabuf
from dmabuf.devices import drm, v4l2, vaapi
from dmabuf.errors import BusyError, ClosedError
from tests import forking
from tests.device.vivid import SINGLE, picture
from tests.guards import drm_node, needs
from tests.support import assert_same, poison

RENDER = drm_node("vgem", "render")
SOURCE = Path(__file__).with_name("va_driver.c")
WIDTH, HEIGHT = 200, 102
FORMATS = ["NV12", "P010", "XR24"]

va = needs("vgem", "udmabuf", "libva")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("va")
    target = folder / "tests_drv_video.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-pthread", "-fvisibility=hidden"]
    subprocess.run(["gcc", *flags, "-o", target, SOURCE], check=True)
    return folder


@pytest.fixture
def loader(driver: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have libva load the driver of the tests."""
    monkeypatch.setenv("LIBVA_DRIVERS_PATH", str(driver))
    monkeypatch.setenv("LIBVA_DRIVER_NAME", "tests")
    return monkeypatch


@pytest.fixture
def display(loader: pytest.MonkeyPatch) -> Iterator[vaapi.Display]:
    with vaapi.open(RENDER) as found:
        yield found


class Gate:
    """What the driver's jobs wait for: `open` lets one end, `fail` makes it fail."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def open(self) -> None:
        os.eventfd_write(self.fd, 1)

    def fail(self) -> None:
        os.eventfd_write(self.fd, 2)


@pytest.fixture
def gate(loader: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate()
    loader.setenv("TEST_VA_GATE", str(found.fd))
    yield found
    os.close(found.fd)


class Jobs:
    """A context of libva whose jobs copy one surface to another, by libva itself."""

    def __init__(self, display: vaapi.Display) -> None:
        self.va, self.display = ctypes.CDLL("libva.so.2"), ctypes.c_void_p(display.handle)
        config, self.context = ctypes.c_uint32(), ctypes.c_uint32()
        self._call("vaCreateConfig", -1, 10, None, 0, ctypes.byref(config))  # none, VideoProc
        self._call("vaCreateContext", config, WIDTH, HEIGHT, 0, None, 0, ctypes.byref(self.context))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.va, name)(self.display, *arguments)
        assert status == 0, f"{name}: {status}"

    def copy(self, source: vaapi.Surface, target: vaapi.Surface) -> None:
        number, buffer = ctypes.c_uint32(source.number), ctypes.c_uint32()
        self._call(
            "vaCreateBuffer", self.context, 41, 4, 1, ctypes.byref(number), ctypes.byref(buffer)
        )
        self._call("vaBeginPicture", self.context, target.number)
        self._call("vaRenderPicture", self.context, ctypes.byref(buffer), 1)
        self._call("vaEndPicture", self.context)

    def sync(self, number: int) -> None:
        self._call("vaSyncSurface", number)


def buffer_of(name: str, exporter: str = "udmabuf", pitch: int | None = None) -> drm.Image:
    """A picture in poisoned memory."""
    memory = dmabuf.allocate(drm.size(WIDTH, HEIGHT, name, pitch=pitch), exporter=exporter)
    memory.pwrite(poison(memory.size), 0)
    return drm.image(memory, WIDTH, HEIGHT, name, pitch=pitch, modifier=0)


def rows(image: drm.Image) -> list[tuple[drm.Plane, int, int]]:
    """Each plane, its bytes in a row, and its rows; an independent account of the layouts."""
    pixel = {"NV12": 1, "P010": 2, "XR24": 4}[image.format]
    return [
        (plane, image.width * pixel, -(-image.height // (2 if number else 1)))
        for number, plane in enumerate(image.planes)
    ]


def draw(image: drm.Image, seed: int) -> None:
    for number, (plane, width, count) in enumerate(rows(image)):
        for row in range(count):
            data = bytes((seed + 31 * row + 7 * n + 101 * number) % 251 for n in range(width))
            plane.buffer.pwrite(data, plane.offset + row * plane.pitch)


def content(image: drm.Image) -> bytes:
    return b"".join(
        plane.buffer.pread(width, plane.offset + row * plane.pitch)
        for plane, width, count in rows(image)
        for row in range(count)
    )


def whole(image: drm.Image) -> bytes:
    return b"".join(
        plane.buffer.pread(plane.buffer.size, 0)
        for plane in {id(plane.buffer): plane for plane in image.planes}.values()
    )


@va
@needs("dma_heap")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exporter", ["udmabuf", "system"])
@pytest.mark.device_table("VA-API, a driver of the tests", "import")
def test_import(name: str, exporter: str, display: vaapi.Display) -> None:
    """The driver reads one Buffer and writes another: each byte of it, and no byte beside."""
    pitch = {"NV12": 256, "P010": 512, "XR24": 1024}[name]
    jobs = Jobs(display)
    with buffer_of(name, exporter, pitch) as one, buffer_of(name, exporter, pitch) as other:
        draw(one, 3)
        expected = bytearray(whole(other))
        for plane, width, count in rows(one):
            for row in range(count):
                at = plane.offset + row * plane.pitch
                expected[at : at + width] = plane.buffer.pread(width, at)
        with display.surface(one) as source, display.surface(other) as target:
            assert (target.width, target.height, target.format) == (WIDTH, HEIGHT, name)
            for surface in (source, target):
                with pytest.raises(BusyError):
                    (one if surface is source else other).buffer.close()
            jobs.copy(source, target)
            target.sync()
            assert_same(whole(other), bytes(expected), name)


@va
def test_planes_in_two_buffers(display: vaapi.Display) -> None:
    with contextlib.ExitStack() as stack:
        images = []
        for _ in range(2):
            luma = stack.enter_context(dmabuf.allocate(WIDTH * HEIGHT, exporter="udmabuf"))
            chroma = stack.enter_context(dmabuf.allocate(WIDTH * HEIGHT, exporter="udmabuf"))
            planes = (drm.Plane(luma, 0, WIDTH), drm.Plane(chroma, 512, WIDTH))
            images.append(drm.Image(WIDTH, HEIGHT, "NV12", planes, 0))
            for plane in planes:
                plane.buffer.pwrite(poison(plane.buffer.size), 0)
        draw(images[0], 9)
        with display.surface(images[0]) as source, display.surface(images[1]) as target:
            Jobs(display).copy(source, target)
            target.sync()
        assert_same(content(images[1]), content(images[0]), "both planes")


@va
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layers", ["separate", "composed"])
@pytest.mark.device_table("VA-API, a driver of the tests", "export")
def test_export(name: str, layers: str, loader: pytest.MonkeyPatch, gate: Gate) -> None:
    """A Buffer into a surface of the driver, which is a Buffer too, and lasts longer."""
    if layers == "composed":
        loader.setenv("TEST_VA_COMPOSED", "1")
    gate.open()
    with vaapi.open(RENDER) as display, buffer_of(name) as one:
        draw(one, 17)
        with display.surface(one) as source, display.make(WIDTH, HEIGHT, name) as target:
            exported = target.export()
            with exported:
                assert (exported.format, exported.modifier) == (name, 0)
                assert all(plane.pitch % 256 == 0 for plane in exported.planes)
                assert exported.buffer.exporter == "udmabuf"
                exported.buffer.pwrite(poison(exported.buffer.size), 0)
                Jobs(display).copy(source, target)
                target.sync()
                assert_same(content(exported), content(one), name)
            again = target.export()
    with again:
        assert again.buffer.size > 0 and content(again)


@va
@needs("nvme")
@pytest.mark.device_table("VA-API, a driver of the tests", "export", "read", "write")
def test_a_surface_to_a_file_and_back(display: vaapi.Display) -> None:
    """By a drive: the surface's memory is what the file is written from and read into."""
    path = os.environ["DMABUF_TEST_NVME1"]
    with (
        buffer_of("NV12") as one,
        display.surface(one) as source,
        display.make(WIDTH, HEIGHT) as target,
        target.export() as exported,
        dmabuf.open(path, "r+") as file,
    ):
        draw(one, 40)
        Jobs(display).copy(source, target)
        target.sync()
        file.write_from(exported.buffer)
        before = content(exported)
        exported.buffer.pwrite(poison(exported.buffer.size), 0)
        file.read_into(exported.buffer)
        assert_same(content(exported), before, "what came back")
        assert_same(before, content(one), "what was drawn")


@va
@pytest.mark.parametrize("old", [False, True], ids=["new libva", "a driver without vaSyncSurface2"])
@pytest.mark.device_table("VA-API, a driver of the tests", "fence")
def test_sync_waits_for_the_driver(old: bool, loader: pytest.MonkeyPatch, gate: Gate) -> None:
    if old:
        loader.setenv("TEST_VA_OLD", "1")
    with vaapi.open(RENDER) as display, buffer_of("NV12") as one, buffer_of("NV12") as other:
        draw(one, 5)
        with display.surface(one) as source, display.surface(other) as target:
            before = content(other)
            target.sync(timeout=0)
            Jobs(display).copy(source, target)
            with pytest.raises(TimeoutError, match=r"still works on it after 0\.2 s"):
                target.sync(timeout=0.2)
            assert_same(content(other), before, "before the job")
            waiting = threading.Thread(target=target.sync)
            waiting.start()
            gate.open()
            waiting.join()
            assert_same(content(other), content(one), "after the job")


@va
def test_close_waits_for_the_driver(gate: Gate) -> None:
    """The Buffers are in use until the driver has finished with them."""
    with vaapi.open(RENDER) as display, buffer_of("NV12") as one, buffer_of("NV12") as other:
        draw(one, 6)
        source, target = display.surface(one), display.surface(other)
        Jobs(display).copy(source, target)
        closing = threading.Thread(target=target.close)
        closing.start()
        with pytest.raises(BusyError):
            other.buffer.close()
        gate.open()
        closing.join()
        source.close()
        assert_same(content(other), content(one), "after the job")
        with pytest.raises(ClosedError):
            target.sync()
        with pytest.raises(ClosedError):
            target.export()


@va
def test_work_that_fails(gate: Gate) -> None:
    with vaapi.open(RENDER) as display, buffer_of("NV12") as one, buffer_of("NV12") as other:
        with display.surface(one) as source, display.surface(other) as target:
            before = content(other)
            Jobs(display).copy(source, target)
            gate.fail()
            with pytest.raises(OSError, match=r"wait for .*: an error in decoding") as caught:
                target.sync()
            assert caught.value.errno == errno.EIO
            assert_same(content(other), before, "what the job did not write")


@va
def test_what_is_refused(display: vaapi.Display) -> None:
    """And nothing is left of it."""
    with buffer_of("NV12") as one:
        cases = [
            (drm.image(one.buffer, 64, 64, "R8"), errno.EINVAL, "known formats are NV12, P010"),
            (drm.image(one.buffer, 64, 64, "YUYV"), errno.EINVAL, "the driver has no such format"),
            (drm.image(one.buffer, 64, 64, "NV12", modifier=1), errno.EINVAL, "the layout"),
            (drm.image(one.buffer, 64, 64, "NV12"), errno.EINVAL, "the layout"),
        ]
        for image, number, match in cases:
            with pytest.raises(OSError, match=match) as caught:
                display.surface(image)
            assert (caught.value.errno, caught.value.filename) == (number, RENDER)
        with dmabuf.allocate("64KiB", exporter="memfd") as plain:
            with pytest.raises(OSError, match="is not a dma-buf") as caught:
                display.surface(drm.image(plain, 64, 64, "NV12", modifier=0))
            assert caught.value.errno == errno.EOPNOTSUPP
        for how, error, match in (
            ((5000, 64, "NV12"), OSError, "no surfaces of this size"),
            ((64, 64, "YUYV"), OSError, "no such format"),
            ((0, 64, "NV12"), ValueError, "1 or more pixels"),
            ((64, 64, "none"), OSError, "known formats"),
        ):
            with pytest.raises(error, match=match):
                display.make(*how)


@va
def test_a_driver_that_cannot_start(loader: pytest.MonkeyPatch) -> None:
    with loader.context() as inner:
        inner.setenv("TEST_VA_BROKEN", "1")
        with pytest.raises(OSError, match=r"init failed.*; .*LIBVA_DRIVER_NAME") as caught:
            vaapi.open(RENDER)
        assert caught.value.errno == errno.ENODEV
    loader.setenv("LIBVA_DRIVER_NAME", "none")
    with pytest.raises(OSError, match="open the video driver"):
        vaapi.open(RENDER)
    for path, number in (("/dev/null", errno.ENODEV), ("/dev/dri/no", errno.ENOENT)):
        with pytest.raises(OSError, match="DRM device") as caught:
            vaapi.open(path)
        assert caught.value.errno == number


@va
def test_closing_a_display_closes_its_surfaces(loader: pytest.MonkeyPatch) -> None:
    display = vaapi.open(RENDER)
    with buffer_of("NV12") as one:
        surface, other = display.surface(one), display.make(64, 64)
        display.close()
        assert surface.closed and other.closed
        display.close()
        with pytest.raises(ClosedError):
            display.make(64, 64)


@va
def test_a_fork_leaves_the_display_to_the_parent(display: vaapi.Display) -> None:
    with buffer_of("NV12") as one, buffer_of("NV12") as other:
        draw(one, 8)
        source, target = display.surface(one), display.surface(other)

        def child() -> None:
            with pytest.raises(ClosedError, match="before fork"):
                target.sync()
            target.close()

        forking.in_child(child)
        Jobs(display).copy(source, target)
        target.sync()
        assert_same(content(other), content(one), "after the fork")
        source.close()
        target.close()


@pytest.fixture(scope="module")
def hwmap(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Load hwmap.c, which calls FFmpeg's libavutil."""
    target = tmp_path_factory.mktemp("hwmap") / "hwmap.so"
    source = SOURCE.with_name("hwmap.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-o", target, source, "-lavutil"]
    subprocess.run(["gcc", *flags], check=True)
    library = ctypes.CDLL(str(target))
    library.hwmap_open.restype = ctypes.c_void_p
    return library


class Mapped(ctypes.Structure):
    """What hwmap.c makes, by av_hwframe_map: `struct mapped` there."""

    _fields_ = [
        ("display", ctypes.c_void_p),
        ("imported", ctypes.c_uint32),
        ("own", ctypes.c_uint32),
        ("fd", ctypes.c_int),
        ("offset", ctypes.c_long * 2),
        ("pitch", ctypes.c_long * 2),
    ]


@va
@needs("libavutil")
@pytest.mark.parametrize("way", ["to a Buffer", "from a Buffer"])
def test_ffmpeg_maps_a_buffer_and_a_surface(
    way: str, hwmap: ctypes.CDLL, loader: pytest.MonkeyPatch
) -> None:
    """FFmpeg maps a Buffer to a surface, and its own surface to a Buffer; the driver copies."""
    mapped, error = Mapped(), ctypes.create_string_buffer(128)
    with buffer_of("NV12", pitch=512) as image:
        given = Mapped(
            fd=image.buffer.fileno(),
            offset=(ctypes.c_long * 2)(*(plane.offset for plane in image.planes)),
            pitch=(ctypes.c_long * 2)(*(plane.pitch for plane in image.planes)),
        )
        opened = hwmap.hwmap_open(
            *(RENDER.encode(), WIDTH, HEIGHT, ctypes.c_long(image.buffer.size)),
            *(ctypes.byref(given), ctypes.byref(mapped), error),
        )
        assert opened, error.value.decode()
        try:
            with dmabuf.from_fd(mapped.fd) as memory:
                planes = tuple(map(drm.Plane, [memory] * 2, mapped.offset, mapped.pitch))
                surface = drm.Image(WIDTH, HEIGHT, "NV12", planes, 0)
                memory.pwrite(poison(memory.size), 0)
                source, target = (image, surface) if way == "from a Buffer" else (surface, image)
                draw(source, 21)
                expected = bytearray(whole(target))
                for old, new in zip(rows(source), rows(target), strict=True):
                    for row in range(old[2]):
                        at = new[0].offset + row * new[0].pitch
                        data = old[0].buffer.pread(old[1], old[0].offset + row * old[0].pitch)
                        expected[at : at + old[1]] = data
                numbers = {id(image): mapped.imported, id(surface): mapped.own}
                jobs = Jobs(SimpleNamespace(handle=mapped.display))
                jobs.copy(*(SimpleNamespace(number=numbers[id(at)]) for at in (source, target)))
                jobs.sync(numbers[id(target)])
                assert_same(whole(target), bytes(expected), way)
        finally:
            hwmap.hwmap_close(ctypes.c_void_p(opened))


@va
@needs("vivid")
def test_a_frame_of_a_camera_is_a_surface(display: vaapi.Display) -> None:
    with picture(SINGLE), v4l2.capture(SINGLE, format="NV12", width=320, height=180) as camera:
        with next(camera) as frame:
            described = drm.image(frame)
            linear = drm.Image(320, 180, "NV12", described.planes, 0)
            with display.surface(linear) as source, display.make(320, 180) as target:
                Jobs(display).copy(source, target)
                target.sync()
                with target.export() as exported:
                    assert_same(content(exported), content(linear), "the frame")
