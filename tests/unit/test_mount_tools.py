"""Programs that have never heard of dma-bufs, on the files of a mount: every byte compared."""

import filecmp
import os
from pathlib import Path

from tests.guards import needs
from tests.mounting import Mounted, shell
from tests.support import assert_same, pattern, together

SIZE = (1 << 20) + 70_777


def test_dd(files: Mounted, path: Path) -> None:
    for block in ("512", "4k", "1M"):
        shell("dd if=$1 of=x bs=$2 status=none; cmp $1 x", files.path, path, block)
        shell("dd if=x of=$1.out bs=$2 status=none; cmp $1 $1.out", files.path, path, block)
    whole = SIZE // 4096 * 4096
    shell("truncate -s $2 $1", files.path, path, whole)
    shell("dd if=$1 of=d bs=64k oflag=direct conv=fsync status=none", files.path, path)
    shell("dd if=d of=$1.d bs=64k iflag=direct status=none; cmp $1 $1.d", files.path, path)
    shell("dd if=/dev/zero of=d bs=4k seek=3 count=2 conv=notrunc status=none", files.path)
    expected = bytearray(pattern(SIZE, 1)[:whole])
    expected[12288:20480] = bytes(8192)
    assert_same((files.path / "d").read_bytes(), bytes(expected), "a part by dd")


def test_cp_cmp_and_sums(files: Mounted, path: Path) -> None:
    script = """
    cp -p $1 x; cmp $1 x
    cp x y; cmp $1 y
    cp --sparse=always x z; cmp $1 z
    cat x > c; cmp $1 c
    [ "$(sha256sum < x)" = "$(sha256sum < $1)" ]
    head -c 1000 x | cmp - <(head -c 1000 $1)
    tail -c 1000 x | cmp - <(tail -c 1000 $1)
    [ $(stat -c %Y x) = $(stat -c %Y $1) ] && [ $(stat -c %a x) = $(stat -c %a $1) ]
    printf X | dd of=y bs=1 seek=1000 conv=notrunc status=none
    ! cmp -s $1 y
    mv y x; ! cmp -s $1 x; [ ! -e y ]
    """
    shell(script, files.path, path)
    assert sorted(os.listdir(files.path)) == ["c", "x", "z"]


@needs("xxd")
def test_xxd_reads_and_patches(files: Mounted, path: Path) -> None:
    shell("cp $1 x; cmp <(xxd x) <(xxd $1)", files.path, path)
    shell("echo '00000010: 4142 43' | xxd -r - x", files.path)
    expected = bytearray(pattern(SIZE, 1))
    expected[16:19] = b"ABC"
    assert_same((files.path / "x").read_bytes(), bytes(expected), "patched")


def test_a_shells_redirections(files: Mounted) -> None:
    script = """
    echo one > x; echo two >> x; cat < x > y
    { echo three; cat x; date -u -d @0 +%s; } > z
    for i in $(seq 300); do echo $i; done > n; seq 301 600 >> n
    (for i in $(seq 20); do /bin/echo $i; done) > e
    : > x
    exec 3<> rw; echo written >&3; exec 3>&-
    """
    shell(script, files.path)
    assert (files.path / "y").read_text() == "one\ntwo\n"
    assert (files.path / "z").read_text() == "three\none\ntwo\n0\n"
    assert (files.path / "n").read_text() == "".join(f"{n}\n" for n in range(1, 601))
    assert (files.path / "e").read_text() == "".join(f"{n}\n" for n in range(1, 21))
    assert (files.path / "x").read_text() == ""
    assert (files.path / "rw").read_text() == "written\n"


def tree(folder: Path) -> Path:
    folder.mkdir()
    for number, size in enumerate([0, 1, 4096, 70000, 1 << 20, SIZE]):
        path = folder / f"file {number}"
        path.write_bytes(pattern(size, number))
        path.chmod(0o600 + number)
        os.utime(path, (10**9 + number, 10**9 + number))
    return folder


def same(one: Path, other: Path) -> None:
    names = sorted(os.listdir(one))
    assert sorted(os.listdir(other)) == names
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])
    for name in names:
        told = [((folder / name).stat()) for folder in (one, other)]
        assert told[0].st_mode == told[1].st_mode, name
        assert int(told[0].st_mtime) == int(told[1].st_mtime), name


def test_tar_extracts_to_it_and_packs_it(files: Mounted, tmp_path: Path) -> None:
    folder, back = tree(tmp_path / "tree"), tmp_path / "back"
    back.mkdir()
    script = "(cd $1; tar -cf - file*) | tar -xpf -; tar -cf - file* | tar -xpf - -C $2"
    shell(script, files.path, folder, back)
    same(folder, files.path)
    same(folder, back)


@needs("rsync")
def test_rsync_both_ways_and_again(files: Mounted, tmp_path: Path) -> None:
    folder, back = tree(tmp_path / "tree"), tmp_path / "back"
    shell("rsync -t -p $1/* .", files.path, folder)
    same(folder, files.path)
    assert shell("rsync -t -p --out-format=%n $1/* .", files.path, folder) == ""
    with (folder / "file 5").open("r+b") as file:
        file.write(b"changed")
    shell("rsync -t -p --no-whole-file $1/* .; rsync -t -p * $2/", files.path, folder, back)
    same(folder, files.path)
    same(folder, back)
    with (folder / "file 5").open("ab") as file:
        file.write(b"longer")
    shell("rsync -t -p --inplace --no-whole-file $1/* .", files.path, folder)
    same(folder, files.path)


@needs("fio")
def test_fio_verifies_what_it_wrote(files: Mounted) -> None:
    options = "--name=x --filename=fio --size=2M --verify=crc32c --do_verify=1 --verify_fatal=1"
    for how in ("--rw=randwrite --bs=4k", "--rw=write --bs=1M", "--rw=randrw --bsrange=512-128k",
                "--rw=randwrite --bs=4k --direct=1 --ioengine=psync --numjobs=1"):  # fmt: skip
        shell(f"fio --minimal {options} {how} --ioengine=psync", files.path)


def test_many_programs_at_once(files: Mounted, path: Path) -> None:
    def work(number: int) -> None:
        script = """
        for turn in 1 2 3; do
            cp $1 a$2; dd if=a$2 of=b$2 bs=100k status=none; cat b$2 > a$2
            cmp $1 a$2; cmp $1 b$2; mv b$2 c$2; sha256sum a$2 c$2 | cut -d' ' -f1 | uniq | wc -l
        done
        """
        assert shell(script, files.path, path, number) == "1\n1\n1\n"

    together(work, 6)
