"""The inspection room: programs that look at a machine, a path or a route and report.

It has the doctor (`examine_machine`, `examine_path`: what works here, and why something does not),
the census (`take_census`: every dma-buf on the machine and who holds it), `verify_routes` (whether
bytes arrive) and `measure_routes` (how fast each route is beside what people use today). What
enters here reads facts or measures through the public API. No transfer depends on it, and printing
belongs to cli/.

    >>> from dmabuf.inspect import take_census
    >>> for process, total in take_census().by_process().items():
    ...     print(process, total.nbytes)
"""

TYPE_CHECKING = False  # typing's own, without what importing typing costs
if TYPE_CHECKING:
    from dmabuf.inspect.answer import Answer
    from dmabuf.inspect.bench import (
        PERCENTILES,
        Facts,
        Group,
        Ratio,
        Result,
        Row,
        Sample,
        measure_routes,
    )
    from dmabuf.inspect.bench_chart import CHART_FORMATS, draw_chart, load_matplotlib
    from dmabuf.inspect.bench_ways import TODAY
    from dmabuf.inspect.census import (
        Census,
        Holder,
        Mapping,
        Process,
        SystemBuffer,
        Total,
        take_census,
    )
    from dmabuf.inspect.doctor import Machine, Outlook, PathReport, examine_machine, examine_path
    from dmabuf.inspect.verify import (
        Case,
        Failure,
        Report,
        Tally,
        reproducer,
        verify_routes,
    )

__all__ = [
    "CHART_FORMATS", "PERCENTILES", "TODAY", "Answer", "Case", "Census", "Facts", "Failure",
    "Group", "Holder", "Machine", "Mapping", "Outlook", "PathReport", "Process", "Ratio", "Report",
    "Result", "Row", "Sample", "SystemBuffer", "Tally", "Total", "draw_chart", "examine_machine",
    "examine_path", "load_matplotlib", "measure_routes", "reproducer", "take_census",
    "verify_routes",
]  # fmt: skip

if not TYPE_CHECKING:
    _HOMES = {
        "answer": "Answer",
        "bench": "PERCENTILES Facts Group Ratio Result Row Sample measure_routes",
        "bench_chart": "CHART_FORMATS draw_chart load_matplotlib",
        "bench_ways": "TODAY",
        "census": "Census Holder Mapping Process SystemBuffer Total take_census",
        "doctor": "Machine Outlook PathReport examine_machine examine_path",
        "verify": "Case Failure Report Tally reproducer verify_routes",
    }

    def __getattr__(name):
        """Import a public name when it is first used (PEP 562): each part needs other modules."""
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names.split():
                value = getattr(import_module(f"{__name__}.{home}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
