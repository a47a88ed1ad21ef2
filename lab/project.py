"""Makes the project ready for the guest: its dependencies, its extension, its files."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import host, packages
from lab.cache import Cache, key_of
from lab.host import LabError
from lab.prepare import Root, compile_python, make_image
from lab.processors import PROCESSORS, Processor

SITE = f"lib/python{packages.PYTHON}/dist-packages"
"""Where Debian's Python looks for packages under /usr/local."""

JUNK = {".git", ".venv", "venv", "__pycache__", "build", "dist", ".pytest_cache", ".mypy_cache"}
"""What is not copied from a folder that is no git checkout."""

TESTING_CORE = "tests/core.py"
"""A program of the checkout that builds what its tests need compiled, below BUILT."""
BUILT = "build/testing-core"

WHEELS = "tools/build-wheels"
"""A program of the checkout that builds its wheels, also for another processor."""

BUILD_INPUTS = (
    *("csrc/", "setup.py", "setup.cfg", "MANIFEST.in", "pyproject.toml"),
    TESTING_CORE,
    WHEELS,
)
"""The files and folders that the extensions and the package's metadata are made of."""


@dataclass(frozen=True)
class Project:
    """A checkout, and the pieces made for it."""

    folder: Path
    files: tuple[str, ...]
    """What is copied into the guest, relative to the folder."""
    dependencies: Path
    """The folder of the piece with the ext4 image for the guest's /usr/local."""
    extension: Path | None
    """The folder of the piece with the built package, less its Python sources, and with what the
    tests need compiled."""


def prepare(cache: Cache, root: Root, folder: Path, alone: Sequence[str] = ()) -> Project:
    """Return the project of a checkout, with what the cache lacks built for the guest.

    `alone` are more Python packages, which are installed without their dependencies.
    """
    files = checkout_files(folder)
    about = folder / "pyproject.toml"
    settings = tomllib.loads(about.read_text()) if about.exists() else {}
    wanted, build = requirements(settings)
    base = (root.key, packages.PYTHON, *wanted, "for building", *build, "1")
    key = key_of(*base)
    dependencies = cache.piece(
        "dependencies",
        key_of(*base, *alone),
        "Python packages for the guest",
        lambda made: _make_dependencies(root, wanted, build, alone, made),
    )
    extension = None
    if settings:
        inputs = [name for name in files if name.startswith(BUILD_INPUTS)]
        parts = [part for name in inputs for part in (name.encode(), _contents(folder / name))]
        title = "the extension, for the guest's Python"
        if root.processor.name == packages.NATIVE:
            extension = cache.piece(
                "extension",
                key_of(key, *parts, "2"),
                title,
                lambda made: _make_extension(root, dependencies, folder, files, settings, made),
            )
        else:
            environment = _wheel_tools(cache, settings, build)
            extension = cache.piece(
                "extension",
                key_of(key, environment.name, *parts, "1"),
                title,
                lambda made: _make_wheel(root.processor, environment, folder, files, made),
            )
    return Project(folder, files, dependencies, extension)


def _contents(path: Path) -> bytes:
    return os.readlink(path).encode() if path.is_symlink() else path.read_bytes()


