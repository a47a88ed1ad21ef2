"""Codecs by V4L2 memory-to-memory: encoders, decoders and converters over Buffers.

Both queues of the driver import dma-bufs: the frames of a camera go in as they are, and what comes
out is in Buffers that a file or another device reads. The protocol is that of
Documentation/userspace-api/media/v4l/dev-encoder.rst and dev-decoder.rst.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Literal

from dmabuf.devices import lifetime
from dmabuf.devices.frames import Format, Frame
from dmabuf.devices.video import Node, Queue, Ring, Stream, make_buffer, problem_with
from dmabuf.errors import BusyError, ClosedError, Uncopyable, os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer
from dmabuf.sizes import as_int

__all__ = ["Codec", "Frame", "Input", "codec"]

Kind = Literal["encoder", "decoder", "converter"]

_STOP = 1  # V4L2_ENC_CMD_STOP, V4L2_DEC_CMD_STOP
_OTHER = "a heap of contiguous memory, by exporter="


def codec(
    device: str | os.PathLike[str],
    *,
    input: str | Format | None = None,  # noqa: A002 - the usual name
    output: str | None = None,
    width: int | None = None,
    height: int | None = None,
    inputs: int = 4,
    outputs: int = 4,
    exporter: str = "udmabuf",
    huge_pages: bool | str | int = False,
    timeout: float | None = 5.0,
) -> Codec:
    """Open a memory-to-memory device of V4L2: an encoder, a stateful decoder or a converter.

    Args:
        device: the node, such as "/dev/video2".
        input: the pixel format of what goes in, as four characters such as "NV12", or the
            ``format`` of a camera, with its size and colours. For a decoder the coded format, such
            as "H264". The default for this and the next three is the driver's.
        output: the pixel format of what comes out.
        width: pixels of an input picture. A decoder takes the size from the stream; the size given
            here determines how large its input buffers are.
        height: lines of an input picture.
        inputs: the number of inputs that may wait at a time.
        outputs: the number of outputs that the program may hold; the driver gets more of its own.
        exporter: what allocates the buffers: "udmabuf" (zero-copy to files), or a dma-heap.
        huge_pages: as for `dmabuf.allocate`; also for devices that need contiguous memory.
        timeout: seconds to wait for each input or output; None waits without limit.

    Raises:
        OSError: there is no such device or no permission; the node is not such a device (ENODEV);
            it lacks a format or the size (EINVAL); the driver cannot import the memory.
        ImportError: linuxpy is not installed.
        ValueError: a count or a size that is not positive, or an invalid timeout.
    """
    fence.check_timeout(timeout)
    color = None
    if isinstance(input, Format):
        if width is not None or height is not None:
            raise ValueError("input is a Format, which has the width and height: leave them out")
        width, height, color = input.width, input.height, input.color
        input = input.fourcc  # noqa: A001
    for name, text in (("input", input), ("output", output)):
        if not isinstance(text, str | None):
            raise TypeError(f"invalid {name} {text!r}: use four characters, such as 'NV12'")
    width = None if width is None else as_int(width, "width")
    height = None if height is None else as_int(height, "height")
    counts = as_int(inputs, "inputs"), as_int(outputs, "outputs")
    names = ("width", "height", "inputs", "outputs")
    for name, value in zip(names, (width, height, *counts), strict=True):
        if value is not None and not 0 < value < 1 << 32:
            raise ValueError(f"invalid {name} {value!r}: use a positive number")
    if exporter == "driver":
        text = "invalid exporter 'driver': a codec imports its buffers; use udmabuf or a dma-heap"
        raise ValueError(text)
    node = Node(os.fspath(device))
    try:
        into, out = _queues(node)
        kind = _kind(into, out)
        if kind == "encoder":
            out.set_format(output, None, None)
        if (input, width, height) != (None, None, None):
            into.set_format(input, width, height, color)
        if kind == "converter":
            form = into.format()
            out.set_format(output, form.width, form.height)
        elif kind == "decoder" and output is not None and output not in out.formats():
            text = f"set the format: no format {output!r}; it has {', '.join(out.formats())}"
            raise os_error(errno.EINVAL, text, node.path)
        return Codec(node, kind, into, out, output, *counts, exporter, huge_pages, timeout)
    except BaseException:
        os.close(node.fd)
        raise


def _queues(node: Node) -> tuple[Queue, Queue]:
    """Return the queues of what goes in, which V4L2 calls output, and of what comes out."""
    caps = node.raw.Capability
    if node.caps & caps.VIDEO_M2M_MPLANE:
        ending = "_MPLANE"
    elif node.caps & caps.VIDEO_M2M:
        ending = ""
    else:
        text = f"codec: {node.card!r} is not a memory-to-memory device; use another, by v4l2-ctl"
        raise os_error(errno.ENODEV, text, node.path)
    return (
        Queue(node, f"VIDEO_OUTPUT{ending}", "codec", _OTHER),
        Queue(node, f"VIDEO_CAPTURE{ending}", "codec", _OTHER),
    )


def _kind(into: Queue, out: Queue) -> Kind:
    if all(into.formats().values()):
        return "decoder"
    return "encoder" if all(out.formats().values()) else "converter"


class _End(Enum):
    END = 0


class Input(Uncopyable, instead="take another by Codec.input()"):
    """A buffer of a codec for the program to fill: a context manager, until it is sent.

    One that nothing refers to goes back to the codec.
    """

    sent = True  # until __init__ has finished

    def __init__(self, owner: Codec, number: int, buffers: tuple[Buffer, ...]) -> None:
        self.owner, self.number = owner, number
        self.buffers = buffers
        """One, or one for each plane of a multi-planar format."""
        self.nbytes: int | None = None
        """The bytes that count of a single buffer; None for all that the format takes."""
        self.timestamp_ns = 0
        """A time in nanoseconds, which the driver copies to the output, in microseconds."""
        self.sent = False
        """Whether it was sent or given back."""

    @property
    def buffer(self) -> Buffer:
        """The buffer of the first plane."""
        return self.buffers[0]

    def release(self) -> None:
        """Give it back without sending it; does nothing once it was sent."""
        if not self.sent:
            self.sent = True
            self.owner.unused.add(self.number)

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Codec(Stream):
    """A codec; made by :func:`codec`. Iterating over it returns the outputs, each as a Frame.

    One thread may send while another iterates; :meth:`run` does both in one. After a fork the child
    can only close its copy.
    """

    def __init__(
        self,
        node: Node,
        kind: Kind,
        into: Queue,
        out: Queue,
        wanted: str | None,
        inputs: int,
        outputs: int,
        exporter: str,
        huge_pages: bool | str | int,
        timeout: float | None,
    ) -> None:
        """Take over the node, which the caller closes if this raises; for :func:`codec`."""
        super().__init__(node, timeout)
        self._into, self._out, self._wanted = into, out, wanted
        self._outputs, self._memory = outputs, (exporter, huge_pages)
        self._own: dict[int, tuple[Buffer, ...]] = {}
        self._queued: dict[int, tuple[tuple[Buffer, ...], Frame | None]] = {}
        self._done: deque[Frame] = deque()  # sent frames that the driver has read
        self._ring: Ring | None = None
        self._old: list[Ring] = []  # of earlier sizes, with frames that are held
        self._started = False
        self._draining = False
        self._counts = False  # the driver has no such command: as many outputs as inputs
        self._ended = False
        self._last = False  # the driver gives no more until it is restarted
        self._changed = False  # the stream has another format
        self._balance = 0  # inputs less outputs
        self.unused: set[int] = set()
        """Numbers of Inputs that were not sent; for Input."""
        self.kind = kind
        """"encoder", "decoder", or "converter" where both sides are pictures."""
        self.input_format = into.format()
        """The format of what goes in."""
        self.format: Format | None = None
        """The format of what comes out; None of a decoder that has not found it yet."""
        self.damaged = 0
        """The number of inputs that the driver could not use."""
        try:
            self._free = list(range(into.request(inputs, "DMABUF")))
            if kind == "decoder":
                self._subscribe()
            else:
                self._make_outputs()
            self._opened()
        except BaseException:
            self._closed = True
            self._stop()
            self._release()
            raise

    # -- what goes in

    def input(self) -> Input:
        """Wait for a buffer to fill, and return it; :meth:`send` takes it back.

        Raises:
            TimeoutError: none became free in time, because nobody takes the outputs, or the driver
                does not go on.
            OSError: the driver failed; ENODEV where the device was unplugged.
            ClosedError: the codec is closed.
        """
        found = self._await(self._take_input, self._room, self._full)
        self._release_done()
        return found

    def _take_input(self) -> Input | None:
        with self._turn:
            if not self._has_room():
                return None
            index = min(self._free, key=lambda one: one not in self._own)
            if index not in self._own:
                row: list[Buffer] = []
                try:
                    for number, plane in enumerate(self.input_format.planes):
                        name = f"in {index}.{number}"
                        row.append(make_buffer(self.path, name, plane.size, *self._memory))
                        self._check(row[-1], plane.size)
                except BaseException:
                    for buffer in row:
                        buffer.close()
                    raise
                self._own[index] = tuple(row)
            self._free.remove(index)
            return Input(self, index, self._own[index])

    def send(self, item: Frame | Input) -> None:
        """Queue an input. Waits for a place if all are in use.

        A Frame of a camera or of another codec goes in without a copy. The codec takes it over: it
        is released when the driver has read it.

        After the end that :meth:`drain` brings, the next input begins a new stream.

        Raises:
            TimeoutError: no place became free in time.
            OSError: EINVAL where the item has another format than the codec, or the driver cannot
                import its memory; EBUSY while the codec drains.
            ClosedError: the codec is closed, or the item was released or sent.
        """
        if not isinstance(item, Frame | Input):
            raise TypeError(f"send: a Frame or an Input is needed, not {type(item).__name__}")
        self.check_open()
        row, spans = self._filled(item) if isinstance(item, Input) else self._parts(item)
        held: list[Buffer] = []
        try:
            for buffer in row:
                lifetime.hold(buffer)
                held.append(buffer)
            fds = [buffer.slabs[0].fd for buffer in row]
            fence.wait(fds, "read", self._timeout, path=self.path)
            self._await(lambda: self._enqueue(item, row, spans, held), self._room, self._full)
        finally:
            for buffer in held:
                lifetime.release(buffer)
        self._release_done()

    def _enqueue(
        self,
        item: Frame | Input,
        row: tuple[Buffer, ...],
        spans: Sequence[tuple[int, int]],
        held: list[Buffer],
    ) -> bool | None:
        """Queue an input if there is a place, starting the stream first if necessary.

        Takes over the Buffers that are ``held``, and empties the list.
        """
        with self._turn:
            room = self._has_room()
            if isinstance(item, Input):
                index, frame = item.number, None
            elif room:
                index, frame = self._free[0], item
            else:
                return None
            if not self._started:
                self._into.on()
                self._started = True
            self._queued[index] = row, frame  # first: an interrupt may follow the driver's call
            held.clear()
            if isinstance(item, Input):
                item.sent = True
            else:
                self._free.remove(index)
            try:
                self._into.queue(index, "DMABUF", row, spans, item.timestamp_ns)
            except OSError:
                del self._queued[index]
                held.extend(row)
                if isinstance(item, Input):
                    item.sent = False
                else:
                    self._free.append(index)
                raise
            self._balance += 1
            return True

    def _filled(self, item: Input) -> tuple[tuple[Buffer, ...], list[tuple[int, int]]]:
        """Return the buffers of an Input and the span in each."""
        if item.owner is not self:
            raise ValueError("send: this Input is of another codec")
        if item.sent:
            raise ClosedError("send: this Input was sent or released; take another by input()")
        sizes = [plane.size for plane in self.input_format.planes]
        if item.nbytes is not None:
            nbytes = as_int(item.nbytes, "nbytes")
            if len(sizes) > 1 or not 0 < nbytes <= item.buffer.size:
                text = f"send: nbytes={nbytes}: 1 to {item.buffer.size} are possible, in one buffer"
                raise ValueError(text)
            sizes = [nbytes]
        return tuple(item.buffers), [(0, size) for size in sizes]

    def _parts(self, frame: Frame) -> tuple[tuple[Buffer, ...], list[tuple[int, int]]]:
        """Return the buffers of a frame and the span in each; raise unless the codec takes it."""
        if frame.released:
            raise ClosedError(f"send: {frame!r} was released; send it before")
        mine, its = self.input_format, frame.format
        rows = {id(plane.buffer): plane.buffer for plane in frame.planes}
        spans: dict[int, tuple[int, int]] = {}
        for plane in frame.planes:
            start, nbytes = spans.get(id(plane.buffer), (plane.offset, 0))
            spans[id(plane.buffer)] = (start, max(nbytes, plane.offset + plane.nbytes - start))
        strides = [plane.bytes_per_line for plane in mine.planes]
        problem = None
        if its.fourcc != mine.fourcc:
            problem = f"the frame is {its.fourcc}, and the codec takes {mine.fourcc}"
        elif self.kind != "decoder" and (its.width, its.height) != (mine.width, mine.height):
            problem = f"the frame has {its.width}x{its.height}, and the codec takes "
            problem += f"{mine.width}x{mine.height}; drain() it and open another"
        elif len(rows) != len(mine.planes):
            problem = f"the frame has {len(rows)} buffers, and the codec takes {len(mine.planes)}"
        elif self.kind != "decoder" and [p.bytes_per_line for p in its.planes] != strides:
            problem = f"the rows of the frame are {its.planes[0].bytes_per_line} bytes apart, and "
            problem += f"the codec takes {strides[0]}"
        if problem is not None:
            raise os_error(errno.EINVAL, f"send: {problem}", self.path)
        for buffer, plane_format in zip(rows.values(), mine.planes, strict=True):
            self._check(buffer, plane_format.size)
        return tuple(rows.values()), list(spans.values())

    def _check(self, buffer: Buffer, size: int) -> None:
        problem = problem_with(buffer, size, self.input_format, written=False)
        if problem is not None:
            raise os_error(errno.EINVAL, f"send: the buffer {problem}", self.path)

    def _has_room(self) -> bool:
        """Whether an input can be queued at once; starts a new stream after the end of one."""
        self.check_open()
        self._reclaim()
        if self._ended:
            self._restart()
        if self._draining:
            text = "send: the codec drains; take its outputs to the end before the next input"
            raise os_error(errno.EBUSY, text, self.path)
        return bool(self._free)

    def _reclaim(self) -> None:
        """Take back the inputs that the driver has read."""
        for index in list(self.unused):
            self.unused.discard(index)
            self._free.append(index)
        while self._queued and (filled := self._into.take("DMABUF")) is not None:
            self.damaged += filled.error
            self._take_back(filled.number)

    def _take_back(self, index: int) -> None:
        row, frame = self._queued.pop(index)
        self._free.append(index)
        for buffer in row:
            lifetime.release(buffer)
        if frame is not None:
            self._done.append(frame)

    def _release_done(self) -> None:
        """Release frames that the driver has read; without the lock, since another device waits."""
        with suppress(IndexError):
            while True:
                frame = self._done.popleft()
                with suppress(BusyError):  # in use: it is released with its last reference
                    frame.release()

    # -- what comes out

    def __iter__(self) -> Codec:
        return self

    def __next__(self) -> Frame:
        """Wait for the next output. Release it when it was used: the driver needs its buffer.

        Raises:
            StopIteration: the codec was drained, and all was returned.
            TimeoutError: nothing came out in time.
            OSError: the driver failed; ENODEV where the device was unplugged.
            ClosedError: the codec is closed.
        """
        found = self._await(self._take, self._any, self._late)
        self._release_done()
        if isinstance(found, Frame):
            return found
        raise StopIteration

    def run(self, source: Iterable[Frame | Input]) -> Iterator[Frame]:
        """Send what ``source`` returns, drain, and yield the outputs as they come.

        A place for the input is free whenever the next item of ``source`` is taken, so that it may
        call :meth:`input` without waiting.
        """
        items = iter(source)
        while True:
            found = self._await(self._output_or_room, self._any, self._late)
            self._release_done()
            if isinstance(found, Frame):
                yield found
            elif (item := next(items, None)) is not None:
                self.send(item)
            else:
                break
        self.drain()
        yield from self

    def _output_or_room(self) -> Frame | bool | None:
        with self._turn:
            room = self._has_room()
            found = self._take()
            return found if isinstance(found, Frame) else room or None

    @staticmethod
    def _room() -> int:
        return select.POLLOUT

    def _any(self) -> int:
        """Return the events of poll(2) to wait for; after the last frame POLLIN is always set."""
        return select.POLLPRI if self._last else select.POLLIN | select.POLLOUT | select.POLLPRI

    def _take(self) -> Frame | _End | None:
        with self._turn:
            self.check_open()
            self._reclaim()
            self._push_dropped()
            while not self._ended:
                self._read_events()
                if self._draining and not self._started:
                    self._ended = True
                elif self._ring is None:
                    if not self._changed:
                        return None
                    self._make_outputs()
                elif self._last:
                    if self._changed:
                        self._retire()
                    elif self._draining:
                        self._ended = True
                    else:
                        return None  # an event follows
                elif (frame := self._take_frame(self._ring)) is not None:
                    return frame
                elif self._draining and self._counts and self._balance <= 0:
                    self._ended = True
                elif not self._last:
                    return None
            return _End.END

    def _take_frame(self, ring: Ring) -> Frame | None:
        try:
            filled = ring.take()
        except BrokenPipeError:
            self._last = True
            return None
        if filled is None:
            return None
        self._last = filled.last
        if filled.last and not any(nbytes for _, nbytes in filled.spans):
            ring.dropped.add(filled.number)
            return None
        self._balance -= 1
        assert self.format is not None

        def give_back(index: int) -> None:
            if not self.forked:
                ring.give_back(index)

        row = ring.rows[filled.number]
        return Frame(self.path, self.format, row, filled, 0, give_back, ring.dropped.add)

    def _push_dropped(self) -> None:
        for ring in self._old:
            ring.push_dropped()
        self._old = [ring for ring in self._old if not ring.released]
        if self._ring is not None:
            self._ring.push_dropped()

    def _subscribe(self) -> None:
        raw = self._node.raw
        wanted = raw.v4l2_event_subscription(type=raw.EventType.SOURCE_CHANGE)
        fixes = {errno.EINVAL: "it reports no formats of streams; only stateful decoders work here"}
        self._node.call("SUBSCRIBE_EVENT", wanted, "open the decoder", fixes)

    def _read_events(self) -> None:
        if self.kind != "decoder":
            return
        event = self._node.raw.v4l2_event()
        while True:
            try:
                self._node.call("DQEVENT", event, "read an event")
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN):  # no event
                    return
                raise
            if event.type == self._node.raw.EventType.SOURCE_CHANGE:
                self._changed = True

    def _make_outputs(self) -> None:
        """Make the buffers of what comes out, in the format that the driver has now."""
        if self.kind == "decoder" and self._wanted is not None:
            self._out.set_format(self._wanted, None, None)
        form = self._out.format()
        ring = Ring(self._out, form, self._timeout, self._turn)
        try:
            ring.make(self._outputs + self._least(), None, *self._memory)
            ring.push_all()
            self._out.on()
        except BaseException:
            ring.end()
            ring.release()
            raise
        self._ring, self.format = ring, form
        self._changed = self._last = False
        if self._draining:
            self._send_stop()

    def _least(self) -> int:
        """Return how many buffers the driver needs for itself, 0 if it reports none."""
        asked = self._node.raw.v4l2_control(id=self._node.raw.ControlID.MIN_BUFFERS_FOR_CAPTURE)
        with suppress(OSError):
            return max(0, int(self._node.call("G_CTRL", asked, "ask for the least").value))
        return 0

    def _retire(self) -> None:
        """Stop what comes out, for another format; frames that are held keep their memory."""
        if self._ring is not None:
            self._ring.retire()
            self._old.append(self._ring)
            self._ring = None

    # -- the end of a stream

    def drain(self) -> None:
        """State that no input follows. The iteration ends after the last output."""
        with self._turn:
            self.check_open()
            if not self._draining:
                self._draining = True
                if self._started and self._ring is not None:
                    self._send_stop()

    def _send_stop(self) -> None:
        raw = self._node.raw
        decoder = self.kind == "decoder"
        name = "DECODER_CMD" if decoder else "ENCODER_CMD"
        command = (raw.v4l2_decoder_cmd if decoder else raw.v4l2_encoder_cmd)(cmd=_STOP)
        try:
            self._node.call(name, command, "drain")
        except OSError as error:
            if error.errno == errno.ENOTTY:
                self._counts = True
            elif error.errno != errno.EBUSY:  # it drains already, and goes on after a new format
                raise

    def flush(self) -> None:
        """Discard the inputs and outputs that the driver has. The next input begins a new stream.

        Frames that are held stay valid.
        """
        with self._turn:
            self.check_open()
            self._restart()
        self._release_done()

    def _restart(self) -> None:
        self._into.off()
        for index in list(self._queued):
            self._take_back(index)
        self._started = self._draining = self._ended = self._last = False
        self._balance = 0
        if self._ring is None:
            return
        if self._changed:
            self._retire()
            self._changed = False
            return
        mine = self._ring.off()
        for index in mine:
            self._ring.push(index)
        self._out.on()

    def _stop(self) -> None:
        if self._ring is not None:
            self._ring.end()
        with suppress(OSError):  # ENODEV: the device is gone
            self._into.off()
        with suppress(OSError):
            self._into.request(0, "DMABUF")

    def _release(self) -> None:
        if self.forked:
            self._queued.clear()
            self._done.clear()
        for index in list(self._queued):
            self._take_back(index)
        rings = [*self._old, *([self._ring] if self._ring is not None else [])]
        first: BufferError | None = None
        for close in (
            *(ring.release for ring in rings),
            *(buffer.close for row in self._own.values() for buffer in row),
        ):
            try:
                close()
            except BufferError as error:
                first = first or error
        self._release_done()
        if first is not None:
            raise first

    # -- errors and facts

    @property
    def buffers(self) -> tuple[tuple[Buffer, ...], ...]:
        """The buffers of the outputs, one for each plane; empty while their format is unknown."""
        with self._turn:
            return self._ring.rows if self._ring is not None else ()

    @property
    def visible(self) -> tuple[int, int, int, int] | None:
        """The part of an output picture to show: left, top, width, height, in pixels.

        Coded sizes are multiples of a block. None where the driver has no such rectangle.
        """
        raw = self._node.raw
        self.check_open()
        chosen = raw.v4l2_selection(
            type=raw.BufType.VIDEO_CAPTURE, target=raw.SelectionTarget.COMPOSE
        )
        with suppress(OSError):
            rect = self._node.call("G_SELECTION", chosen, "ask for the visible part").r
            return rect.left, rect.top, rect.width, rect.height
        return None

    def _full(self) -> OSError:
        text = f"wait for an input to become free: none did within {self._timeout:g} s; "
        return os_error(errno.ETIMEDOUT, text + self._advice("take the outputs"), self.path)

    def _late(self) -> OSError:
        text = f"wait for an output: none came within {self._timeout:g} s; "
        return os_error(errno.ETIMEDOUT, text + self._advice("send() more"), self.path)

    def _advice(self, usual: str) -> str:
        if self._ring is not None and not self._ring.waits and not self._last:
            return "all outputs are held: release() them, or ask for more"
        if self._ring is None and not self._changed and self._draining:
            return "the stream has no header that the driver knows"
        if self._draining:
            return "the driver does not go on; flush() or close() it"
        return usual if self._queued or usual != "send() more" else "send() inputs, or drain()"

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.input_format} to {self.format or 'unknown'}"
        return f"<dmabuf.Codec {self.path} {self.card!r} {self.kind}, {state}>"
