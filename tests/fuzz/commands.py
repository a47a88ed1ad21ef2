"""Command lines: made of the options that each command has, and of other words."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import dmabuf.store
from dmabuf.cli import COMMANDS, load, main
from dmabuf.cli.parser import Misuse, Parser
from tests.serving import in_a_thread
from tests.support import pattern

FILES = {"a": pattern(5000, 1), "b": pattern(70_000, 2), "none": b"", "-n": b"dash"}
"""What lies in the folder before each command. `sub` is a folder, `gone` a broken link."""
NAMES = (*FILES, "sub", "sub/new", "new", "gone", "missing/x", ".", "x", "y", "x*", "[x", "z/..")
WORDS = (
    "", " ", "-", "--", "---", "-é", "é", "\udcff", "a\nb", "\x1b[2J", "\u202e", "\x7f", "x" * 300,
    "/dev/null", "/proc/self/status", "0", "1", "-1", "4096", "4097", "1MiB", "1 MiB",
    "0x10", "1_0", "\u0663", "1e3", "1.5KiB", "nan", "inf", "12x", "9" * 30, "18446744073709551615",
    "0+4096", "4096+", "+1", "memfd", "auto", "none", "777", "640", "8", "direct", "buffered",
    "zero-copy", "any", "fastest", "load", "ls", "rm", "dmabuf://", "dmabuf://127.0.0.1:1/a", "%s",
)  # fmt: skip
SAFE = ("cp", "put", "get", "stat", "rm", "mv", "chmod", "df", "ls", "ping")
"""The commands that are run. The others wait, show what the machine has, or start programs."""
STORED = SAFE[1:]
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]")


def _value(dice: random.Random, action: argparse.Action) -> str:
    if action.choices and dice.random() < 0.7:
        return str(dice.choice(list(action.choices)))
    return dice.choice(NAMES) if dice.random() < 0.5 else dice.choice(WORDS)


def words_of(dice: random.Random, name: str) -> list[str]:
    """Return words for a command: often the right number of arguments, and options it has."""
    parser = Parser(f"dmabuf {name}", load(name))
    words: list[str] = []
    for action in parser._actions:
        if not action.option_strings:
            count = {None: 1, "?": dice.randrange(2)}.get(action.nargs, dice.randrange(4))
            words += [_value(dice, action) for _ in range(count)]
    for _ in range(dice.choice((0, 0, 1, 1, 2, 3))):
        action = dice.choice(parser._actions)
        if not action.option_strings or action.dest == "socket":
            words.insert(dice.randrange(len(words) + 1), dice.choice(WORDS))
            continue
        option = dice.choice(action.option_strings)
        value = [] if action.nargs == 0 else [_value(dice, action)]
        if value and dice.random() < 0.3:
            option, value = f"{option}={value[0]}", []
        at = dice.randrange(len(words) + 1)
        words[at:at] = [option, *value]
    if dice.random() < 0.1:
        del words[dice.randrange(len(words) + 1) :]
    return words


def parse(name: str, words: list[str]) -> argparse.Namespace | None:
    """Return what a command line means, or None where it is invalid or asks for help."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return Parser(f"dmabuf {name}", load(name)).parse_args(words)
    except Misuse as misuse:
        assert str(misuse), words
        return None
    except SystemExit as ended:
        assert not ended.code and {"-h", "--help"} & set(words), words
        return None


def make_line(dice: random.Random) -> bytes:
    """Return a command line as bytes, for `check_line`."""
    name = dice.choice(list(COMMANDS))
    words = words_of(dice, name)
    return json.dumps([name, *words]).encode()


def check_line(raw: bytes) -> None:
    """Parse a command line: nothing but Misuse may be raised."""
    try:
        words = json.loads(raw)
    except ValueError:
        return
    valid = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if valid and words and words[0] in COMMANDS:
        parse(words[0], words[1:])


