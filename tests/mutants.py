"""Put faults into the C core and run the simulator on each: it has to find them.

``python -m tests.mutants`` takes out the fixes of FAULTS, each a kind of fault that the core once
had or could have. ``python -m tests.mutants csrc/batch.c`` makes small changes to a file instead,
one at a time: conditions negated, comparisons and numbers changed, statements left out. A change
that the simulator does not notice is tried by the core's own tests. One that these do not notice
either is printed: it survives.

``python -m tests.mutants --sample 50 src/dmabuf/transfer/*.py`` makes such changes to files of the
package, 50 of all that there are. On each it runs those of TESTS_OF_TRANSFERS that execute the
changed line, as coverage.py has recorded before; `--record FILE` keeps that for another time.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """A change of one file."""

    name: str
    file: str
    old: str
    new: str


_WAIT = (
    "\t\tif (!batch->in_flight) {\n\t\t\tnext_phase(batch);\n\t\t\tcontinue;\n\t\t}\n"
    "\t\trc = batch->ring->ops->wait(batch->ring, left > 0"
)

_ADD = "self.users.add(token)"
_TOKEN = f"        target, token = self.target, object()\n        try:\n            {_ADD}\n"

FAULTS = (
    Fault(
        "an edge shares a page with its middle, or with another write's",
        "split.c",
        "uint64_t align = job->page > job->offset_align ? job->page : job->offset_align;",
        "uint64_t align = job->offset_align;",
    ),
    Fault(
        "a write does not report which pages it shares",
        "measure.c",
        "ret->shared_pages |= shared_pages(job, segment);",
        "",
    ),
    Fault(
        "edges are written while the middle is in flight",
        "batch.c",
        _WAIT,
        _WAIT.replace("flight)", "flight || (batch->phase == MIDDLE && batch->free))", 1),
    ),
    Fault(
        "the block with the end of the file is read into the buffer",
        "split.c",
        "dmb_min(dmb_align_down(end, align), dmb_align_down(job->file_size, align));",
        "dmb_align_down(end, align);",
    ),
    Fault(
        "old pages stay in the page cache",
        "cache.c",
        "if (!job->stale_cache || job->direction",
        "if (job->stale_cache || job->direction",
    ),
    Fault(
        "nbytes counts past an edge",
        "batch.c",
        "batch->first_edge);\n\treturn",
        "nbytes);\n\treturn",
    ),
    Fault(
        "nbytes counts past an error",
        "batch.c",
        "dmb_min(batch->total, batch->stop)",
        "batch->total",
    ),
    Fault(
        "nbytes counts what was not issued",
        "batch.c",
        "\tnbytes = dmb_min(nbytes, batch->middle_end);\n",
        "",
    ),
    Fault(
        "a drain returns with requests in flight",
        "batch.c",
        "while (batch->in_flight || batch->phase != DONE) {",
        "while (batch->in_flight > 1 || (!batch->in_flight && batch->phase != DONE)) {",
    ),
    Fault(
        "a run ends with requests in flight",
        "batch.c",
        _WAIT,
        f"\t\tif (batch->error)\n\t\t\treturn 0;\n{_WAIT}",
    ),
    Fault(
        "an event loop forgets requests that the kernel did not take",
        "ring.c",
        "ring->issued = io_uring_sq_ready(&ring->uring) > 0;",
        "ring->issued = false;",
    ),
    Fault(
        "an edge of memory that the CPU cannot map has an address",
        "batch.c",
        "if (!io->native && !batch->job.base)",
        "if (io->staged && !batch->job.base)",
    ),
    Fault(
        "a staging block is given back while its request is in flight",
        "batch.c",
        "\tio->reissues = 0;\n\trc = issue(batch, io);",
        "\tif (io->block)\n\t\tdmb_stage_give(&batch->stage, io->block);\n\trc = issue(batch, io);",
    ),
    Fault(
        "a cancelled request counts as moved",
        "batch.c",
        "\t\tstop_at(batch, io);\n\t\treturn false;\n\t}\n\tif (result < 0) {",
        "\t\treturn false;\n\t}\n\tif (result < 0) {",
    ),
)

PACKAGE_FAULTS = (
    Fault(
        "an audit ignores what it finds",
        "transfer/audit.py",
        "        if findings.first is not None:\n",
        "        if findings.wrong > 1 << 30:\n",
    ),
    Fault(
        "the slot of a closed buffer stays taken",
        "transfer/ring.py",
        "        self._ring.give(self.slots, self._ring.unregister)\n",
        "        pass\n",
    ),
    Fault(
        "a file that grew is not cut after an error",
        "transfer/growth.py",
        "        if wanted >= self._end:\n",
        "        if wanted:\n",
    ),
    Fault(
        "a failed save leaves the new file",
        "copying/replace.py",
        "    def __exit__(self, *exc: object) -> None:\n",
        "    def __exit__(self, *exc: object) -> None:\n        exc[0] and self._take_name()\n",
    ),
    Fault(
        "a registration is renewed once after controller resets",
        "transfer/link.py",
        "\n_RENEWALS = 16\n",
        "\n_RENEWALS = 1\n",
    ),
    Fault(
        "neighbouring segments are not joined",
        "transfer/link.py",
        "        if count == segments.count:\n",
        "        if count:\n",
    ),
    Fault(
        "an event loop waits until the kernel lets go of a dma-buf",
        "transfer/ring.py",
        "                if self.unregister_elsewhere is None:\n",
        "                if self.unregister_elsewhere is not self:\n",
    ),
    Fault(
        "a write that fails cuts off what others appended",
        "transfer/growth.py",
        "            if os.fstat(self._fd).st_size != size:\n",
        "            if os.fstat(self._fd).st_size < size:\n",
    ),
    Fault(
        "a copy cuts off what lies behind its end",
        "copying/targets.py",
        "            self._growth.cut(self._start + nbytes)\n",
        "            os.ftruncate(self._here.fileno(), self._start + nbytes)\n",
    ),
    Fault(
        "gaps between segments are allocated",
        "transfer/growth.py",
        "                for start, stop in _joined(ranges())\n",
        "                for start, stop in [(0, end)]\n",
    ),
    Fault(
        "a transfer inside another one waits for its ring",
        "transfer/engine.py",
        "        if this_thread.transfers > 1:\n",
        "        if this_thread.transfers > 1 << 30:\n",
    ),
    Fault(
        "sizes and offsets stay integers of NumPy",
        "sizes.py",
        "    return operator.index(value)\n",
        "    return operator.index(value) and value\n",
    ),
    Fault(
        "O_DSYNC of the caller's descriptor is lost",
        "kernel/files.py",
        "    flags |= had & (os.O_SYNC | os.O_DSYNC)\n",
        "",
    ),
    Fault(
        "a copy ends early where the source was cut for a while",
        "copying/sources.py",
        "        if not pseudo or os.pread(fd, 1, self._offset):\n",
        "        if pseudo and os.pread(fd, 1, self._offset):\n",
    ),
    Fault(
        "an error while cutting back hides the error before",
        "transfer/growth.py",
        '            error.add_note(f"the file could not be cut back: {why}")\n',
        "            raise refused from None\n",
    ),
    Fault(
        "a failed write reports what was not flushed",
        "transfer/link.py",
        "            with_nbytes(failed, 0)\n",
        "",
    ),
    Fault(
        "an exception of a copy's progress skips the flush",
        "copying/pipeline.py",
        "            if sync and not isinstance(target, Memory):\n",
        "            meter.finish(done)\n            if sync and not isinstance(target, Memory):\n",
    ),
    Fault(
        "a copy with sync reports what was not flushed",
        "copying/pipeline.py",
        "            nbytes = 0 if self._sync else nbytes\n",
        "",
    ),
    Fault(
        "an interrupt leaves a buffer in use",
        "transfer/link.py",
        _TOKEN,
        _TOKEN.replace(f"try:\n            {_ADD}", f"{_ADD}\n        try:"),
    ),
    Fault(
        "an exception of progress has no nbytes",
        "transfer/file.py",
        "        with_nbytes(error, done.nbytes)\n",
        "",
    ),
    Fault(
        "an exception of a copy's progress has no nbytes",
        "copying/pipeline.py",
        "        error.nbytes = done  # type: ignore[attr-defined]\n",
        "",
    ),
)
"""Of the package, which the slower simulator, `python -m tests.simulator`, has to find."""

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def small_changes(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, line, changed line) for every small change of a C file."""
    comment = False
    for number, line in enumerate(text.splitlines()):
        bare = line.strip()
        comment = comment or bare.startswith("/*")
        if comment or bare.startswith(("#", "*", "//")) or not bare:
            comment = comment and "*/" not in bare
            continue
        for found in re.finditer(r"(?<=\s)(<=|>=|==|!=|<|>)(?=\s)", line):
            new = _COMPARISONS[found[0]]
            yield number, line, line[: found.start()] + new + line[found.end() :]
        for found in re.finditer(r"&&|\|\|", line):
            new = "||" if found[0] == "&&" else "&&"
            yield number, line, line[: found.start()] + new + line[found.end() :]
        for found in re.finditer(r"(?<=\s)[+-](?=\s)", line):
            new = "-" if found[0] == "+" else "+"
            yield number, line, line[: found.start()] + new + line[found.end() :]
        if found := re.match(r"(\s*(?:\} else )?if \()(.*)(\)(?: \{)?)$", line):
            yield number, line, f"{found[1]}!({found[2]}){found[3]}"
        if re.match(r"\t+[\w>.\[\]*()-]+(\+\+|--| [-+|]?= .*|\(.*\));$", line):
            yield number, line, ""
        for old, new in (("true", "false"), ("false", "true"), ("dmb_min", "dmb_max")):
            if re.search(rf"\b{old}\b", line):
                yield number, line, re.sub(rf"\b{old}\b", new, line, count=1)


