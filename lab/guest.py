"""Runs one guest under QEMU: its command line, its streams, its end."""

import contextlib
import ctypes
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lab import host, project
from lab.cache import Cache
from lab.devices import Device
from lab.klog import trouble
from lab.prepare import Kernel, Root, make_image, make_initrd
from lab.project import Project

HERE = Path(__file__).resolve().parent

FSTAB = """\
tmp      /tmp                  tmpfs    size=1G,mode=1777             0 0
run      /run                  tmpfs    mode=755                      0 0
shm      /dev/shm              tmpfs    X-mount.mkdir,mode=1777       0 0
pts      /dev/pts              devpts   X-mount.mkdir,mode=620,gid=5  0 0
debug    /sys/kernel/debug     debugfs  nofail                        0 0
config   /sys/kernel/config    configfs nofail                        0 0
"""
"""What the guest mounts by itself."""

SCRATCH = {"lab-nvme0": 512, "lab-nvme1": 4096}
"""Serial number and logical block size, in bytes, of each scratch NVMe drive."""

SCRATCH_SIZE = 512 << 20
OUT_SIZE = 4 << 30

QBOOT = Path("/usr/share/qemu/qboot.rom")
"""A firmware that starts a kernel a second sooner than the default one."""

KERNEL_ARGUMENTS = (
    "loglevel=5",  # warnings and worse reach the console, and so the host, at once
    "log_buf_len=4M",
    "printk.devkmsg=on",
    "panic=-1",  # with -no-reboot, the end of the guest
    "oops=panic",
    "mitigations=off",
    "nokaslr",
)

TIMED_OUT, BROKEN, LOGGED = 124, 125, 99
"""Exit statuses: out of time, no guest or no result, trouble in the kernel log."""


@dataclass(frozen=True)
class Run:
    """What to run, on what."""

    command: Sequence[str]
    root: Root
    kernel: Kernel
    project: Project
    memory: str
    timeout: float
    out: Path | None = None
    devices: tuple[Device, ...] = ()
    built: Path | None = None
    """A folder with the modules that were built for the devices."""


class Stopped(BaseException):
    """A signal asks lab/run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Turn the signals that end a program into Stopped, so that the guest ends too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    yield


def run(cache: Cache, job: Run) -> int:
    """Run a command in a guest and return the exit status of lab/run."""
    with cache.run_folder() as folder:
        token = os.urandom(6).hex()
        _lay_out(job, folder, token)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        guest = Guest(job, folder, token, cache.logs / f"{name}.log")
        status = guest.run()
        if guest.never_began and status == BROKEN:
            host.say("COMMAND had not begun: a second try")
            guest = Guest(job, folder, token, cache.logs / f"{name}-2.log")
            status = guest.run()
        if job.out and guest.status is not None:
            _unpack(folder / "out", job.out)
    return status


def _lay_out(job: Run, folder: Path, token: str) -> None:
    """Write the run's images: the project's, the initrd, the scratch drives."""
    lab = folder / "lab"
    lab.mkdir()
    project.lay_out(job.root, job.project, lab)
    (lab / "out").mkdir()
    (lab / "init").write_bytes((HERE / "init").read_bytes())
    (lab / "init").chmod(0o755)
    (lab / "fstab").write_text(FSTAB)
    (lab / "token").write_text(token + "\n")
    (lab / "argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in job.command))
    modules = list(job.root.processor.modules) if job.kernel.suite else []
    modules += [module for device in job.devices for module in device.modules]
    (lab / "modules").write_text("".join(f"{module}\n" for module in modules))
    if job.built:
        shutil.copytree(job.built, lab / "built")
    pairs = environment(os.environb)
    lacks = [f"-{name}" for name in job.root.processor.lacks]
    pairs[b"DMABUF_REQUIRE"] = ",".join(["all", *lacks]).encode()
    (lab / "env").write_bytes(b"".join(b"%s=%s\0" % pair for pair in pairs.items()))
    make_image(lab, folder / "project", 2 << 30, "project")
    make_initrd(job.root, job.kernel, HERE / "initrd", folder / "initrd")
    for serial in SCRATCH:
        _sparse(folder / serial, SCRATCH_SIZE)
    _sparse(folder / "out", OUT_SIZE)
    for device in job.devices:
        for file, size in device.files:
            _sparse(folder / file, size)


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def environment(host_environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return what COMMAND gets of the host's environment: TERM, CI and DMABUF_ variables.

    Those that the guest itself sets, and the lab's own, are left out.
    """
    ours = (b"DMABUF_LAB_", b"DMABUF_TEST_NVME0", b"DMABUF_TEST_NVME1", b"DMABUF_REQUIRE")
    return {
        name: value
        for name, value in host_environment.items()
        if name in (b"TERM", b"CI") or (name.startswith(b"DMABUF_") and not name.startswith(ours))
    }


