"""Write frames of a camera to disk, without a copy by the CPU.

    python examples/camera.py /dev/video0 frames.raw

The camera writes into buffers, and the disk reads from the same memory. Each frame begins at a
multiple of 4096 bytes in the file. Needs pip install dmabuf[v4l2].
"""

import sys

import dmabuf
from dmabuf.devices import v4l2


def main(device: str, path: str, count: int = 10) -> None:
    copied = offset = 0
    with v4l2.capture(device) as camera, dmabuf.open(path, "w") as file:
        print(f"{camera.card}: {camera.format}")
        for number, frame in enumerate(camera, 1):
            with frame:  # its buffer goes back to the camera at the end of the block
                t = file.write_from(frame.buffer, file_offset=offset)
            offset += t.nbytes
            copied += t.copied
            if number == count:
                break
    print(f"{count} frames, {camera.lost} lost, route {t.route}, {copied} bytes copied by the CPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
