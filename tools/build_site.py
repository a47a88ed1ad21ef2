"""Build the documentation site in build/site, from docs/, the examples and the code: `make docs`.

Pages of the site are those of docs/, the project's own pages, one for each example, and the
reference of Python. The site generator reads docstrings through the extension at the end.
"""

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
PUBLIC = [
    "dmabuf",
    *(
        f"dmabuf.{room}"
        for room in ("aio", "safetensors", "formats", "store", "remote", "mount", "inspect", "ray")
    ),
    *(f"dmabuf.{room}" for room in ("remote.aio", "integrations", "compat.kvikio")),
    *(
        f"dmabuf.devices.{kind}"
        for kind in (
            "v4l2",
            "codec",
            "drm",
            "vaapi",
            "vulkan",
            "cuda",
            "hip",
            "level_zero",
            "vfio",
            "block",
        )
    ),
]
"""The modules whose `__all__` is the public interface."""
WITHOUT_HEADING = "    options:\n      show_root_heading: false\n"


def main() -> None:
    """Write the pages, build the site, and check that the reference is complete."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    places = {path: path.removeprefix("docs/") for path in found("docs/**/*.*")}
    places |= {path: f"project/{path}" for path in found("[A-Z]*.md")}
    places |= {"README.md": "index.md", "lab/README.md": "project/lab.md"}
    places["examples"] = "examples.md"
    places |= {path: f"{path.removesuffix('.py')}.md" for path in found("examples/*.py")}
    for source, place in places.items():
        of_site = source.endswith(".md") or source.startswith("examples/")
        if of_site and source != "README.md":
            text = (ROOT / source).read_text()
            if source.endswith(".py"):
                about = ast.get_docstring(ast.parse(text))
                text = f"# {Path(source).name}\n\n{about}\n\n```python\n{text}```\n"
            write(place, with_links(text, source, places))
    for module in PUBLIC:
        write(f"reference/api/{module}.md", f"# {module}\n\n::: {module}\n{WITHOUT_HEADING}")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=ROOT, check=True)
    for module in PUBLIC:
        page = (SITE / f"reference/api/{module}.html").read_text()
        if missing := [
            name for name in public_names(module) if f'id="{module}.{name}"' not in page
        ]:
            sys.exit(f"the reference of {module} lacks {', '.join(missing)}")


def found(pattern: str) -> list[str]:
    """Return the paths of the project that match, relative to its root."""
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]


def write(place: str, text: str) -> None:
    """Write a page of the site."""
    (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / place).write_text(text)


def with_links(text: str, source: str, places: dict[str, str]) -> str:
    """Turn links between the project's files into links between their pages."""

    def replace(match: re.Match[str]) -> str:
        text, link = match["text"], match["link"]
        if not link or re.match(r"\w+:|#", link):
            return match[0]
        path, mark, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if target not in places:  # a file that the site does not have
            return f"{text} (`{target}`)"
        place = os.path.relpath(places[target], os.path.dirname(places[source]))
        return f"[{text.removesuffix('.md')}]({place}{mark}{anchor})"

    code, link = r"^```.*?^```", r"\[(?P<text>[^\]]*)\]\((?P<link>[^)\s]+)\)"
    return re.sub(f"{code}|{link}", replace, text, flags=re.M | re.S)


def public_names(module: str) -> list[str]:
    """Return the public names of a module."""
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{path} has no __all__")


def function_at(pkg: griffe.Module, path: str) -> griffe.Function | None:
    """Return the function of the package at a path, or None."""
    try:
        function = pkg[path.removeprefix("dmabuf.")]
    except KeyError:
        return None
    return function if isinstance(function, griffe.Function) else None


class Code(griffe.Extension):
    """Lets the reference find what the package defines in one place and shows in another."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: object) -> None:
        """Make links of the cross-references in a docstring, such as :func:`open`."""
        if not obj.is_alias and obj.docstring:
            text = obj.docstring.value.replace("``", "`")
            text = re.sub(r":\w+:(`(?:io|os)\.\w+`)", r"\1", text)
            obj.docstring.value = re.sub(r":\w+:`([\w.]+)`", r"[`\1`][\1]", text)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Put functions where they are used.

        `from room.name import name` is the function, though the room has a module of that name,
        and `name = module.name` in a class is a method.
        """
        for room in pkg.modules.values():
            for name, module in list(room.modules.items()):
                for face in (room, pkg):
                    if name in (face.exports or []) and name in module.members:
                        face.members[name] = griffe.Alias(name, module.members[name], parent=face)
                for owner in module.classes.values():
                    for attribute in list(owner.attributes.values()):
                        value = attribute.value
                        if isinstance(value, griffe.ExprAttribute) and (
                            function := function_at(pkg, value.canonical_path)
                        ):
                            method = copy.copy(function)
                            method.name, method.parent = attribute.name, owner
                            owner.members[attribute.name] = method


if __name__ == "__main__":
    main()
