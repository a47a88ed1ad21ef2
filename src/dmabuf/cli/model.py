"""`dmabuf model`: the models that the processes of a host share."""

from __future__ import annotations

import errno
import os
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from dmabuf import safetensors
from dmabuf.cli import output
from dmabuf.cli.parser import Command, Parser, report
from dmabuf.safetensors import SharedModel
from dmabuf.sizes import format_size
from dmabuf.store import Store, connect


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of `dmabuf model load`."""

    name: str
    """Of its buffer in the store."""
    tensors: int
    nbytes: int
    """Memory, in bytes."""
    read: int
    """Bytes read from the files: 0 where the store had the model already."""
    seconds: float
    routes: list[str]
    """The route of each file that was read."""
    format: Literal["dmabuf-model-load/1"] = "dmabuf-model-load/1"


@dataclass(frozen=True, slots=True)
class Models:
    """The result of `dmabuf model ls`."""

    models: list[SharedModel]
    format: Literal["dmabuf-model-ls/1"] = "dmabuf-model-ls/1"


def _load(args: Namespace) -> None:
    begun = time.monotonic()
    with output.Progress(args.progress) as progress:
        model = safetensors.load(
            args.models[0] if len(args.models) == 1 else args.models,
            framework="np",
            shared=True if args.socket is None else args.socket,
            progress=lambda done, total: progress.show("loading", done, total),
        )
    seconds = time.monotonic() - begun
    read = sum(one.nbytes for one in model.transfers)
    routes = [str(one.route.value) for one in model.transfers]
    name, nbytes = str(model.buffer.name), model.buffer.size
    if args.json:
        output.say_json(Loaded(name, len(model), nbytes, read, seconds, routes))
    elif not args.quiet and model.transfers:
        how = ", ".join(dict.fromkeys(routes))
        told = f"{output.decimal(read)} in {seconds:.2f} s, {output.decimal(read / seconds)}/s"
        output.say(f"{name}: {told}: read {how}")
    elif not args.quiet:
        output.say(f"{name}: in the store already, {format_size(nbytes)}")


def _ls(args: Namespace) -> None:
    with connect(args.socket) as store:
        found = safetensors.shared_models(store)
    if args.json:
        output.say_json(Models(found))
        return
    for one in found:
        in_use = {True: "in use", False: "unused", None: "unknown"}[one.in_use]
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.used_ns / 1e9))
        more = f" and {len(one.paths) - 1} more" if len(one.paths) > 1 else ""
        output.say(f"{one.name}  {one.nbytes:>12}  {in_use:<7}  {used}  {one.paths[0]}{more}")


def _rm(args: Namespace) -> int:
    with connect(args.socket) as store:
        return _remove(store, args)


def _remove(store: Store, args: Namespace) -> int:
    """Remove models; one that cannot be removed does not keep the others."""
    found, failed = safetensors.shared_models(store), 0
    wanted: dict[str, SharedModel | None] = {}
    for word in args.models:
        words = {word, os.path.abspath(word)}  # a path may be relative, a URL is as it is
        matching: dict[str, SharedModel | None] = {
            one.name: one for one in found if words & {one.name, *_places(one.paths)}
        }
        wanted |= matching or {word: None}
    for name, model in wanted.items():
        try:
            if model is None:
                raise FileNotFoundError(errno.ENOENT, "the store has no such model", name)
            if model.in_use is not False and not args.force:
                text = "a process has it; pass force=True to leave it to the process"
                raise OSError(errno.EBUSY, text, model.paths[0])
            store.remove(name, number=model.number)
        except ConnectionError:
            raise
        except OSError as problem:
            report(problem, args.json)
            failed = output.FAILED
    return failed


def _places(paths: tuple[str, ...]) -> set[str]:
    """Return the files, and the directory that has all of them."""
    return {*paths, os.path.dirname(paths[0])} if paths else set()


def _load_arguments(parser: Parser) -> None:
    text = "Files of one model, its index, or its directory; URLs for those of other nodes."
    parser.add_argument("models", metavar="FILE", nargs="+", help=text)
    parser.shared("socket", "json", "progress", "quiet")


def _ls_arguments(parser: Parser) -> None:
    parser.shared("socket", "json")


def _rm_arguments(parser: Parser) -> None:
    text = "A name, one of the files or their URLs, or their directory."
    parser.add_argument("models", metavar="MODEL", nargs="+", help=text)
    parser.flag("-f --force", "Remove a model that is in use; its programs keep the memory.")
    parser.shared("socket", "json")


_ACTIONS = {
    "load": Command(
        "Load a model into the store, which is started if none is running.", _load_arguments, _load
    ),
    "ls": Command(
        "List the models: name, bytes of memory, whether in use, when last, file.",
        _ls_arguments,
        _ls,
    ),
    "rm": Command("Remove models, and give their memory back.", _rm_arguments, _rm),
}


def _arguments(parser: Parser) -> None:
    actions = parser.add_subparsers(
        metavar="ACTION", dest="action", required=True, parser_class=Parser, title="actions"
    )
    for name, command in _ACTIONS.items():
        actions.add_parser(name, help=command.help, command=command)


def _model(args: Namespace) -> int | None:
    return _ACTIONS[args.action].run(args)


MODEL = Command(
    """\
Load a model once for all processes of this user, list such models, or remove them.

Each process that calls dmabuf.safetensors.load(FILE, shared=True) has the same memory, which nobody
can write. `dmabuf model load --help` has the options of `load`.""",
    _arguments,
    _model,
    """\
  dmabuf model load model.safetensors
  dmabuf model ls --json
  dmabuf model rm --force model.safetensors""",
)
