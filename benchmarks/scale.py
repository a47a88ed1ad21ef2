"""Simulate workers that load one model from a few storage nodes: discrete events, no network.

    python benchmarks/scale.py --hosts 125 --workers 8 --nodes 8 --model 16

The model is cut into parts. A part occupies each link on its way for its size divided by the link's
rate, one part after the other: the storage node's disk if the file is cold, the node's link, the
links of racks, the host's link. A reader of several nodes has one request under way at each, as
`dmabuf.remote` does, and asks a node that has answered for the next part. So ranges spread by
themselves. A reader of one source has four under way, which stands for a stream.

A node or host that dies loses the parts that it was sending. The readers notice at once where the
process was killed, which resets the connection, and after the deadline where the machine was. Then
they ask another source, in the end a storage node, for those parts.

The default rates are figures of docs/benchmarks/models-and-nodes.md and performance.md: what one
connection moved on two processors, and reads of a disk. The sizes of the cluster are yours to give.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial

STREAM = 4
"""Requests under way over the only connection of a reader."""


@dataclass(frozen=True)
class Settings:
    """What is simulated. Sizes are in GB (1e9 bytes), rates in GB/s, times in seconds."""

    hosts: int = 125
    workers: int = 8
    """Processes of a host that read the model; 1 if all share one copy."""
    nodes: int = 8
    model: float = 16.0
    part: float = 0.0625
    node_rate: float = 3.2
    """The most that a storage node sends: its link's rate, or that of its processors."""
    disk_rate: float = 0.0
    """The most that it reads from its disk; 0 for a file in its page cache."""
    host_rate: float = 3.2
    """The most that a host receives, and the most that it sends."""
    rack: int = 4
    """Hosts in a rack. Storage nodes are in none."""
    uplink: float = 6.4
    """The most that enters a rack, and the most that leaves it."""
    setup: float = 0.01
    """From connect() until the first byte."""
    spread: bool = True
    """Whether a reader reads from all storage nodes, or from one."""
    fan_out: int = 0
    """The readers to which each passes the model on; 0 if all read from the nodes."""
    whole: bool = False
    """Whether it passes nothing on before it has all of the model."""
    dies: str = ""
    """"node" or "reader": the first of them dies."""
    dies_at: float = 0.0
    deadline: float = 30.0
    """Until a silent end counts as dead; 0 for a process that was killed."""


@dataclass
class Link:
    """A link in one direction: it carries one part after the other."""

    name: str
    rate: float
    free_at: float = 0.0
    carried: float = 0.0


@dataclass(frozen=True)
class Passage:
    """A part on a link."""

    link: Link
    begin: float
    end: float
    size: float


@dataclass
class End:
    """A storage node or a reader: what it has, and who waits for it."""

    number: int
    out: list[Link]
    """The links that its bytes take out of its host, or out of the storage node."""
    up: list[Link]
    """The link out of its rack."""
    down: list[Link]
    """The link into its rack; empty for a storage node."""
    into: list[Link]
    """The link into its host."""
    offers: set[int] = field(default_factory=set)
    """The parts that it sends if it is asked."""
    waiting: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    """Requests for the other parts."""
    clients: list[Connection] = field(default_factory=list)
    alive: bool = True


@dataclass
class Connection:
    """A reader's connection to an end that it reads from."""

    reader: End
    source: End
    way: list[Link]
    window: int
    """Requests under way, at most."""
    under_way: set[int] = field(default_factory=set)
    lost: bool = False
    """Whether the reader knows that the source is dead."""


