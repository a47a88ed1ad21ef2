"""A file system whose files are the buffers of a store: ``dmabuf mount``, and docs/mount.md.

The names, owners, modes, lengths and times are the store's, and the bytes are the buffers' own
memory: what a device writes there is what the next read(2) returns.
"""

from dmabuf.mount.session import mount

__all__ = ["mount"]
