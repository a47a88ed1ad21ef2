"""Transfers of the package on the virtual kernel of csrc/tests/simulator, from a seed.

The C driver simulates the core alone, and many more transfers. Here the whole package runs on the
same kernel: Link, the audits, both event loops, copies and the writer of safetensors files. Files
and buffers are real memory; every request between them is the virtual kernel's.
"""

import os

os.environ["DMABUF_TESTS_CORE"] = "virtual"

from tests import core  # before dmabuf

__all__ = ["core"]
