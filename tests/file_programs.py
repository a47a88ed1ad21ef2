"""Programs that know files and no dma-bufs, each on a descriptor: what they read, what they write.

    python3 -m tests.file_programs FD MEMORY all|few

runs them on the file FD, and compares with the memory itself, which MEMORY is a descriptor of.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import dmabuf
from tests.support import assert_same, pattern, poison

PYTHON = f"{sys.executable} -I -S"

READERS: dict[str, str] = {
    "cat of a redirection": "cat <&{fd}",
    "cat": "cat /dev/fd/{fd}",
    "cp": "cp /dev/fd/{fd} copy && cat copy",
    "cmp": "cmp /dev/fd/{fd} expected && cat expected",
    "dd in large blocks": "dd if=/dev/fd/{fd} bs=1M status=none",
    "dd in odd blocks": "dd if=/dev/fd/{fd} bs=9999 status=none",
    "dd of parts": "dd if=/dev/fd/{fd} bs=4096 count=3 status=none;"
    " dd if=/dev/fd/{fd} bs=4096 skip=3 status=none",
    "dd past the page cache": "dd if=/dev/fd/{fd} bs=4096 iflag=direct status=none",
    "head and tail": "head -c 12345 /dev/fd/{fd}; tail -c +12346 /dev/fd/{fd}",
    "head, then the rest": "(head -c 0; cat) <&{fd}",
    "tar": "tar -C /dev/fd -chf - {fd} 2>tar.log | tar -xOf -",
    "gzip": "gzip -1 <&{fd} | gzip -d",
    "Python's read": "{python} -c 'import sys; sys.stdout.buffer.write(open({fd}, \"rb\").read())'",
    "a private mapping": "{python} -c 'import mmap, sys;"
    " sys.stdout.buffer.write(mmap.mmap({fd}, 0, access=mmap.ACCESS_COPY))'",
    "sendfile": "{python} -c 'import os\nat = 0\n"
    "while n := os.sendfile(1, {fd}, at, 1 << 20): at += n'",
    "splice": "{python} -c 'import os\nat = 0\n"
    "while n := os.splice({fd}, 1, 1 << 20, offset_src=at): at += n' | cat",
    "copy_file_range": "cat /dev/fd/{fd} > copied; cat copied",
    "xxd": "xxd -p -c 32 /dev/fd/{fd} | xxd -p -r -c 32",
    "busybox cat": "busybox cat <&{fd}",
    "busybox dd": "busybox dd if=/dev/fd/{fd} bs=64k 2>/dev/null",
    "busybox xxd": "busybox xxd -p -c 32 /dev/fd/{fd} | busybox xxd -p -r",
}
"""Each prints all of the file."""

SUMS = ("sha256sum /dev/fd/{fd}", "sha256sum <&{fd}", "busybox sha256sum /dev/fd/{fd}")

WRITERS: dict[str, str] = {
    "cat to a redirection": "cat new >&{fd}",
    "cat to a file": "cat new 1<>/dev/fd/{fd}",
    "dd in large blocks": "dd if=new of=/dev/fd/{fd} bs=1M conv=notrunc status=none",
    "dd in odd blocks": "dd if=new of=/dev/fd/{fd} bs=9999 conv=notrunc status=none",
    "dd of parts": "dd if=new of=/dev/fd/{fd} bs=4096 skip=3 seek=3 conv=notrunc status=none;"
    " dd if=new of=/dev/fd/{fd} bs=4096 count=3 conv=notrunc status=none",
    "tar": "tar -cf - new | tar -xOf - >&{fd}",
    "Python's pwrite": '{python} -c \'import os; d = open("new", "rb").read()\n'
    "for at in range(0, len(d), 99991): os.pwrite({fd}, d[at : at + 99991], at)'",
    "busybox dd": "busybox dd if=new of=/dev/fd/{fd} bs=64k conv=notrunc 2>/dev/null",
}
"""Each writes all of the file, from one called new."""

TRUNCATING: dict[str, str] = {
    "a shell's >": "cat new > /dev/fd/{fd}",
    "cp": "cp new /dev/fd/{fd}",
    "dd": "dd if=new of=/dev/fd/{fd} bs=1M status=none",
    "tee": "tee /dev/fd/{fd} < new > /dev/null",
}
"""The same by programs that open it with O_TRUNC, which a memfd refuses and FUSE lets pass."""

FEW = (
    "cat of a redirection",
    "head and tail",
    "dd in odd blocks",
    "cat to a redirection",
    "busybox dd",
)
"""The names of some, for where a process takes long to start."""


def usable(commands: dict[str, str], few: bool = False) -> dict[str, str]:
    """Those whose programs are installed."""
    optional = {name for name in ("xxd", "busybox") if shutil.which(name) is None}
    return {
        name: text
        for name, text in commands.items()
        if text.split()[0] not in optional and (name in FEW or not few)
    }


def shell(command: str, fd: int, folder: Path) -> bytes:
    """Run a command on the file from its start; its standard output."""
    os.lseek(fd, 0, os.SEEK_SET)
    done = subprocess.run(
        ["bash", "-c", command.replace("{python}", PYTHON).replace("{fd}", str(fd))],
        pass_fds=[fd],
        cwd=folder,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b""), (command, done.returncode, done.stderr)
    return done.stdout


def check_readers(fd: int, buffer: dmabuf.Buffer, folder: Path, *, few: bool = False) -> None:
    """Each reader sees what was last put into the buffer, all of it."""
    for seed, (name, command) in enumerate(usable(READERS, few).items()):
        data = pattern(buffer.size, seed)
        buffer.pwrite(data, 0)
        (folder / "expected").write_bytes(data)
        assert_same(shell(command, fd, folder), data, name)
    for name, command in usable({text: text for text in SUMS[: 1 if few else None]}).items():
        told = shell(command, fd, folder).split()[0].decode()
        assert told == hashlib.sha256(data).hexdigest(), name


def check_writers(
    fd: int, buffer: dmabuf.Buffer, folder: Path, *, truncating: bool, few: bool = False
) -> None:
    """What each writer wrote is in the buffer, where poison was before."""
    commands = usable(WRITERS, few)
    commands |= {f"{name}, truncating": c for name, c in TRUNCATING.items() if not few}
    size = buffer.size
    for seed, (name, command) in enumerate(commands.items()):
        data = pattern(size, seed)
        (folder / "new").write_bytes(data)
        buffer.pwrite(poison(size), 0)
        if name.endswith(", truncating") and not truncating:
            with_error = f"({command}) >/dev/null 2>&1 && echo it worked; true"
            assert shell(with_error, fd, folder) == b"", name
            data = poison(size)
        else:
            shell(command, fd, folder)
        assert_same(buffer.pread(size, 0), data, name)


def main(fd: int, memory: int, *, few: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, dmabuf.from_fd(memory) as buffer:
        check_readers(fd, buffer, Path(folder), few=few)
        check_writers(fd, buffer, Path(folder), truncating=True, few=few)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), few=sys.argv[3] == "few")