def _unpack(drive: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(drive, "r:") as archive:
        archive.extractall(target, filter="data")


def qemu(job: Run, folder: Path, streams: Mapping[str, int]) -> list[str]:
    """Return the QEMU command line; streams are descriptors for console, lab-out and lab-err."""

    def drive(name: str, path: Path, device: str) -> list[str]:
        options = f"id={name},file={path},if=none,format=raw,snapshot=on,cache=unsafe"
        if name in SCRATCH or name == "out":  # this run's own
            options = options.replace("snapshot=on,", "")
        return ["-drive", options.replace(str(path), str(path).replace(",", ",,")), *device.split()]

    processor = job.root.processor
    iommu = any(device.iommu for device in job.devices)
    argv = [*processor.qemu, *(processor.iommu if iommu else ())]
    argv += ["-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-accel", "tcg,thread=multi", "-smp", "2", "-m", job.memory, "-no-reboot"]
    if processor.machine == "x86_64" and QBOOT.exists():
        argv += ["-bios", str(QBOOT)]
    argv += ["-kernel", str(job.kernel.image), "-initrd", str(folder / "initrd")]
    words = [*KERNEL_ARGUMENTS, *processor.kernel, *(processor.kernel_iommu if iommu else ())]
    words += [word for device in job.devices for word in device.kernel]
    argv += ["-append", " ".join(words)]

    argv += ["-chardev", f"file,id=console,path=/dev/fd/{streams['console']}"]
    argv += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
    for number, name in enumerate(("lab-out", "lab-err"), 1):  # a port each, and a serial line
        for kind in ("port", "line"):
            argv += ["-chardev", f"file,id={name}-{kind},path=/dev/fd/{streams[name]}"]
        argv += ["-device", f"virtserialport,nr={number},name={name},chardev={name}-port"]
        argv += ["-serial", f"chardev:{name}-line"]
    argv += [word for device in job.devices for word in device.qemu]

    images = {
        "root": job.root.image,
        "modules": job.kernel.modules,
        "dependencies": job.project.dependencies / "image",
        "project": folder / "project",
        "out": folder / "out" if job.out else None,
    }
    for name, image in images.items():
        if image:
            argv += drive(name, image, f"-device virtio-blk-pci,drive={name},serial={name}")
    for name, block in SCRATCH.items():
        blocks = f"logical_block_size={block},physical_block_size={block}"
        argv += drive(name, folder / name, f"-device nvme,drive={name},serial={name},{blocks}")
    return argv


@dataclass
class Guest:
    """One guest, from its start to its end."""

    job: Run
    folder: Path
    token: str
    log: Path
    lines: list[str] = field(default_factory=list)
    """The kernel log, as far as its console had it."""
    ready: bool = False
    status: int | None = None
    """COMMAND's exit status, once it is known."""
    _rest: bytes = b""

    @property
    def never_began(self) -> bool:
        """Whether it ended before COMMAND was started.

        Under QEMU's emulation a kernel that patched its own code while it booted was seen to crash.
        """
        return not self.ready and self.status is None

    def run(self) -> int:
        """Run the guest, pass its streams on, and return the exit status of lab/run."""
        pipes = {name: os.pipe() for name in ("console", "lab-out", "lab-err")}
        argv = qemu(self.job, self.folder, {name: pipe[1] for name, pipe in pipes.items()})
        qemu_log = self.folder / "qemu.log"
        with qemu_log.open("wb") as errors:
            process = subprocess.Popen(
                argv,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[pipe[1] for pipe in pipes.values()],
                start_new_session=True,  # Ctrl-C reaches lab/run alone
                preexec_fn=_die_with_parent,
            )
        try:
            for _, end in pipes.values():
                os.close(end)
            in_time = self._follow(process, {pipes[name][0]: name for name in pipes})
        finally:
            process.kill()
            process.wait()
        return self._verdict(in_time, qemu_log.read_text(errors="replace"))

    def _follow(self, process: "subprocess.Popen[bytes]", pipes: Mapping[int, str]) -> bool:
        """Pass on what the guest prints until it ends; False if it ran out of time."""
        end = time.monotonic() + self.job.timeout
        with selectors.DefaultSelector() as selector, self.log.open("wb", buffering=0) as log:
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, end - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                    elif pipes[key.fd] == "console":
                        log.write(data)
                        if self._console(data):
                            process.kill()
                    else:
                        _write(1 if pipes[key.fd] == "lab-out" else 2, data)
                if self.status is None and time.monotonic() >= end:
                    return False
        return True

    def _console(self, data: bytes) -> bool:
        """Take in what the console printed; True once COMMAND has ended."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").rstrip("\r")
            match = re.search(rf"lab-{self.token}: (ready|exit (\d+))", line)
            if not match:
                if self.status is None:
                    self.lines.append(line)
            elif match[2] is None:
                self.ready = True
            else:
                self.status = int(match[2])
        return self.status is not None

    def _verdict(self, in_time: bool, qemu_output: str) -> int:
        """Say on standard error what went wrong, if anything, and return the exit status."""
        found = trouble(self.lines)
        if self.status is None:
            if not in_time:
                what = f"out of time: the guest was ended after {self.job.timeout:g} s"
            elif self.ready:
                what = "the guest died while COMMAND ran"
            else:
                what = "the guest did not start"
            tail = self.lines[-40:] + ([self._rest.decode(errors="replace")] if self._rest else [])
            host.say(f"{what}; the end of its console (all of it in {self.log}):")
            _lines([*tail, *qemu_output.splitlines()])
            return BROKEN if in_time else TIMED_OUT
        if found:
            host.say(f"the guest's kernel log tells of trouble (all of it in {self.log}):")
            _lines(found)
            return self.status or LOGGED
        return self.status


def _lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"    {line}", file=sys.stderr)
    sys.stderr.flush()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
