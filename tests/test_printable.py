"""Nothing that was read from a file or from RAM steers the terminal."""

from __future__ import annotations

import io
import shutil
import struct
import sys
from pathlib import Path

import pytest

from khosim import Machine
from khosim.abi import fdt
from khosim.cli.main import main
from khosim.printable import printable

GOLDEN = Path(__file__).parent / "golden" / "captures"
HOSTILE = b"\x1b[2J\x1b]0;x\x07\x9b1m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, also \u00e9 and\nlines", "plain, also \u00e9 and\nlines"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\tb\rc\x9b\x7f\0", "a\\tb\\rc\\x9b\\x7f\\x00"),
        ("\udcff \u2028", "\\udcff \\u2028"),
        ("", ""),
    ],
)
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    """Newlines and what can be seen stay."""
    assert printable(text) == shown


def metadata_phys() -> int:
    """Where the first kernel of the scenario below keeps its name for the successor."""
    kernel = Machine("64M").boot(cmdline="kho=on")
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    node = fdt.fdt_subnode_offset(tree, 0, "kexec-metadata")
    value, _ = fdt.fdt_getprop(tree, node, "preserved-data")
    assert value is not None
    return int(struct.unpack("<Q", value)[0])


def test_an_account_of_hostile_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel's name out of damaged RAM is shown, not obeyed."""
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        f"""
        generations = 2
        machine = {{ ram = "64M" }}
        kernel = {{ cmdline = "kho=on" }}
        [[generation]]
        steps = [
          {{ do = "corrupt", at = "{metadata_phys() + 4:#x}", bytes = "{HOSTILE.hex()}" }},
        ]
        [[generation]]
        """
    )
    main(["run", str(scenario)])
    out = capsys.readouterr().out
    assert "exec from: \\x1b[2J\\x1b]0;x\\x07" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_a_blob_of_hostile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So are names and values of a device tree, as a table and as DTS."""
    tree = memoryview(bytearray(4096))
    error = fdt.fdt_create(tree, 4096)
    error |= fdt.fdt_finish_reservemap(tree)
    error |= fdt.fdt_begin_node(tree, "")
    error |= fdt.fdt_property_string(tree, "compatible", "kho-v4")
    error |= fdt.fdt_begin_node(tree, HOSTILE)
    error |= fdt.fdt_property(tree, HOSTILE, HOSTILE + b"\0")
    error |= fdt.fdt_end_node(tree)
    error |= fdt.fdt_end_node(tree)
    assert error | fdt.fdt_finish(tree) == 0
    blob = tmp_path / "blob"
    blob.write_bytes(tree)
    for options in ([], ["--dts"]):
        assert main(["inspect", str(blob), *options]) in (0, 1)
        told = capsys.readouterr()
        assert "x1b[2J" in told.out
        assert all(line.isprintable() for line in told.out.split("\n"))


def test_a_stdout_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot show is spelled out; nothing is raised."""
    scenario = tmp_path / "s.toml"
    scenario.write_text('about = "caf\u00e9"\nmachine = { ram = "64M" }\n[[generation]]\n', "utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["run", str(scenario)]) == 0
    stdout.seek(0)
    assert stdout.readline() == "s: caf\\xe9\n"


def test_an_error_with_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one line on stderr as well."""
    assert main(["run", str(tmp_path / "\x1b[2J")]) == 2
    assert "\\x1b[2J" in capsys.readouterr().err


def test_a_capture_of_hostile_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What logs and debugfs files of a capture say is shown by every command that reads it."""
    folder = tmp_path / "capture"
    shutil.copytree(GOLDEN / "uma1g", folder)
    log = folder / "gen0/dmesg"
    hostile = HOSTILE.decode("latin-1")
    log.write_text(log.read_text().replace("quiet", f"{hostile} quiet"), encoding="utf-8")
    (folder / "gen0/cmdline").write_text(hostile, encoding="utf-8")
    path = folder / "capture.json"
    path.write_text(path.read_text().replace("7.3.4", "7.3.4\\u001b[2J"))
    for command in ("conform", "replay"):
        main([command, str(folder)])
        out = capsys.readouterr().out
        assert len(out) > 100
        assert all(line.isprintable() for line in out.splitlines()), command
