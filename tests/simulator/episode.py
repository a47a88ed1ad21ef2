"""One episode: a file, a Buffer, faults, and transfers of every kind, each against a model."""

from __future__ import annotations

import errno
import mmap
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.simulator import core, loops  # before dmabuf

# isort: split

import anyio
import numpy as np

import dmabuf
from dmabuf import IntegrityError, aio
from dmabuf.aio import engine as loop_engines
from dmabuf.aio.engine import LoopEngine
from dmabuf.aio.requests import Call as LoopCall
from dmabuf.kernel import uapi
from dmabuf.memory import Slab
from dmabuf.transfer import Engine, audit
from dmabuf.transfer.engine import _default, default_engine
from tests.unit import interrupting

ffi, lib = core.ffi, core.lib
NO_FAULTS = ffi.new("struct faults *")
uapi.sync = lambda fd, flags: None  # the Buffers' memfds pass for dma-bufs


def _call_in_the_loop(engine: LoopEngine, request: LoopCall) -> None:
    """Make a call in the loop's thread: the virtual kernel is for one thread at a time."""
    engine.check_usable()
    engine._call_soon(partial(engine._run_call, request, engine.add(request)))


LoopEngine.start_call = _call_in_the_loop  # type: ignore[method-assign]


class _AtOnce:
    """Passes for the queue of rings whose dma-bufs a thread of the loop's engine lets go of."""

    @staticmethod
    def put(ring: Any) -> None:
        if ring is not None:
            lib.virtual_forbid(0, 0)
            ring.unregister_all()
            lib.virtual_forbid(0, 1)

    @staticmethod
    def get() -> None:
        """Return None, which ends the thread."""


loop_engines.SimpleQueue = _AtOnce  # type: ignore[misc, assignment]
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


class Call:
    """Passes for a call of the system on a file by its descriptor, which fails where `refused`."""

    refused = False
    made = 0

    def __init__(self, real: Callable[..., None], number: int) -> None:
        self._real, self._number = real, number

    def __call__(self, fd: int, *arguments: int) -> None:
        self.made += 1
        if self.refused and os.fstat(fd).st_nlink:  # no memfd
            raise OSError(self._number, os.strerror(self._number))
        self._real(fd, *arguments)


CUTS = os.ftruncate = Call(os.ftruncate, errno.ENOSPC)  # type: ignore[assignment]
FLUSHES = os.fdatasync = Call(os.fdatasync, errno.EIO)  # type: ignore[assignment]


def uncut() -> bool:
    """Return whether a file may be too long: it could not be cut, or all but a flush was done."""
    return CUTS.refused or (FLUSHES.refused and FLUSHES.made > 0)


class Stop(Exception):
    """What the caller's function of progress raises at the end."""


class Dice(random.Random):
    """The choices of an episode. `choice` and `below` are several times as fast as Random's."""

    def below(self, limit: int) -> int:
        return int(self.random() * limit)

    def choice(self, of: Sequence[Any]) -> Any:
        return of[int(self.random() * len(of))]


