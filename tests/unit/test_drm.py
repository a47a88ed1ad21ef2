"""Cards, handles and framebuffers over a fake display; tests/device/test_drm.py has real ones."""

import errno
import os

import pytest

import dmabuf
from dmabuf.devices import drm
from tests import forking
from tests.support import assert_same, pattern, raises_errno
from tests.unit.fake_drm import PITCH, FakeDrm, fail

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def fake(kernel, monkeypatch):
    made = FakeDrm(kernel.ioctl).install(monkeypatch)
    yield made
    assert not made.handles, "a GEM handle is open"


@pytest.fixture
def card(fake):
    with drm.Card("/dev/dri/card0") as made:
        yield made


@pytest.fixture
def buffer(kernel):
    with dmabuf.allocate("2MiB", exporter="udmabuf") as made:
        yield made


def test_opening_a_card_takes_no_display(fake, card):
    assert (card.driver, fake.master) == ("fake-drm", False)
    assert "fake-drm" in repr(card) and card.fileno() >= 0
    card.close()
    assert "closed" in repr(card)
    for use in (card.fileno, card.outputs, lambda: card.dumb(1, 1), lambda: card.export(1)):
        with pytest.raises(dmabuf.ClosedError):
            use()


def test_a_node_that_is_not_of_drm_is_closed(fake):
    fake.errors["DRM_IOCTL_VERSION"] = errno.ENOTTY
    with raises_errno(errno.ENOTTY, "get the driver: not a DRM device"):
        drm.Card("/dev/dri/card0")


@pytest.mark.parametrize(("name", "nbytes"), [("XR24", 4), ("RG16", 2)])
def test_a_dumb_buffer_has_the_pitch_of_the_driver(fake, card, name, nbytes):
    with card.dumb(333, 20, name, name="dumb") as picture:
        assert not fake.handles  # the buffer does without
        assert picture.pitch == -(-333 * nbytes // PITCH) * PITCH
        assert (picture.format, picture.buffer.name) == (name, "dumb")
        data = pattern(picture.buffer.size, 1)
        picture.buffer.pwrite(data, 0)
        assert_same(picture.buffer.pread(len(data), 0), data, "the dumb buffer")
    assert picture.buffer.closed


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.ENOSYS, r"fake-drm makes none; use dmabuf\.allocate"),
        (errno.EACCES, "a render node makes none"),
        (errno.EINVAL, "fake-drm refuses that size, or 32 bits"),
        (errno.ENOMEM, "not enough memory on the device"),
        (errno.ENODEV, "the device is gone"),
    ],
)
def test_dumb_buffers_that_are_refused(fake, card, number, match):
    fake.errors["DRM_IOCTL_MODE_CREATE_DUMB"] = number
    with raises_errno(number, match):
        card.dumb(64, 64)
    for name in ("NV12", "YUYV"):
        with raises_errno(errno.EINVAL, "not one plane of whole pixels"):
            card.dumb(64, 64, name)


def test_a_dumb_buffer_that_is_not_exported_is_freed(fake, card):
    fake.errors["DRM_IOCTL_PRIME_HANDLE_TO_FD"] = errno.EOPNOTSUPP
    with raises_errno(errno.EOPNOTSUPP, "does not export memory of this kind"):
        card.dumb(64, 64)
    assert not fake.handles


def test_the_last_of_the_handles_of_a_buffer_closes_its_number(fake, card, buffer):
    one, other = card.handle(buffer), card.handle(buffer)
    assert one.number == other.number and list(fake.handles) == [one.number]
    with raises_errno(errno.EBUSY, "a Handle uses it; close that one"):
        card.close_handle(one.number)
    one.close()
    one.close()
    assert list(fake.handles) == [other.number] and one.closed and "closed" in repr(one)
    with card.export(other.number, name="again") as again:
        assert (again.size, again.name) == (buffer.size, "again")
    with other:
        pass
    with raises_errno(errno.ENOENT, "no such handle on this node"):
        card.export(other.number)
    with raises_errno(errno.EINVAL, "no such handle on this node"):
        card.close_handle(other.number)


