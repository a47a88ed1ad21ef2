"""Run requests of one size by read_segments or write_segments, as a process.

The Measure is an argument in JSON: `python benchmarks/ours.py TARGET '{"name": ...}'`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from array import array

from common import GIB, MIB, Process, run


@dataclasses.dataclass(frozen=True)
class Measure:
    """The work of both sides: `total` bytes in requests of `block`, `depth` of them in flight.

    They are within the first `span` bytes of the target, in `footprint` bytes of memory.
    """

    name: str
    write: bool
    rand: bool
    block: int
    depth: int
    total: int
    footprint: int = 0
    span: int = GIB
    huge_pages: bool = False

    @property
    def window(self) -> int:
        """Bytes of memory that the requests reuse."""
        return self.footprint or self.block * self.depth

    def idle(self) -> Measure:
        """Return the measure without requests: the remaining cost of a process."""
        return dataclasses.replace(self, total=0)

    def segments(self) -> array[int]:
        """Return one round of requests, as an array for read_segments."""
        count = self.span // self.block
        places = range(count)
        order = random.Random(1).choices(places, k=count) if self.rand else places
        slots = self.window // self.block
        segments = array("Q")
        for i, place in enumerate(order):
            segments.extend((place * self.block, i % slots * self.block, self.block))
        return segments


@dataclasses.dataclass(frozen=True)
class Run:
    """The speed of one process in bytes a second, and its whole cost."""

    speed: float
    process: Process
    route: str = ""


def run_ours(target: str, measure: Measure) -> Run:
    """Run one process of dmabuf."""
    process = run([sys.executable, __file__, target, json.dumps(dataclasses.asdict(measure))])
    answer = json.loads(process.output)
    return Run(answer["speed"], process, answer["route"])


def worker(target: str, measure: Measure) -> None:
    """Run the requests of a measure; print bytes a second."""
    import dmabuf

    engine = dmabuf.Engine(queue_depth=measure.depth, block_size=measure.block)
    with dmabuf.allocate(measure.window, huge_pages=measure.huge_pages) as buffer:
        if measure.write:
            buffer.pwrite(random.Random(2).randbytes(min(buffer.size, 64 * MIB)), 0)
        with dmabuf.open(target, "r+", force=True, engine=engine) as file:
            move = file.write_segments if measure.write else file.read_segments
            segments = measure.segments()
            # The first access and the pinning, as in the setup of fio.
            transfer = move(buffer, segments[: 3 * measure.depth])
            done, seconds = 0, 0.0
            while done < measure.total:
                transfer = move(buffer, segments)
                done += transfer.nbytes
                seconds += transfer.seconds
            speed = done / seconds if done else 0
            json.dump({"speed": speed, "route": transfer.route}, sys.stdout)


if __name__ == "__main__":
    worker(sys.argv[1], Measure(**json.loads(sys.argv[2])))
