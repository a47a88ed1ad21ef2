"""Build the C core; pyproject.toml has everything else."""

import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildCore(build_ext):
    """A build_ext that names the package to install where the compiler or a header is missing."""

    def run(self) -> None:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"dmabuf: no C compiler ({compiler}) found. On Debian or Ubuntu: "
                "apt install gcc libc6-dev python3-dev liburing-dev"
            )
        for header, package in (("liburing.h", "liburing-dev"), ("Python.h", "python3-dev")):
            include = sysconfig.get_path("include")
            probe = subprocess.run(
                [compiler, "-E", "-x", "c", f"-I{include}", "-"],
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


setup(cffi_modules=["csrc/build_ffi.py:ffi"], cmdclass={"build_ext": BuildCore})