def test_a_handle_that_was_exported_is_not_closed_with_an_import(fake, card, buffer):
    number = fake._new_handle(os.dup(buffer.fileno()))  # by an ioctl of the driver
    card.export(number).close()
    card.handle(buffer).close()
    assert list(fake.handles) == [number]
    card.close_handle(number)


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.EIO, "it cannot reach such memory; use memory of the card"),
        (errno.ENOSYS, "it imports no memory of other devices"),
        (errno.ENOMEM, "not enough memory or address space"),
        (errno.EBUSY, "another program is using it"),
    ],
)
@pytest.mark.parametrize("plane", [0, 1])
def test_an_import_that_is_refused_leaves_no_handle(fake, card, buffer, number, match, plane):
    """Also of the second plane: the handle of the first is closed."""
    real, count = fake._prime_fd_to_handle, []

    def refuse(values):
        count.append(values)
        return real(values) if len(count) <= plane else fail(number)

    fake._prime_fd_to_handle = refuse
    with dmabuf.allocate("1MiB", exporter="udmabuf") as chroma:
        planes = (drm.Plane(buffer, 0, 640), drm.Plane(chroma, 0, 640))
        with raises_errno(number, f"import .* of udmabuf into fake-drm: {match}"):
            card.framebuffer(drm.Image(640, 480, "NV12", planes))
    assert not fake.handles and not fake.framebuffers


def test_buffers_that_are_not_one_dma_buf(kernel, card, buffer):
    with dmabuf.allocate(4096, exporter="memfd") as plain:
        with raises_errno(errno.EOPNOTSUPP, "a memfd is not a dma-buf; allocate with"):
            card.handle(plain)
    kernel.limit = 64 << 20
    with dmabuf.allocate("65MiB", exporter="udmabuf") as large:
        with raises_errno(errno.EOPNOTSUPP, "it has 2 slabs, a GEM handle is one"):
            card.handle(large)
    for number in (-1, 1 << 32):
        with pytest.raises(ValueError, match="use a GEM handle, a number of 32 bits"):
            card.export(number)


def test_outputs_have_their_modes_and_crtcs(fake, card):
    fake.plugged_meanwhile = fake.modes[32] * 2
    hdmi, virtual, unknown = card.outputs()
    assert (hdmi.name, hdmi.connected, hdmi.crtcs) == ("HDMI-A-1", True, (42, 41))
    assert [(str(one), one.hz, one.preferred) for one in hdmi.modes[:2]] == [
        ("640x480", 60, True), ("320x240", 75, False),
    ]  # fmt: skip
    assert len(hdmi.modes) == 4, "modes that appeared between two questions"
    assert (virtual.name, virtual.crtcs) == ("Virtual-2", (41, 42))
    assert (unknown.name, unknown.connected, unknown.crtcs) == ("Unknown-3", False, ())


def test_two_displays_show_two_framebuffers(fake, card, buffer):
    picture = drm.image(buffer, 640, 480)
    with card.framebuffer(picture) as one, card.framebuffer(picture) as other:
        assert not fake.handles  # the framebuffers keep the memory themselves
        card.show(one)
        card.show(other, "Virtual-2")
        assert fake.master
        assert {at: found[:2] for at, found in fake.shown.items()} == {
            42: (one.number, 31), 41: (other.number, 32),
        }  # fmt: skip
        assert fake.shown[42][2] == fake.modes[31][0]
        one.flush()
        fake.errors["DRM_IOCTL_MODE_DIRTYFB"] = errno.ENOSYS
        one.flush()  # of a display that reads the memory all the time
        assert fake.flushed == [one.number]
        fake.errors["DRM_IOCTL_MODE_DIRTYFB"] = errno.EIO
        with raises_errno(errno.EIO, "flush a framebuffer"):
            one.flush()
        one.close()
        assert fake.master and list(fake.shown) == [41]
        with pytest.raises(dmabuf.ClosedError):
            card.show(one)
    assert not fake.master and not fake.framebuffers


def test_the_numbers_of_a_picture_reach_the_driver(fake, card, buffer):
    modifier = 1 << 56 | 1
    with card.framebuffer(drm.image(buffer, 64, 32, "NV12", offset=128, modifier=modifier)) as one:
        width, height, code, flags, *rest = fake.framebuffers[one.number]
        assert (width, height, code.to_bytes(4, "little"), flags) == (64, 32, b"NV12", 2)
        handles, pitches, offsets, modifiers = (rest[at : at + 4] for at in range(0, 16, 4))
        assert handles[0] == handles[1] and not any(handles[2:])
        assert pitches == [64, 64, 0, 0] and offsets == [128, 128 + 64 * 32, 0, 0]
        assert modifiers == [modifier, modifier, 0, 0]


