"""One episode: a file, a Buffer, faults, and transfers of every kind, each against a model."""

from __future__ import annotations

import errno
import mmap
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.simulator import core  # before dmabuf

# isort: split

import anyio

import dmabuf
from dmabuf import IntegrityError, aio
from dmabuf.aio.engine import LoopEngine
from dmabuf.aio.requests import Call
from dmabuf.kernel import uapi
from dmabuf.memory import Slab
from dmabuf.transfer import Engine, audit
from dmabuf.transfer.engine import _default, default_engine
from tests.unit import interrupting

ffi, lib = core.ffi, core.lib
NO_FAULTS = ffi.new("struct faults *")
uapi.sync = lambda fd, flags: None  # the Buffers' memfds pass for dma-bufs


def _call_in_the_loop(engine: LoopEngine, request: Call) -> None:
    """Make a call in the loop's thread: the virtual kernel is for one thread at a time."""
    engine.check_usable()
    engine._call_soon(partial(engine._run_call, request, engine.add(request)))


LoopEngine.start_call = _call_in_the_loop  # type: ignore[method-assign]
# Where a fault refuses the probe of io_uring, worker threads would enter the virtual kernel.
Engine._choose_backend = lambda *_: lib.DMB_BACKEND_URING  # type: ignore[method-assign]

FILE, MEMORY, BLOCK = 96 << 10, 128 << 10, 4096
PLAUSIBLE = {
    *(errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.ENODATA, errno.EILSEQ, errno.EFAULT),
    *(errno.EREMOTEIO, errno.ENXIO, errno.EINVAL),
    *(errno.ENODEV, errno.EAGAIN, errno.EINTR, errno.EBUSY),
}
"""What the virtual kernel answers, and what the package makes of it."""
_NOISE = random.Random(0).randbytes(1 << 20)


