"""Run the code of pages of documentation: `python tests/pages.py docs/getting-started.md`.

It runs in the working directory, in the order of the page: pycon sessions, console commands and
python blocks. The output is compared: `...` in a page stands for any text, and times, rates and
users need not be equal. A block after `<!-- not run: REASON -->` is left out; such a comment in the
first line leaves out the whole page. It needs nothing but the package.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dmabuf

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("lab/*.md")]
FLAGS = doctest.ELLIPSIS | doctest.REPORT_UDIFF | doctest.FAIL_FAST
LANGUAGES = ("python", "pycon", "console")
MODEL = 90_868_376
"""Bytes of the model that `make demo` fetches."""
MARK = "-- end of the command --"


class Block(NamedTuple):
    """A block of code, and the number of its first line."""

    language: str
    text: str
    line: int


def blocks_to_run(text: str) -> Iterator[Block]:
    """Yield the blocks of a page that can be run and are not left out."""
    if re.match(r"<!-- not run: [^>]* -->\n", text):
        return
    fence = r"(?P<left_out><!-- not run: [^>]* -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$"
    for found in re.finditer(fence, text, re.M | re.S):
        if found["language"] in LANGUAGES and not found["left_out"]:
            line = text.count("\n", 0, found.start("text")) + 1
            yield Block(found["language"], found["text"], line)


class Alike(doctest.OutputChecker):
    """Compares output but for times, rates and users; or not at all, and then only errors count."""

    def __init__(self, compare: bool) -> None:
        self._compare = compare

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """Return whether the output is that of the page."""
        return not self._compare or super().check_output(
            self._plain(want), self._plain(got), optionflags
        )

    @staticmethod
    def _plain(text: str) -> str:
        text = re.sub(r"/run/(user/\d+/)?", "/run/", text)
        text = re.sub(r"^([-r][-rwx]{9}) +\w+ +\w+ +", r"\1 USER ", text, flags=re.M)
        text = re.sub(r"\d[\d.]*( ?)(?:[kMGKi]*(B/)|[mun]?)s\b", r"N\1\2s", text)
        return re.sub(r"\d+-\d\d-\d\d +\d\d:\d\d:\d\d", "TIME", text)


class Shell:
    """A shell that runs the commands of a page; what it started ends with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True,
        )  # fmt: skip

    def run(self, command: str, want: str) -> str:
        """Return the output of a command; of one in the background, as many lines as wanted."""
        assert self._process.stdin and self._process.stdout
        background = command.endswith("&")
        self._process.stdin.write(command if background else f"{command}\necho '{MARK}'")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if not background and line.endswith(f"{MARK}\n"):
                return "".join(lines) + line.removesuffix(f"{MARK}\n")
            lines.append(line)
            if background and len(lines) == want.count("\n"):
                break
        return "".join(lines)

    def close(self) -> None:
        """End the shell and its children."""
        os.killpg(self._process.pid, 15)
        self._process.wait()


class Page:
    """A page whose blocks share the names of Python, and one shell."""

    def __init__(self, path: Path, compare: bool) -> None:
        self._path = path
        self._names: dict[str, object] = {"__name__": "__main__"}
        self._checker = Alike(compare)
        self._shell = Shell()

    def run(self) -> None:
        """Run all blocks; raise AssertionError at the first that is not as the page shows."""
        ways = dict(zip(LANGUAGES, (self._code, self._session, self._commands), strict=True))
        try:
            for block in blocks_to_run(self._path.read_text()):
                ways[block.language](block)
        finally:
            self._shell.close()

    def _code(self, block: Block) -> None:
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, self._path, "exec"), self._names)

    def _session(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(
            block.text, self._names, self._path.name, str(self._path), block.line - 1
        )
        test.globs = self._names  # not a copy: the next block goes on with them
        runner = doctest.DocTestRunner(self._checker, verbose=False, optionflags=FLAGS)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        assert not runner.failures, "".join(report)

    def _commands(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, _, want = part.partition("\n")
            got = self._shell.run(command, want)
            if not self._checker.check_output(want, got, FLAGS):
                example = doctest.Example(command, want)
                raise AssertionError(
                    f"{self._path}:{block.line}: {command}\n"
                    + self._checker.output_difference(example, got, FLAGS)
                )


def header_of_model(whole):
    """The header of a safetensors file of so many bytes, with one tensor."""
    for size in range(whole - 200, whole):
        tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        raw = json.dumps({"__metadata__": {"format": "pt"}, "t": tensor}).encode()
        if 8 + len(raw) + size == whole:
            return len(raw).to_bytes(8, "little") + raw
    raise ValueError(whole)


def run_apart(page: Path, folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Run a page in a folder with a model file, as another interpreter and its commands do."""
    for path in (folder / "model.safetensors", folder / "demo/model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(header_of_model(MODEL))
        os.truncate(path, MODEL)
    own_run = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    if subprocess.run([*own_run, "true"], capture_output=True).returncode:
        own_run = []  # not root: XDG_RUNTIME_DIR is enough
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(folder),
    }
    return subprocess.run(
        [*own_run, python, __file__, page],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def like_the_pages() -> bool:
    """Return whether buffers and the working directory are those of the machine in the pages."""
    path = Path("probe")
    path.write_bytes(bytes(8192))
    with dmabuf.allocate(8192) as buffer, dmabuf.open(path) as file:
        alike = (buffer.exporter, file.plan(buffer).route) == ("memfd", dmabuf.Route.DIRECT)
    path.unlink()
    return alike


if __name__ == "__main__":
    compare = like_the_pages()
    if not compare:
        print("output is not compared: the pages are from a machine with memfd and O_DIRECT")
    for name in sys.argv[1:]:
        Page(Path(name), compare).run()
