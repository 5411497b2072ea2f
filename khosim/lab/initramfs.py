"""The guest's user space: one static program, compiled here, in an initramfs."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

from khosim.errors import InputError
from khosim.lab.cpio import Entry, newc

__all__ = ("build_initramfs", "compile_init")

_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_SECTOR = 512
_DIRECTORY = stat.S_IFDIR | 0o755
_PROGRAM = stat.S_IFREG | 0o755
_FILE = stat.S_IFREG | 0o644


def compile_init() -> bytes:
    """The static program that is the guest's first process.

    Raises :class:`InputError` without a C compiler, or without a static C library.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise InputError("khosim lab", f"needs a C compiler: none of {', '.join(_COMPILERS)}")
    source = files("khosim.lab").joinpath("init.c").read_bytes()
    with tempfile.TemporaryDirectory(prefix="khosim-lab-") as folder:
        program = Path(folder, "init")
        command = [compiler, "-static", "-Os", "-s", "-x", "c", "-", "-o", str(program)]
        try:
            done = subprocess.run(
                command, input=source, capture_output=True, timeout=_COMPILE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(compiler, str(error)) from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing"]
            cause = f"cannot build the guest's static program (a static C library?): {said[-1]}"
            raise InputError(compiler, cause)
        return program.read_bytes()


def build_initramfs(
    init: bytes, kernel: bytes, *, generations: int, cmdline: str, size_bytes: int = 0
) -> bytes:
    """The initramfs of the first kernel; later ones make theirs alike, from what is in it.

    ``cmdline`` is what the next kernels are loaded with. A ``size_bytes`` above what is needed is
    met with zeros behind the archive.
    """
    conf = f"generations {generations}\ninitrd {size_bytes}\ncmdline {cmdline}\n".encode()
    archive = newc(
        [
            Entry("dev", _DIRECTORY),
            Entry("init", _PROGRAM, init),
            Entry("lab.conf", _FILE, conf),
            Entry("kernel", _FILE, kernel),
        ]
    )
    wanted = max(size_bytes, len(archive))
    return archive + bytes(-(-wanted // _SECTOR) * _SECTOR - len(archive))
