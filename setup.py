"""Build the C core; pyproject.toml has everything else."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildCore(build_ext):
    """A build_ext that names the package to install where the compiler or a header is missing."""

    def run(self) -> None:
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        flags = shlex.split(os.environ.get("CFLAGS", ""))
        if shutil.which(compiler[0]) is None:
            sys.exit(
                f"dmabuf: no C compiler ({compiler[0]}) found. On Debian or Ubuntu: "
                "apt install gcc libc6-dev python3-dev liburing-dev"
            )
        for header, package in (("liburing.h", "liburing-dev"), ("Python.h", "python3-dev")):
            include = sysconfig.get_path("include")
            probe = subprocess.run(
                [*compiler, *flags, "-E", "-x", "c", f"-I{include}", "-"],
                input=f"#include <{header}>\n",
                capture_output=True,
                text=True,
            )
            if probe.returncode:
                sys.exit(
                    f"dmabuf: the header {header} is missing. On Debian or Ubuntu: "
                    f"apt install {package}"
                )
        super().run()


def readme() -> str:
    """Return README.md with names of files in place of links, which would lead nowhere on PyPI."""
    text = Path(__file__).with_name("README.md").read_text()
    text = re.sub(r"\[([^]]+)\]\(\1\)", r"`\1`", text)
    return re.sub(r"\[([^]]+)\]\((?!\w+:)([^)]+)\)", r"\1 (`\2`)", text)


# One wheel serves every CPython from 3.11 on, but for free-threaded ones: they have no stable ABI.
abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
exporter = Extension("dmabuf._exporter", ["csrc/python/exporter.c"], py_limited_api=abi3)
setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    cffi_modules=["csrc/build_ffi.py:ffi"],
    ext_modules=[exporter],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"} if abi3 else {}},
)
