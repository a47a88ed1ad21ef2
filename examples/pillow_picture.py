"""A picture in a Buffer, as a display or a GPU takes it, by Pillow; and back to a file.

    python examples/pillow_picture.py photo.jpg copy.png

Needs pip install dmabuf[arrays] pillow.
"""

import sys

import numpy as np
from PIL import Image

import dmabuf
from dmabuf.devices import drm


def main(source: str, target: str) -> None:
    with Image.open(source) as picture:
        rgb = np.asarray(picture.convert("RGB"))
    height, width, _ = rgb.shape
    with dmabuf.allocate(drm.size(width, height, "XR24")) as buffer:
        image = drm.image(buffer, width, height, "XR24")  # for Card.framebuffer
        pixels = buffer.asarray("u1", (height, width, 4))
        pixels[..., :3] = rgb[..., ::-1]  # XR24 has blue first
        copy = Image.frombuffer("RGB", (width, height), pixels, "raw", "BGRX", image.pitch, 1)
        copy.save(target)
        del pixels  # an array keeps the Buffer open
        print(f"{image} in a {buffer.exporter}, {buffer.size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
