"""What samples come to: medians, spreads, percentiles, and the sentence."""

import pytest

from dmabuf.bench.figures import Group, Row, Sample, best, headline, percentile, percentiles
from dmabuf.cli._bench_table import duration

MIB = 1 << 20


def row(way, *seconds, depth=1, cpu=0.25, after=0):
    return Row(way, depth, samples=[Sample(one, cpu, 0, after) for one in seconds])


def group(*rows, direction="read"):
    return Group(direction, MIB, nbytes=64 * MIB, rows=list(rows))


def test_percentiles_by_nearest_rank():
    ordered = [float(one) for one in range(1, 1001)]
    assert percentiles(reversed(ordered)) == {"p50": 500, "p99": 990, "p99.9": 999, "p100": 1000}
    assert percentile([1.0, 2.0, 3.0], 500) == 2.0


def test_too_few_calls_tell_no_percentile():
    hundred = percentiles([float(one) for one in range(1, 101)])
    assert hundred == {"p50": 50, "p99": 99, "p99.9": None, "p100": 100}
    assert percentiles([7.0]) == {"p50": None, "p99": None, "p99.9": None, "p100": 7}
    assert set(percentiles([]).values()) == {None}


def test_ratios_are_of_the_same_round():
    """The machine was slow in the second round, for both of them."""
    copy, direct = row("copy", 2.0, 20.0, 4.0), row("direct", 1.0, 5.0, 3.0)
    one = group(direct, copy)
    assert one.base is copy
    assert one.sooner(direct, copy) == (0.5, 0.25, 0.75)
    assert one.sooner(direct, None) is None
    assert one.speed(copy) == 64 * MIB / 4.0
    assert one.cpu(copy) == 0.25 * 16


def test_the_headline():
    one = group(
        row("staged", 1.0, depth=32),
        row("direct", 1.0, 1.1),
        row("direct", 0.9, 0.7, depth=32),
        row("copy", 2.0, 2.0),
        row("bounce", 1.5, 1.5),
        row("mmap", 0.5, 0.5),
    )
    assert best(one).depth == 32
    assert headline(one, cold=True) == (
        "direct has the bytes in the buffer 60% sooner than by a cold buffered read and copy (55% "
        "to 65% over 2 rounds; 47% sooner than by O_DIRECT into a bounce and copy; 60% later than "
        "by mmap and copy): 1 MiB blocks, 32 in flight"
    )
    assert "than by a buffered read and copy" in headline(one, cold=False)
    written = group(row("buffered", 1.0), row("copy", 2.0), direction="write")
    assert headline(written, cold=True).startswith(
        "buffered has the bytes on the medium 50% sooner than by a copy and buffered write"
    )
    assert headline(group(row("copy", 1.0)), cold=True) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000412, "41.2 us"), (0.00123, "1.23 ms"), (0.99949, "999 ms"), (0.9996, "1 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
