"""Builds kernel modules that Debian's configuration leaves out, from Debian's kernel source.

Out of tree, as any module is: with the headers of the kernel, by the compiler of the guest's root,
or by one for its processor.
"""

import re
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab import host, packages
from lab.cache import Cache, key_of
from lab.host import LabError
from lab.prepare import Kernel, Root, apt, apt_lists, cross_tools
from lab.processors import PROCESSORS, Processor


def built(cache: Cache, root: Root, kernel: Kernel, names: Sequence[str]) -> Path | None:
    """Return a folder with NAME.ko of each name in `packages.MODULES`, built if the cache lacks it.

    None where there is nothing to build: no names, or a kernel that is not from a suite, which has
    its own modules.
    """
    if not names or not kernel.suite:
        return None
    recipes = [f"{name}: {' '.join(packages.MODULES[name])}" for name in names]
    key = key_of(root.key, kernel.release, kernel.version, *recipes, "1")
    title = f"modules {', '.join(names)} for {kernel.release}"
    cross = root.processor.name != packages.NATIVE
    tools = cross_tools(cache, root) if cross else root.tools

    def make(folder: Path) -> None:
        _make(cache, root.processor, tools, kernel, names, folder)

    return cache.piece("built", key, title, make)


def _make(
    cache: Cache,
    processor: Processor,
    tools: Path,
    kernel: Kernel,
    names: Sequence[str],
    folder: Path,
) -> None:
    work = folder / "work"
    work.mkdir()
    with tempfile.TemporaryDirectory(prefix="apt-", dir=cache.folder) as place:
        _unpack(Path(place), processor, kernel, work)
    sources = _extract(next((work / "usr/src").glob("linux-source-*.tar.xz")), names, work)
    lines = [f"obj-m := {' '.join(f'{name}.o' for name in names)}"]
    for name in names:
        parts = [Path(part).stem for part in packages.MODULES[name] if part.endswith(".c")]
        if parts != [name]:
            lines.append(f"{name}-y := {' '.join(f'{part}.o' for part in parts)}")
    (sources / "Kbuild").write_text("\n".join(lines) + "\n")
    headers = work / "usr/src" / f"linux-headers-{kernel.release}"
    makefile = headers / "Makefile"  # it names folders below /usr/src, which are below /mnt here
    makefile.write_text(makefile.read_text().replace("/usr/src/", "/mnt/usr/src/"))
    argv = ["make", "-C", f"/mnt/usr/src/{headers.name}", f"M=/mnt/{sources.name}", "-j2"]
    argv += ["CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]
    host.run(host.in_tree(tools, work, *argv))
    for name in names:
        (sources / f"{name}.ko").rename(folder / f"{name}.ko")
    shutil.rmtree(work)


def _unpack(place: Path, processor: Processor, kernel: Kernel, work: Path) -> None:
    """Unpack the kernel's headers, its source package, and the tools that run on this machine."""
    release = kernel.release
    numbers = re.match(r"\d+\.\d+", release)
    assert numbers
    common = release.removesuffix(f"-{kernel.flavour}")
    headers = [f"linux-headers-{release}", f"linux-headers-{common}-common"]
    tools = [f"linux-source-{numbers[0]}", f"linux-kbuild-{common}"]
    try:
        for owner, names in (processor, headers), (PROCESSORS[packages.NATIVE], tools):
            folder = place / names[0]
            folder.mkdir()
            apt_lists(folder, kernel.suite, owner)
            exact = [f"{name}={kernel.version}" for name in names]
            apt(folder, "apt-get", "download", "-q", *exact)
    except LabError as error:
        text = f"{kernel.suite} no longer has {release}: lab/run --prepare takes its newest kernel"
        raise LabError(f"{text}\n{error}") from None
    for deb in place.glob("*/*.deb"):
        host.run(["dpkg-deb", "-x", deb, work])


def _extract(archive: Path, names: Sequence[str], work: Path) -> Path:
    """Extract the sources of some modules, all into one folder; reads no further than it must."""
    sources = work / "modules"
    sources.mkdir()
    (sources / packages.LICENSE).write_text(
        '#include <linux/module.h>\nMODULE_LICENSE("GPL");\nMODULE_IMPORT_NS("DMA_BUF");\n'
    )
    wanted = {part for name in names for part in packages.MODULES[name]} - {packages.LICENSE}
    with tarfile.open(archive, "r|xz") as source:
        for member in source:
            path = member.name.partition("/")[2]
            if path in wanted and (file := source.extractfile(member)) is not None:
                (sources / Path(path).name).write_bytes(file.read())
                wanted.discard(path)
                if not wanted:
                    break
    if wanted:
        raise LabError(f"{archive.name} has no {', '.join(sorted(wanted))}")
    archive.unlink()
    return sources
