"""The documentation: its links lead somewhere, and its code and commands use names that exist."""

import ast
import functools
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from dmabuf import errors, safetensors
from dmabuf.cli import COMMANDS
from tests.guards import needs
from tests.pages import PAGES, header_of_model
from tests.support import run
from tests.unit.command import dmabuf as command

ROOT = Path(__file__).parents[2]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, *languages):
    """The code blocks of a page in one of the languages."""
    text = page.read_text()
    return [
        block
        for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
        if language in languages
    ]


@functools.cache
def anchors(page):
    """The anchors of a page's headings, by GitHub's rule."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages
def test_every_link_within_the_project_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def lines_of(room):
    """Return the lines of what a row of CONTRIBUTING.md's table of sizes is about."""
    if room == "tests":
        folders, endings = ["tests"], "*.py"
    elif room == "csrc without tests":
        folders, endings = ["csrc", "csrc/python"], "*.[ch]"
    else:
        names = room.replace("floor 0", "_core errors sizes").replace(",", "").split()
        folders, endings = [f"src/dmabuf/{name}" for name in names if name != "and"], "*.py"
    found = [Path(f"{ROOT / folder}.py") for folder in folders]
    for folder in folders:
        every = (ROOT / folder).glob if folder.startswith("csrc") else (ROOT / folder).rglob
        found += every(endings)
    return sum(len(path.read_text().splitlines()) for path in found if path.exists())


def test_the_sizes_of_rooms_are_right_within_a_twentieth():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([\w, ]+?) \| (?:none|[\d,]+) \| ([\d,]+) \| \S", page, re.M)
    assert len(rows) == 15
    for room, stated in rows:
        assert int(stated.replace(",", "")) == pytest.approx(lines_of(room), rel=0.05), room


def test_every_page_is_in_the_navigation_of_the_site_and_in_the_index():
    folder = ROOT / "docs"
    nav, index = (ROOT / "mkdocs.yml").read_text(), (folder / "index.md").read_text()
    pages = re.findall(r" (\S+\.md)$", nav, re.M)
    assert len(pages) == len(set(pages)), "a page is there twice"
    for path in folder.rglob("*.md"):
        page = path.relative_to(folder).as_posix()
        assert f" {page}\n" in nav, page
        assert page == "index.md" or f"({page})" in index, page


def test_the_description_of_the_package_has_no_links_into_the_source():
    text = importlib.metadata.metadata("dmabuf").get_payload()
    assert "docs/getting-started.md" in text
    assert not re.search(r"\]\((?!https?:)", text)


def source(block):
    """The Python source of a block; of a session, what follows the prompts."""
    lines = block.splitlines()
    if any(line.startswith(">>> ") for line in lines):
        lines = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    return "\n".join(lines)


def chain(node):
    """The names of `a.b.c`, or None for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        front = chain(node.value)
        return front and (*front, node.attr)
    return None


def find(path):
    """The object with a dotted path; AttributeError or ImportError if there is none."""
    found = importlib.import_module(path[0])
    for index, name in enumerate(path[1:], start=1):
        try:
            if not hasattr(found, name):
                importlib.import_module(".".join(path[: index + 1]))
        except ModuleNotFoundError:
            if name in found.__all__:  # a plug-in of a library that is not installed
                return None
            raise
        found = getattr(found, name)
    return found


@pages
def test_every_name_of_the_package_in_python_code_exists(page):
    for block in blocks(page, "python", "pycon", "py"):
        known = {"dmabuf": ("dmabuf",)}
        tree = ast.parse(source(block))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmabuf"):
                for alias in node.names:
                    path = (*node.module.split("."), alias.name)
                    find(path)
                    known[alias.asname or alias.name] = path
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("dmabuf") and alias.asname:
                        known[alias.asname] = tuple(alias.name.split("."))
        for node in ast.walk(tree):
            names = chain(node) if isinstance(node, ast.Attribute) else None
            if names and names[0] in known:
                find((*known[names[0]], *names[1:]))


@pages
def test_every_command_and_option_in_consoles_exists(page, capsys):
    helps = {}
    for block in blocks(page, "console", "sh"):
        for line in re.findall(r"^\$ (?:sudo )?dmabuf ([a-z]+.*)$", block, re.M):
            name, *words = re.split(r" -- |[|;&>#]", line)[0].split()
            if name not in helps:
                ended = command(capsys, name, "--help")
                assert ended.status == 0, line
                helps[name] = ended.out
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert option in helps[name], line


def test_the_reference_names_every_command_and_option(capsys):
    text = (ROOT / "docs/reference/cli.md").read_text()
    listed = re.findall(r"^  ([a-z]+) ", command(capsys, "--help").out, re.M)
    assert len(listed) > 10
    for name in listed:
        assert f"`dmabuf {name}" in text, name
        for option in re.findall(r"(?<!\S)--[a-z-]+", command(capsys, name, "--help").out):
            assert option == "--help" or re.search(rf"{option}\b", text), f"{name} {option}"


def test_the_manual_pages_name_every_command_and_option(capsys):
    """`make man` writes them."""
    pages = {path.stem: path.read_text().replace("\\", "") for path in ROOT.glob("contrib/man/*.1")}
    assert set(pages) == {"dmabuf", *(f"dmabuf-{name}" for name in COMMANDS)}
    for name, (_, summary) in COMMANDS.items():
        assert summary in pages["dmabuf"]
        told = command(capsys, name, "--help").out
        for option in set(re.findall(r"(?<!\S)--[a-z-]+", told)) - {"--help"}:
            assert option in pages[f"dmabuf-{name}"], f"{name} {option}: run `make man`"


@needs("pydantic")
def test_the_schemas_are_those_of_the_records(tmp_path):
    run(sys.executable, ROOT / "tools/write_schemas.py", tmp_path)
    published = ROOT / "docs/reference/schemas"
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(made) <= {path.name for path in published.iterdir()}
    for name, text in made.items():
        assert (published / name).read_text() == text, f"{name}: run `make schemas`"


def test_the_reference_names_every_exception():
    text = (ROOT / "docs/reference/errors.md").read_text()
    for name in errors.__all__:
        assert f"`dmabuf.{name}`" in text, name


def test_a_malformed_file_is_refused_as_models_md_shows(tmp_path):
    text = (ROOT / "docs/guides/models.md").read_text()
    (line,) = re.findall(r"^ValueError: load cut.safetensors: .*", text, re.MULTILINE)
    whole, cut = (int(number) for number in re.findall(r" (\d+)\b", line))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(header_of_model(whole))
    with path.open("r+b") as file:
        file.truncate(cut)
    with pytest.raises(ValueError) as error:
        safetensors.load(path, framework="np")
    assert f"ValueError: {error.value}".replace(f"{tmp_path}/", "") == line


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    texts = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                ]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    page = (ROOT / "docs/reference/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)` \|", page, re.M)
    assert len(messages) > 40
    for message in messages:
        words = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.S)
        assert any(words.search(text) for text in texts), message
