"""The memory room: Buffers, what makes them, and how the CPU and Python libraries see them.

`buffer` has Buffer, which every other room moves bytes to and from, and `rawfile` its file
interface. `exporters` allocates memory and `capacity` checks that there is enough; `far` maps that
of devices; `foreign` takes in dma-bufs and tensors made elsewhere; `arrays` shows the memory to
NumPy, PyTorch and DLPack, and `as_file` shows it to other programs. What makes, maps or shares
memory enters here; what moves bytes between memory and files belongs to `transfer`, and memory of a
particular kind of device to `devices`.

The names below are the face, with the modules `capacity`, `exporters`, `far` and `foreign` for
rooms that make Buffers of their own.
"""

from dmabuf.memory.arrays import import_optional
from dmabuf.memory.as_file import BufferFile, as_file, descriptor_as_file, serve_by_fuse
from dmabuf.memory.buffer import Buffer, Slab, Window, find_buffer
from dmabuf.memory.exporters import allocate
from dmabuf.memory.foreign import device_memory, from_dlpack, from_fd

__all__ = [
    "Buffer",
    "BufferFile",
    "Slab",
    "Window",
    "allocate",
    "as_file",
    "capacity",
    "descriptor_as_file",
    "device_memory",
    "exporters",
    "far",
    "find_buffer",
    "foreign",
    "from_dlpack",
    "from_fd",
    "import_optional",
    "serve_by_fuse",
]
