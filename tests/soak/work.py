"""The soak's transfers: each random, each against the models, each counted by its kind."""

import contextlib
import os
import random
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dmabuf
from dmabuf import RouteUnavailable
from tests.soak.awaited import at_once
from tests.soak.copies import copy
from tests.soak.failing import failing, refused
from tests.soak.world import BLOCK, LIMIT, Emulating, Memory, Target, exporters, noise, targets

BUFFERS = 5
"""How many are open at a time."""


class Soak:
    """Targets, memories, and random transfers between them, all from one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.routes: Counter[str] = Counter()
        self.exporters = exporters()
        self.engines: list[dmabuf.Engine | None] = []
        self.memories: list[Memory] = []
        self.closed = dmabuf.allocate(BLOCK, exporter="memfd")
        self.closed.close()
        with contextlib.ExitStack() as stack:
            self.targets = stack.enter_context(targets(folder, self.dice))
            stack.callback(self.close_engines)
            stack.callback(self.close_memories)
            self.new_engines()
            for _ in range(BUFFERS):
                self.new_memory()
            self.stack = stack.pop_all()

    def __enter__(self) -> "Soak":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def check(self) -> None:
        """Compare every byte of all targets, as the medium has it, and of all memories."""
        for memory in self.memories:
            memory.check("all of it")
        for target in self.targets:
            target.check("all of it", deep=True)

    def close_memories(self) -> None:
        for memory in self.memories:
            memory.close()

    # -- what there is

    def new_engines(self) -> int:
        """Return an engine of this thread, two of threads, and None for the default engine."""
        self.close_engines()
        depth, block = self.dice.choice([1, 4, 32]), self.dice.choice([4096, 16384, 1 << 20])
        self.engines = [
            None,
            dmabuf.Engine(queue_depth=depth, block_size=block),
            dmabuf.Engine(queue_depth=4, block_size="16KiB", backend="threads"),
            Emulating(queue_depth=4, block_size="16KiB", backend="threads"),
        ]
        return 0

    def close_engines(self) -> None:
        for target in self.targets:
            if target.file is not None:
                target.file.close()
                target.file = None
        for engine in filter(None, self.engines):
            engine.close()

    def new_memory(self) -> None:
        """Make a Buffer of a random exporter and size, or from a descriptor of an existing one."""
        kind = self.dice.choice(list(self.exporters))
        dma_bufs = [memory for memory in self.memories if memory.buffer.is_dmabuf]
        if dma_bufs and self.dice.random() < 0.2:
            first = self.dice.choice(dma_bufs)
            buffer = dmabuf.from_fd(first.buffer)
            self.memories.append(Memory("from_fd", buffer, first.model, buffer.close))
            return
        size = BLOCK * self.dice.choice([1, 2, 16, 33, 64, 128])
        with contextlib.ExitStack() as stack:
            buffer = stack.enter_context(self.exporters[kind](size))  # type: ignore[arg-type]
            memory = Memory(kind, buffer, bytearray(buffer.size), stack.pop_all().close)
        memory.check("allocating it")
        self.memories.append(memory)

    def swap_memory(self) -> int:
        """Close a Buffer and make another."""
        memory = self.memories.pop(self.dice.randrange(len(self.memories)))
        memory.check("much")
        memory.close()
        self.new_memory()
        return 0

    def file(self, target: Target) -> dmabuf.File:
        """Return a target, which is opened again at times by a random engine."""
        if target.file is None or self.dice.random() < 0.02:
            if target.file is not None:
                target.file.close()
            engine = self.dice.choice(self.engines)
            by = os.dup(target.fd) if self.dice.random() < 0.2 and not target.disk else None
            target.file = dmabuf.open(by if by is not None else target.path, "r+", engine=engine)
            if by is not None:
                os.close(by)
        return target.file

    def emulated(self, target: Target) -> bool:
        """Return whether native may have been tried first, which leaves the poison of an audit."""
        return target.file is not None and isinstance(target.file.target.engine, Emulating)

    # -- ranges

    def near(self, top: int) -> int:
        """Return a number up to `top`, often a round one."""
        unit = self.dice.choice([1, 512, BLOCK, BLOCK, 65536])
        number = self.dice.randint(0, top) // unit * unit + self.dice.choice([0, 0, 0, 0, 1, 3])
        return min(number, top)

    def place(self, target: Target, memory: Memory, top: int) -> tuple[int, int, int]:
        """Return (file offset, buffer offset, size) within `top` bytes of the target."""
        offset, start = self.near(top), self.near(memory.size - 1)
        if self.dice.random() < 0.6:  # something can go straight
            start = min(start // BLOCK * BLOCK + offset % BLOCK, memory.size - 1)
        size = min(int(2 ** self.dice.uniform(0, 19)), top - offset, memory.size - start)
        return offset, start, size if self.dice.random() < 0.5 else size // BLOCK * BLOCK

    def place_write(self, target: Target, memory: Memory) -> tuple[int, int, int]:
        offset, start, size = self.place(target, memory, LIMIT)
        if target.block > 1:
            offset -= offset % target.block
            size -= size % target.block
        return offset, start, size

    def how(self) -> dict[str, Any]:
        """Return keywords that change the route of a transfer but not its result."""
        dice = self.dice.random()
        if dice < 0.4:
            return {}
        if dice < 0.6:
            return {"route": self.dice.choice(["native", "direct", "staged", "buffered"])}
        if dice < 0.75:
            return {"require": self.dice.choice(["zero-copy", "uncached"])}
        return {"audit": self.dice.choice(["always", "off"])}

    # -- transfers

    def one(self, kind: str) -> int:
        """Run one kind of work; return the number of transfers."""
        number = KINDS[kind][1](self)
        number = 1 if number is None else number
        self.counts[kind] += number
        return number

    def pick(self) -> tuple[Target, Memory]:
        return self.dice.choice(self.targets), self.dice.choice(self.memories)

    def carry(self, call: Callable[..., dmabuf.Transfer], *given: Any, **how: Any) -> int | None:
        """Transfer; return the number of bytes, or None if no permitted route is possible."""
        try:
            done = call(*given, **how)
        except RouteUnavailable:
            assert "route" in how or "require" in how or how.get("audit") == "always"
            self.counts["no route"] += 1
            return None
        self.count_route(done)
        return done.nbytes

    def count_route(self, done: dmabuf.Transfer, *, awaited: bool = False) -> None:
        """Count a transfer by its route; a lone small request is counted as lone."""
        by = "lone" if "one small request" in done.registration else done.route.value
        self.routes[f"awaited {by}" if awaited else by] += 1

    def read(self) -> None:
        target, memory = self.pick()
        top = len(target.model) + (1000 if target.ends else 0)
        offset, start, size = self.place(target, memory, top)
        memory.put(noise(self.dice, size), start)
        how = self.how() | self.dice.choice([{}, {}, {"prefer": "fastest"}, {"timeout": 5.0}])
        where = {"file_offset": offset, "buffer_offset": start}
        got = self.carry(self.file(target).read_into, memory.buffer, size, **where, **how)
        if got is not None:
            there = target.model[offset : offset + size]
            assert got == len(there)
            memory.model[start : start + got] = there
        elif self.emulated(target):
            memory.put(noise(self.dice, size), start)
        memory.check((target.name, size, where, how))

    def write(self) -> None:
        target, memory = self.pick()
        offset, start, size = self.place_write(target, memory)
        memory.put(data := noise(self.dice, size), start)
        how = self.how() | {"sync": self.dice.random() < 0.05}
        where = {"file_offset": offset, "buffer_offset": start}
        call = self.file(target).write_from
        if self.carry(call, memory.buffer, size, **where, **how) is not None:
            target.put(data, offset)
        what = target.name, size, where, how
        target.check(what, offset, size, deep=self.dice.random() < 0.02)
        memory.check(what)

    def small(self) -> int:
        """Read and write up to 16 single blocks, which may take the fast path."""
        target, memory = self.pick()
        there, here = len(target.model) // BLOCK, memory.size // BLOCK
        count = self.dice.randint(1, 16) if there else 0
        file = self.file(target)
        memory.put(noise(self.dice, memory.size), 0)
        for _ in range(count):
            offset, start = self.dice.randrange(there) * BLOCK, self.dice.randrange(here) * BLOCK
            where = {"file_offset": offset, "buffer_offset": start}
            if self.dice.random() < 0.5:
                done = file.read_into(memory.buffer, BLOCK, **where)
                memory.model[start : start + BLOCK] = target.model[offset : offset + BLOCK]
            else:
                done = file.write_from(memory.buffer, BLOCK, **where)
                target.put(memory.model[start : start + BLOCK], offset)
            assert done.nbytes == BLOCK
            self.count_route(done)
        target.check("small requests")
        memory.check("small requests")
        return count

    def places(self, target: Target, memory: Memory) -> list[tuple[int, int, int]]:
        """Transfer ranges that overlap neither in the target nor in the memory."""
        most = min(LIMIT, memory.size) // 16 // BLOCK * BLOCK or 512
        count = min(memory.size // most, len(target.model) // most, 16)
        spots = self.dice.sample(range(len(target.model) // most), count)
        whole = target.block > 1 or self.dice.random() < 0.5
        sizes = [most if whole else self.dice.randint(0, most) for _ in spots]
        odd = 0 if whole else self.dice.choice([0, 0, 1, 4, 512])
        places = [
            (at * most, number * most + odd, max(0, size - odd))
            for number, (at, size) in enumerate(zip(spots, sizes, strict=True))
        ]
        return [] if target.block > 1 and most % target.block else places

    def read_segments(self) -> None:
        target, memory = self.pick()
        places = self.places(target, memory)
        memory.put(noise(self.dice, memory.size), 0)
        segments, how = array("Q", (n for place in places for n in place)), self.how()
        if self.carry(self.file(target).read_segments, memory.buffer, segments, **how) is not None:
            for offset, start, size in places:
                memory.model[start : start + size] = target.model[offset : offset + size]
        elif self.emulated(target):
            for _, start, size in places:
                memory.put(noise(self.dice, size), start)
        memory.check((target.name, places, how))

    def write_segments(self) -> None:
        target, memory = self.pick()
        places = self.places(target, memory)
        memory.put(noise(self.dice, memory.size), 0)
        segments, how = array("Q", (n for place in places for n in place)), self.how()
        if self.carry(self.file(target).write_segments, memory.buffer, segments, **how) is not None:
            for offset, start, size in places:
                target.put(memory.model[start : start + size], offset)
        target.check((target.name, places, how))
        memory.check((target.name, places, how))

    def in_a_thread(self) -> int:
        """Transfer from another thread, by the default engine or by an engine of that thread."""
        target, memory = self.pick()
        size = min(memory.size, LIMIT // 2)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with dmabuf.open(target.path, "r+") as file:
                    file.write_from(memory.buffer, size)
                    file.read_into(memory.buffer, size, file_offset=LIMIT // 2)
            except BaseException as error:
                errors.append(error)

        if target.grows:
            target.put(bytes(max(0, LIMIT - len(target.model))), len(target.model))
            os.ftruncate(target.fd, len(target.model))
        memory.put(data := noise(self.dice, memory.size), 0)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not errors, errors
        target.put(data[:size], 0)
        memory.model[:size] = target.model[LIMIT // 2 : LIMIT // 2 + size]
        target.check("a thread's write", 0, size)
        memory.check("a thread's read")
        return 2

    def stream(self) -> None:
        """Transfer between a buffer and a pipe or a pair of sockets."""
        memory = self.dice.choice(self.memories)
        start = self.near(memory.size - 1)
        size = min(self.near(60000), memory.size - start)
        memory.put(data := noise(self.dice, size), start)
        if self.dice.random() < 0.5:
            ends = os.pipe()
        else:
            ends = tuple(end.detach() for end in socket.socketpair())[:2]  # type: ignore[assignment]
        try:
            if self.dice.random() < 0.5:
                with dmabuf.open(ends[1], "w") as file:
                    file.write_from(memory.buffer, size, buffer_offset=start)
                got = b""
                while len(got) < size:
                    got += os.read(ends[0], size)
                assert got == data
            else:
                sent = noise(self.dice, size)
                assert os.write(ends[1], sent) == size
                with dmabuf.open(ends[0]) as file:
                    done = file.read_into(memory.buffer, size, buffer_offset=start, timeout=5.0)
                assert done.nbytes == size
                memory.model[start : start + size] = sent
        finally:
            for end in ends:
                os.close(end)
        memory.check("a stream")

    def by_the_cpu(self) -> int:
        """Open a Buffer as a file, and compare it."""
        memory = self.dice.choice(self.memories)
        start = self.near(memory.size - 1)
        size = min(self.near(memory.size), memory.size - start)
        data = noise(self.dice, size)
        with memory.buffer.open(offset=start, size=size) as window:
            assert window.read() == memory.model[start : start + size]
            window.seek(0)
            window.write(data)
        memory.model[start : start + size] = data
        with memory.buffer.map("r") as view:
            assert view == memory.model
        return 0

    def truncate(self) -> int:
        """Truncate or extend a file without the package."""
        target = self.dice.choice([target for target in self.targets if target.grows])
        size = self.near(LIMIT)
        os.ftruncate(target.fd, size)
        kept = target.model[:size]
        target.model[:] = kept + bytes(size - len(kept))
        return 0


KINDS: dict[str, tuple[float, Callable[[Soak], int | None]]] = {
    "read": (30, Soak.read),
    "write": (22, Soak.write),
    "small": (2, Soak.small),
    "read segments": (9, Soak.read_segments),
    "write segments": (7, Soak.write_segments),
    "in a thread": (1, Soak.in_a_thread),
    "stream": (6, Soak.stream),
    "copy": (4, copy),
    "asyncio": (0.5, partial(at_once, backend="asyncio")),
    "trio": (0.5, partial(at_once, backend="trio")),
    "refused": (8, refused),
    "failing": (6, failing),
    "by the CPU": (3, Soak.by_the_cpu),
    "truncate": (2, Soak.truncate),
    "another buffer": (4, Soak.swap_memory),
    "other engines": (0.2, Soak.new_engines),
}
"""The weight and the method of each kind; it returns the number of transfers, None for one."""
