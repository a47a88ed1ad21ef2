"""Devices that share memory with a Buffer: one module for each world of devices.

- ``v4l2``: cameras that write frames into Buffers, and codecs that read and write them.
- ``drm``: displays and GPUs by Linux's DRM; their memory as Buffers, Buffers on a screen.
- ``vulkan``: Buffers as VkBuffers, device memory as Buffers, and fences between the two.
- ``cuda``, ``hip``, ``level_zero``: files into and out of the memory of an NVIDIA, AMD or Intel
  GPU, and Buffers for its kernels.
- ``vaapi``: Buffers as surfaces of video drivers by libva, and their surfaces as Buffers.
- ``vfio``: the BARs of PCI devices as Buffers.
- ``block``: a Buffer as a block device, by the kernel's ublk driver.
- ``staging``: the pipeline between a File and memory that only a device can reach.

A module is named by its users (``from dmabuf.devices import v4l2``) and is not imported here, so
that ``import dmabuf`` stays light. Each module loads the library of its world when it first needs
it. It raises ImportError with the ``pip install`` command where a Python package is missing, and
OSError (ENOENT) where another library is.

What may enter: code that turns the memory of one kind of device into a Buffer, or lets such a
device use a Buffer. A world is one file. What several worlds need is in ``lifetime``,
``node``, ``frames`` (pixel formats, and the pictures of cameras), ``video`` (V4L2's queues) and
``gpu`` (device memory, whose vendor makes the calls).
The bytes themselves move by a File; nothing here submits I/O to storage.
"""
