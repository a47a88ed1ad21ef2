"""Python code of others at every point where the interpreter may run it: signal handlers.

The points are the starts of functions, jumps backwards, and returns of calls (ceval.c).
"""

import contextlib
import dis
import sys
import threading
from collections.abc import Callable, Container
from pathlib import Path
from types import ModuleType

import dmabuf

MONITORING = getattr(sys, "monitoring", None)
"""Python 3.12 and later: their settrace loses instructions, and crashes beside other threads."""


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
        self._thread, self._inside = threading.get_ident(), False
        if MONITORING is None:
            self._before = sys.gettrace()
            sys.settrace(self._call)
            return self
        self._tool = next(tool for tool in range(6) if MONITORING.get_tool(tool) is None)
        MONITORING.use_tool_id(self._tool, "points")
        event = MONITORING.events.INSTRUCTION
        MONITORING.register_callback(self._tool, event, self._instruction)
        MONITORING.set_events(self._tool, event)
        return self

    def __exit__(self, *exc: object) -> None:
        if MONITORING is None:
            sys.settrace(self._before)
        else:
            MONITORING.set_events(self._tool, 0)
            MONITORING.free_tool_id(self._tool)
            MONITORING.restart_events()

    def _instruction(self, code, offset):
        if not code.co_filename.startswith(self._prefixes):
            return MONITORING.DISABLE
        if threading.get_ident() == self._thread and not self._inside:
            self._inside = True
            try:
                self._at(code, offset)
            finally:
                self._inside = False
        return None

    def _call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self._prefixes):
            return None
        frame.f_trace_opcodes = True
        return self._opcode

    def _opcode(self, frame, event, argument):
        if event == "opcode":
            self._at(frame.f_code, frame.f_lasti)
        return self._opcode

    def _at(self, code, offset):
        name = dis.opname[code.co_code[offset]]
        # A handler of exceptions follows a call that has raised: no signal handler runs in between.
        after_call = self._after_call and name != "PUSH_EXC_INFO"
        point = after_call or name.startswith(("RESUME", "JUMP_BACKWARD"))
        self._after_call = name.startswith("CALL")
        if point:
            self.seen += 1
            if self.seen in self._numbers:
                self._action()


class Interruptions(Points):
    """Raises KeyboardInterrupt at those points, as Ctrl-C may."""

    def __init__(self, numbers: Container[int], *modules: ModuleType) -> None:
        super().__init__(numbers, self._raise, *modules)

    def _raise(self) -> None:
        raise KeyboardInterrupt
