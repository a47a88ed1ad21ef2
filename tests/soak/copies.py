"""The soak's copies: between targets, memories, pipes."""

import os
import threading
from typing import TYPE_CHECKING, Any

import dmabuf
from dmabuf import RouteUnavailable
from tests.soak.world import LIMIT, noise

if TYPE_CHECKING:
    from tests.soak.work import Soak


def copy(soak: "Soak") -> int:
    """Copy between two random ends."""
    dice = soak.dice
    return dice.choice([_to_target, _to_target, _to_memory, _from_memory, _from_pipe, _to_pipe])(
        soak
    )


def _how(soak: "Soak") -> dict[str, Any]:
    dice = soak.dice
    return {
        "block_size": dice.choice([4096, "64KiB", "1MiB"]),
        "blocks": dice.choice([1, 2, 4]),
        "exporter": dice.choice([name for name in ("auto", "memfd", "system") if _has(soak, name)]),
        "require": dice.choice(["any", "any", "any", "uncached"]),
    }


def _has(soak: "Soak", exporter: str) -> bool:
    return exporter != "system" or "dma-heap" in soak.exporters


def _write_range(soak: "Soak", target: Any, most: int) -> tuple[int, int]:
    """Return (offset, size) to write to a target, in whole blocks if it needs them."""
    offset = soak.near(LIMIT)
    size = min(soak.near(most), LIMIT - offset)
    return offset // target.block * target.block, size // target.block * target.block


def _carry(soak: "Soak", *ends: Any, **how: Any) -> bool:
    try:
        dmabuf.copy(*ends, **how)
    except RouteUnavailable:
        assert how.get("require", "any") != "any"
        soak.counts["no route"] += 1
        return False
    return True


def _to_target(soak: "Soak") -> int:
    source, target = soak.dice.sample(soak.targets, 2)
    offset, size = _write_range(soak, target, 256 << 10)
    src = soak.near(max(0, len(source.model) - size))
    size = min(size, len(source.model) - src) // target.block * target.block
    how = _how(soak) | {"src_offset": src, "dst_offset": offset, "size": size}
    if _carry(soak, source.path, soak.file(target), **how):
        target.put(source.model[src : src + size], offset)
    target.check((source.name, target.name, how), offset, size)
    return 1


def _to_memory(soak: "Soak") -> int:
    source, memory = soak.pick()
    start = soak.near(memory.size - 1)
    src = soak.near(len(source.model))
    size = min(memory.size - start, len(source.model) - src)
    memory.put(noise(soak.dice, size), start)
    how = {"src_offset": src, "dst_offset": start, "size": size}
    assert _carry(soak, soak.file(source), memory.buffer, **how)
    memory.model[start : start + size] = source.model[src : src + size]
    memory.check((source.name, how))
    return 1


def _from_memory(soak: "Soak") -> int:
    target, memory = soak.pick()
    offset, size = _write_range(soak, target, memory.size)
    start = soak.near(memory.size - size)
    how = {"src_offset": start, "dst_offset": offset, "size": size}
    memory.put(data := noise(soak.dice, size), start)
    assert _carry(soak, memory.buffer, soak.file(target), **how)
    target.put(data, offset)
    target.check((target.name, how), offset, size)
    memory.check((target.name, how))
    return 1


def _from_pipe(soak: "Soak") -> int:
    """Copy from a pipe that another thread fills with more than it holds."""
    target = soak.dice.choice(soak.targets)
    offset, size = _write_range(soak, target, 200_000)
    data = noise(soak.dice, size)
    ends = os.pipe()

    def feed() -> None:
        with open(ends[1], "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    how = _how(soak) | {"require": "any", "dst_offset": offset}
    assert _carry(soak, ends[0], soak.file(target), **how)
    thread.join()
    os.close(ends[0])
    target.put(data, offset)
    target.check((target.name, how), offset, size)
    return 1


def _to_pipe(soak: "Soak") -> int:
    source = soak.dice.choice(soak.targets)
    src = soak.near(len(source.model))
    size = min(len(source.model) - src, 200_000)
    ends = os.pipe()
    got: list[bytes] = []

    def drain() -> None:
        with open(ends[0], "rb") as pipe:
            got.append(pipe.read())

    thread = threading.Thread(target=drain)
    thread.start()
    how = _how(soak) | {"require": "any", "src_offset": src, "size": size}
    try:
        assert _carry(soak, soak.file(source), ends[1], **how)
    finally:
        os.close(ends[1])
        thread.join()
    assert got == [source.model[src : src + size]]
    return 1
