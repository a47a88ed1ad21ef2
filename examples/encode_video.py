"""Encode frames of a camera to a video file with PyAV, which has FFmpeg's encoders.

    python examples/encode_video.py /dev/video0 clip.mp4

PyAV's frames have memory of their own, so the CPU copies each frame once. Needs
pip install dmabuf[v4l2,arrays] av.
"""

import sys

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from dmabuf.devices import v4l2


def video_frame(frame: v4l2.Frame) -> av.VideoFrame:
    """A copy of a frame for PyAV, with its colours."""
    form = frame.format
    if form.pix_fmt is None:
        raise SystemExit(f"FFmpeg has no raw format like {form.fourcc}; capture format='YUYV'")
    copy = av.VideoFrame(form.width, form.height, form.pix_fmt)
    for plane, target in zip(frame.planes, copy.planes, strict=True):
        view = plane.buffer.asarray("u1", plane.stride * plane.rows, plane.offset)
        rows = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
        rows[: plane.rows, : plane.row_bytes] = view.reshape(plane.rows, -1)[:, : plane.row_bytes]
    full = form.color.quantization == "full_range"
    copy.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    copy.colorspace = Colorspace.ITU709 if form.color.encoding == "709" else Colorspace.ITU601
    return copy


def main(device: str, path: str, count: int = 60, codec: str = "libx264") -> None:
    with v4l2.capture(device) as camera, av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=camera.format.fps or 30)
        stream.width, stream.height = camera.format.width, camera.format.height
        stream.pix_fmt = "yuv420p"
        for number, frame in zip(range(int(count)), camera, strict=False):
            with frame:
                picture = video_frame(frame)
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    print(f"{count} frames of {camera.format}, {camera.lost} lost")


if __name__ == "__main__":
    main(*sys.argv[1:])