_WORDS = {
    **_COMPARISONS,
    "and": "or", "or": "and", "True": "False", "False": "True", "+": "-", "-": "+",
    "min": "max", "max": "min", "in": "not in", "is": "is not", "+=": "-=",
}  # fmt: skip
_CONDITIONS = ("if", "elif", "while")


def small_changes_of_python(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, line, changed line) for every small change of a Python file."""
    lines = text.splitlines()
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.type not in (tokenize.OP, tokenize.NAME) or before.string in ("import", "def"):
            continue
        number, column = token.start[0] - 1, token.start[1]
        line, new = lines[number], _WORDS.get(token.string)
        if token.string == "in" and before.string == "not":
            continue
        if token.string == "is" and after.string == "not":
            new = None
        if new:
            yield number, line, line[:column] + new + line[token.end[1] :]
        if token.string in _CONDITIONS and line.endswith(":") and not line[:column].strip():
            yield number, line, f"{line[: token.end[1]]} not ({line[token.end[1] :].strip()[:-1]}):"
    for node in ast.walk(tree):
        left_out = isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Return)
        left_out = left_out or (
            isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
        )
        text_only = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if left_out and not text_only and node.lineno == node.end_lineno:
            line = lines[node.lineno - 1]
            if line[: node.col_offset].strip() == "":
                yield node.lineno - 1, line, f"{line[: node.col_offset]}pass"


TESTS_OF_TRANSFERS = (
    "transfer", "route", "file", "lone", "growth", "transfer_errors", "audit", "engine", "native",
    "native_files", "transfer_cache", "transfer_targets", "stream", "facts", "unsized", "together",
    "reentrancy", "transfer_interrupt", "copy", "aio", "shared_pages", "many", "one_descriptor",
    "nvme", "progress", "safetensors_shards", "sending", "aio_cancel",
)  # fmt: skip
"""The files of tests/unit whose tests run on a changed package, in this order."""

OPTIONS = "-q", "-p", "no:cacheprovider", "--timeout", "60"
"""Of pytest. A test that takes longer has noticed the change."""
LONGEST = 900
"""Seconds in which pytest ends, unless a change leaves a thread that does not."""
TIMEOUT = 120
"""Seconds in which each of the core's tests ends."""
SKIPPED = 77
"""The status of a test that lacks something."""


