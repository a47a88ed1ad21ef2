"""`import dmabuf` costs little, and its names are loaded at first use."""

import ast
import pickle
from pathlib import Path

import pytest

import dmabuf
from tests.support import in_child

ROOT = Path(dmabuf.__file__).parent

SLOW = {"asyncio", "cffi", "ctypes", "logging", "numpy", "pathlib", "rich", "shutil", "subprocess"}
SLOW |= {"importlib.metadata", "socket", "ssl", "tempfile", "typer", "urllib"}
AT_USE = {"collections", "contextlib", "dataclasses", "enum", "functools", "importlib", "inspect"}
AT_USE |= {"re", "threading", "typing", "warnings", "weakref"}

_LOADED = """
import sys
before = set(sys.modules)
import dmabuf
{use}
print(*sorted(set(sys.modules) - before))
"""


def loaded(use=""):
    """The modules that `import dmabuf` and then `use` load."""
    return set(in_child(_LOADED.format(use=use)).split())


def test_import_dmabuf_loads_next_to_nothing():
    found = loaded()
    ours = {name for name in found if name.startswith("dmabuf")}
    assert ours == {"dmabuf", "dmabuf._ext", "dmabuf._ext.lib", "dmabuf._core", "dmabuf.errors"}
    assert not found & (SLOW | AT_USE)


@pytest.mark.parametrize(
    ("use", "without"),
    [
        ("dmabuf.allocate(4096).close()", {"dmabuf.transfer", "dataclasses"}),
        ("dmabuf.open('/dev/null').close()", {"dmabuf.copying", "queue"}),
    ],
)
def test_what_is_used_first_loads_what_it_needs(use, without):
    found = loaded(use)
    assert "dmabuf.memory.buffer" in found
    assert not found & (SLOW | without)


_AFTERWARDS = """
import sys
from dmabuf import *
before = set(sys.modules)
with allocate(8192, exporter="memfd") as buffer, open(sys.argv[1], "r+") as file:
    file.read_into(buffer)
    file.write_from(buffer, 4096, sync=True)
    copy(buffer, file)
print(*sorted(set(sys.modules) - before))
"""


def test_what_was_named_needs_no_imports_afterwards(tmp_path):
    """So a program can load it all before it gives up its rights or changes its root."""
    (tmp_path / "file").write_bytes(bytes(8192))
    assert in_child(_AFTERWARDS, tmp_path / "file").split() == []


_AT_ONCE = """
import sys, threading
import dmabuf
names, start, found = dmabuf.__all__ * 4, threading.Barrier(4 * len(dmabuf.__all__)), []
def ask(name):
    start.wait()
    found.append((name, getattr(dmabuf, name)))
threads = [threading.Thread(target=ask, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(name for name, _ in found) == sorted(names), found
assert all(thing is getattr(dmabuf, name) for name, thing in found)
"""


def test_many_threads_ask_for_names_at_once():
    in_child(_AT_ONCE)


_REFUSED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "dmabuf._ext":
            raise ImportError(sys.argv[1], name=sys.argv[2])
sys.meta_path.insert(0, Finder())
try:
    import dmabuf
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("error", "name", "says"),
    [
        ("No module named 'dmabuf._core'", "dmabuf._ext", "the C core is not built: run `pip"),
        (
            "module _cffi_backend does not support loading in subinterpreters",
            "_cffi_backend",
            "cffi does not work in an isolated subinterpreter: use a process",
        ),
        ("No module named '_cffi_backend'", "_cffi_backend", "the C core cannot be loaded: No mod"),
    ],
)
def test_a_core_that_cannot_be_loaded_states_why(error, name, says):
    assert f"import dmabuf: {says}" in in_child(_REFUSED, error, name)


def test_names_for_type_checkers_are_those_at_run_time():
    """What is imported under TYPE_CHECKING, and so what an IDE and mypy see, is what is found."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    (block,) = (node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"dmabuf.{room}" for room, names in dmabuf._ROOMS.items() for name in names}
    assert homes == seen


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'dmabuf' has no attribute 'unnamed'"):
        dmabuf.unnamed  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'unnamed' from 'dmabuf'"):
        from dmabuf import unnamed  # noqa: F401


def test_dir_lists_names_before_they_are_loaded():
    listed = in_child("import dmabuf; print(*dir(dmabuf))").split()
    assert set(dmabuf.__all__) | {"__all__", "__doc__", "errors"} <= set(listed)
    assert listed == sorted(set(listed))


@pytest.mark.parametrize("name", dmabuf.__all__)
def test_public_names_can_be_pickled(name):
    thing = getattr(dmabuf, name)
    assert pickle.loads(pickle.dumps(thing)) is thing


_SENT = """
import pickle, sys
plan = pickle.loads(bytes.fromhex(sys.argv[1]))
import dmabuf
assert type(plan) is dmabuf.Plan and plan == dmabuf.Plan(dmabuf.Route.DIRECT, "why")
"""


def test_a_record_goes_to_another_process():
    in_child(_SENT, pickle.dumps(dmabuf.Plan(dmabuf.Route.DIRECT, "why")).hex())


def test_all_is_what_there_is():
    for name in dmabuf.__all__:
        assert getattr(dmabuf, name) is not None
    assert sorted(dmabuf.__all__) == list(dmabuf.__all__)


def test_every_public_name_has_a_docstring():
    for name in dmabuf.__all__:
        thing = getattr(dmabuf, name)
        assert thing.__doc__, name
        if isinstance(thing, type) and not issubclass(thing, BaseException):
            for member, value in vars(thing).items():
                if not member.startswith("_") and callable(value):
                    assert value.__doc__, f"{name}.{member}"
