"""The public interface: what signatures contain, and that what a function returns is exported."""

import ast
import importlib
import inspect
import re
from typing import TypeVar

import pytest

from tests.unit.test_rooms import ROOT

MODULES = [
    "dmabuf", "dmabuf.aio", "dmabuf.safetensors", "dmabuf.formats", "dmabuf.store", "dmabuf.remote",
    "dmabuf.remote.aio", "dmabuf.inspect", "dmabuf.ray", "dmabuf.compat.kvikio",
    *(
        f"dmabuf.devices.{kind}"
        for kind in (
            "block", "codec", "cuda", "drm", "hip", "level_zero", "v4l2", "vaapi", "vfio", "vulkan",
        )
    ),
]  # fmt: skip
"""But for dmabuf.integrations, whose signatures are those of the libraries that call them."""

FOR_OTHER_ROOMS = {
    "Engine.native_refusal", "Engine.run", "Engine.start", "File.segment", "File.target",
    "RemoteFile.copy_source", "RemoteFile.copy_target",
    "ReplicaFile.copy_source", "ReplicaFile.copy_target",
}  # fmt: skip
"""Methods of public classes that other rooms call and users do not."""


def defined_names():
    """Return the names of the package's own classes, aliases of types and constants."""
    names = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                names |= {target.id} if isinstance(target, ast.Name) else set()
    return names


OWN = defined_names()


def functions(module):
    """Yield the public functions and methods of a module with their names."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for attribute in dir(value):
                found = inspect.getattr_static(value, attribute)
                found = found.fget if isinstance(found, property) else found
                found = getattr(found, "__func__", found)
                if not attribute.startswith("_") and inspect.isfunction(found):
                    yield f"{name}.{attribute}", found


def words(annotation):
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|ndarray\[Any, Any\]", "", text)
    return {one.removeprefix("typing.") for one in re.findall(r"[\w.]+", text)}


def is_foreign(name, function):
    """Return whether a name of an annotation is a type variable, or another library's."""
    value = inspect.unwrap(function).__globals__.get(name)
    return isinstance(value, TypeVar) or not getattr(value, "__module__", "dmabuf").startswith(
        "dmabuf"
    )


@pytest.mark.parametrize("module", MODULES)
def test_signatures_have_no_any_and_return_what_is_exported(module):
    face = importlib.import_module(module)
    exported = {*face.__all__, *importlib.import_module("dmabuf").__all__}
    wrong = []
    for name, function in functions(face):
        signature = inspect.signature(function)
        for one in signature.parameters.values():
            if one.kind is one.VAR_KEYWORD or "Any" in words(one.annotation):
                wrong.append(f"{name}({one})")
        hidden = (words(signature.return_annotation) & (OWN | {"Any"})) - exported
        wrong += [f"{name} returns {one}" for one in hidden if not is_foreign(one, function)]
    assert not [one for one in wrong if re.match(r"[\w.]+", one)[0] not in FOR_OTHER_ROOMS]


@pytest.mark.parametrize("name", ["copy", "read_files", "write_files"])
def test_functions_for_event_loops_have_the_same_arguments(name):
    ours, theirs = (importlib.import_module(one) for one in ("dmabuf.aio", "dmabuf"))
    of_ours = inspect.signature(getattr(ours, name)).parameters
    of_theirs = inspect.signature(getattr(theirs, name)).parameters
    assert [str(one) for one in of_ours.values()] == [str(one) for one in of_theirs.values()]
