"""A store's buffers as files: ``dmabuf mount``, and docs/guides/mount.md.

The names, owners, modes, lengths and times are the store's. The bytes are the buffers' own memory:
read(2) returns what a device last wrote there.

What may enter this room: everything about FUSE, on pyfuse3, which is imported when it is used.
``session.py`` mounts, ``operations.py`` answers the kernel, ``files.py`` and ``connections.py``
speak to the store, ``access.py`` waits for devices. ``one_file.py`` is a program of its own: the
process behind ``dmabuf.as_file``, which starts it by name.
"""

from dmabuf.mount.session import mount

__all__ = ["mount"]
