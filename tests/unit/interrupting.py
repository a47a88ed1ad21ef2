"""KeyboardInterrupt at every point where the interpreter may answer a signal."""

import dis
import sys
from types import ModuleType


class Interruptions:
    """Raises KeyboardInterrupt at those of the points, counted from 1, in the modules' own code.

    The points are the starts of functions, jumps backwards, and returns of calls (ceval.c).
    """

    def __init__(self, numbers, *modules: ModuleType) -> None:
        self._files = {module.__file__ for module in modules}
        self._numbers, self.seen, self._after_call = numbers, 0, False

    def __enter__(self) -> "Interruptions":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files:
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
                raise KeyboardInterrupt
        return self._opcode