class _Run:
    """One command in this process: its status, and what it wrote to descriptors 1 and 2."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        told = folder / "out", folder / "err"
        opened = [os.open("/dev/null", os.O_RDONLY)]
        opened += [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for path in told]
        kept = [os.dup(number) for number in range(3)]
        streams = [io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8") for fd in (1, 2)]
        try:
            for number, fd in enumerate(opened):
                os.dup2(fd, number)
            with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
                self.status = main(words)
        finally:
            for number, fd in enumerate(kept):
                os.dup2(fd, number)
                os.close(fd)
            for fd in opened:
                os.close(fd)
        self.out, self.err = (path.read_bytes() for path in told)


def _contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@contextlib.contextmanager
def commands_target() -> Iterator[Callable[[random.Random], None]]:
    """Yield a target that runs commands in a folder, with a store, and judges what they did."""
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        folder, told = top / "folder", top / "told"
        told.mkdir()
        stack.callback(os.chdir, os.getcwd())
        stack.enter_context(in_a_thread(top / "store.sock", 16 << 20))
        store = stack.enter_context(dmabuf.store.connect(top / "store.sock"))

        def reset() -> dict[str, bytes]:
            os.chdir(top)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            (folder / "sub").mkdir(parents=True, exist_ok=True)
            for name, data in FILES.items():
                (folder / name).write_bytes(data)
            os.symlink("nowhere", folder / "gone")
            os.chdir(folder)
            for status in store.list():
                store.remove(status.name)
            with store.create("x", 5000) as buffer:
                buffer.pwrite(FILES["a"], 0)
            return _contents(folder)

        before = reset()

        def attempt(dice: random.Random) -> None:
            nonlocal before
            name = dice.choice(SAFE)
            words = words_of(dice, name)
            if name in STORED:
                words[:0] = ["--socket", str(top / "store.sock")]
            args = parse(name, words)
            run = _Run(told, [name, *words])
            after = _contents(folder)
            try:
                _judge(name, words, args, run, before, after)
                if run.status == 0 and name == "put" and args is not None:
                    _judge_put(args, store, before)
            finally:
                if after != before or name in STORED:
                    before = reset()

        yield attempt


def _judge(
    name: str,
    words: list[str],
    args: argparse.Namespace | None,
    run: _Run,
    before: dict[str, bytes],
    after: dict[str, bytes],
) -> None:
    """Compare the status, the messages and the files with what the command line asked for."""
    about = f"{name} {words}: {run.status}, {run.err[:500]!r}"
    err = run.err.decode()
    assert run.status in (0, 1, 2), about
    assert args is not None or run.status == 2 or {"-h", "--help"} & set(words), about
    assert not _HIDDEN.search(err), about
    raw = name in ("cp", "get") and args is not None and "-" in _ends(name, args)
    assert raw or not _HIDDEN.search(run.out.decode()), about
    if run.status:
        last = err.splitlines()[-1]
        as_json = "--json" in words[: words.index("--") if "--" in words else None]
        if as_json:
            assert json.loads(last)["format"] == "dmabuf-error/1", about
        else:
            assert any(line.startswith("error: ") for line in err.splitlines()), about
    if run.status == 2:
        assert after == before and not run.out, about
    if args is None:
        return
    source, target = _ends(name, args)
    changed = {one for one in before.keys() | after.keys() if before.get(one) != after.get(one)}
    allowed = {target, os.path.join(target, os.path.basename(source))} if target else set()
    allowed |= {"nowhere"} if target == "gone" else set()
    assert {os.path.normpath(one) for one in changed} <= {
        os.path.normpath(one) for one in allowed
    }, f"{about} {changed}"
    if run.status == 0 and name in ("cp", "get"):
        wanted = before.get(source) if name == "cp" else {"x": FILES["a"]}.get(source)
        if wanted is not None:
            wanted = wanted if args.size is None else wanted[: args.size]
            places = [after.get(os.path.normpath(one)) for one in allowed]
            if target in ("-", "/dev/stdout"):
                places = [run.out[: len(wanted)]]
            if not target.startswith("/dev/") or target == "/dev/stdout":
                assert any((got or b"").startswith(wanted) for got in places), about


def _ends(name: str, args: argparse.Namespace) -> tuple[str, str]:
    """Return the source and the target, "" where there is none."""
    if name == "cp":
        return args.source, args.target
    return (args.name, args.file) if name == "get" else ("", "")


def _judge_put(
    args: argparse.Namespace, store: dmabuf.store.Store, before: dict[str, bytes]
) -> None:
    data = before.get(args.file)
    if data is None:
        return
    data = data if args.size is None else data[: args.size]
    with store.open(args.name) as buffer:
        assert buffer.pread(len(data), 0) == data, args
    assert store.stat(args.name).length == len(data), args
