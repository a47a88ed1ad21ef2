"""The rules of the package's rooms: floors, faces, sizes, and what `import dmabuf` costs.

CONTRIBUTING.md describes them. A room is a folder of src/dmabuf, or one of the files on floor 0.
"""

import ast
import re
from pathlib import Path

import pytest

import dmabuf
from tests.support import in_child, pattern

ROOT = Path(dmabuf.__file__).parent
REPOSITORY = Path(__file__).parents[2]

FLOORS = {
    "errors": -1,  # which _core raises; all four are floor 0
    "_exporter": 0,  # compiled
    "sizes": 0,
    "_core": 0,
    "kernel": 1,
    "memory": 2,
    "transfer": 3,
    "aio": 4,
    "copying": 4,
    "safetensors": 5,
    "formats": 5,
    "devices": 5,
    "store": 5,
    "mount": 5,
    "inspect": 5,
    "integrations": 5,
    "compat": 5,
    "remote": 5,
    "ray": 5,
    "cli": 6,
}
PUBLIC = {
    "store", "safetensors", "formats", "devices", "aio", "integrations", "compat", "remote", "ray",
}  # fmt: skip
"""Rooms that users import by name. Above floor 4 they may be used beside each other."""
BESIDE = {
    ("mount", "store"), ("aio", "copying"), ("inspect", "devices"), ("inspect", "store"),
    ("safetensors", "devices"), ("safetensors", "store"), ("integrations", "store"),
    ("safetensors", "remote"), ("remote", "store"), ("ray", "remote"), ("ray", "integrations"),
    ("integrations", "remote"),
    ("integrations", "safetensors"),
}  # fmt: skip
"""Rooms that use another room of their own floor, never the other way round."""


def rooms():
    """Yield each source file and its room; the package's own face is the room ""."""
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        yield path, "" if path == ROOT / "__init__.py" else first.removesuffix(".py")


FILES = [pytest.param(path, room, id=str(path.relative_to(ROOT))) for path, room in rooms()]


def imports(path):
    """Yield the modules of the package that a file imports anywhere, TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("dmabuf"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "dmabuf":
                yield from (
                    f"dmabuf.{alias.name}" for alias in node.names if alias.name != "__version__"
                )
            elif node.module and node.module.startswith("dmabuf."):
                yield node.module


@pytest.mark.parametrize(("path", "room"), FILES)
def test_a_room_imports_from_the_floors_below_through_their_faces(path, room):
    if room == "":
        assert not any(name.startswith("dmabuf.cli") for name in imports(path))
        return
    assert room in FLOORS, f"{room} has no floor: name it here and in CONTRIBUTING.md"
    for name in imports(path):
        _, other, *inside = f"{name}.".rstrip(".").split(".")
        if other == room or name == "dmabuf._ext":
            continue
        assert other in FLOORS, f"{path.name} imports {name}, which is not a room"
        below = FLOORS[other] < FLOORS[room] or (room, other) in BESIDE
        assert below, f"{path.name} imports {name}, which is not below {room}"
        public_module = other == "devices" and len(inside) == 1
        assert not inside or public_module, f"{path.name} imports {name} past the face of {other}"


@pytest.mark.parametrize("room", [room for room in FLOORS if (ROOT / room).is_dir()])
def test_the_files_of_a_room_import_each_other_in_one_direction(room):
    graph = {}
    for path in (ROOT / room).rglob("*.py"):
        name = ".".join(("dmabuf", *path.relative_to(ROOT).with_suffix("").parts))
        used = {other for other in imports(path) if other.startswith(f"dmabuf.{room}")}
        graph[name.removesuffix(".__init__")] = used - {f"dmabuf.{room}"}
    while graph:
        leaves = {name for name, used in graph.items() if not used & graph.keys()}
        assert leaves, f"an import cycle among {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in leaves}


@pytest.mark.parametrize("room", [room for room in FLOORS if (ROOT / room).is_dir()])
def test_a_face_says_what_the_room_is_for_and_lists_its_names(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    assert len(ast.get_docstring(tree) or "") > 100
    if room not in ("cli", "devices"):
        assert any(
            isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(node)
            for node in ast.walk(tree)
        )


@pytest.mark.parametrize(("path", "room"), FILES)
def test_no_file_is_longer_than_800_lines(path, room):
    assert len(path.read_text().splitlines()) <= 800


def test_the_same_holds_of_the_core_and_the_tests():
    sources = [*(REPOSITORY / "csrc").rglob("*.[ch]"), *(REPOSITORY / "tests").rglob("*.py")]
    assert sources
    for path in sources:
        assert len(path.read_text().splitlines()) <= 800, path


def refusals(path):
    """Yield the texts of the ValueErrors and Refusals of a file; `...` for what is filled in."""
    places = {"ValueError": 0, "Refusal": 1}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and (name := getattr(node.func, "id", "")) in places:
            for text in node.args[places[name] :][:1]:
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "..." for part in parts
                )


@pytest.mark.parametrize(("path", "room"), FILES)
def test_invalid_arguments_are_refused_in_one_form(path, room):
    """The form is `invalid NAME VALUE: use what is valid`."""
    for text in refusals(path):
        assert not re.search(r"(^|invalid )[a-z_.]+=\.\.\.:", text), text
        assert not re.search(r"(is|are) needed$", text), text
        if text.startswith("invalid "):
            assert "use " in text or text.endswith(": ..."), text


def test_only_one_module_imports_the_core():
    for path, _ in rooms():
        if path.name != "_core.py":
            assert "_ext" not in {name.split(".")[1] for name in imports(path) if "." in name}, path


def test_the_lab_and_the_core_stand_alone():
    for path in (REPOSITORY / "lab").glob("*.py"):
        assert not list(imports(path)), path
    for path in (REPOSITORY / "csrc").glob("*.[ch]"):
        assert "Python.h" not in path.read_text(), path


# -- what a steady transfer costs

_CALLS = """
import sys
from pathlib import Path
import dmabuf
size, path = int(sys.argv[1]), sys.argv[2]
root = str(Path(dmabuf.__file__).parent)
calls = []
def profile(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith((root, "<string>")):
        calls.append((frame.f_code.co_filename, frame.f_code.co_name))
with dmabuf.allocate(size) as buffer, dmabuf.open(path) as file:
    for _ in range(3):
        record = file.read_into(buffer, size)
    sys.setprofile(profile)
    file.read_into(buffer, size)
    sys.setprofile(None)
assert record.route == "direct", record
print(len(calls), len({file for file, _ in calls if file != "<string>"}))
"""


@pytest.mark.parametrize(("size", "most", "files"), [(64 << 20, 25, 5), (4096, 6, 5)])
def test_a_steady_read_makes_few_python_calls(tmp_path, size, most, files):
    path = tmp_path / "file"
    path.write_bytes(pattern(size, 1))
    calls, seen = map(int, in_child(_CALLS, str(size), path).split())
    assert calls <= most
    assert seen <= files