class Broken(AssertionError):
    """A promise that was not kept; `kind` is its name in the summary."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Episode:
    """Everything of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        lib.virtual_begin(seed, NO_FAULTS)
        self.dice = dice = random.Random(seed)
        self.path = folder / "file"
        self.counts: Counter[str] = Counter()
        self.lying = dice.random() < 0.4
        often = 1 << dice.randrange(8)
        faults = ffi.new("struct faults *")
        faults.latency = 1 << dice.randrange(9)
        for name, most in {"short_count": 8, "again": 8, "interrupt": 4, "submit": 4}.items():
            setattr(faults, name, min(most * often, 500) if dice.random() < 0.4 else 0)
        for name in ("error", "memory", "reset"):
            setattr(faults, name, often if dice.random() < 0.2 else 0)
        faults.lost = 20 if dice.random() < 0.05 else 0
        faults.lie = 300 if self.lying else 0
        depth, block = dice.choice([(1, 4096), (4, 4096), (32, "16KiB")])
        self.engine = dmabuf.Engine(queue_depth=depth, block_size=block, backend="io_uring")
        default_engine().close()  # for the copies, without what earlier ones left in it
        _default.clear()
        self.model = bytearray(self.noise(dice.choice([FILE, FILE - 100, 5000, 512])))
        self.path.write_bytes(self.model)
        self.memory = Memory(MEMORY)
        self.buffer = self.memory.buffer
        self.image = bytearray(MEMORY)
        audit.PAIRS.forget()
        ways: list[Callable[[], None]] = [self.one_by_one] * 6 + [self.loop, self.copies]
        self.way = dice.choice(ways)
        self.history = 0
        lib.virtual_begin(seed, faults)

    def noise(self, size: int) -> bytes:
        start = self.dice.randrange(len(_NOISE) - size)
        return _NOISE[start : start + size]

    def run(self) -> Counter[str]:
        """Run the transfers; raise Broken where one breaks a promise."""
        try:
            self.way()
        finally:
            self.history = lib.virtual_history()
            lib.virtual_begin(1, NO_FAULTS)
            self.memory.close()
        self.check_left()
        return self.counts

    def close(self) -> None:
        self.memory.close()
        self.engine.close()

    def check_left(self) -> None:
        """Check that nothing is left: slots, requests."""
        for ring in self.engine._rings:
            ring.tidy()
            if ring.free_buffer_slots != lib.DMB_BUFFER_SLOTS:
                raise Broken("leaked", f"{lib.DMB_BUFFER_SLOTS - ring.free_buffer_slots} slots")
            if ring.files:
                raise Broken("leaked", f"files {ring.files}")
        self.check_idle(0, 0)

    def check_idle(self, offset: int, size: int) -> None:
        address = self.memory.address + offset if size else 0
        count = lib.virtual_in_flight(address, size)
        if count:
            raise Broken("in flight at return", f"{count} requests")

    # -- ranges

    def near(self, top: int) -> int:
        unit = self.dice.choice([1, 512, BLOCK, BLOCK])
        return min(self.dice.randint(0, top) // unit * unit + self.dice.choice([0, 0, 0, 1]), top)

    def ranges(self, write: bool) -> list[tuple[int, int, int]]:
        """Return (file offset, buffer offset, size) of ranges that overlap nowhere."""
        count = self.dice.choice([1, 1, 1, 2, 5])
        end, piece = len(self.model), MEMORY // count
        found = []
        for number in range(count):
            file_start, file_end = number * end // count, (number + 1) * end // count
            if write and number == count - 1 and self.dice.random() < 0.1:
                file_end += 3 * BLOCK  # the file grows
            offset = file_start + self.near(file_end - file_start)
            start = self.near(piece - 1)
            if self.dice.random() < 0.6:  # something can go straight
                start = min(start // BLOCK * BLOCK + offset % BLOCK, piece - 1)
            most = min(piece - start, file_end - offset)
            found.append((offset, number * piece + start, self.near(max(0, most))))
        return found

    # -- one transfer after the other

    def one_by_one(self) -> None:
        with dmabuf.open(self.path, "r+", engine=self.engine) as file:
            for _ in range(self.dice.randint(1, 8)):
                self.transfer(file)

    def how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"audit": "always"} if self.lying else {}
        if not self.lying and self.dice.random() < 0.3:
            how["audit"] = self.dice.choice(["always", "off"])
        if self.dice.random() < 0.4:
            how["route"] = self.dice.choice(["native", "direct", "staged", "buffered"])
        return how

    def transfer(self, file: dmabuf.File) -> None:
        write, how = self.dice.random() < 0.5, self.how()
        ranges = self.ranges(write)
        self.refill()
        if len(ranges) == 1:
            offset, start, size = ranges[0]
            function: Any = file.write_from if write else file.read_into
            arguments: tuple[Any, ...] = (self.buffer, size)
            how |= {"file_offset": offset, "buffer_offset": start}
        else:
            function = file.write_segments if write else file.read_segments
            arguments = (self.buffer, array("Q", (n for place in ranges for n in place)))
        if self.dice.random() < 0.02:
            points = interrupting.Interruptions({self.dice.randrange(1, 200)})
        else:
            points = None
        poison = not write and how.get("audit") != "off"
        call = partial(self.call, function, arguments, how, points)
        self.judge(write, ranges, call, poison)
        self.check_idle(0, 0)

    @staticmethod
    def call(function: Any, arguments: Any, how: dict[str, Any], points: Any) -> Any:
        if points is None:
            return function(*arguments, **how)
        with points:
            return function(*arguments, **how)

    def refill(self) -> None:
        data = self.noise(MEMORY)
        self.memory.put(data)
        self.image[:] = data

    def judge(
        self,
        write: bool,
        ranges: list[tuple[int, int, int]],
        call: Callable[[], Any],
        poison: bool,
    ) -> None:
        """Make one transfer and compare everything with the model.

        A read that fails may leave the audit's poison in its ranges.
        """
        lib.virtual_lies()
        self.counts["transfers"] += 1
        failure: BaseException | None = None
        try:
            nbytes = call().nbytes
        except (OSError, EOFError, KeyboardInterrupt) as error:
            failure, nbytes = error, getattr(error, "nbytes", 0)
        lies = lib.virtual_lies()
        self.counts["lies"] += lies
        if isinstance(failure, IntegrityError):
            self.counts["detected"] += 1
            if not lies:
                raise Broken("false alarm", str(failure))
        elif isinstance(failure, OSError):
            self.counts["errors"] += 1
            refused = isinstance(failure, dmabuf.RouteUnavailable)
            if not refused and failure.errno not in PLAUSIBLE:
                raise Broken("an error out of nowhere", repr(failure))
        elif isinstance(failure, KeyboardInterrupt):
            self.counts["interrupts"] += 1
        sure = not (failure and (lies or poison))
        try:
            self.compare(write, ranges, nbytes, sure=sure, failed=isinstance(failure, OSError))
        except Broken as error:
            error.add_note(f"the transfer: {failure!r}, {call}")
            raise

    def compare(
        self,
        write: bool,
        ranges: list[tuple[int, int, int]],
        nbytes: int,
        *,
        sure: bool,
        failed: bool,
    ) -> None:
        """Compare both sides: `nbytes` arrived, later bytes are old or new, others are old.

        Without `sure`, any byte of the ranges may be wrong: that was reported.
        """
        file = bytearray(self.path.read_bytes())
        memory = bytearray(self.memory.get())
        now, model = (file, self.model) if write else (memory, self.image)
        source = self.image if write else self.model
        expected = bytearray(model)
        left = nbytes
        if len(now) > len(expected):
            expected += bytes(len(now) - len(expected))
        for offset, start, size in ranges:
            to, come = (offset, start) if write else (start, offset)
            new = source[come : come + size]
            arrived = min(left, size)
            left -= arrived
            if not sure:
                expected[to : to + size] = now[to : to + size]
                continue
            expected[to : to + arrived] = new[:arrived]
            for at in range(arrived, len(new)):
                if to + at < len(now) and now[to + at] == new[at]:
                    expected[to + at] = new[at]
        if write and len(now) < len(expected):
            raise Broken("undetected", f"the file has {len(now)} of {len(expected)} bytes")
        if now != expected:
            at = next(
                i for i, (one, other) in enumerate(zip(now, expected, strict=True)) if one != other
            )
            raise Broken(
                "undetected",
                f"byte {at} is {now[at]:#x} and not {expected[at]:#x} after "
                f"{'writing' if write else 'reading'} {ranges}, {nbytes} moved",
            )
        # A file is not cut below the place where the write's own allocation begins.
        begun = [to for to, _, size in ranges if size and to + size > len(self.model)]
        reached = max([to + size for to, _, size in ranges if nbytes] + [min(begun, default=0)])
        if write and failed and len(now) > max(len(self.model), reached):
            raise Broken("leaked", f"a file of {len(now)} bytes was not cut to {reached}")
        if (memory if write else file) != (self.image if write else self.model):
            raise Broken("undetected", "the other side changed")
        if write:
            self.model = file
        else:
            self.image = memory

    # -- an event loop

    def loop(self) -> None:
        try:
            anyio.run(self.at_once, backend=self.dice.choice(["asyncio", "trio"]))
        except OSError as error:  # no memory for the loop's ring
            self.counts["errors"] += 1
            if error.errno != errno.ENOMEM:
                raise

    async def at_once(self) -> None:
        """Run transfers in parts of the file and of the memory, and cancel some of them."""
        parts = 8
        self.refill()
        ends = [len(self.model) // BLOCK // parts * BLOCK * i for i in range(parts)]
        piece = min(MEMORY // parts, len(self.model) // BLOCK // parts * BLOCK)
        if not piece:
            return
        done: list[tuple[bool, tuple[int, int, int], int, bool]] = []

        async def one(file: aio.File, number: int) -> None:
            write, turns = self.dice.random() < 0.5, self.dice.randrange(40)
            offset, start = ends[number], number * (MEMORY // parts)
            size = self.near(piece)
            how = {"file_offset": offset, "buffer_offset": start} | self.how()
            function: Any = file.write_from if write else file.read_into
            self.counts["transfers"] += 1
            nbytes, sure = 0, False
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    for _ in range(turns):
                        await anyio.sleep(0)
                    group.cancel_scope.cancel()

                if turns < 10:
                    group.start_soon(cancel)
                try:
                    nbytes, sure = (await function(self.buffer, size, **how)).nbytes, True
                except IntegrityError:
                    self.counts["detected"] += 1
                except (OSError, EOFError) as error:
                    self.counts["errors"] += 1
                    nbytes, sure = getattr(error, "nbytes", 0), not self.lying
                finally:
                    self.check_idle(start, piece)
                group.cancel_scope.cancel()
            done.append((write, (offset, start, size), nbytes, sure))

        async with await aio.open(self.path, "r+") as file:
            async with anyio.create_task_group() as group:
                for number in range(parts):
                    group.start_soon(one, file, number)
        self.check_idle(0, 0)
        self.counts["lies"] += lib.virtual_lies()
        file_now, memory_now = self.path.read_bytes(), self.memory.get()
        for write, (offset, start, size), nbytes, sure in done:
            came, was = self.image[start : start + size], self.model[offset : offset + size]
            new, old = (came, was) if write else (was, came)
            now = file_now[offset : offset + size] if write else memory_now[start : start + size]
            if sure and now[:nbytes] != new[:nbytes]:
                raise Broken("undetected", f"in a loop: {write=} {offset} {start} {size} {nbytes}")
            if (
                not self.lying
                and write
                and any(
                    byte not in (one, other)
                    for byte, one, other in zip(
                        now[nbytes:], new[nbytes:], old[nbytes:], strict=False
                    )
                )
            ):
                raise Broken("undetected", f"in a loop, neither old nor new: {offset}")

    # -- copies and files of tensors

    def copies(self) -> None:
        """Copy the file, or save tensors: they appear whole, or what was there before stays."""
        target = self.path.with_name("copy")
        old = self.noise(3000)
        target.write_bytes(old)
        self.counts["transfers"] += 2
        saving = self.dice.random() < 0.5
        try:
            if saving:
                wanted = self.save(target)
            else:
                dmabuf.copy(self.path, target, blocks=1, block_size="16KiB")
                wanted = bytes(self.model)
        except (OSError, EOFError) as error:
            self.counts["errors"] += 1
            if saving and target.read_bytes() != old:
                raise Broken("undetected", f"after {error!r} not what was there") from error
        else:
            if target.read_bytes() != wanted and not lib.virtual_lies():
                raise Broken("undetected", "a copy differs")
        self.counts["lies"] += lib.virtual_lies()
        self.check_idle(0, 0)
        left = [name for name in os.listdir(self.path.parent) if name not in ("file", "copy")]
        if left:
            raise Broken("leaked", f"{left}")

    def save(self, target: Path) -> bytes:
        import numpy as np
        import safetensors.numpy

        from dmabuf import safetensors as ours

        sizes = [self.dice.randint(0, 20000) for _ in range(self.dice.randint(1, 4))]
        tensors = {str(i): np.frombuffer(self.noise(size), "uint8") for i, size in enumerate(sizes)}
        ours.save(tensors, target, engine=self.engine)
        return safetensors.numpy.save(tensors)


class Memory:
    """A Buffer that passes for a dma-buf, and its memory."""

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("dma-buf")
        os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        self.buffer = dmabuf.Buffer(
            [Slab(fd, 0, size)],
            mmap.mmap(fd, size),
            exporter="fake",
            reason="a test",
            map_refusal=None,
            writable=True,
        )
        self.address = int(self.buffer.address or 0)

    def put(self, data: bytes) -> None:
        self._map[:] = data

    def get(self) -> bytes:
        return self._map[:]

    def close(self) -> None:
        self.buffer.close()
        self._map.close()
