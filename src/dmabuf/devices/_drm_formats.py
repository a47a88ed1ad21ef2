"""Pixel formats by their four characters: how many bytes a picture takes, and where its planes are.

The names and their meaning are those of <drm/drm_fourcc.h>; the sizes are for the linear layout.
"""

from typing import NamedTuple

LINEAR = 0
"""The modifier of pixels in rows, one after the other."""


class PlaneRule(NamedTuple):
    """One plane of a format: a unit of `nbytes` for `across` x `down` pixels."""

    nbytes: int
    across: int = 1
    down: int = 1

    def least_pitch(self, width: int) -> int:
        """Bytes that one row of a picture takes."""
        return -(-width // self.across) * self.nbytes

    def rows(self, height: int) -> int:
        """How many rows it has."""
        return -(-height // self.down)


def _packed(nbytes: int, names: str) -> dict[str, tuple[PlaneRule, ...]]:
    return dict.fromkeys(names.split(), (PlaneRule(nbytes),))


FORMATS: dict[str, tuple[PlaneRule, ...]] = {
    **_packed(1, "C8 R8"),
    **_packed(2, "RG16 BG16 XR15 XB15 RX15 BX15 AR15 AB15 RA15 BA15 XR12 AR12 R16 GR88 RG88"),
    **_packed(3, "RG24 BG24"),
    **_packed(4, "XR24 XB24 RX24 BX24 AR24 AB24 RA24 BA24 XR30 XB30 RX30 BX30 AR30 AB30 RA30 BA30"),
    **_packed(4, "GR32 RG32 AYUV XYUV"),
    **_packed(8, "XR48 XB48 AR48 AB48 XR4H XB4H AR4H AB4H"),
    **dict.fromkeys(("YUYV", "YVYU", "UYVY", "VYUY"), (PlaneRule(4, 2),)),
    **dict.fromkeys(("NV12", "NV21"), (PlaneRule(1), PlaneRule(2, 2, 2))),
    **dict.fromkeys(("NV16", "NV61"), (PlaneRule(1), PlaneRule(2, 2, 1))),
    **dict.fromkeys(("NV24", "NV42"), (PlaneRule(1), PlaneRule(2))),
    **dict.fromkeys(("P010", "P012", "P016"), (PlaneRule(2), PlaneRule(4, 2, 2))),
    **dict.fromkeys(("YU12", "YV12"), (PlaneRule(1), *2 * [PlaneRule(1, 2, 2)])),
    **dict.fromkeys(("YU16", "YV16"), (PlaneRule(1), *2 * [PlaneRule(1, 2, 1)])),
    **dict.fromkeys(("YU24", "YV24"), 3 * (PlaneRule(1),)),
}
"""Every format whose sizes are known here, and its planes."""


def number(name: str) -> int:
    """A format's number."""
    return int.from_bytes(name.ljust(4).encode("ascii"), "little")


def text(code: int) -> str:
    """A format's name; a number that is none, in hexadecimal."""
    name = (code & ~(1 << 31)).to_bytes(4, "little")
    if not all(0x20 < byte < 0x7F or byte == 0x20 for byte in name):
        return f"{code:#x}"
    return name.decode().rstrip() + (" big-endian" if code >> 31 else "")