def checkout_files(folder: Path) -> tuple[str, ...]:
    """Return the files git tracks or would add; without git, all but what tools leave behind."""
    argv = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    if (folder / ".git").exists() and shutil.which("git"):
        done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, check=False)
        if done.returncode == 0:
            names = {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}
            return tuple(sorted(name for name in names if _is_file(folder / name)))
    found: list[str] = []
    for place, folders, leaves in os.walk(folder):
        folders[:] = [name for name in folders if name not in JUNK]
        found += [os.path.relpath(os.path.join(place, leaf), folder) for leaf in leaves]
    return tuple(sorted(name for name in found if _is_file(folder / name)))


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def requirements(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what pip installs to run and test a project, and what to build it."""
    project = settings.get("project", {})
    extras = project.get("optional-dependencies", {})
    own = re.compile(rf"{re.escape(project.get('name', ''))}\[([^]]*)\]", re.IGNORECASE)

    def flat(names: Iterable[str]) -> Iterable[str]:
        for name in names:
            match = own.match(name)
            if match:  # a group that includes others: "dmabuf[test]"
                groups = [group.strip() for group in match[1].split(",")]
                yield from flat(entry for group in groups for entry in extras.get(group, []))
            else:
                yield name

    groups = [entry for group in packages.PYTHON_EXTRAS for entry in extras.get(group, [])]
    wanted = flat([*packages.PYTHON_TESTS, *project.get("dependencies", []), *groups])
    build = settings.get("build-system", {}).get("requires", ["setuptools"])
    return sorted(set(wanted)), sorted(build)


def _pip(processor: Processor, target: Path, names: Sequence[str], *options: str) -> None:
    """Install packages for the guest's Python with the host's pip, as it is configured."""
    machine = processor.machine
    tags = [*(f"2_{minor}" for minor in range(41, 4, -1)), "2014", "1"]
    argv = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"),
        *("--disable-pip-version-check", "--root-user-action=ignore", "--only-binary=:all:"),
        *(f"--python-version={packages.PYTHON}", "--implementation=cp"),
        *(f"--platform=manylinux{'_' * ('_' in tag)}{tag}_{machine}" for tag in tags),
        f"--target={target}",
        *options,
        *names,
    ]
    host.run(argv)


def _make_dependencies(
    root: Root, wanted: Sequence[str], build: Sequence[str], alone: Sequence[str], folder: Path
) -> None:
    local = folder / "local"
    site = local / SITE
    site.parent.mkdir(parents=True)
    _pip(root.processor, site, wanted)
    if alone:
        _pip(root.processor, site, alone, "--no-deps")
    _pip(PROCESSORS[packages.NATIVE], folder / "build", build)
    if (site / "bin").exists():
        (site / "bin").rename(local / "bin")
        for script in (local / "bin").iterdir():  # they name the host's Python
            text = re.sub(rb"\A#!.*python.*", b"#!/usr/bin/python3", script.read_bytes())
            script.write_bytes(text)
    (site / "dmabuf-lab.pth").write_text("/lab/site\n")
    compile_python(root.tools, local, "/usr/local")
    make_image(local, folder / "image", 64 << 20, "dependencies")
    shutil.rmtree(local)


def _make_extension(
    root: Root,
    dependencies: Path,
    folder: Path,
    files: Iterable[str],
    settings: dict[str, Any],
    made: Path,
) -> None:
    """Build a wheel inside the guest's root; keep all of it but its Python sources."""
    work = made / "work"
    copy_files(folder, files, work / "checkout")
    (work / "wheel").mkdir()
    shutil.copytree(dependencies / "build", work / "build", symlinks=True)
    backend = settings.get("build-system", {}).get("build-backend", "setuptools.build_meta")
    script = (
        "import importlib, os, sys; sys.path.insert(0, '/mnt/build'); "
        "os.environ['PYTHONPATH'] = '/mnt/build'; os.chdir('/mnt/checkout'); "
        f"importlib.import_module('{backend}').build_wheel('/mnt/wheel')"
    )
    tests = (
        "import os, runpy, sys; sys.path.insert(0, '/mnt/build'); "
        "os.environ['PYTHONPATH'] = '/mnt/build'; os.chdir('/mnt/checkout'); "
        f"runpy.run_path('{TESTING_CORE}', run_name='__main__')"
    )
    try:
        host.run(host.in_tree(root.tree, work, "python3", "-c", script))
        if (work / "checkout" / TESTING_CORE).exists():
            host.run(host.in_tree(root.tree, work, "python3", "-c", tests))
            (work / "checkout" / BUILT).rename(made / "testing-core")
    except LabError as error:
        output = str(error).split("\n", 1)[-1]
        raise LabError(f"the extension did not build for the guest:\n{output}") from None
    _unpack(work / "wheel", made)


def _unpack(wheels: Path, made: Path) -> None:
    """Unpack the one wheel of a folder, and remove the folder that this one is in."""
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(made / "site")
    shutil.rmtree(wheels.parent)


def _wheel_tools(cache: Cache, settings: dict[str, Any], build: Sequence[str]) -> Path:
    """Return a virtual environment with what the program that builds the wheels needs."""
    group = settings["dependency-groups"][packages.PYTHON_CROSS]
    wanted = sorted({"pip", *build, *group})

    def make(folder: Path) -> None:
        host.run([sys.executable, "-m", "venv", "--without-pip", folder])
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
        host.run([*pip, "install", *quiet, "--root-user-action=ignore", *wanted])

    title = "Python packages that build wheels for other processors"
    return cache.piece("environment", key_of(sys.version, *wanted, "1"), title, make)


def _make_wheel(
    processor: Processor, environment: Path, folder: Path, files: Iterable[str], made: Path
) -> None:
    """Build the wheel of a release for another processor, and the core of the tests with it."""
    work = made / "work"
    copy_files(folder, files, work)
    python = environment / "bin/python"
    host.run([work / WHEELS, python, processor.machine])
    compiler = work / "build/wheels" / processor.machine / "cc"
    target = f"cpython-{packages.PYTHON.replace('.', '')} {processor.machine}"
    variables = {
        "CC": str(compiler),
        "LDSHARED": f"{compiler} -shared",
        "DMABUF_TESTS_TARGET": target,
    }
    host.run([python, work / TESTING_CORE], env=variables, cwd=work)
    (work / BUILT).rename(made / "testing-core")
    _unpack(work / "dist", made)


def copy_files(folder: Path, files: Iterable[str], target: Path) -> None:
    """Copy files, symbolic links as such, into a new folder."""
    target.mkdir(parents=True)
    ready = {target}
    for name in files:
        path = target / name
        if path.parent not in ready:
            path.parent.mkdir(parents=True, exist_ok=True)
            ready.add(path.parent)
        shutil.copy2(folder / name, path, follow_symlinks=False)


def lay_out(root: Root, project: Project, lab: Path) -> None:
    """Lay out what the guest sees as /lab: the checkout, and the package installed beside it."""
    copy_files(project.folder, project.files, lab / "checkout")
    site, scripts = lab / "site", lab / "bin"
    scripts.mkdir()
    if project.extension is None:
        site.mkdir()
        return
    shutil.copytree(project.extension / "site", site, symlinks=True)
    if (project.extension / "testing-core").exists():
        shutil.copytree(project.extension / "testing-core", lab / "checkout" / BUILT)
    source = lab / "checkout/src"
    for package in source.iterdir() if source.exists() else ():
        for path in (site / package.name).rglob("*.py"):
            path.unlink()
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        if package.is_dir() and not package.name.endswith(".egg-info"):
            shutil.copytree(package, site / package.name, dirs_exist_ok=True, ignore=ignore)
    compile_python(root.tools, site, "/lab/site")
    for entries in site.glob("*.dist-info/entry_points.txt"):
        points = configparser.ConfigParser(delimiters=("=",), interpolation=None)
        points.optionxform = str  # type: ignore[assignment,method-assign]
        points.read(entries)
        for name, point in points["console_scripts"].items() if "console_scripts" in points else ():
            module, _, function = point.partition(":")
            script = scripts / name
            script.write_text(
                "#!/usr/bin/python3\nimport sys\n"
                f"from {module} import {function.split('.')[0]}\nsys.exit({function}())\n"
            )
            script.chmod(0o755)
