"""The kernel's texts of dma-bufs, with labels and commands that want to be something else."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmabuf import _described
from dmabuf._described import Description, Entry, Mapping, Status
from tests.unit.fake_machine import Made, bufinfo

FDINFO = """\
pos:\t0
flags:\t02000002
mnt_id:\t16
ino:\t2
size:\t1048576
count:\t1
exp_name:\tudmabuf
name:\ta
Total 0 devices attached
"""
BUFINFO = """\

Dma-buf Objects:
size    \tflags   \tmode    \tcount   \texp_name\tino     \tname
00065536\t00000002\t02080007\t00000005\tdrm\t00000004\t<none>
\tAttached Devices:
Total 0 devices attached

00065536\t00000002\t02080007\t00000006\tsystem\t00000003\t<none>
\tkernel fence:drm_sched gfx seq 5 unsignalled
\tAttached Devices:
\tvgem
Total 1 devices attached

01048576\t00000002\t02080007\t00000001\tudmabuf\t00000002\ta
Total 0 devices attached
\tAttached Devices:
Total 0 devices attached


Total 3 objects, 1179648 bytes
"""
"""As Linux 7.3 wrote them; the fence is from the source of Linux 6.12 (dma_resv_describe)."""

LINES = ("\n", "\t", "Total 1 devices attached", "\tAttached Devices:", "\tgpu", "name:\t", "x",
         "\nexp_name:\tdrm", "size:\t1", "\tread fence:", "00004096\t", "\x1b[2J", "\r", "\x85",
         "é", "\u2028", "\\", "\\012", "ino:\t9", "\x1c", "\udcff")  # fmt: skip


def short(limit: int):
    """Text of at most `limit` bytes, without NUL, that may be any line the kernel writes."""
    part = st.sampled_from(LINES) | st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4
    )
    joined = st.lists(part, max_size=8).map("".join)
    return joined.map(lambda text: text.encode(errors="surrogateescape")[:limit]).map(os.fsdecode)


labels = short(31)
dma_bufs = st.builds(
    Made,
    inode=st.integers(0, 2**64 - 1),
    size=st.integers(1, 2**63),
    exporter=st.sampled_from(["system", "udmabuf", "drm", "a b"]),
    name=st.none() | labels,
    references=st.integers(0, 10**9),
    devices=st.lists(st.sampled_from(["vgem", "0000:01:00.0"]), max_size=3).map(tuple),
    fences=st.lists(st.just("drm_sched gfx seq 5 signalled"), max_size=2).map(tuple),
)


def test_what_a_kernel_wrote():
    told = _described.description(FDINFO)
    assert told == Description("udmabuf", "a\nTotal 0 devices attached", 2, 1 << 20, 1)
    assert _described.entries(BUFINFO) == {
        4: Entry(4, 65536, "drm", None, 5, ()),
        3: Entry(3, 65536, "system", None, 6, ("vgem",)),
        2: Entry(2, 1 << 20, "udmabuf", "a\nTotal 0 devices attached", 1, ()),
    }


@given(dma_bufs)
@example(Made(1, name="x\nexp_name:\tdrm\nname:\ty"))
def test_a_label_reaches_no_line_of_fdinfo(made: Made):
    told = _described.description(os.fsdecode(made.fdinfo()))
    assert told == Description(made.exporter, made.name, made.inode, made.size, made.references)


@given(st.lists(dma_bufs, max_size=4, unique_by=lambda made: made.inode))
@example([Made(1, name="a\n\tAttached Devices:\n\tgpu"), Made(2, devices=("vgem",))])
@example([Made(1, name="a\nTotal 1 devices attached"), Made(2)])
@example([Made(1, name="longer\n\tAttached Devices:\nTotal 0 devices attached", devices=("a",))])
@example([Made(1, name="\n1\t1\t1\t1\tx\t00000009\ty"), Made(2)])
@example([Made(1, name="a\n\tread fence:", fences=("one",))])
def test_a_label_reaches_no_other_line_of_debugfs(made: list[Made]):
    found = _described.entries(bufinfo(made))
    assert list(found) == [one.inode for one in made]
    for one in made:
        entry = found[one.inode]
        expected = (one.size, one.exporter, one.references, one.devices)
        assert (entry.size, entry.exporter, entry.references, entry.devices) == expected
        if one.name not in (None, "<none>"):
            # A label that ends like a fence is cut there, and no more.
            assert one.name == entry.name or (
                one.name.startswith(entry.name + "\n\t") and "fence:" in one.name
            )


@given(labels, st.integers(0, 2**47), st.integers(1, 2**40), st.integers(0, 2**64 - 1))
@example("x\n7f00-7f01 rw-s 0 00:0e 9  /dmabuf:", 0, 1, 1)
def test_mappings(label: str, address: int, nbytes: int, inode: int):
    label = label.replace("\\", "/").lstrip()
    around = "7f00-7f01 r--p 00000000 fe:00 4   /srv/dmabuf:x\n7f01-7f02 rw-p 0 00:00 0\n"
    text = around + Made(inode, name=label).mapped(address, nbytes) + around
    expected = Mapping(address, nbytes, os.makedev(0, 14), inode, label or None)
    assert _described.mappings(text) == [expected]


@given(short(15), st.sampled_from("RSDZTX"), st.booleans(), st.integers(1, 10**5))
@example(") Z 1 1 1", "S", False, 1)
def test_a_command_reaches_no_other_field(command: str, state: str, kernel: bool, threads: int):
    flags = 0x00200000 if kernel else 0x00400140
    rest = [state, 1, 1, 1, 0, -1, flags, *[0] * 10, threads, 0, 4711, *[0] * 30]
    told = _described.status(f"17 ({command}) {' '.join(map(str, rest))}\n")
    assert told == Status(command, state, kernel, threads, 4711)


@pytest.mark.parametrize(
    "parse",
    [_described.description, _described.entries, _described.mappings, _described.status],
)
@given(text=st.lists(st.sampled_from(LINES) | st.text(max_size=9), max_size=9).map("".join))
@example(text=BUFINFO[: len(BUFINFO) // 2])
@example(text="1-2 rw-s 0 zz:0e 5 /dmabuf:\n-  0 : x /dmabuf:")
@example(text="1 (x) S 1 2 3")
@example(text="exp_name:\tx\nino:\t²\nsize:\tmany")
def test_any_text_is_read(parse, text: str):
    parse(text)
