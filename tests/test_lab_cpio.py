"""The initramfs: cpio archives, and the guest's program that is compiled into them."""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.lab import initramfs
from khosim.lab.cpio import Entry, newc
from khosim.lab.initramfs import build_initramfs, compile_init


def _unpacked(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Names, modes and content, read as init/initramfs.c reads them."""
    found = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at = (at + 110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert not any(archive[at:])
            return found
        found.append((name[:-1].decode(), mode, archive[at : at + size]))
        at = (at + size + 3) // 4 * 4


names = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=9)


@given(st.lists(st.tuples(names, st.integers(0, 0xFFFF), st.binary(max_size=9)), max_size=4))
def test_archives_hold_what_went_in(entries: list[tuple[str, int, bytes]]) -> None:
    """Every name, mode and content comes out again, in order."""
    assert _unpacked(newc([Entry(*entry) for entry in entries])) == entries


def test_an_initramfs_is_complete() -> None:
    """It has the program, the next kernel and the settings, and is as large as was asked."""
    data = build_initramfs(b"ELF", b"kernel", generations=3, cmdline="kho=on a=b", size_bytes=9000)
    assert len(data) == 9216
    found = {name: (mode, content) for name, mode, content in _unpacked(data)}
    assert found["init"] == (stat.S_IFREG | 0o755, b"ELF")
    assert found["kernel"][1] == b"kernel"
    assert found["lab.conf"][1] == b"generations 3\ninitrd 9000\ncmdline kho=on a=b\n"
    assert stat.S_ISDIR(found["dev"][0])


def test_a_small_size_changes_nothing() -> None:
    """An initramfs is never cut to the size asked for, only padded to whole sectors."""
    data = build_initramfs(b"E" * 5000, b"kernel", generations=1, cmdline="", size_bytes=10)
    assert len(data) % 512 == 0
    assert _unpacked(data)[1][2] == b"E" * 5000


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler the error names those that would do."""
    monkeypatch.setattr(initramfs.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"khosim lab: needs a C compiler: none of cc, gcc, clang"):
        compile_init()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last line is passed on."""
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho first >&2\necho cannot find -lc >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(initramfs.shutil, "which", lambda name: str(fake))
    with pytest.raises(InputError, match=r"static C library\?\): cannot find -lc$"):
        compile_init()


def _static_cc() -> bool:
    try:
        compile_init()
    except InputError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _static_cc(), reason="no C compiler with a static C library")
def test_the_program_compiles_and_digests(tmp_path: Path) -> None:
    """It is a static ELF program, and its SHA-256 is the one that hashlib has."""
    assert compile_init().startswith(b"\x7fELF")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    source = tmp_path / "digest.c"
    source.write_text(
        "#define main lab_main\n"
        f'#include "{files("khosim.lab").joinpath("init.c")}"\n'
        "#undef main\n"
        "int main(void)\n{\n\tsize_t len;\n\tchar hex[65];\n"
        "\tchar *data = slurp(0, &len);\n\n"
        "\tsha256((uint8_t *)data, len, hex);\n\tputs(hex);\n\treturn 0;\n}\n"
    )
    program = tmp_path / "digest"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-return-type", "-Wno-unused-result"]
    subprocess.run([str(compiler), *warnings, "-O1", str(source), "-o", str(program)], check=True)
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 100_000):
        data = hashlib.shake_128(b"lab").digest(size)
        said = subprocess.run([str(program)], input=data, capture_output=True, check=True).stdout
        assert said.decode().strip() == hashlib.sha256(data).hexdigest()
