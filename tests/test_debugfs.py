"""Debugfs folders: which files are read, and what the real kernel's quirks make of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from khosim.capture.debugfs import read_debugfs
from khosim.errors import InputError
from khosim.inspect.debugfs import inspect_debugfs

CAPTURES = Path(__file__).parent / "golden" / "captures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The debugfs folder of a kernel that was handed over, to be spoilt."""
    return Path(shutil.copytree(CAPTURES / "uma1g" / "gen1" / "kho", tmp_path / "kho"))


def test_sides_are_found_from_wherever_one_begins() -> None:
    """Debugfs itself, its kho folder, or one side: the same files."""
    generation = CAPTURES / "uma1g" / "gen1"
    whole = read_debugfs(generation)
    assert list(whole) == ["in", "out"]
    assert read_debugfs(generation / "kho") == whole
    assert read_debugfs(generation / "kho" / "out") == {"out": whole["out"]}
    assert sorted(whole["in"].blobs) == ["LUO", "kexec-metadata", "kho_test", "memblock"]
    assert whole["in"].scratch is None
    assert whole["out"].scratch == (
        (0x2B000000, 239075328),
        (0x39800000, 0),
        (0x1D400000, 230686720),
    )


@pytest.mark.parametrize("name", ["uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k"])
@pytest.mark.parametrize("generation", ["gen0", "gen1", "gen2"])
def test_quirks_of_real_kernels_are_no_damage(name: str, generation: str) -> None:
    """A cut ``out/fdt``, none at all, and LUO's page given back: nothing is torn."""
    for side, found in read_debugfs(CAPTURES / name / generation).items():
        report = inspect_debugfs(side, found)
        assert report.damage == []
        assert list(report.reserve_mem) in (["oops"], ["trace", "oops"], ["log"])
        assert report.kexec_metadata is not None
        assert (report.root is None) == (side == "out")
        if side == "out":
            assert report.luo is not None
            assert report.luo[1] == int(generation[-1]) + 1
            assert (report.cut_bytes > 0) == (generation == "gen0")


def test_an_fdt_cut_off_elsewhere_is_damage(folder: Path) -> None:
    """``in/fdt`` is never cut by the kernel."""
    fdt = folder / "in" / "fdt"
    fdt.write_bytes(fdt.read_bytes()[:-1])
    report = inspect_debugfs("in", read_debugfs(folder)["in"])
    assert report.damage[0].code == "fdt-totalsize"
    assert report.damage[0].where == "in/fdt, byte 0x4"


def test_blobs_must_be_those_that_the_fdt_names(folder: Path) -> None:
    """One more, one fewer and one of another size are told apart."""
    blobs = folder / "in" / "sub_fdts"
    (blobs / "kho_test").rename(blobs / "other")
    (blobs / "kexec-metadata").write_bytes(bytes([1]) + bytes(73))
    report = inspect_debugfs("in", read_debugfs(folder)["in"])
    assert {(item.code, item.path) for item in report.damage} == {
        ("debugfs-file", "/kho_test"),
        ("debugfs-file", "/other"),
        ("debugfs-size", "/kexec-metadata"),
    }


def test_damage_inside_of_blobs_is_found(folder: Path) -> None:
    """Each blob is read as what its name says."""
    blobs = folder / "out" / "sub_fdts"
    for name, at in (("memblock", 0), ("LUO", 0), ("kexec-metadata", 0)):
        raw = bytearray((blobs / name).read_bytes())
        raw[at] ^= 0x40
        (blobs / name).write_bytes(raw)
    report = inspect_debugfs("out", read_debugfs(folder)["out"])
    assert [item.code for item in report.damage] == [
        "luo-compatible",
        "metadata-version",
        "fdt-magic",
    ]


def test_a_missing_root_is_said(folder: Path) -> None:
    """Without ``in/fdt`` the blobs are still read."""
    (folder / "in" / "fdt").unlink()
    report = inspect_debugfs("in", read_debugfs(folder)["in"])
    assert [(item.code, item.path) for item in report.damage] == [("debugfs-file", "/")]
    assert list(report.reserve_mem) == ["oops"]


def test_what_is_no_debugfs_is_refused(folder: Path) -> None:
    """Other folders, folders for files, and lists that are none."""
    with pytest.raises(InputError, match="no debugfs folder"):
        read_debugfs(CAPTURES)
    (folder / "out" / "scratch_len").write_text("0x1000\n")
    with pytest.raises(InputError, match="3 addresses but 1 lengths"):
        read_debugfs(folder)
    (folder / "out" / "scratch_len").write_text("many\n")
    with pytest.raises(InputError, match="not a list of numbers"):
        read_debugfs(folder)
    (folder / "in" / "sub_fdts" / "memblock").unlink()
    (folder / "in" / "sub_fdts" / "memblock").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        read_debugfs(folder)
