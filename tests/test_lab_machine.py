"""The lab's machine, its kernel, and how it says no to either."""

from __future__ import annotations

from pathlib import Path

import pytest

from khosim.cli.main import main
from khosim.errors import InputError
from khosim.kernel.image import KernelImage
from khosim.lab import machine as machine_module
from khosim.lab.bzimage import read_bzimage
from khosim.lab.machine import DEFAULT_CMDLINE, GuestMachine, find_qemu

GIB = 1 << 30


@pytest.fixture(scope="module")
def bzimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is a bzImage, of khosim's making."""
    path = tmp_path_factory.mktemp("kernel") / "bzImage"
    path.write_bytes(KernelImage.build(size=2 << 20).data)
    return path


def _machine(memory: str = "1G", numa: str | None = None, append: str = "") -> GuestMachine:
    return GuestMachine.of(memory, numa, DEFAULT_CMDLINE, append)


def _arguments(machine: GuestMachine, nr_ram: int) -> str:
    here = Path("x,y")
    return " ".join(
        machine.qemu_arguments(
            "qemu",
            kernel=Path("kernel"),
            initrd=Path("initrd"),
            ram=[here / f"ram{n}" for n in range(nr_ram)],
            console=Path("console"),
            port=Path("port"),
            gdb=Path("gdb"),
            cmdline=machine.cmdline,
        )
    )


def test_one_node() -> None:
    """Its memory is in one file; the machine starts stopped and does not reboot."""
    said = _arguments(_machine(append="reserve_mem=2M:4096:a"), 1)
    assert "memory-backend-file,id=ram0,size=1073741824,share=on,mem-path=x,,y/ram0" in said
    assert "memory-backend=ram0" in said
    assert "-numa" not in said
    assert "-m 1024M" in said
    assert " -S " in said
    assert "-no-reboot" in said
    assert said.endswith(
        "-append console=ttyS0 nokaslr no_timer_check panic=-1 kho=on liveupdate=on"
        " log_buf_len=16M memblock=debug quiet reserve_mem=2M:4096:a"
    )


def test_several_nodes() -> None:
    """Each has its file; together they are the machine's memory."""
    machine = _machine("1G", "2560M,1536M")
    assert machine.node_bytes == (2560 << 20, 1536 << 20)
    said = _arguments(machine, 2)
    assert "-m 4096M" in said
    assert "-numa node,nodeid=1,memdev=ram1" in said
    assert "memory-backend=" not in said


@pytest.mark.parametrize(
    ("memory", "numa", "append", "said"),
    [
        ("64M", None, "", "--memory: 64M is not between 128M and 1T"),
        ("100000001", None, "", "--memory: .* is not at least 16M in whole MiB"),
        ("1G", "1G,8M", "", "--numa: 8M is not at least 16M in whole MiB"),
        ("1G", ",".join(["1G"] * 9), "", "--numa: 9 nodes; the lab knows up to 8"),
        ("1G", "1G,", "", "--numa: '' is not a size"),
        ("x", None, "", "--memory: 'x' is not a size"),
        ("1G", None, "a\nb", "--append: the command line is not printable ASCII"),
        ("1G", None, "a" * 3000, "--append: the command line is not printable ASCII of up to 2000"),
    ],
)
def test_impossible_machines(memory: str, numa: str | None, append: str, said: str) -> None:
    """One line names the option and the cause."""
    with pytest.raises(InputError, match=said):
        _machine(memory, numa, append)


def test_a_bzimage_is_read(bzimage: Path) -> None:
    """Where it is loaded is known."""
    image = read_bzimage(bzimage)
    assert image.load_phys == 16 << 20
    assert image.data == bzimage.read_bytes()


def test_a_bzimage_says_its_version(bzimage: Path, tmp_path: Path) -> None:
    """The header points to the text, 512 bytes further on."""
    data = bytearray(bzimage.read_bytes())
    data[0x20E:0x210] = (0x100).to_bytes(2, "little")
    data[0x300:0x310] = b"7.3.4 (me) #1\0xx"
    path = tmp_path / "bzImage"
    path.write_bytes(data)
    assert read_bzimage(path).version == "7.3.4 (me) #1"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not a 64-bit bzImage"),
        (b"\x7fELF" + bytes(2000), "an ELF file; the lab boots a bzImage"),
        (b"\x1f\x8b" + bytes(2000), "gzip data"),
        (b"MZ\x00\x00\x1f\x20\x03\xd5" + bytes(2000), "an arm64 Image"),
        (bytes(4096), "not a 64-bit bzImage"),
    ],
)
def test_other_files_are_no_kernel(tmp_path: Path, data: bytes, cause: str) -> None:
    """Each is refused for what it is."""
    path = tmp_path / "kernel"
    path.write_bytes(data)
    with pytest.raises(InputError, match=cause):
        read_bzimage(path)


def test_a_cut_bzimage(bzimage: Path, tmp_path: Path) -> None:
    """A header without its kernel is none."""
    path = tmp_path / "cut"
    path.write_bytes(bzimage.read_bytes()[:1024])
    with pytest.raises(InputError, match="not a 64-bit bzImage"):
        read_bzimage(path)


def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU the error says what to install."""
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs qemu-system-x86_64 \(Debian: qemu-system-x86\)"):
        find_qemu()


def test_the_command_without_qemu(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bzimage: Path,
    tmp_path: Path,
) -> None:
    """One line on stderr, status 2, and no folder."""
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: None)
    assert main(["lab", str(bzimage), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "khosim: khosim lab: needs qemu-system-x86_64 (Debian: qemu-system-x86), not installed\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--generations", "101"], "--generations: 101 is not from 1 to 100"),
        (["--generations", "0", "--predecessor", "khosim"], "--generations: 0 is not from 1"),
        (["--generations", "two"], "'two' is not a number"),
        (["--timeout", "-1"], "argument --timeout"),
        (["--initrd-size", "900M"], "--initrd-size: more than a quarter"),
        (["--arch", "arm64"], "--arch: invalid choice"),
        (["--predecessor", "bsd"], "--predecessor: invalid choice"),
        (["--memory", "1M"], "--memory: 1M is not"),
    ],
)
def test_wrong_calls(
    capsys: pytest.CaptureFixture[str],
    bzimage: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    """One line each, status 2."""
    assert main(["lab", str(bzimage), "--out", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_output_that_is_there(
    capsys: pytest.CaptureFixture[str], bzimage: Path, tmp_path: Path
) -> None:
    """Nothing is overwritten, and that is said before anything is booted."""
    assert main(["lab", str(bzimage), "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["lab", str(bzimage), "--out", str(tmp_path / "a/b")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_kernel_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The file is named."""
    assert main(["lab", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("none: No such file or directory\n")
