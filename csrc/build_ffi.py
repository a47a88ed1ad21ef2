"""The cffi binding of the C core: `dmabuf._core`, one abi3 extension over core.h.

liburing is linked statically where its archive is installed (Debian's and Ubuntu's liburing-dev
bring it), so the extension needs nothing but libc when it runs.
"""

import subprocess
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "ring.c",
    "threads.c",
    "batch.c",
    "loop.c",
    "split.c",
    "lane.c",
    "stage.c",
    "sys.c",
    "nvme.c",
    "emulate.c",
    "fuse.c",
    "fuse_mount.c",
)


def declarations() -> str:
    """core.h as cffi reads it: constants, and no other preprocessor line."""
    text = (HERE / "core.h").read_text()
    kept = [
        line
        for line in text.splitlines()
        if not line.startswith("#") or line.startswith("#define DMB_")
    ]
    return "\n".join(kept)


def archive() -> str | None:
    """The path of liburing.a, where the compiler knows one."""
    compiler = sysconfig.get_config_var("CC").split()[0]
    try:
        found = subprocess.run(
            [compiler, "-print-file-name=liburing.a"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found if Path(found).is_absolute() else None


static = archive()
ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "dmabuf._core",
    '#include "core.h"',
    sources=[f"csrc/{name}" for name in SOURCES],
    include_dirs=["csrc"],
    define_macros=[("_GNU_SOURCE", "1")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
    extra_objects=[static] if static else [],
    libraries=[] if static else ["uring"],
    py_limited_api=sysconfig.get_config_var("Py_GIL_DISABLED") != 1,
)
