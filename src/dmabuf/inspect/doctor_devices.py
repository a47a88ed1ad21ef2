"""The doctor's answers about devices, optional packages, and what confines this process.

A node is opened for reading and writing and closed again: that is the permission that a transfer
needs, and unlike access(2) it shows what a container's device rules refuse.
"""

from __future__ import annotations

import errno
import glob
import importlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata

from dmabuf.inspect.answer import Answer
from dmabuf.kernel import nvme, proc

_NODES = {
    # kind: (pattern, the group that usually owns it, the name in sysfs, the fix if there is none)
    "NVMe passthrough": ("/dev/ng*n*", "disk", "/sys/class/nvme-generic/{}/device/model", None),
    "camera": ("/dev/video*", "video", "/sys/class/video4linux/{}/name", None),
    "DRM": ("/dev/dri/*", "video or render", "/sys/class/drm/{}/device/uevent", None),
    "RDMA": ("/dev/infiniband/uverbs*", "rdma", "/sys/class/infiniband_verbs/{}/ibdev", None),
    "VFIO": ("/dev/vfio/vfio", "vfio", "", "modprobe vfio-pci, and bind a device to it"),
    "FUSE": ("/dev/fuse", "fuse", "", "modprobe fuse"),
}  # fmt: skip
_REFUSED = {
    errno.EACCES: "join its group, often {group}, or be root",
    errno.EPERM: "give the container the device: --device {path}",
    errno.ENXIO: "load its driver",
}
_CONTAINERS = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
_FOR_DEVELOPERS = ("dev", "docs", "test")


# -- devices


def examine_devices() -> Iterator[Answer]:
    """Yield an answer for each device node of the worlds that dmabuf supports."""
    for kind, (pattern, group, about, fix) in _NODES.items():
        paths = sorted(filter(_is_device, glob.glob(pattern)), key=lambda path: (len(path), path))
        for path in paths:
            yield _node(kind, path, group, about)
        if not paths:
            yield Answer(kind, False, f"there is no {pattern}", fix)
    yield from _fabrics()
    if os.geteuid() and os.path.exists("/dev/fuse") and shutil.which("fusermount3") is None:
        text = "not found: only root mounts without it"
        yield Answer("fusermount3", False, text, "apt-get install fuse3")
    yield _library("Vulkan", "vulkan", _vulkan)
    for name, module in {"CUDA": "cuda", "HIP": "hip", "Level Zero": "level_zero"}.items():
        yield _library(name, module, partial(_gpu, module))


def _is_device(path: str) -> bool:
    with suppress(OSError):
        return stat.S_ISCHR(os.stat(path).st_mode)
    return False


def _node(kind: str, path: str, group: str, about: str) -> Answer:
    name = f"{kind} {path}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        fix = _REFUSED.get(error.errno or 0, "").format(group=group, path=path)
        return Answer(name, False, str(error.strerror), fix or None)
    text = proc.read(about.format(os.path.basename(path))).strip() if about else ""
    if text.startswith("DRIVER="):  # a line of uevent
        text = text.partition("\n")[0].removeprefix("DRIVER=")
    return Answer(name, True, text or "may be opened")


def _fabrics() -> Iterator[Answer]:
    """Yield an answer for each controller of NVMe over fabrics: its state, address and paths."""
    found = nvme.controllers()
    if not found:
        fix = "nvme connect -t tcp -a HOST -s 4420 -n NQN"
        yield Answer("NVMe over fabrics", False, "no controller is connected", fix)
    for one in found:
        text = f"{one.state}, {one.address or 'no address'}"
        for disk in one.paths:
            ways = {other.name: other.paths[disk] for other in found if disk in other.paths}
            each = ", ".join(f"{name} {state}".rstrip() for name, state in ways.items())
            text += f"; {disk} by {len(ways)} path{'s' * (len(ways) > 1)}: {each}"
        lost = "restore the network or the target: the kernel reconnects until ctrl_loss_tmo"
        live = one.state == "live"
        yield Answer(f"NVMe over {one.transport} {one.name}", live, text, None if live else lost)


def _library(name: str, module: str, describe: Callable[[], str]) -> Answer:
    try:
        return Answer(name, True, describe())
    except ImportError:
        return Answer(
            name, False, "its Python package is missing", f"pip install 'dmabuf[{module}]'"
        )
    except OSError as error:
        text, _, fix = str(error.strerror or error).partition("; ")
        return Answer(name, False, text, fix or None)


def _vulkan() -> str:
    from dmabuf.devices import vulkan

    with vulkan.open() as device:
        return device.name


def _gpu(module: str) -> str:
    with importlib.import_module(f"dmabuf.devices.{module}").Device(0) as device:
        return str(device.name)


def _install(extra: str) -> str:
    return f"pip install 'dmabuf[{extra}]'"


# -- optional packages


def examine_extras() -> Iterator[Answer]:
    """Yield an answer for each extra of dmabuf, with the versions of its packages."""
    extras: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("dmabuf") or ()
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", requirement)
        if found and found[2] not in _FOR_DEVELOPERS:
            extras.setdefault(found[2], []).append(found[1])
    for extra, packages in extras.items():
        versions = {package: _version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        if missing:
            yield Answer(extra, False, f"missing: {', '.join(missing)}", _install(extra))
        else:
            yield Answer(extra, True, ", ".join(f"{name} {one}" for name, one in versions.items()))


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


# -- what confines this process


def examine_confinement() -> Iterator[Answer]:
    """Yield answers about the container, the seccomp filter and the user namespace."""
    container = next((name for path, name in _CONTAINERS.items() if os.path.exists(path)), None)
    container = container or proc.read("/run/systemd/container").strip() or None
    if container:
        text = f"{container}: give it each device (--device), and see docs/guides/containers.md"
    yield Answer("container", True, text if container else "none was found")
    status = dict(line.split(":", 1) for line in proc.read("/proc/self/status").splitlines())
    filtered = status.get("Seccomp", "0").strip() != "0"
    number = status.get("Seccomp_filters", "").strip() or "an unknown number of"
    text = (
        f"{number} filters: io_uring above shows whether they allow it" if filtered else "no filter"
    )
    yield Answer("seccomp", True, text)
    mapped = proc.read("/proc/self/uid_map").split()
    whole = mapped in ([], ["0", "0", "4294967295"])
    yield Answer("user namespace", True, "the first one" if whole else "one of its own (rootless)")
