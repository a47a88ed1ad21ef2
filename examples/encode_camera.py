"""Encode frames of a camera and write them to disk, without a copy by the CPU.

    python examples/encode_camera.py /dev/video0 /dev/video2 out.fwht

The camera writes into buffers, the encoder reads from the same memory and writes into others, and
the disk reads from those. Each packet begins at a multiple of 4096 bytes, so that the disk can read
it in place. The bytes between packets are zero, which decoders of byte streams (H.264, HEVC, FWHT)
skip. Needs pip install dmabuf[v4l2].
"""

import itertools
import sys

import dmabuf
from dmabuf.devices import v4l2

BLOCK = 4096


def main(camera_node: str, encoder_node: str, path: str, count: int = 30) -> None:
    copied = offset = 0
    with (
        v4l2.capture(camera_node, format="YUYV", width=640, height=480) as camera,
        v4l2.codec(encoder_node, input=camera.format) as encoder,
        dmabuf.open(path, "w") as file,
    ):
        print(f"{camera.card}: {camera.format}, {encoder.card}: {encoder.format}")
        for packet in encoder.run(itertools.islice(camera, count)):
            with packet:  # its buffer goes back to the encoder at the end of the block
                size = -(-packet.nbytes // BLOCK) * BLOCK
                packet.buffer.pwrite(bytes(size - packet.nbytes), packet.nbytes)
                t = file.write_from(packet.buffer, size, file_offset=offset)
            offset += t.nbytes
            copied += t.copied
    print(f"{count} frames, {offset} bytes, route {t.route}, {copied} bytes copied by the CPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
