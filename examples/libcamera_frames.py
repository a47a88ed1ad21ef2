"""Frames of a Raspberry Pi camera to disk, from the memory that libcamera gave them.

    python examples/libcamera_frames.py frames.raw

A libcamera FrameBuffer has planes, each with a descriptor, an offset and a length. One Buffer for
each descriptor is enough, for as long as the camera keeps its configuration. Needs Picamera2.
"""

import sys

import dmabuf


class Buffers:
    """The Buffers of a camera, by descriptor."""

    def __init__(self) -> None:
        self.known: dict[int, dmabuf.Buffer] = {}

    def planes(self, frame_buffer) -> list[tuple[dmabuf.Buffer, int, int]]:
        """The Buffer, offset and length of each plane of a libcamera FrameBuffer."""
        found = []
        for plane in frame_buffer.planes:
            if plane.fd not in self.known:
                self.known[plane.fd] = dmabuf.from_fd(plane.fd)
            found.append((self.known[plane.fd], plane.offset, plane.length))
        return found

    def close(self) -> None:
        for buffer in self.known.values():
            buffer.close()


def main(path: str, count: int = 10) -> None:
    from picamera2 import Picamera2

    camera, buffers, offset, copied = Picamera2(), Buffers(), 0, 0
    camera.configure(camera.create_video_configuration())
    camera.start()
    with dmabuf.open(path, "w") as file:
        for _ in range(count):
            request = camera.capture_request()
            frame_buffer = request.request.buffers[request.stream_map["main"]]
            config = request.config["main"]
            for buffer, start, length in buffers.planes(frame_buffer):
                t = file.write_from(buffer, length, file_offset=offset, buffer_offset=start)
                offset, copied = offset + length, copied + t.copied
            request.release()  # the camera fills the memory again
    camera.stop()
    buffers.close()
    width, height = config["size"]
    print(f"{count} frames of {width}x{height} {config['format']}, stride {config['stride']}")
    print(f"route {t.route}, {copied:,} of {offset:,} bytes copied by the CPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
