"""Checkpoints: saved in the background from a snapshot, or as shards with an index."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from dmabuf.copying import Replacement, sync_folder
from dmabuf.errors import os_error
from dmabuf.memory import Buffer, allocate
from dmabuf.safetensors.files import read_index
from dmabuf.safetensors.layout import UNIT
from dmabuf.safetensors.pending import Saving, wait_for_pending
from dmabuf.safetensors.saving import Layout, replacing, write, write_image
from dmabuf.sizes import Size, parse_size, round_up
from dmabuf.transfer import Engine, Progress, Require, Terms, Transfer, part_of

_NAMELESS = 256
"""Shards that are files without a name, each an open descriptor, until all are on the medium."""


def save_async(
    tensors: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    buffer: Buffer | None = None,
    exporter: str = "auto",
    require: Require = "any",
    progress: Progress | None = None,
) -> Saving:
    """Copy tensors to a Buffer, and write the file from there in the background.

    The tensors may change as soon as this returns. A thread writes the file, which appears whole or
    not at all: after an error, or a kill at any moment, the old one is there. Saves of one path run
    one after the other, in the order of the calls, and `save` waits for those that are pending. A
    process that ends waits for its saves. An error is also logged, by the logger "dmabuf".

    Args:
        tensors: as for `save`.
        path: the file.
        metadata: as for `save`.
        force: as for `save`.
        buffer: memory for the snapshot, at least as large as the file and one page, which must not
            be used until the save has ended; None allocates it, and frees it afterwards.
        exporter: what allocates it, as for `dmabuf.allocate`.
        require: "zero-copy", "uncached" or "any", for the write from the snapshot.
        progress: called in the thread, with the bytes written and their sum. A save of the same
            path that it makes, or whose `result` it waits for, raises OSError(EDEADLK);
            `save_async` does not wait and is permitted.

    Returns:
        The handle: ``result()`` waits, ``done()`` does not.

    Raises:
        TypeError, ValueError: as `save`, and for a `buffer` that is too small.
        OSError: there is no memory for the snapshot, or the path cannot be written.
    """
    Terms(require=require)
    layout = Layout(tensors, metadata)
    saving = Saving(os.fspath(path))
    with ExitStack() as stack:
        stack.callback(saving.end)
        replacement = stack.enter_context(replacing(path, force))
        size = round_up(layout.size, UNIT)
        if buffer is None:
            buffer = stack.enter_context(allocate(size, exporter=exporter))
        elif not isinstance(buffer, Buffer):
            raise TypeError(f"save: buffer must be a dmabuf.Buffer, not {type(buffer).__name__}")
        elif buffer.size < size:
            raise ValueError(f"save: the snapshot needs {size} bytes, the buffer has {buffer.size}")
        layout.copy_to(buffer)
        buffer.hold()
        stack.callback(buffer.release)
        saving.take_turn()
        owned = deque([stack.pop_all()])
    image = partial(write_image, replacement, buffer, layout.size, require, progress)
    work = partial(_save, saving, owned, replacement, image)
    saving.thread = threading.Thread(target=work, name=f"save {saving.path}", daemon=False)
    try:
        saving.thread.start()
    except BaseException as error:  # there is no thread, or Ctrl-C
        while owned:  # unless the thread has begun
            with owned.pop():
                saving.fail(error)
        raise
    return saving


def _save(
    saving: Saving,
    owned: deque[ExitStack],
    replacement: Replacement,
    image: Callable[[], Transfer],
) -> None:
    """Write the file from the snapshot, in a thread."""
    while owned:
        with owned.pop():
            try:
                if saving.before is not None:
                    saving.before.wait()
                transfer = image()
                replacement.commit(None, sync=True)
                saving.succeed(transfer)
            except BaseException as error:
                if isinstance(error, OSError) and error.filename in (None, replacement.temporary):
                    error.filename = saving.path
                saving.fail(error)


def save_sharded(
    tensors: Mapping[str, object],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: Size = "5GiB",
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    require: Require = "any",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> tuple[Transfer, ...]:
    """Write tensors to shards with an index in a folder, or to one file if they fit into it.

    The shards are named as those of transformers: ``model-00001-of-00003.safetensors``, with
    ``model.safetensors.index.json``. They get their names when all of them are on the medium, and
    the index comes last. So a reader finds the old model or the new, also after a crash. Where the
    folder has a model of the same name, its files are removed at the end, and the new shards get
    names that it does not use. When this returns, all that is on the medium. A `save_async` of
    ``model.safetensors`` in the folder that is still pending ends first.

    Args:
        tensors: as for `save`; each shard has the next of them in this order.
        folder: made if it does not exist; its other files stay.
        max_shard_size: of the tensors of one shard, in bytes or such as "5GiB". A larger tensor has
            a shard of its own.
        name: what the names begin with; "diffusion_pytorch_model" for diffusers.
        metadata: text by text, for each shard.
        force: as for `save`.
        require: as for `save`.
        engine: as for `save`.
        progress: called with the bytes written and their sum.

    Returns:
        The records of the transfers of all shards.

    Raises:
        TypeError, ValueError: as `save`, and for an invalid size or name.
        FileExistsError: another save has written a shard of that name meanwhile.
        OSError, RouteUnavailable: as `save`; the old model is as it was.
    """
    Terms(require=require)
    most = parse_size(max_shard_size, "max_shard_size")
    if not most:
        raise ValueError("invalid max_shard_size 0: use at least one byte")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"invalid name {name!r}: use letters, digits, '-', '_' and '.'")
    groups = _groups(tensors, most)
    layouts = [Layout(group, metadata) for group in groups]
    folder = os.fspath(folder).rstrip("/") or "/"
    os.makedirs(folder, exist_ok=True)
    single, index = f"{name}.safetensors", f"{name}.safetensors.index.json"
    wait_for_pending(os.path.join(folder, single))
    stale = _stale(folder, single, index)
    names = _shard_names(folder, name, len(layouts)) if len(layouts) > 1 else [single]
    transfers: list[Transfer] = []
    total, done = sum(layout.size for layout in layouts), 0
    with ExitStack() as stack:
        shards = []
        for shard, layout in zip(names, layouts, strict=True):
            path = os.path.join(folder, shard)
            nameless = len(layouts) <= _NAMELESS
            replacement = replacing(path, force, nameless=nameless)
            shards.append((path, stack.enter_context(replacement)))
            part = part_of(progress, done, total)
            transfers += write(shards[-1][1], layout, require, engine, part)
            done += layout.size
        if len(shards) == 1:
            shards[0][1].commit(None, sync=True)
        else:
            _put_in_place(shards, os.path.join(folder, index), _index_of(names, groups), force)
            sync_folder(folder)
    stale.difference_update(names if len(names) == 1 else [*names, index])
    for one in sorted(stale, key=lambda one: one != index):  # no index without its shards
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, one))
    if stale:
        sync_folder(folder)  # a file of the old model would be read in place of the new index
    return tuple(transfers)


def _groups(tensors: Mapping[str, object], most: int) -> list[dict[str, object]]:
    """Return the tensors of each shard."""
    groups: list[dict[str, object]] = [{}]
    nbytes = 0
    for name, value in tensors.items():
        size = int(getattr(value, "nbytes", 0))  # what is not a tensor is refused later
        if groups[-1] and nbytes + size > most:
            groups.append({})
            nbytes = 0
        groups[-1][name] = value
        nbytes += size
    return groups


def _shard_names(folder: str, name: str, count: int) -> list[str]:
    """Return names for shards that the folder does not have yet."""
    for stem in (name, f"{name}-{os.urandom(4).hex()}"):
        names = [f"{stem}-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
        if not any(os.path.lexists(os.path.join(folder, one)) for one in names):
            break
    return names


def _stale(folder: str, single: str, index: str) -> set[str]:
    """Return the names of the files of the model that is in the folder."""
    found = {one for one in (single, index) if os.path.exists(os.path.join(folder, one))}
    with suppress(OSError, ValueError):
        owner = read_index(os.path.join(folder, index))
        found |= {os.path.basename(one) for one in owner.values() if os.path.dirname(one) == folder}
    return found


def _index_of(names: Sequence[str], groups: Sequence[Mapping[str, object]]) -> bytes:
    owner = {one: name for name, group in zip(names, groups, strict=True) for one in group}
    size = sum(int(getattr(value, "nbytes", 0)) for group in groups for value in group.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owner.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _put_in_place(
    shards: Sequence[tuple[str, Replacement]], index: str, content: bytes, force: bool
) -> None:
    """Give shards their names, then the index its new content; take the names back on failure."""
    named: list[str] = []
    try:
        for path, replacement in shards:
            if os.path.lexists(path):
                raise os_error(errno.EEXIST, "save: another save has written it meanwhile", path)
            replacement.commit(None, sync=False)
            named.append(path)
        sync_folder(os.path.dirname(index))
        with replacing(index, force) as replacement:
            with open(replacement.temporary, "wb") as file:
                file.write(content)
            replacement.commit(None, sync=False)
    except BaseException:
        for path in named:
            with suppress(FileNotFoundError):
                os.unlink(path)
        raise
