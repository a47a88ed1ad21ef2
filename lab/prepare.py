"""Makes what the guest boots from: the root filesystem, a kernel with its modules, an initrd."""

import gzip
import json
import lzma
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab import host, packages
from lab.cache import Cache, key_of
from lab.host import LabError
from lab.processors import PROCESSORS, Processor

ASK_AGAIN = 86400.0
"""Seconds for which a suite's answer about its newest kernel is taken as still right."""


@dataclass(frozen=True)
class Root:
    """The guest's root filesystem."""

    key: str
    processor: Processor
    tree: Path
    """As a folder on the host."""
    image: Path
    """As an ext4 image, for the guest."""
    tools: Path
    """A tree of the same packages whose programs run on this machine, to build in."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what it needs loaded before it can mount its root."""

    flavour: str
    image: Path
    release: str
    modules: Path | None
    """An ext4 image for /usr/lib/modules; None if all is built in."""
    early: tuple[Path, ...]
    """Modules for the initrd, decompressed, in the order to load them."""
    suite: str = ""
    """The suite that it is from, if any."""
    version: str = ""
    """The version of its package."""


def make_image(folder: Path, image: Path, spare: int, label: str) -> None:
    """Write the folder's contents into a sparse ext4 image that has `spare` bytes more room."""
    used = sum(4096 + -(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*"))
    size = -(-(used + used // 16 + spare) // (1 << 20))
    options = ["-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=1"]
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", label, *options]
    host.run(host.as_root(*argv, "-d", folder, image, f"{size}M"))


# The root filesystem


def root(cache: Cache, processor: Processor) -> Root:
    """Return the guest's root filesystem, made if the cache lacks it."""
    native = PROCESSORS[packages.NATIVE]
    key = key_of(packages.SUITE, *packages.GUEST, "1")
    title = f"root filesystem: Debian {packages.SUITE} with {len(packages.GUEST)} packages"
    path = cache.piece("root", key, title, lambda made: _make_root(made, native))
    if processor is native:
        return Root(key, processor, path / "tree", path / "image", path / "tree")
    like = path / "tree"
    key = key_of(key, processor.name, "1")
    title = f"{title}, for {processor.name}"
    path = cache.piece("root", key, title, lambda made: _make_root(made, processor, like))
    return Root(key, processor, path / "tree", path / "image", like)


def _make_root(folder: Path, processor: Processor, like: Path | None = None) -> None:
    tree = folder / "tree"
    _bootstrap(tree, processor, packages.GUEST, like)
    for name in ("usr/lib/modules", "usr/local", "lab", "mnt"):
        (tree / name).mkdir(exist_ok=True)
    for name, text in {
        "hostname": "lab\n",
        "hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
        "resolv.conf": "",
    }.items():
        path = tree / "etc" / name
        path.unlink(missing_ok=True)
        path.write_text(text)
    if like:
        compile_python(like, tree / "usr/lib", "/usr/lib")
    make_image(tree, folder / "image", 1 << 30, "root")


def _bootstrap(
    tree: Path, processor: Processor, names: Sequence[str], like: Path | None = None
) -> None:
    """Make a tree of packages: configured, or unpacked and then configured like another tree.

    The second way runs nothing of the packages, which may be for another processor.
    """
    tree.mkdir()
    mode = "root" if os.geteuid() == 0 else "unshare"
    place = (
        {"TMPDIR": str(tree.parent)} if mode == "root" else {}
    )  # "unshare" needs one open to all
    bootstrap = [
        "mmdebstrap",
        f"--mode={mode}",
        f"--variant={'extract' if like else 'minbase'}",
        "--format=tar",
        f"--architectures={processor.name}",
        f"--include={','.join(names)}",
        *(["--include=?essential", "--skip=check/qemu"] if like else []),
        *(f"--aptopt={line}" for line in _apt_acquire_options()),
        packages.SUITE,
        "-",
        _source(packages.SUITE, processor),
    ]
    unpack = ["tar", "-xp", "--no-same-owner", "--exclude=./dev/*", "-C", str(tree)]
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen(
            bootstrap,
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        assert first.stdout is not None
        try:
            second = subprocess.run(
                host.as_root(*unpack), stdin=first.stdout, stderr=log, check=False
            )
            first.stdout.close()
            status = first.wait()
        except BaseException:
            first.stdout.close()
            os.killpg(first.pid, signal.SIGTERM)  # it ends when all that it started has
            first.wait()
            raise
        if status or second.returncode:
            log.seek(0)
            output = log.read().decode(errors="replace")
            raise LabError(host.tool_failed(bootstrap, status or second.returncode, output))
    if like:
        _configure(tree, like, processor)


def cross_tools(cache: Cache, root: Root) -> Path:
    """Return a tree whose programs run here and compile kernel modules for the root's processor."""
    machine = root.processor.machine
    names = (*packages.GUEST_BUILD, f"gcc-{machine}-linux-gnu")
    native = PROCESSORS[packages.NATIVE]

    def make(folder: Path) -> None:
        _bootstrap(folder / "tree", native, names, root.tools)
        (folder / "tree/mnt").mkdir(exist_ok=True)

    title = f"a compiler for {root.processor.name}"
    return cache.piece("cross", key_of(root.key, *names, "1"), title, make) / "tree"


def _configure(tree: Path, like: Path, processor: Processor) -> None:
    """Copy what the maintainer scripts of the packages made in another tree: /etc, links, modes."""
    host.run(host.as_root("cp", "-a", "--remove-destination", f"{like}/etc/.", f"{tree}/etc/"))
    (tree / "etc/ld.so.cache").unlink(missing_ok=True)
    ours, theirs = (f"{one.machine}-linux-gnu" for one in (PROCESSORS[packages.NATIVE], processor))
    for made in [*(like / "usr").rglob("*"), *(like / "etc/alternatives").iterdir()]:
        path = tree / str(made.relative_to(like)).replace(ours, theirs)
        if not made.is_symlink():
            if made.stat().st_mode & (stat.S_ISUID | stat.S_ISGID) and path.is_file():
                path.chmod(stat.S_IMODE(made.stat().st_mode))
        elif "/etc/alternatives" in (str(made.parent)[-17:], os.readlink(made)[:17]):
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(os.readlink(made).replace(ours, theirs))


def compile_python(tools: Path, folder: Path, place: str) -> None:
    """Byte-compile what will be at `place` in the guest, with the Python of the tools' tree."""
    flags = ["-q", "-j1", "--invalidation-mode=unchecked-hash", "-s", "/mnt", "-p", place]
    argv = host.in_tree(tools, folder, "python3", "-m", "compileall", *flags, "/mnt")
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if b"PermissionError" in done.stdout or done.returncode not in (0, 1):
        output = done.stdout.decode(errors="replace")
        raise LabError(host.tool_failed(argv[-12:], done.returncode, output))


# The package mirror


def mirror() -> str:
    """Return the address of a Debian mirror: DMABUF_LAB_MIRROR, or the one apt here uses."""
    given = os.environ.get("DMABUF_LAB_MIRROR")
    if given:
        return given.rstrip("/")
    rows = host.run(["apt-get", "indextargets", "--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)"])
    found = dict.fromkeys(row.strip() for row in rows.splitlines())
    for row in found:
        uri, origin, label = row.split("|")
        if (origin, label) == ("Debian", "Debian"):
            return uri.rstrip("/")
    for row in found:  # before the first `apt-get update` only addresses are known
        uri = row.split("|")[0].rstrip("/")
        if uri.endswith("/debian"):
            return uri
    raise LabError(
        "apt on this machine uses no Debian mirror: set DMABUF_LAB_MIRROR to the address of one\n"
        "(the folder that has dists/ and pool/, as the URIs line of a Debian sources file has it)"
    )


def _source(suite: str, processor: Processor) -> str:
    return f"deb [arch={processor.name} signed-by={host.keyring()}] {mirror()} {suite} main"


def _apt_acquire_options() -> list[str]:
    """How this machine's apt reaches its mirrors: proxies, certificates, retries."""
    rows = host.run(["apt-config", "dump"]).splitlines()
    wanted = re.compile(r'Acquire::(http|https|ftp|Retries|ForceIPv[46])\b[^ ]* ".+";')
    return [row for row in rows if wanted.fullmatch(row)]


# Kernels


def kernel(
    cache: Cache, which: str, processor: Processor, flavour: str, refresh: bool = False
) -> Kernel:
    """Return the kernel that `--kernel` names, made ready if the cache lacks it."""
    if which in packages.KERNELS:
        return _suite_kernel(cache, packages.KERNELS[which], processor, flavour, refresh)
    return _custom_kernel(cache, Path(which), flavour)


def _suite_kernel(
    cache: Cache, suite: str, processor: Processor, flavour: str, refresh: bool
) -> Kernel:
    """A suite's newest kernel: the suite is asked once a day, and on --prepare."""
    answer = cache.folder / f"suite.{suite}.{flavour}.json"
    known = json.loads(answer.read_text()) if answer.exists() else None
    path = cache.folder / f"kernel-{flavour}-{known['version']}" if known else None
    cached = path is not None and path.exists()
    if refresh or not cached or time.time() - answer.stat().st_mtime > ASK_AGAIN:
        with tempfile.TemporaryDirectory(prefix="apt-", dir=cache.folder) as folder:
            try:
                known = _ask_suite(Path(folder), suite, processor, flavour)
            except LabError as error:
                if not cached or known is None:
                    raise
                host.say(f"{suite} did not answer, using its kernel {known['version']}: {error}")
            answer.write_text(json.dumps(known))
            title = f"kernel {known['release']} of {suite}"
            cache.piece(
                "kernel",
                f"{flavour}-{known['version']}",
                title,
                lambda made: _make_suite_kernel(Path(folder), known, flavour, made),
            )
    assert known is not None
    path = cache.folder / f"kernel-{flavour}-{known['version']}"
    os.utime(path)
    made = _kernel_piece(path, flavour, path / "vmlinuz", known["release"])
    return replace(made, suite=suite, version=known["version"])


def apt_lists(folder: Path, suite: str, processor: Processor) -> None:
    """Make a folder in which :func:`apt` uses lists of its own, for that one suite."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(_source(suite, processor) + "\n")
    settings = {
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": processor.name,
        "APT::Architectures": processor.name,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    lines = [f'{name} "{value}";\n' for name, value in settings.items()]
    (folder / "apt.conf").write_text("".join(lines))
    apt(folder, "apt-get", "update", "-q", "--error-on=any")


def _ask_suite(folder: Path, suite: str, processor: Processor, flavour: str) -> dict[str, str]:
    """Ask apt for the newest kernel."""
    package = f"{packages.KERNEL}-{flavour}"
    with host.step(f"asking {suite} for its newest kernel"):
        apt_lists(folder, suite, processor)
        record = apt(folder, "apt-cache", "show", "--no-all-versions", package)
    version = re.search(r"^Version: (\S+)$", record, re.MULTILINE)
    release = re.search(rf"\blinux-image-(\d\S*-{flavour})(?![\w-])", record)
    if not version or not release:
        raise LabError(f"{suite} has no {package} that depends on a kernel")
    return {"version": version[1].replace(":", "+"), "release": release[1]}


def apt(folder: Path, *argv: str) -> str:
    """Run a tool of apt with the lists of :func:`apt_lists`, in the folder."""
    return host.run(argv, env={"APT_CONFIG": str(folder / "apt.conf")}, cwd=folder)


def _make_suite_kernel(place: Path, known: dict[str, str], flavour: str, folder: Path) -> None:
    release = known["release"]
    only = "-o=APT::Cache::ShowOnlyFirstOr=true"
    package = f"{packages.KERNEL}-{flavour}"
    tree = apt(place, "apt-cache", "depends", "--recurse", "--important", only, package)
    wanted = re.compile(rf"linux-\w+-{re.escape(release)}")
    names = [row for row in tree.splitlines() if wanted.fullmatch(row)]
    apt(place, "apt-get", "download", "-q", *names)
    unpacked = folder / "unpacked"
    for deb in place.glob("*.deb"):
        host.run(["dpkg-deb", "-x", deb, unpacked])
    base = folder / "base"
    (base / "lib/modules").mkdir(parents=True)
    modules = base / "lib/modules" / release
    libs = (unpacked / "usr/lib/modules" / release, unpacked / "lib/modules" / release)
    next(path for path in libs if path.exists()).rename(modules)
    images = (modules / "vmlinuz", unpacked / f"boot/vmlinuz-{release}")
    next(path for path in images if path.exists()).rename(folder / "vmlinuz")
    host.run(["depmod", "-b", base, release])
    _make_modules(modules, base, folder)
    for path in (unpacked, base):
        shutil.rmtree(path)


def _make_modules(modules: Path, base: Path, folder: Path) -> None:
    """Make the image of a kernel's modules, and the decompressed ones for the initrd."""
    early = folder / "early"
    early.mkdir()
    paths = dict.fromkeys(
        path for name in packages.EARLY_MODULES for path in _insmods(base, modules.name, name)
    )
    for number, path in enumerate(paths):
        name = path.name.split(".ko")[0]
        (early / f"{number:02}-{name}.ko").write_bytes(_decompress(path))
    make_image(modules.parent, folder / "modules", 16 << 20, "modules")


def _insmods(base: Path, release: str, name: str) -> list[Path]:
    """The files to load for a module, in order; none if it is built in."""
    argv = ["modprobe", "-d", str(base), "-S", release, "--show-depends", name]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return [Path(row[1]) for row in map(str.split, done.stdout.splitlines()) if row[0] == "insmod"]


def _decompress(path: Path) -> bytes:
    data = path.read_bytes()
    unpack: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], stdout=subprocess.PIPE, check=True).stdout
    return unpack.get(path.suffix, bytes)(data)


def _kernel_piece(folder: Path, flavour: str, image: Path, release: str) -> Kernel:
    early = tuple(sorted((folder / "early").iterdir()))
    return Kernel(flavour, image, release, folder / "modules", early)


def _custom_kernel(cache: Cache, image: Path, flavour: str) -> Kernel:
    """Any bzImage, with its modules if they are found: beside it, or installed on this machine."""
    try:
        release = _release(image)
    except OSError as error:
        raise LabError(f"--kernel {image}: {error.strerror}") from None
    places = (image.absolute().parent, Path("/lib/modules") / release)
    modules = next((path for path in places if (path / "modules.dep").exists()), None)
    if modules is None:
        return Kernel(flavour, image, release, None, ())
    dep = (modules / "modules.dep").read_bytes()
    key = key_of(release, str(modules), dep, str((modules / "modules.dep").stat().st_mtime_ns))

    def make(folder: Path) -> None:
        base = folder / "base"
        copy = base / "lib/modules" / release
        links = ("build", "source", "vmlinu?")
        shutil.copytree(modules, copy, symlinks=True, ignore=shutil.ignore_patterns(*links))
        _make_modules(copy, base, folder)
        shutil.rmtree(base)

    path = cache.piece("modules", key, f"modules of {release}", make)
    return _kernel_piece(path, flavour, image, release)


def _release(image: Path) -> str:
    """The release in a bzImage's header (Documentation/arch/x86/boot.rst, kernel_version).

    An arm64 Image (Documentation/arch/arm64/booting.rst) has it only in its banner.
    """
    data = image.read_bytes()
    banner = re.search(rb"Linux version (\S+)", data) if data[0x38:0x3C] == b"ARM\x64" else None
    if banner:
        return banner[1].decode()
    if data[0x202:0x206] != b"HdrS":
        raise LabError(f"--kernel {image}: not an x86 bzImage, and not an arm64 Image")
    start = struct.unpack_from("<H", data, 0x20E)[0] + 0x200
    return data[start : data.index(b"\0", start)].split()[0].decode()


# The initrd


def make_initrd(root: Root, kernel: Kernel, script: Path, initrd: Path) -> None:
    """Write an initrd of busybox, the script as /init, and the kernel's early modules."""
    busybox = (root.tree / "usr/bin/busybox").read_bytes()
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys", "root", "early")
    ]
    entries += [
        ("bin/busybox", stat.S_IFREG | 0o755, busybox),
        ("init", stat.S_IFREG | 0o755, script.read_bytes()),
        *((f"early/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in kernel.early),
    ]
    initrd.write_bytes(_newc(entries))


def _newc(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive of (name, mode, contents): Documentation/driver-api/early-userspace."""
    out = bytearray()
    for name, mode, data in (*entries, ("TRAILER!!!", 0, b"")):
        fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)
