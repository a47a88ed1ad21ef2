"""Runs a guest under QEMU, or two: their command lines, their streams, their end."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from lab import host, project
from lab.cache import Cache
from lab.devices import Device, lacked
from lab.klog import trouble
from lab.pair import Wire, wires
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
    guests: int = 1
    """2 adds a guest that obeys the lab-peer of the first."""


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
    with cache.run_folder() as folder, contextlib.ExitStack() as stack:
        token = os.urandom(6).hex()
        ends = stack.enter_context(wires()) if job.guests == 2 else [None]
        both = tuple(device for device in job.devices if device.both)
        second = replace(job, command=["lab-peer", "--serve"], devices=both, out=None)
        jobs = dict(zip((folder, folder / "second"), (job, second)[: job.guests], strict=False))
        _lay_out(jobs, token, ends)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        guests = _guests(jobs, token, cache.logs / name, ends)
        status = _run(guests)
        if status == BROKEN and guests[0].status is None and any(one.never_began for one in guests):
            host.say("COMMAND had not begun: a second try")
            guests = _guests(jobs, token, cache.logs / f"{name}-2", ends)
            status = _run(guests)
        if job.out and guests[0].status is not None:
            _unpack(folder / "out", job.out)
    return status


def _lay_out(jobs: Mapping[Path, Run], token: str, ends: Sequence[Wire | None]) -> None:
    """Write the images of a run, each guest's into its folder; the first has what they share."""
    folder, job = next(iter(jobs.items()))
    lab = folder / "lab"
    lab.mkdir()
    project.lay_out(job.root, job.project, lab)
    (lab / "out").mkdir()
    scripts = (("init", "init"), ("peer", "bin/lab-peer"))[: len(jobs)]
    for name, place in scripts:
        (lab / place).write_bytes((HERE / name).read_bytes())
        (lab / place).chmod(0o755)
    (lab / "fstab").write_text(FSTAB)
    (lab / "token").write_text(token + "\n")
    if job.built:
        shutil.copytree(job.built, lab / "built")
    make_initrd(job.root, job.kernel, HERE / "initrd", folder / "initrd")
    for (own, one), wire in zip(jobs.items(), ends, strict=True):
        own.mkdir(exist_ok=True)
        (lab / "argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in one.command))
        modules = list(job.root.processor.modules) if job.kernel.suite else []
        modules += [module for device in one.devices for module in device.modules]
        (lab / "modules").write_text("".join(f"{module}\n" for module in modules))
        (lab / "setup").write_text("\n".join(device.setup for device in one.devices))
        (lab / "network").write_text(wire.network if wire else "")
        pairs = environment(os.environb) | (wire.environment if wire else {})
        lacks = [f"-{name}" for name in lacked(job.devices, job.root.processor)]
        pairs[b"DMABUF_REQUIRE"] = ",".join(["all", *lacks]).encode()
        (lab / "env").write_bytes(b"".join(b"%s=%s\0" % pair for pair in pairs.items()))
        make_image(lab, own / "project", 2 << 30, "project")
        for serial in SCRATCH:
            _sparse(own / serial, SCRATCH_SIZE)
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
    ours = (
        *(b"DMABUF_LAB_", b"DMABUF_TEST_NVME0", b"DMABUF_TEST_NVME1", b"DMABUF_REQUIRE"),
        *(b"DMABUF_TEST_HOST", b"DMABUF_TEST_PEER"),
    )
    return {
        name: value
        for name, value in host_environment.items()
        if name in (b"TERM", b"CI") or (name.startswith(b"DMABUF_") and not name.startswith(ours))
    }


def _unpack(drive: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(drive, "r:") as archive:
        archive.extractall(target, filter="data")


def qemu(job: Run, folder: Path, streams: Mapping[str, int], wire: Wire | None) -> list[str]:
    """Return the QEMU command line; streams are descriptors for console, lab-out and lab-err.

    Relative paths in it are below the folder of the run.
    """

    def drive(name: str, path: Path, device: str) -> list[str]:
        options = f"id={name},file={path},if=none,format=raw,snapshot=on,cache=unsafe"
        if name in SCRATCH or name == "out":  # this run's own
            options = options.replace("snapshot=on,", "")
        return ["-drive", options.replace(str(path), str(path).replace(",", ",,")), *device.split()]

    processor = job.root.processor
    iommu = any(device.iommu for device in job.devices)
    argv = [*processor.qemu, *(processor.iommu if iommu else ())]
    argv += ["-nodefaults", "-no-user-config", "-display", "none"]
    memory = host.mebibytes(job.memory) + sum(device.memory for device in job.devices)
    argv += ["-accel", "tcg,thread=multi", "-smp", "2", "-m", f"{memory}M", "-no-reboot"]
    if processor.machine == "x86_64" and QBOOT.exists():
        argv += ["-bios", str(QBOOT)]
    argv += ["-kernel", str(job.kernel.image), "-initrd", "initrd"]
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
    words = [word for device in job.devices for word in device.qemu]
    argv += [word.replace("{memory}", job.memory) for word in words]
    argv += wire.qemu if wire else []

    images = {
        "root": job.root.image,
        "modules": job.kernel.modules,
        "dependencies": job.project.dependencies / "image",
        "project": folder / "project",
        "out": folder / "out" if job.out else None,
    }
    for name, image in images.items():
        if image:  # without bus= QEMU would choose the bridge of CXL, which takes no drive
            argv += drive(
                name, image, f"-device virtio-blk-pci,bus=pcie.0,drive={name},serial={name}"
            )
    for name, block in SCRATCH.items():
        blocks = f"logical_block_size={block},physical_block_size={block}"
        argv += drive(
            name, folder / name, f"-device nvme,bus=pcie.0,drive={name},serial={name},{blocks}"
        )
    return argv


@dataclass
class Guest:
    """One guest, from its start to its end."""

    job: Run
    folder: Path
    """The guest's own images."""
    home: Path
    """The folder of the run."""
    token: str
    log: Path
    wire: Wire | None = None
    lines: list[str] = field(default_factory=list)
    """The kernel log, as far as its console had it."""
    ready: bool = False
    """Whether it has begun COMMAND."""
    status: int | None = None
    """COMMAND's exit status, once it is known."""
    pipes: dict[int, str] = field(default_factory=dict)
    """The host's ends of its streams that are open."""
    _process: "subprocess.Popen[bytes] | None" = None
    _rest: bytes = b""

    @property
    def never_began(self) -> bool:
        """Whether it ended before COMMAND was started.

        Under QEMU's emulation a kernel that patched its own code while it booted was seen to crash.
        """
        return not self.ready and self.status is None

    def start(self) -> None:
        """Start QEMU."""
        self.ready, self.status = False, None
        pipes = {name: os.pipe() for name in ("console", "lab-out", "lab-err")}
        streams = {name: pipe[1] for name, pipe in pipes.items()}
        with (self.folder / "qemu.log").open("wb") as errors:
            self._process = subprocess.Popen(
                qemu(self.job, self.folder, streams, self.wire),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[*streams.values(), *(self.wire.descriptors if self.wire else ())],
                start_new_session=True,  # Ctrl-C reaches lab/run alone
                preexec_fn=_die_with_parent,
            )
        for _, end in pipes.values():
            os.close(end)
        self.pipes = {pipe[0]: name for name, pipe in pipes.items()}

    def end(self) -> None:
        """End QEMU, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pass_on(self, pipe: int) -> bool:
        """Pass on what one of its streams has; False if the stream has ended."""
        data = os.read(pipe, 1 << 16)
        if not data:
            del self.pipes[pipe]
            os.close(pipe)
            return False
        if self.pipes[pipe] == "console":
            with self.log.open("ab") as log:
                log.write(data)
            if self._console(data) and self._process is not None:
                self._process.kill()
        else:
            _write(1 if self.pipes[pipe] == "lab-out" else 2, data)
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

    def report_end(self, in_time: bool) -> int:
        """Print how it ended without a status, and return the exit status of lab/run."""
        if not in_time:
            what = f"out of time: the guest was ended after {self.job.timeout:g} s"
        elif self.ready:
            what = "the guest died while COMMAND ran"
        else:
            what = "the guest did not start"
        tail = self.lines[-40:] + ([self._rest.decode(errors="replace")] if self._rest else [])
        host.say(f"{what}; the end of its console (all of it in {self.log}):")
        output = (self.folder / "qemu.log").read_text(errors="replace")
        _lines([*tail, *output.splitlines()])
        return BROKEN if in_time else TIMED_OUT


def _guests(
    jobs: Mapping[Path, Run], token: str, log: Path, ends: Sequence[Wire | None]
) -> list[Guest]:
    home = next(iter(jobs))
    logs = (log.with_name(f"{log.name}.log"), log.with_name(f"{log.name}-second.log"))
    return [
        Guest(job, folder, home, token, file, wire)
        for (folder, job), file, wire in zip(jobs.items(), logs, ends, strict=False)
    ]


def _run(guests: Sequence[Guest]) -> int:
    """Run guests until the first one's COMMAND has ended, and return the exit status of lab/run."""
    first = guests[0]
    try:
        for guest in guests:
            guest.start()
        in_time = _follow(guests, time.monotonic() + first.job.timeout)
    finally:
        for guest in guests:
            guest.end()
    failed = next((guest for guest in guests if guest.never_began), first)
    if first.status is None:
        return failed.report_end(in_time)
    status = first.status
    for guest in guests:
        found = trouble(guest.lines)
        if found:
            host.say(f"the guest's kernel log tells of trouble (all of it in {guest.log}):")
            _lines(found)
            status = status or LOGGED
    return status


def _follow(guests: Sequence[Guest], end: float) -> bool:
    """Pass on what guests print until the first one ends; False if it ran out of time.

    A second guest that ends, because the first ended it, is started again, but not if it has never
    begun: then this returns, too.
    """
    first = guests[0]
    with selectors.DefaultSelector() as selector:

        def watch(guest: Guest) -> None:
            for pipe in guest.pipes:
                selector.register(pipe, selectors.EVENT_READ, guest)

        for guest in guests:
            watch(guest)
        while first.pipes:
            for key, _ in selector.select(max(0.0, end - time.monotonic())):
                guest = key.data
                if not guest.pass_on(key.fd):
                    selector.unregister(key.fd)
                if not guest.pipes and guest is not first:
                    if guest.never_began:
                        return True
                    guest.end()
                    guest.start()
                    watch(guest)
            if first.status is None and time.monotonic() >= end:
                return False
    return True


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
