"""The memory that an allocation may take, checked before it is tried.

Sources: proc(5) for /proc/meminfo and /proc/self/cgroup; Documentation/admin-guide/cgroup-v2.rst
(memory.max, memory.current, memory.stat) and cgroup-v1/memory.rst; mm/hugetlbpage.rst for
/sys/kernel/mm/hugepages; Documentation/ABI/stable/sysfs-devices-node for the nodes; proc(5) for
/proc/zoneinfo.

Every function takes ``root``, the directory under which it looks for /proc and /sys: tests give
their own.
"""

import errno
import os
import re
from contextlib import suppress

from dmabuf.kernel import proc
from dmabuf.sizes import Size, format_size, parse_size, round_up


def parse_table(text: str) -> dict[str, int]:
    """Return the numbers of /proc/meminfo, a node's meminfo or memory.stat, in bytes."""
    found = {}
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == ["Node"]:
            words = words[2:]
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found


def check_memory(nbytes: int, node: int | None = None, *, root: str = "/") -> None:
    """Raise OSError(ENOMEM) with the figures if ``nbytes`` are more than there is.

    The limits are MemAvailable, those of the process's memory cgroup and of the cgroups above it,
    and with ``node`` the memory that this NUMA node has free or could free. Swap does not count:
    devices need the pages.
    """
    figures = memory_figures(root)
    if node is not None:
        table = parse_table(proc.read(root, f"sys/devices/system/node/node{node}/meminfo"))
        if "MemFree" in table:
            reclaimable = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
            figures.append((sum(table.get(key, 0) for key in reclaimable), f"NUMA node {node}"))
    if figures and min(figures)[0] < nbytes:
        have, where = min(figures)
        raise OSError(
            errno.ENOMEM,
            f"not tried: {format_size(nbytes)} ({nbytes} bytes) are more than the "
            f"{format_size(have)} ({have} bytes) that {where} allows",
        )


def memory_figures(root: str = "/") -> list[tuple[int, str]]:
    """Return the bytes that the machine and each memory cgroup of this process have left."""
    figures = []
    available = parse_table(proc.read(root, "proc/meminfo")).get("MemAvailable")
    if available is not None:
        figures.append((available, "MemAvailable in /proc/meminfo"))
    return figures + cgroup_figures(root)


def cgroup_figures(root: str) -> list[tuple[int, str]]:
    """Return the bytes that each memory cgroup of this process leaves, and a name of each."""
    figures = []
    for line in proc.read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for mount, below in cgroup_mounts(root, version):
            relative = os.path.relpath(path, below) if below != "/" else path.lstrip("/")
            folder = mount if relative.startswith("..") else os.path.join(mount, relative)
            while len(folder) >= len(mount):
                free = _cgroup_free(root, folder.strip("/"), version)
                if free is not None:
                    figures.append((free, f"the memory cgroup at {folder}"))
                folder = os.path.dirname(folder)
    return figures


def cgroup_mounts(root: str, version: int) -> list[tuple[str, str]]:
    """Return (mount point, folder of the hierarchy that is mounted there) of each cgroup mount."""
    mounts = []
    with suppress(OSError):
        for mount in proc.mounts(root):
            if (version == 2 and mount.kind == "cgroup2") or (
                version == 1 and mount.kind == "cgroup" and "memory" in mount.options.split(",")
            ):
                mounts.append((mount.point, mount.below))
    return mounts


def _cgroup_free(root: str, folder: str, version: int) -> int | None:
    limit, used, prefix = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    most, current = proc.number(root, folder, limit), proc.number(root, folder, used)
    if most is None or current is None:  # "max", or the root, which has no limit
        return None
    stat = parse_table(proc.read(root, folder, "memory.stat"))
    cache = stat.get(prefix + "active_file", 0) + stat.get(prefix + "inactive_file", 0)
    return max(most - max(current - cache, 0), 0)


