"""The host's side: messages, running tools, what must be installed, working inside the root."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab import packages
from lab.processors import Processor

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Debian's archive keys, from the package debian-archive-keyring (in Ubuntu, too)."""


class LabError(Exception):
    """The lab itself could not do its work; the message says what and why."""


def say(message: str) -> None:
    """Print a line of the lab's own on standard error."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title now, and the seconds it took at the end of the same line."""
    print(f"lab: {title} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    done = "failed after"
    try:
        yield
        done = "done in"
    finally:
        print(f"{done} {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a tool and return its standard output.

    Raises LabError, with the last lines it printed, if it fails.
    """
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise LabError(tool_failed(argv, done.returncode, done.stdout + done.stderr))
    return done.stdout


def tool_failed(argv: Sequence[str | Path], status: int, output: str) -> str:
    """Say that a tool failed, with the last 40 lines that it printed."""
    tail = "\n".join(f"    {line}" for line in output.rstrip().splitlines()[-40:])
    words = " ".join(str(word) for word in argv)
    return f"{words[:200]}: exit status {status}\n{tail}".rstrip()


def mebibytes(size: str) -> int:
    """Return a size of QEMU's -m, such as 3G, in MiB."""
    match = re.fullmatch(r"(\d+)([MG]?)", size.upper())
    if match is None:
        raise LabError(f"--memory {size}: a number of MiB, or with M or G, is needed")
    return int(match[1]) * (1024 if match[2] == "G" else 1)


def add_sbin_to_path() -> None:
    """Ordinary users of Debian lack the folders that hold mke2fs and depmod."""
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    )


def _tools(processor: Processor) -> dict[str, str]:
    """Return the commands that a guest with this processor needs here, and their packages."""
    tools = {**packages.HOST_TOOLS, processor.qemu[0]: processor.package}
    if processor.name != packages.NATIVE:
        tools.update(packages.HOST_TOOLS_CROSS)
    if os.geteuid() != 0:
        tools.update(packages.HOST_TOOLS_USER)
    return tools


def apt_packages(processor: Processor) -> list[str]:
    """Return the names of the host's packages that the lab needs."""
    return sorted({*_tools(processor).values(), "debian-archive-keyring", "python3-pip"})


def keyring() -> Path:
    """Return the file with Debian's archive keys: DMABUF_LAB_KEYRING, or the package's."""
    return Path(os.environ.get("DMABUF_LAB_KEYRING") or KEYRING)


def check_prerequisites(processor: Processor) -> None:
    """Raise LabError naming all that is missing on this host, and how to install it."""
    tools = _tools(processor).items()
    missing = {tool: package for tool, package in tools if not shutil.which(tool)}
    if not keyring().exists():
        missing[str(keyring())] = "debian-archive-keyring"
    if not _has_pip():
        missing[f"{sys.executable} -m pip"] = "python3-pip"
    if missing:
        lines = [f"  {tool}  (package {package})" for tool, package in missing.items()]
        install = " ".join(sorted(set(missing.values())))
        sudo = "" if os.geteuid() == 0 else "sudo "
        raise LabError(
            "missing on this machine:\n"
            + "\n".join(lines)
            + f"\ninstall with: {sudo}apt-get install --no-install-recommends {install}"
        )
    if os.geteuid() != 0:
        _check_namespaces()


def _has_pip() -> bool:
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('pip') is None)"
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def _check_namespaces() -> None:
    argv = [*_unshare(), "true"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(
            f"{' '.join(argv)}: {done.stderr.strip()}\n"
            "an ordinary user needs user namespaces here (on Ubuntu 24.04 and later:\n"
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0); or run the lab as root"
        )


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount"]


def as_root(*argv: str | Path) -> list[str | Path]:
    """Return argv such that files of this user look, and are made, as root's."""
    return [*argv] if os.geteuid() == 0 else [*_unshare(), *argv]


def in_tree(tree: Path, mnt: Path, *argv: str) -> list[str | Path]:
    """Return the command that runs argv inside the guest's root, with the folder mnt on /mnt."""
    script = (
        'mount --rbind /dev "$0/dev"; mount --rbind /proc "$0/proc"; '
        'mount --bind "$1" "$0/mnt"; tree=$0; shift; cd /; exec env -i PATH=/usr/sbin:/usr/bin '
        'HOME=/root LANG=C.UTF-8 TMPDIR=/mnt chroot "$tree" "$@"'
    )
    return [*_unshare(), "sh", "-ec", script, tree, mnt, *argv]
