"""The cffi binding of the C core: `dmabuf._ext`, one abi3 extension over core.h.

liburing is linked statically where its archive is installed (Debian's and Ubuntu's liburing-dev
bring it), so the extension needs nothing but libc when it runs.
"""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def declarations(header: str) -> str:
    """Return a header as cffi reads it: constants, and no other preprocessor line."""
    text = (HERE / header).read_text()
    kept = [
        line
        for line in text.splitlines()
        if not line.startswith("#") or line.startswith("#define DMB_")
    ]
    return "\n".join(kept)


def archive() -> str | None:
    """Return the path of liburing.a, where the compiler knows one."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC"))
    try:
        found = subprocess.run(
            [*compiler, "-print-file-name=liburing.a"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found if Path(found).is_absolute() else None


def make(folder: str, *, testing: bool = False, virtual: bool = False) -> FFI:
    """Return the binding, to be compiled.

    Args:
        folder: the path of this folder, as the compiler is to find it.
        testing: whether it has the seams of tests/testing.h, which only tests use.
        virtual: whether it runs on the virtual kernel of tests/simulator, which only tests use.
    """
    kernel = ["calls.c", "choices.c", "python.c", "rings.c", "virtual.c"] if virtual else []
    headers = ["core.h"] + ["tests/testing.h"] * testing
    headers += ["tests/simulator/control.h"] * virtual
    sources = sorted(path.name for path in HERE.glob("*.c")) + ["tests/testing.c"] * testing
    sources += [f"tests/simulator/{name}" for name in kernel]
    static = None if virtual else archive()
    ffi = FFI()
    for header in headers:
        ffi.cdef(declarations(header))
    ffi.set_source(
        "dmabuf._ext",
        "\n".join(f'#include "{header}"' for header in headers),
        sources=[f"{folder}/{name}" for name in sources],
        include_dirs=[folder],
        define_macros=[("_GNU_SOURCE", "1")] + [("DMB_TESTING", "1")] * testing,
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
        extra_objects=[static] if static else [],
        extra_link_args=[f"-Wl,@{folder}/tests/simulator/wrapped"] if virtual else [],
        libraries=[] if static or virtual else ["uring"],
        py_limited_api=sysconfig.get_config_var("Py_GIL_DISABLED") != 1,
    )
    return ffi


ffi = make("csrc")
