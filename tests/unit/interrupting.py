"""Python code of others at every point where the interpreter may run it: signal handlers.

The points are the starts of functions, jumps backwards, and returns of calls (ceval.c).
"""

import contextlib
import dis
import sys
from collections.abc import Callable, Container
from pathlib import Path
from types import ModuleType

import dmabuf


class Points:
    """Calls `action` at those of the points whose numbers, counted from 1, are in `numbers`.

    Counts the points of this thread in the package and in contextlib, or in some modules only.
    """

    def __init__(
        self, numbers: Container[int], action: Callable[[], object], *modules: ModuleType
    ) -> None:
        package = str(Path(dmabuf.__file__).parent)
        files = {module.__file__ for module in modules}
        self._prefixes = tuple(files) if files else (package, contextlib.__file__)
        self._numbers, self._action = numbers, action
        self.seen, self._after_call = 0, False

    def __enter__(self) -> "Points":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self._prefixes):
            return None
        frame.f_trace_opcodes = True
        return self._opcode

    def _opcode(self, frame, event, argument):
        if event != "opcode":
            return self._opcode
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        point = self._after_call or name.startswith(("RESUME", "JUMP_BACKWARD"))
        self._after_call = name.startswith("CALL")
        if point:
            self.seen += 1
            if self.seen in self._numbers:
                self._action()
        return self._opcode


class Interruptions(Points):
    """Raises KeyboardInterrupt at those points, as Ctrl-C may."""

    def __init__(self, numbers: Container[int], *modules: ModuleType) -> None:
        super().__init__(numbers, self._raise, *modules)

    def _raise(self) -> None:
        raise KeyboardInterrupt