class Simulation:
    """One run of the events, until each reader that lives has the model."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.passages: list[Passage] | None = None
        """What every link carried, if it is a list."""
        self.received: dict[int, list[int]] = {}
        """The parts that each reader received, in order."""
        self.finished: dict[int, float] = {}
        """When each reader had all parts."""
        self.sizes = _cut(settings.model, settings.part)
        """The size of each part."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.nodes = [self._node(number) for number in range(settings.nodes)]
        self.readers = list(self._readers())
        self._wanted = [deque(range(len(self.sizes))) for _ in self.readers]
        self._connections: list[list[Connection]] = [[] for _ in self.readers]
        for reader in self.readers:
            sources = self._sources(reader.number)
            for source in sources:
                self._connect(reader, source, 1 if len(sources) > 1 else STREAM)
        if settings.dies:
            victim = (self.nodes if settings.dies == "node" else self.readers)[0]
            self._at(settings.dies_at, partial(self._die, victim))

    # -- what there is

    def _node(self, number: int) -> End:
        settings = self.settings
        disk = [Link(f"disk {number}", settings.disk_rate)] if settings.disk_rate else []
        out = [*disk, Link(f"node {number}", settings.node_rate)]
        return End(number, out, [], [], [], set(range(len(self.sizes))))

    def _readers(self) -> Iterator[End]:
        settings = self.settings
        for host in range(settings.hosts):
            if host % settings.rack == 0:
                up, down = (Link(f"rack {host} {way}", settings.uplink) for way in ("up", "down"))
            out, into = (Link(f"host {host} {way}", settings.host_rate) for way in ("out", "in"))
            for worker in range(settings.workers):
                number = host * settings.workers + worker
                self.received[number] = []
                yield End(number, [out], [up], [down], [into])

    def _sources(self, number: int) -> list[End]:
        """Return what a reader reads from."""
        nodes, fan_out = self.nodes, self.settings.fan_out
        place = number % -(-len(self.readers) // len(nodes))  # in its tree; a tree for each node
        if fan_out and place:
            return [self.readers[number - place + (place - 1) // fan_out]]
        first = number % len(nodes)
        return [*nodes[first:], *nodes[:first]] if self.settings.spread else [nodes[first]]

    def _connect(self, reader: End, source: End, window: int) -> None:
        crossing = [] if source.down and source.down == reader.down else source.up + reader.down
        made = Connection(reader, source, source.out + crossing + reader.into, window)
        source.clients.append(made)
        self._connections[reader.number].append(made)
        self._at(self.now + self.settings.setup, partial(self._ask, made))

    # -- events

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def run(self) -> float:
        """Return when the last reader that lives had the model."""
        missing = len(self.readers)
        while missing:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if self.settings.dies or len(self.finished) == len(self.readers):
                living = (reader.number for reader in self.readers if reader.alive)
                missing = sum(number not in self.finished for number in living)
        return max(self.finished[one.number] for one in self.readers if one.alive)

    def _ask(self, connection: Connection) -> None:
        """Ask for the next parts, as far as the connection has room."""
        wanted = self._wanted[connection.reader.number]
        while wanted and len(connection.under_way) < connection.window and not connection.lost:
            part, source = wanted.popleft(), connection.source
            connection.under_way.add(part)
            send = partial(self._hop, connection, part, 0)
            if part in source.offers:
                send()
            elif source.alive:
                source.waiting.setdefault(part, []).append(send)

    def _hop(self, connection: Connection, part: int, index: int) -> None:
        """Have a part take its next link, after those that wait for it already."""
        if index == len(connection.way):
            self._arrive(connection, part)
            return
        link = connection.way[index]
        begin = max(self.now, link.free_at)
        link.free_at = begin + self.sizes[part] / link.rate
        self._at(link.free_at, partial(self._pass, connection, part, index, begin))

    def _pass(self, connection: Connection, part: int, index: int, begin: float) -> None:
        """Have a part leave a link; what a dead end had not yet sent is lost."""
        if index < len(connection.source.out) and not connection.source.alive:
            return
        link, size = connection.way[index], self.sizes[part]
        link.carried += size
        if self.passages is not None:
            self.passages.append(Passage(link, begin, self.now, size))
        if connection.reader.alive:
            self._hop(connection, part, index + 1)

    def _arrive(self, connection: Connection, part: int) -> None:
        reader = connection.reader
        if part not in connection.under_way:
            return  # it comes so late that another source was asked
        connection.under_way.discard(part)
        received = self.received[reader.number]
        received.append(part)
        if len(received) == len(self.sizes):
            self.finished[reader.number] = self.now
        if not self.settings.whole or len(received) == len(self.sizes):
            for one in received if self.settings.whole else [part]:
                reader.offers.add(one)
                for send in reader.waiting.pop(one, ()):
                    send()
        self._ask(connection)

    def _die(self, victim: End) -> None:
        victim.alive = False
        victim.waiting.clear()
        for connection in victim.clients:
            self._at(self.now + self.settings.deadline, partial(self._notice, connection))

    def _notice(self, connection: Connection) -> None:
        """Ask others for what a dead end owed: the other connections, or a storage node."""
        connection.lost = True
        number = connection.reader.number
        self._wanted[number].extendleft(sorted(connection.under_way, reverse=True))
        connection.under_way.clear()
        others = [one for one in self._connections[number] if not one.lost]
        if not others:
            living = [node for node in self.nodes if node.alive]
            self._connect(connection.reader, living[number % len(living)], STREAM)
        for one in others:
            self._ask(one)


def _cut(model: float, part: float) -> list[float]:
    """Return the sizes of the parts; the last one is the rest."""
    count = max(1, -int(-model // part))
    return [part] * (count - 1) + [model - part * (count - 1)]


# -- the command line


def variants(base: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield what is compared, each with its title."""
    shared = replace(base, workers=1)
    chain = replace(shared, fan_out=1)
    yield "each worker reads from one node", replace(base, spread=False)
    yield "each worker reads from all nodes", base
    yield "one reader a host, `shared=True`", shared
    yield "the same, files not in the page cache", replace(shared, disk_rate=1.58)
    yield "each host passes on to 1 other", chain
    yield "to 2 others", replace(shared, fan_out=2)
    yield "to 2 others, once it has all", replace(shared, fan_out=2, whole=True)
    for dies, title, settings in (
        ("node", "one reader a host", shared),
        ("reader", "chain", chain),
    ):
        half = Simulation(settings).run() / 2
        for deadline, how in (
            (0.0, "is killed"),
            (30.0, "is silent, 30 s"),
            (2.0, "is silent, 2 s"),
        ):
            failing = replace(settings, dies=dies, dies_at=half, deadline=deadline)
            yield f"{title}: a {'host' if dies == 'reader' else 'node'} {how}", failing


def describe(title: str, settings: Settings) -> str:
    """Return a row of the table."""
    simulation = Simulation(settings)
    last = simulation.run()
    ends = sorted(simulation.finished.values())
    sent = sum(node.out[-1].carried for node in simulation.nodes)
    return f"| {title} | {ends[len(ends) // 2]:,.1f} s | {last:,.1f} s | {sent:,.0f} GB |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for one in fields(Settings):
        if one.type in ("int", "float") and one.name not in ("fan_out", "dies_at", "deadline"):
            kind = int if one.type == "int" else float
            parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default)
    base = Settings(**vars(parser.parse_args()))
    print("| how | half of them | the last | sent by the nodes |")
    print("| --- | --- | --- | --- |")
    for title, settings in variants(base):
        print(describe(title, settings), flush=True)


if __name__ == "__main__":
    main()
