"""Frames of a file through a GStreamer pipeline and into another file, in shared memory.

    python examples/gstreamer_frames.py frames.nv12 640 360 out.nv12 "identity"

The drive fills a Buffer, and GStreamer gets its descriptor as GstMemory. What comes out of the
pipeline in memory with a descriptor becomes a Buffer, and the drive reads from it: frames of
`v4l2src io-mode=dmabuf` and of hardware decoders too. Memory without a descriptor is copied.

apt install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base
"""

import os
import sys

import gi

import dmabuf

gi.require_version("Gst", "1.0")
gi.require_version("GstAllocators", "1.0")
gi.require_version("GstApp", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import Gst, GstAllocators, GstApp, GstVideo  # noqa: E402, F401


def wrap(buffer: dmabuf.Buffer, nbytes: int) -> Gst.Memory:
    """GstMemory of the first bytes of a Buffer of one slab; it has a descriptor of its own."""
    fd = os.dup(buffer.fileno())
    if buffer.is_dmabuf:
        return GstAllocators.DmaBufAllocator.alloc(GstAllocators.DmaBufAllocator.new(), fd, nbytes)
    none = GstAllocators.FdMemoryFlags.NONE
    return GstAllocators.FdAllocator.alloc(GstAllocators.FdAllocator.new(), fd, nbytes, none)


def unwrap(memory: Gst.Memory) -> tuple[dmabuf.Buffer, int, int, bool]:
    """A Buffer, the offset and size of the bytes in it, and whether it is the same memory."""
    nbytes, offset, _ = memory.get_sizes()
    if GstAllocators.is_fd_memory(memory):  # a dma-buf is fd memory too
        return dmabuf.from_fd(GstAllocators.fd_memory_get_fd(memory)), offset, nbytes, True
    buffer = dmabuf.allocate(nbytes)
    mapped, info = memory.map(Gst.MapFlags.READ)
    assert mapped
    buffer.pwrite(info.data, 0)
    memory.unmap(info)
    return buffer, 0, nbytes, False


def main(source: str, width: str, height: str, target: str, elements: str = "identity") -> None:
    Gst.init(None)
    nv12 = GstVideo.VideoInfo()
    nv12.set_format(GstVideo.VideoFormat.NV12, int(width), int(height))
    width, height, size = nv12.width, nv12.height, nv12.width * nv12.height * 3 // 2
    caps = f"video/x-raw,format=NV12,width={width},height={height},framerate=30/1"
    pipeline = Gst.parse_launch(
        f"appsrc name=source format=time caps={caps} ! {elements} ! appsink name=sink sync=false"
    )
    push, pull = pipeline.get_by_name("source"), pipeline.get_by_name("sink")
    pipeline.set_state(Gst.State.PLAYING)
    end = count = shared = 0
    with dmabuf.open(source) as reader, dmabuf.open(target, "w") as writer:
        for number in range(reader.size // size):
            with dmabuf.allocate(size) as buffer:
                reader.read_into(buffer, size, file_offset=number * size)
                frame = Gst.Buffer.new()
                frame.append_memory(wrap(buffer, size))
            strides, offsets = [width, width, 0, 0], [0, width * height, 0, 0]  # of each plane
            GstVideo.buffer_add_video_meta_full(
                frame, 0, GstVideo.VideoFormat.NV12, width, height, 2, offsets, strides
            )
            frame.pts = number * Gst.SECOND // 30
            push.push_buffer(frame)
        push.end_of_stream()
        while (sample := pull.pull_sample()) is not None:
            frame = sample.get_buffer()
            for index in range(frame.n_memory()):
                memory = frame.peek_memory(index)
                buffer, offset, nbytes, same = unwrap(memory)
                with buffer:
                    t = writer.write_from(buffer, nbytes, file_offset=end, buffer_offset=offset)
                end, shared = end + nbytes, shared + same
            count += 1
    problem = pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
    pipeline.set_state(Gst.State.NULL)
    if problem is not None:
        raise SystemExit(f"GStreamer: {problem.parse_error()[0].message}")
    print(f"{count} frames, {shared} in shared memory, {end:,} bytes written {t.route}")


if __name__ == "__main__":
    main(*sys.argv[1:])
