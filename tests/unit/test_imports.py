"""The package's layers: imports go one way, and `import dmabuf` costs little."""

import ast
from pathlib import Path

import pytest

import dmabuf
from tests.support import in_child

ROOT = Path(dmabuf.__file__).parent

# Each layer may import what is below it, and itself where it is marked so. A new module is given
# a place here: a module without one fails the test.
LAYERS: list[set[str]] = [
    {"_core", "_log", "_process", "_sysfs", "errors", "sizes", "_uapi", "compare", "reference"},
    {"_ffi"},
    {"_mapping", "_rawfile", "fence"},
    {"buffer"},
    {"exporters"},
    {"route", "facts", "nvme"},
    {"ring"},
    {"engine"},
    {"growth", "span", "steps", "audit"},
    {"stream"},
    {"target"},
    {"lone", "transfer"},
    {"file"},
    {"_leg"},
    {"_ends"},
    {"_ahead", "_opening"},
    {"pipeline"},
    {"_waits"},
    {"_flight"},
    {"_loop"},
    {"_copying"},
    {"aio"},
    {"machine", "verify"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
WITHIN = {"exporters", "cli", "_mapping", "_rawfile", "errors", "sizes", "_uapi"}
EXCEPTIONS = {
    ("_rawfile", "buffer"),  # for a type checker only
    ("target", "lone"),  # likewise
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path, path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The modules of the package that a file names, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
            if node.module == "dmabuf":
                names = [f"dmabuf.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "dmabuf":
                yield rest.split(".")[0] if rest else ""


@pytest.mark.parametrize(
    ("path", "name"), list(modules()), ids=lambda value: getattr(value, "stem", value)
)
def test_imports_go_one_way(path, name):
    if name == "__init__":
        assert not set(imported(path)) & {"cli"}
        return
    assert name in RANK, f"{path} has no layer: give it one in {__file__}"
    for other in imported(path):
        if other not in RANK:
            # The command line may take the package's face, `dmabuf.copy` or `dmabuf.Buffer`.
            assert name in ("cli", "machine"), f"{path} imports {other!r} of the package itself"
            continue
        if other == name:
            assert name in WITHIN
            continue
        allowed = RANK[other] < RANK[name] or (name, other) in EXCEPTIONS
        allowed = allowed or (RANK[other] == RANK[name] and name in WITHIN)
        assert allowed, f"{path} imports {other}, which stands above or beside it"


def test_only_one_module_touches_the_core():
    for path, name in modules():
        source = path.read_text()
        assert name == "_ffi" or "_core" not in source, path


def test_the_lab_and_the_core_stand_alone():
    repository = Path(__file__).parents[2]
    for path in (repository / "lab").glob("*.py"):
        assert "dmabuf" not in {module.split(".")[0] for module in _top_level(path)}, path
    for path in (repository / "csrc").glob("*.[ch]"):
        assert "Python.h" not in path.read_text(), path


def _top_level(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


HEAVY = ["asyncio", "ctypes", "numpy", "rich", "shutil", "subprocess", "tempfile", "typer", "cffi"]

_LOADED = """
import sys
before = set(sys.modules)
import dmabuf
print(*sorted(set(sys.modules) - before))
"""


def test_import_dmabuf_loads_nothing_heavy():
    loaded = {name.split(".")[0] for name in in_child(_LOADED).split()}
    assert not loaded & set(HEAVY)
    assert "dmabuf" in loaded


_TIMED = """
import time
import _cffi_backend
begun = time.process_time()
import dmabuf
print(time.process_time() - begun)
"""


def test_import_dmabuf_is_quick():
    """Processor time, the best of three, with room for a slow machine; 40 ms were seen."""
    assert min(float(in_child(_TIMED)) for _ in range(3)) < 0.4


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