def huge_page_size(huge_pages: bool | Size, *, root: str = "/") -> int | None:
    """Return the page size in bytes that ``huge_pages`` names: None for False.

    True is the machine's default size. Raises ValueError for a size that this machine does not
    have; the error names those it has.
    """
    if huge_pages is False or huge_pages is None:
        return None
    sizes = huge_page_sizes(root)
    default = parse_table(proc.read(root, "proc/meminfo")).get("Hugepagesize")
    wanted = default if huge_pages is True else parse_size(huge_pages, "huge_pages")
    if wanted not in sizes:
        have = ", ".join(format_size(size) for size in sizes) or "none (no CONFIG_HUGETLBFS)"
        asked = "huge pages" if wanted is None else f"huge pages of {format_size(wanted)}"
        raise ValueError(f"this kernel has no {asked}; use a size that it has: {have}")
    return wanted


def huge_page_sizes(root: str) -> list[int]:
    """Return the sizes of huge pages that this kernel has, in bytes."""
    try:
        names = os.listdir(os.path.join(root, "sys/kernel/mm/hugepages"))
    except OSError:
        return []
    return sorted(int(name[len("hugepages-") : -len("kB")]) * 1024 for name in names)


def check_huge_pages(nbytes: int, page: int, node: int | None = None, *, root: str = "/") -> None:
    """Raise OSError(ENOMEM) with the fix if fewer huge pages are free than ``nbytes`` take."""
    name = f"hugepages-{page // 1024}kB"
    folder = f"sys/kernel/mm/hugepages/{name}"
    free = proc.number(root, folder, "free_hugepages") or 0
    free -= proc.number(root, folder, "resv_hugepages") or 0
    surplus = proc.number(root, folder, "surplus_hugepages") or 0
    free += max((proc.number(root, folder, "nr_overcommit_hugepages") or 0) - surplus, 0)
    where = ""
    if node is not None:
        on_node = f"sys/devices/system/node/node{node}/hugepages/{name}"
        free, where = proc.number(root, on_node, "free_hugepages") or 0, f" on NUMA node {node}"
        folder = on_node
    need = round_up(nbytes, page) // page
    if need <= free:
        return
    total = (proc.number(root, folder, "nr_hugepages") or 0) + need - free
    raise OSError(
        errno.ENOMEM,
        f"not tried: {need} huge pages of {format_size(page)} are needed{where} and {free} are "
        f"free (as root: echo {total} > /{folder}/nr_hugepages)",
    )


def check_node(node: int, *, root: str = "/") -> None:
    """Raise ValueError unless the NUMA node exists and has memory."""
    nodes = _node_list(proc.read(root, "sys/devices/system/node/has_memory"))
    if node not in nodes:
        have = ", ".join(map(str, nodes)) or "none (no CONFIG_NUMA)"
        raise ValueError(f"invalid numa_node {node}: use a node that has memory: {have}")


def nodes_without_processors(*, root: str = "/") -> list[int]:
    """Return the NUMA nodes that have memory and no processors, as CXL memory often is."""
    folder = "sys/devices/system/node"
    nodes = {name: _node_list(proc.read(root, folder, name)) for name in ("has_memory", "has_cpu")}
    return [node for node in nodes["has_memory"] if node not in nodes["has_cpu"]]


def has_normal(node: int, *, root: str = "/") -> bool:
    """Return whether a NUMA node has memory outside of ZONE_MOVABLE."""
    return node in _node_list(proc.read(root, "sys/devices/system/node/has_normal_memory"))


def has_movable(node: int, *, root: str = "/") -> bool:
    """Return whether a NUMA node has memory in ZONE_MOVABLE."""
    zones = proc.read(root, "proc/zoneinfo")
    zone = re.search(rf"^Node {node}, zone +Movable\n(?: .*\n)*? +managed +(\d+)$", zones, re.M)
    return zone is not None and zone[1] != "0"


def _node_list(text: str) -> list[int]:
    """Return ``0-1,3`` as a list."""
    nodes: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            nodes.extend(range(int(first), int(last or first) + 1))
    return nodes