class Broken(AssertionError):
    """A promise that was not kept; `kind` is its name in the summary."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Episode:
    """Everything of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        lib.virtual_begin(seed, NO_FAULTS)
        self.seed, self.dice = seed, (dice := Dice(seed))
        self.path = folder / "file"
        self.counts: Counter[str] = Counter()
        self.lying = dice.random() < 0.4
        often = 1 << dice.below(8)
        faults = ffi.new("struct faults *")
        faults.latency = 1 << dice.below(9)
        for name, most in {"short_count": 8, "again": 8, "interrupt": 4, "submit": 4}.items():
            setattr(faults, name, min(most * often, 500) if dice.random() < 0.4 else 0)
        for name in ("error", "memory", "reset"):
            setattr(faults, name, often if dice.random() < 0.2 else 0)
        faults.lost = 20 if dice.random() < 0.05 else 0
        faults.lie = 300 if self.lying else 0
        self.faults = faults
        self.faultless = not any((faults.short_count, faults.again, faults.error, faults.lost))
        self.synced = dice.random() < 0.1
        self.shared = not self.lying and dice.random() < 0.2
        depth, self.block = dice.choice([(1, BLOCK), (4, BLOCK), (32, 4 * BLOCK)])
        self.engine = dmabuf.Engine(queue_depth=depth, block_size=self.block, backend="io_uring")
        default_engine().close()  # for the copies, without what earlier ones left in it
        _default.clear()
        self.model = bytearray(self.noise(dice.choice([FILE, FILE - 100, 5000, 512])))
        self.path.write_bytes(self.model)
        self.memory = Memory(MEMORY)
        self.buffer = self.memory.buffer
        self.image = bytearray(self.noise(MEMORY))
        self.memory.bytes[:] = self.image
        audit.PAIRS.forget()
        audit.SHARE = dice.choice((0, 1e9))  # of the time: no clock decides what is audited
        ways = [self.one_by_one] * 9 + [self.loop] * 2 + [self.copies, self.copy_into]
        self.way: Callable[[], None] = dice.choice(ways)
        CUTS.refused, FLUSHES.refused = (
            self.way != self.copies and dice.random() < 0.1 for _ in range(2)
        )
        self.history = 0
        lib.virtual_begin(seed, faults)

    def noise(self, size: int) -> bytes:
        start = self.dice.below(len(_NOISE) - size)
        return _NOISE[start : start + size]

    def run(self) -> Counter[str]:
        """Run the transfers; raise Broken where one breaks a promise."""
        try:
            self.way()
            self.check_permitted()
        finally:
            self.history = lib.virtual_history()
            CUTS.refused = FLUSHES.refused = False
            lib.virtual_share(-1, 0, 0)
            lib.virtual_begin(1, NO_FAULTS)
            self.memory.close()
            lib.virtual_forbid(0, 0)
        self.check_left()
        return self.counts

    def close(self) -> None:
        self.memory.close()
        self.engine.close()

    def content(self) -> bytes:
        """Return the bytes of the file."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)

    def check_left(self) -> None:
        """Check that nothing is left: slots, requests."""
        for ring in self.engine._rings:
            ring.tidy()
            if ring.free_buffer_slots != lib.DMB_BUFFER_SLOTS:
                raise Broken("leaked", f"{lib.DMB_BUFFER_SLOTS - ring.free_buffer_slots} slots")
            if ring.files:
                raise Broken("leaked", f"files {ring.files}")
        self.check_idle(0, 0)

    def check_permitted(self) -> None:
        violation = lib.virtual_violation()
        if violation:
            raise Broken("other", ffi.string(violation).decode())

    def check_idle(self, offset: int, size: int) -> None:
        address = self.memory.address + offset if size else 0
        count = lib.virtual_in_flight(address, size)
        if count:
            raise Broken("in flight at return", f"{count} requests")

    # -- ranges

    def near(self, top: int) -> int:
        unit = self.dice.choice((1, 512, BLOCK, BLOCK))
        value = self.dice.below(top + 1)
        return min(value - value % unit + self.dice.choice((0, 0, 0, 1)), top)

    def ranges(self, write: bool) -> list[tuple[int, int, int]]:
        """Return (file offset, buffer offset, size) of ranges that overlap nowhere."""
        count = self.dice.choice((1, 1, 1, 2, 5))
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
        if write and count > 1 and self.dice.random() < 0.1:  # a gap behind the end of the file
            _, start, size = found[-1]
            found[-1] = end + 16 * BLOCK, start, size
        elif count == 1 and self.dice.random() < 0.2:  # neighbours
            (offset, start, size), parts = found[0], self.dice.choice([3, 20])
            edges = [size * number // parts for number in range(parts + 1)]
            found = [(offset + at, start + at, to - at) for at, to in pairwise(edges)]
        return found

    # -- one transfer after the other

    def one_by_one(self) -> None:
        fd = os.open(self.path, os.O_RDWR | (os.O_DSYNC if self.synced else 0))
        try:
            lib.virtual_forbid(self.synced, 0)
            opened = fd if self.synced or self.shared else self.path
            with dmabuf.open(opened, "r+", engine=self.engine) as file:
                for _ in range(1 + self.dice.below(16)):
                    self.transfer(file, fd)
        finally:
            os.close(fd)

    def how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"audit": "always"} if self.lying else {}
        if not self.lying and self.dice.random() < 0.3:
            how["audit"] = self.dice.choice(["always", "off"])
        if self.dice.random() < 0.4:
            how["route"] = self.dice.choice(["native", "direct", "staged", "buffered"])
        return how

    def transfer(self, file: dmabuf.File, fd: int) -> None:
        write, how = self.dice.random() < 0.5, self.how()
        ranges = self.ranges(write)
        self.refill(ranges)
        poison = not write and how.get("audit") != "off"
        if self.dice.random() < 0.05:
            how["progress"] = stop_at_the_end
        if write and self.dice.random() < 0.1:
            how["sync"] = True
        if len(ranges) == 1:
            offset, start, size = ranges[0]
            function: Any = file.write_from if write else file.read_into
            arguments: tuple[Any, ...] = (self.buffer, self.number(size))
            how |= {"file_offset": self.number(offset), "buffer_offset": self.number(start)}
        else:
            function = file.write_segments if write else file.read_segments
            arguments = (self.buffer, array("Q", (n for place in ranges for n in place)))
        call, chance = partial(function, *arguments, **how), self.dice.random()
        if chance < 0.02:
            points = interrupting.Interruptions({1 + self.dice.below(120)})
            call = partial(self.at_points, points, call)
        elif chance < 0.04:
            action = partial(self.transfer_inside, file, write)
            points = interrupting.Points({1 + self.dice.below(120)}, action)
            call = partial(self.at_points, points, call)
        if self.shared and write:
            lib.virtual_share(fd, 50, 0)
        try:
            self.judge(write, ranges, call, poison, sync="sync" in how)
        finally:
            lib.virtual_share(-1, 0, 0)
        self.check_idle(0, 0)

    def number(self, value: int) -> Any:
        """Return a number, which may be one of NumPy's smallest."""
        return np.min_scalar_type(value).type(value) if self.dice.random() < 0.1 else value

    @staticmethod
    def at_points(points: interrupting.Points, call: Callable[[], Any]) -> Any:
        with points:
            return call()

    def transfer_inside(self, file: dmabuf.File, write: bool) -> None:
        """Make a transfer inside another one, as a signal handler may."""
        how: dict[str, Any] = {"audit": "always"} if self.lying else {}
        with dmabuf.allocate(BLOCK, exporter="memfd") as buffer, suppress(OSError):
            nbytes = file.read_into(buffer, BLOCK, **how).nbytes
            if not write and buffer.pread(nbytes, 0) != self.model[:nbytes]:
                raise Broken("undetected", "a transfer inside another one")

    def refill(self, ranges: list[tuple[int, int, int]]) -> None:
        """Put new bytes in ranges of the memory: those to be written, or poison for a read."""
        for _, start, size in ranges:
            self.image[start : start + size] = new = self.noise(size)
            self.memory.bytes[start : start + size] = new

    def judge(
        self,
        write: bool,
        ranges: list[tuple[int, int, int]],
        call: Callable[[], Any],
        poison: bool,
        *,
        sync: bool,
    ) -> None:
        """Make one transfer and compare everything with the model.

        A read that fails may leave the audit's poison in its ranges.
        """
        lib.virtual_lies()
        resets, blocks, FLUSHES.made = lib.virtual_resets(), self.path.stat().st_blocks, 0
        self.counts["transfers"] += 1
        failure: BaseException | None = None
        try:
            done = call()
            nbytes = done.nbytes
        except (OSError, EOFError, KeyboardInterrupt, Stop) as error:
            failure, nbytes = error, getattr(error, "nbytes", 0)
        lies = lib.virtual_lies()
        self.counts["lies"] += lies
        if isinstance(failure, IntegrityError):
            self.counts["detected"] += 1
            if not lies:
                raise Broken("false alarm", str(failure))
        elif isinstance(failure, OSError):
            self.counts["errors"] += 1
            if not isinstance(failure, dmabuf.RouteUnavailable):
                self.check_error(failure, lib.virtual_resets() - resets)
        elif isinstance(failure, KeyboardInterrupt):
            self.counts["interrupts"] += 1
        elif isinstance(failure, Stop) and not hasattr(failure, "nbytes"):
            raise Broken("other", "the exception of a function of progress has no nbytes")
        if sync:
            self.check_sync(failure, nbytes, sum(size for _, _, size in ranges))
        sure = not (failure and (lies or poison))
        try:
            self.compare(write, ranges, nbytes, sure=sure, failed=isinstance(failure, OSError))
            if failure is None:
                self.check_requests(ranges, done)
            if write:
                self.check_blocks(ranges, blocks)
        except Broken as error:
            error.add_note(f"the transfer: {failure!r}, {call}")
            raise

    def check_error(self, failure: OSError, resets: int) -> None:
        """Check that an error has a cause, a path and `nbytes`."""
        if failure.errno not in PLAUSIBLE:
            raise Broken("an error out of nowhere", repr(failure))
        if failure.errno == errno.ENODEV and resets < 16 and not self.faults.memory:
            raise Broken("other", f"a transfer gives up after {resets} resets: {failure!r}")
        if failure.errno == errno.ENOMEM:  # no ring could be made, perhaps
            return
        if not hasattr(failure, "nbytes") or failure.filename is None:
            raise Broken("other", f"an error without a path or nbytes: {failure!r}") from failure

    @staticmethod
    def check_sync(failure: BaseException | None, nbytes: int, size: int) -> None:
        """Check that what a call reports as written was flushed."""
        flushed = FLUSHES.made and not FLUSHES.refused
        moved = size if failure is None else nbytes
        if moved and not flushed and not isinstance(failure, KeyboardInterrupt):
            raise Broken("other", f"{moved} bytes were not flushed: {failure!r}")

    def check_requests(self, ranges: list[tuple[int, int, int]], done: Any) -> None:
        """Check that neighbours were joined. Faults, and a device that is read, take more."""
        most, run, after = 0, 0, (-1, -1)
        for offset, start, size in ranges:
            if size:
                run = run + size if after == (offset, start) else size
                most += 4 * (run == size) + run // self.block - (run - size) // self.block
                after = offset + size, start + size
        if self.faultless and done.requests > most:
            raise Broken("other", f"{done.requests} requests, and {most} suffice for {ranges}")

    def check_blocks(self, ranges: list[tuple[int, int, int]], before: int) -> None:
        """Check that a write allocates what it writes, and no gap."""
        room = before * 512 + sum(size + 2 * BLOCK for _, _, size in ranges) + 2 * BLOCK
        blocks = self.path.stat().st_blocks
        if blocks * 512 > room:
            raise Broken("leaked", f"{blocks} blocks of a file that had {before}")

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
        file, memory = self.content(), self.memory.bytes
        now, model = (file, self.model) if write else (memory, self.image)
        before, left = len(self.model), nbytes
        if write and len(file) > before:
            self.model.extend(bytes(len(file) - before))
        extended = self.appended()
        self.settle_appended(self.model, extended)
        for offset, start, size in ranges:
            if write:
                to, source = offset, self.image[start : start + size]
            else:
                to, source = start, self.model[offset : offset + size]
            settle(now, model, to, source, min(left, size), size, sure=sure)
            left -= min(left, size)
        if len(file) < before:
            raise Broken("undetected", f"the file has {len(file)} of {before} bytes")
        if model != now:
            at = next(i for i, byte in enumerate(model) if i >= len(now) or byte != now[i])
            raise Broken(
                "undetected",
                f"byte {at} of {len(now)} is {now[at : at + 1].hex()} and not {model[at]:02x} "
                f"after {'writing' if write else 'reading'} {ranges}, {nbytes} moved",
            )
        # A file is not cut below the place where the write's own allocation begins.
        begun = [to for to, _, size in ranges if size and to + size > before]
        reached = max([to + size for to, _, size in ranges if nbytes] + [min(begun, default=0)])
        most = max(before, reached, sum(extended))
        if write and failed and not uncut() and len(file) > most:
            raise Broken("leaked", f"a file of {len(file)} bytes was not cut to {reached}")
        if (self.image if write else self.model) != (memory if write else file):
            raise Broken("undetected", "the other side changed")

    @staticmethod
    def appended() -> tuple[int, int]:
        """Return where another program appended bytes to the file, and how many."""
        at = ffi.new("uint64_t *")
        return (at[0], size) if (size := lib.virtual_appended(at)) else (0, 0)

    @staticmethod
    def settle_appended(model: bytearray, extended: tuple[int, int]) -> None:
        at, size = extended
        model[at : at + size] = bytes([lib.APPENDED]) * size

    # -- an event loop

    def loop(self) -> None:
        lib.virtual_forbid(0, 1)
        try:
            loops.run(self.at_once, self.dice.choice(["asyncio", "trio"]), self.seed)
        except OSError as error:  # no memory for the loop's ring
            self.counts["errors"] += 1
            if error.errno != errno.ENOMEM:
                raise

    async def at_once(self) -> None:
        """Run transfers in parts of the file and of the memory, and cancel some of them."""
        parts = 8
        piece = min(MEMORY // parts, len(self.model) // BLOCK // parts * BLOCK)
        if not piece:
            return
        fd = os.open(self.path, os.O_RDONLY)
        try:
            async with await aio.open(self.path, "r+") as file:
                async with anyio.create_task_group() as group:
                    for number in range(parts):
                        group.start_soon(self.in_part, file, fd, number, piece)
        finally:
            os.close(fd)
        self.check_idle(0, 0)
        self.counts["lies"] += lib.virtual_lies()
        if self.model != self.content() or self.image != self.memory.bytes:
            raise Broken("undetected", "in a loop, outside of all parts")

    async def in_part(self, file: aio.File, fd: int, number: int, piece: int) -> None:
        """Run transfers in a part, one after the other."""
        offset, start = number * piece, number * piece
        for _ in range(1 + self.dice.below(6)):
            write, size, how = self.dice.random() < 0.5, self.near(piece), self.how()
            self.refill([(offset, start, size)])
            turns = self.dice.below(40)
            call = file.write_from if write else file.read_into
            self.counts["transfers"] += 1
            nbytes, failed = 0, True
            async with anyio.create_task_group() as group:
                if turns < 10:
                    group.start_soon(cancel_after, turns, group.cancel_scope)
                try:
                    done = await call(
                        self.buffer, size, file_offset=offset, buffer_offset=start, **how
                    )
                    nbytes, failed = done.nbytes, False
                except (OSError, EOFError) as error:
                    self.counts["detected" if isinstance(error, IntegrityError) else "errors"] += 1
                    nbytes = getattr(error, "nbytes", 0)
                finally:
                    self.check_idle(start, piece)
                group.cancel_scope.cancel()
            poison = not write and how.get("audit") != "off"
            sure = not (failed and (self.lying or poison))
            model = self.model[offset : offset + piece]
            image = self.image[start : start + piece]
            found, memory = os.pread(fd, piece, offset), self.memory.bytes[start : start + piece]
            if write:
                settle(found, model, 0, image[:size], nbytes, size, sure=sure)
            else:
                settle(memory, image, 0, model[:size], nbytes, size, sure=sure)
            if model != found or image != memory:
                what = f"{'write' if write else 'read'} of {size} at {offset}, {nbytes} moved"
                raise Broken("undetected", f"in a loop: {what}")
            self.model[offset : offset + piece] = model
            self.image[start : start + piece] = image

    # -- copies and files of tensors

    def copies(self) -> None:
        """Copy the file, or save tensors: they appear whole, or what was there before stays."""
        target = self.path.with_name("copy")
        old = self.noise(3000)
        target.write_bytes(old)
        self.counts["transfers"] += 1
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

    def copy_into(self) -> None:
        """Copy into a part of a file that others extend, or from one that they cut for a while."""
        cutting = self.shared and self.dice.random() < 0.5
        old, offset = self.noise(self.dice.choice([3000, FILE])), self.near(2 * BLOCK)
        place = self.number(offset)
        target = self.path.with_name("copy")
        target.write_bytes(old)
        how: dict[str, Any] = {"progress": stop_at_the_end} if self.dice.random() < 0.1 else {}
        how |= {"sync": True} if (sync := self.dice.random() < 0.5) else {}
        FLUSHES.made = 0
        self.counts["transfers"] += 1
        failure: Exception | None = None
        lib.virtual_forbid(self.synced, 0)
        with self.path.open("r+b", 0) as source, target.open("r+b", 0) as plain:
            fd = os.open(target, os.O_RDWR | os.O_DSYNC) if self.synced else os.dup(plain.fileno())
            if self.shared:
                lib.virtual_share(*((source.fileno(), 0, 50) if cutting else (fd, 50, 0)))
            try:
                done = dmabuf.copy(
                    self.path, fd, dst_offset=place, blocks=1, block_size="16KiB", **how
                )
                nbytes = done.nbytes
            except (OSError, EOFError, Stop) as error:
                failure, nbytes = error, getattr(error, "nbytes", -1)
            end, extended = source.seek(0, os.SEEK_END), self.appended()
            lib.virtual_share(-1, 0, 0)
            os.close(fd)
        if isinstance(failure, OSError):
            self.counts["errors"] += 1
            if not isinstance(failure, dmabuf.RouteUnavailable):
                self.check_error(failure, 99)
        if nbytes < 0 and getattr(failure, "errno", 0) != errno.ENOMEM:
            raise Broken("other", f"{failure!r} has no nbytes")
        if failure is None and nbytes < end:
            raise Broken("undetected", f"a copy of {end} bytes ended after {nbytes}")
        nbytes = max(0, nbytes)
        if sync:
            self.check_sync(failure, nbytes, nbytes)
        sure, now, model = not lib.virtual_lies(), target.read_bytes(), bytearray(old)
        reached = max(len(old), offset + nbytes, sum(extended))
        if failure is not None and not uncut() and len(now) > reached:
            raise Broken("leaked", f"a file of {len(now)} bytes was not cut to {reached}")
        model.extend(bytes(max(0, len(now) - len(model))))
        if cutting:  # zeros in the place of what was cut
            came = bytearray(now[offset : offset + nbytes])
            settle(came, zeros := bytearray(nbytes), 0, self.model, 0, nbytes, sure=sure)
            if sure and came != zeros:
                raise Broken("undetected", "a copy differs from what was there")
        settle(now, model, offset, self.model, nbytes, len(self.model), sure=sure and not cutting)
        self.settle_appended(model, extended)
        if model != now:
            raise Broken("undetected", f"a copy of {nbytes} bytes to {offset}: {failure!r}")
        self.check_idle(0, 0)

    def save(self, target: Path) -> bytes:
        import safetensors.numpy

        from dmabuf import safetensors as ours

        sizes = [self.dice.below(20000) for _ in range(1 + self.dice.below(4))]
        tensors = {str(i): np.frombuffer(self.noise(size), "uint8") for i, size in enumerate(sizes)}
        ours.save(tensors, target, engine=self.engine)
        return safetensors.numpy.save(tensors)


def stop_at_the_end(done: int, total: int | None) -> None:
    if done == total:
        raise Stop


async def cancel_after(turns: int, scope: anyio.CancelScope) -> None:
    for _ in range(turns):
        await anyio.sleep(0)
    scope.cancel()


def settle(
    now: Any, model: bytearray, to: int, source: bytearray, arrived: int, size: int, *, sure: bool
) -> None:
    """Make the model what a range may hold: `arrived` bytes of the source, then old or new ones.

    Without `sure` it may hold anything.
    """
    if not sure:
        model[to : to + size] = now[to : to + size]
        return
    model[to : to + arrived] = source[:arrived]
    start, end = to + arrived, min(to + len(source), len(now))
    if start < end and now[start:end] != model[start:end]:
        found, new, old = (
            np.frombuffer(part, "uint8")
            for part in (now[start:end], source[arrived:][: end - start], model[start:end])
        )
        model[start:end] = np.where(found == new, new, old).tobytes()


class Memory:
    """A Buffer that passes for a dma-buf, and its memory."""

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("dma-buf")
        os.ftruncate(fd, size)
        self.bytes = mmap.mmap(fd, size)
        self.buffer = dmabuf.Buffer(
            [Slab(fd, 0, size)],
            mmap.mmap(fd, size),
            exporter="fake",
            reason="a test",
            map_refusal=None,
            writable=True,
        )
        self.address = int(self.buffer.address or 0)

    def close(self) -> None:
        self.buffer.close()
        self.bytes.close()