class Bench:
    """A copy of the core, in which one file at a time is changed."""

    def __init__(self, folder: Path, episodes: int) -> None:
        self.folder = folder / "csrc"
        self.episodes = str(episodes)
        shutil.copytree(ROOT / "csrc", self.folder)
        self.build()

    def build(self, *programs: str) -> bool:
        """Build programs of build/csrc, by default the simulator."""
        targets = [f"../build/csrc/{name}" for name in programs or ["fast/simulate"]]
        made = subprocess.run(["make", "-s", "-C", self.folder, *targets], capture_output=True)
        return made.returncode == 0

    def killed(self, file: str, text: str, tests: bool = False) -> str | None:
        """Return how a changed file was noticed; "" if it was not; None if it does not compile.

        With tests, a change that the simulator did not notice is tried by the core's own tests.
        """
        path = self.folder / file
        before = path.read_text()
        path.write_text(text)
        try:
            if not self.build():
                return None
            run = subprocess.run(
                [
                    self.folder.parent / "build/csrc/fast/simulate",
                    *("--episodes", self.episodes, "--failures", "1", "--shrink", "0"),
                ],
                capture_output=True,
                text=True,
                errors="replace",
            )
            lines = run.stdout.splitlines()
            if run.returncode or not tests:
                return "; ".join(lines[:2]) if run.returncode else ""
            return self._killed_by_tests()
        finally:
            path.write_text(before)

    def _killed_by_tests(self) -> str:
        names = sorted(path.stem for path in (self.folder / "tests").glob("test_*.c"))
        programs = [f"plain/{name}" for name in names]
        if not self.build(*programs):
            raise SystemExit("the core's tests cannot be built: run make -C csrc test")
        for name in programs:
            program = self.folder.parent / "build/csrc" / name
            try:
                run = subprocess.run([program], capture_output=True, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return f"{name} does not end"
            if run.returncode not in (0, SKIPPED):
                return f"{name} fails"
        return ""

    def package_killed(self, fault: Fault) -> str:
        """Return how a fault of the package was noticed; "" if it was not."""
        source = self.folder.parent / "src"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(ROOT / "src", source)
        (source / "dmabuf" / fault.file).write_text(changed(ROOT / "src/dmabuf", fault))
        run = subprocess.run(
            [
                *(sys.executable, "-m", "tests.simulator", "--seconds", "600"),
                *("--episodes", "3000", "--failures", "1"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
        )
        said = re.search(r"^[ |]*[\w.]*(?:Broken|Error|died).*", run.stdout, re.MULTILINE)
        return said[0].strip() if run.returncode and said else ""


class PackageBench:
    """A copy of the package, in which one file at a time is changed."""

    def __init__(self, folder: Path, record: Path) -> None:
        self.source = folder / "src"
        shutil.copytree(ROOT / "src", self.source)
        if not record.exists():
            self._record(folder / "settings", record)
        self._data = CoverageData(str(record))
        self._data.read()

    def _record(self, settings: Path, record: Path) -> None:
        """Run the tests, and record which of them executes which lines."""
        settings.write_text(
            f"[run]\ndata_file = {record}\nsource = {self.source}\nbranch = True\n"
            "dynamic_context = test_function\n"
        )
        # Cached Terms would be made by the first test alone.
        plan = self.source / "dmabuf/transfer/plan.py"
        before = plan.read_text()
        plan.write_text(before.replace("lru_cache(maxsize=256)(Terms)", "Terms"))
        tests = [f"tests/unit/test_{name}.py" for name in TESTS_OF_TRANSFERS]
        run = self._run("coverage", "run", f"--rcfile={settings}", "-m", "pytest", *OPTIONS, *tests)
        plan.write_text(before)
        if run.returncode:
            raise SystemExit(f"the tests fail without a change:\n{run.stdout}{run.stderr}")

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(self.source), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )

    def _tests(self, file: str, line: int) -> list[str]:
        """Return the tests that execute a line; all where it is executed by importing the file."""
        lines = self._data.contexts_by_lineno(self._name(file))
        found = {one.removeprefix("tests.unit.test_") for one in lines.get(line, [""]) if one}
        tests = []
        for name in TESTS_OF_TRANSFERS:
            path = f"tests/unit/test_{name}.py"
            functions = sorted(one.split(".", 1)[1] for one in found if one.split(".")[0] == name)
            tests += [f"{path}::{one}" for one in functions] if found else [path]
        return tests

    def _name(self, file: str) -> str:
        return next(one for one in self._data.measured_files() if one.endswith(f"/src/{file}"))

    def killed(self, file: str, line: int, text: str) -> str | None:
        """Return the test that fails with a changed file; "" if none; None if it is invalid."""
        path = self.source / file
        before = path.read_text()
        try:
            compile(text, file, "exec")
        except SyntaxError:
            return None
        path.write_text(text)
        try:
            run = self._run("pytest", *OPTIONS, "-x", *self._tests(file, line))
        except subprocess.TimeoutExpired:
            return "pytest does not end"
        finally:
            path.write_text(before)
        if "not found: " in run.stderr:
            raise SystemExit(run.stderr)
        failed = [one for one in run.stdout.splitlines() if one.startswith(("FAILED", "ERROR"))]
        return (failed or [f"pytest ends with {run.returncode}"])[0] if run.returncode else ""


def package_changes(bench: PackageBench, files: list[str], sample: int, seed: int) -> int:
    """Try a sample of the small changes of files of the package; print those that survive."""
    every = []
    for file in files:
        text = (ROOT / "src" / file).read_text()
        every += [(file, *one) for one in dict.fromkeys(small_changes_of_python(text))]
    dice = random.Random(seed)
    killed = tried = 0
    for file, number, line, new in dice.sample(every, min(sample, len(every))):
        lines = (ROOT / "src" / file).read_text().splitlines()
        changed_lines = [*lines[:number], new, *lines[number + 1 :]]
        how = bench.killed(file, number + 1, "\n".join(changed_lines) + "\n")
        if how is None:
            continue
        tried, killed = tried + 1, killed + bool(how)
        print(
            f"{'killed  ' if how else 'SURVIVES'} {file}:{number + 1}: {line.strip()}\n"
            f"         {new.strip()}   {how}",
            flush=True,
        )
    print(f"{killed} of {tried} changes noticed, of {len(every)} that there are")
    return 0


def faults(bench: Bench) -> int:
    """Put in every fault, one at a time; return how many were missed."""
    missed = 0
    for fault in FAULTS:
        text = changed(ROOT / "csrc", fault)
        missed += told(fault, bench.killed(fault.file, text))
    for fault in PACKAGE_FAULTS:
        missed += told(fault, bench.package_killed(fault))
    count = len(FAULTS) + len(PACKAGE_FAULTS)
    print(f"{count - missed} of {count} faults found")
    return missed


def changed(folder: Path, fault: Fault) -> str:
    text = (folder / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its place in {fault.file} has changed")
    return text.replace(fault.old, fault.new)


def told(fault: Fault, how: str | None) -> bool:
    print(f"{'found ' if how else 'MISSED'}  {fault.name}: {how}", flush=True)
    return not how


def changes(bench: Bench, file: str, first: int) -> int:
    text = (ROOT / "csrc" / file).read_text()
    lines = text.splitlines()
    killed = by_tests = survived = 0
    for number, line, new in small_changes(text):
        if number + 1 < first:
            continue
        all_lines = [*lines[:number], new, *lines[number + 1 :]]
        how = bench.killed(file, "\n".join(all_lines) + "\n", tests=True)
        if how is None:
            continue
        killed, survived = killed + bool(how), survived + (not how)
        by_tests += how.startswith("plain/")
        if not how:
            print(
                f"{file}:{number + 1}: {line.strip()}\n    {new.strip() or 'left out'}", flush=True
            )
    print(f"{file}: {killed} of {killed + survived} changes noticed, {by_tests} of them by tests")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("files", nargs="*", help="of csrc, such as batch.c")
    parser.add_argument(
        "--episodes", type=int, default=40_000, help="of each of two processes, for each (40000)"
    )
    parser.add_argument("--sample", type=int, default=50, help="of the package's changes (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--record", type=Path, help="of which test executes which line")
    parser.add_argument("--from-line", type=int, default=1, help="of a file of csrc (1)")
    options = parser.parse_args()
    of_package = [str(Path(one).resolve().relative_to(ROOT / "src")) for one in options.files
                  if one.endswith(".py")]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dmabuf-mutants-", dir="/var/tmp") as folder:
        if of_package:
            bench = PackageBench(Path(folder), options.record or Path(folder) / "record")
            return package_changes(bench, of_package, options.sample, options.seed)
        bench = Bench(Path(folder), options.episodes)
        if not options.files:
            return faults(bench)
        first = options.from_line
        return sum(changes(bench, Path(file).name, first) for file in options.files)


if __name__ == "__main__":
    sys.exit(main())
