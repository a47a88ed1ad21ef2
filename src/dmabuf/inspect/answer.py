"""Answer: one line of the doctor's report."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One thing that a machine or file supports or not."""

    name: str
    ok: bool
    detail: str
    """What was found, or why it is not available."""
    fix: str | None = None
    """What would make it available, if anything would."""
