"""Modules with the names and signatures of other libraries, so that code for those runs unchanged.

    >>> from dmabuf.compat import kvikio
    >>> with kvikio.CuFile("model.bin") as f:
    ...     f.pread(array).get()

A module here is named as the library is, needs nothing of it, and documents what differs. What may
enter: names and arguments of another library, in terms of the rooms below. Plug-ins that another
library loads belong in integrations/.
"""

__all__ = ["kvikio"]

from dmabuf.compat import kvikio
