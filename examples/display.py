"""Show a picture on a display: the disk writes it into the memory that the display shows.

    python examples/display.py /dev/dri/card0 picture.raw 1920 1080

The file has four bytes a pixel: blue, green, red and an unused one. Run it on a text
console, or where no other program uses the display.
"""

import sys

import dmabuf
from dmabuf.devices import drm


def main(card_path: str, path: str, width: int, height: int) -> None:
    size = drm.size(width, height, "XR24")
    with (
        dmabuf.allocate(size, exporter="udmabuf") as buffer,
        dmabuf.open(path) as file,
        drm.Card(card_path) as card,
        card.framebuffer(drm.image(buffer, width, height, "XR24")) as framebuffer,
    ):
        t = file.read_into(buffer, size)
        card.show(framebuffer)
        print(f"{card.driver} shows {framebuffer.image}, route {t.route}: Enter ends", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