def test_what_cannot_be_shown_gives_the_display_back(fake, card, buffer):
    with card.framebuffer(drm.image(buffer, 333, 240)) as odd:
        with raises_errno(errno.EINVAL, "HDMI-A-1 has no mode of 333x240; it has 640x480, 320x240"):
            card.show(odd)
        for name in ("HDMI-A-7", "Unknown-3"):
            with raises_errno(errno.ENODEV, f"no display at {name}; its connectors are HDMI-A-1"):
                card.show(odd, name)
        fake.modes = {33: []}
        with raises_errno(errno.ENODEV, "no display is connected; its connectors are Unknown-3"):
            card.show(odd)
        with drm.Card("/dev/dri/card0") as another, pytest.raises(ValueError, match="another Card"):
            another.show(odd)
        assert not fake.master


@pytest.mark.parametrize(
    ("name", "number", "match"),
    [
        ("SET_MASTER", errno.EBUSY, "take the display: another program has the display; leave"),
        ("MODE_SETCRTC", errno.EINVAL, "fake-drm refuses 640x480 XR24 at a pitch of 2560 bytes"),
        ("MODE_SETCRTC", errno.ENOSPC, "the framebuffer is smaller than the mode"),
        ("MODE_GETRESOURCES", errno.EOPNOTSUPP, "list the displays: fake-drm has no displays"),
        ("MODE_GETCONNECTOR", errno.EACCES, "a render node has no displays"),
    ],
)
def test_a_display_that_refuses(fake, card, buffer, name, number, match):
    with card.framebuffer(drm.image(buffer, 640, 480)) as one:
        fake.errors[f"DRM_IOCTL_{name}"] = number
        with raises_errno(number, match):
            card.show(one)
        assert not fake.master and not fake.shown
        fake.errors.clear()
        card.show(one)


def test_more_displays_than_crtcs(fake, card, buffer):
    fake._mode_getencoder = lambda values: values.__setitem__(slice(2, 4), [0, 0b01])
    picture = drm.image(buffer, 640, 480)
    with card.framebuffer(picture) as one, card.framebuffer(picture) as other:
        card.show(one)
        with raises_errno(errno.EBUSY, "no CRTC is left to drive Virtual-2; close a framebuffer"):
            card.show(other, "Virtual-2")
        one.close()
        card.show(other, "Virtual-2")


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (errno.EOPNOTSUPP, "fake-drm has no displays"),
        (errno.EACCES, "a render node has no displays; open /dev/dri/card0"),
        (errno.EINVAL, "refuses the format, the size or pitch 2560; try XR24"),
    ],
)
def test_a_framebuffer_that_is_refused(fake, card, buffer, number, match):
    fake.errors["DRM_IOCTL_MODE_ADDFB2"] = number
    with raises_errno(number, f"make a framebuffer of 640x480 XR24: .*{match}"):
        card.framebuffer(drm.image(buffer, 640, 480))
    assert not fake.handles


def test_closing_the_card_closes_what_it_made(fake, card, buffer):
    handle, framebuffer = card.handle(buffer), card.framebuffer(drm.image(buffer, 640, 480))
    card.close()
    card.close()
    assert handle.closed and framebuffer.closed
    with pytest.raises(dmabuf.ClosedError):
        framebuffer.flush()
    handle.close()
    framebuffer.close()
    fake._gem_close([handle.number])  # as the kernel does with the node's descriptor


def test_a_device_that_is_gone_when_a_framebuffer_is_closed(fake, card, buffer):
    framebuffer = card.framebuffer(drm.image(buffer, 640, 480))
    card.show(framebuffer)
    fake.errors["DRM_IOCTL_MODE_RMFB"] = errno.ENODEV
    framebuffer.close()
    assert framebuffer.closed and not fake.master


def test_a_fork_leaves_the_parents_handles_alone(fake, card, buffer):
    handle, framebuffer = card.handle(buffer), card.framebuffer(drm.image(buffer, 640, 480))

    def child() -> None:
        handle.close()
        framebuffer.close()
        assert len(fake.handles) == len(fake.framebuffers) == 1
        with pytest.raises(dmabuf.ClosedError, match="before fork"):
            card.handle(buffer)
        card.close()

    forking.in_child(child)
    card.export(handle.number).close()
    handle.close()
    framebuffer.close()


def test_what_is_dropped_is_closed_with_a_warning(fake, card, buffer):
    with pytest.warns(ResourceWarning, match=r"unclosed <dmabuf\.Handle 1 of"):
        card.handle(buffer)
    assert not fake.handles
    with pytest.warns(ResourceWarning, match=r"unclosed <dmabuf\.Card /dev/dri/card0 fake-drm>"):
        drm.Card("/dev/dri/card0")
