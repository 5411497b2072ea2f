"""The machine that the lab asks QEMU for, as data, and QEMU's arguments for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from khosim.errors import InputError
from khosim.lab.guest_ram import LOW_BYTES
from khosim.units import format_size, parse_size

__all__ = ("ALWAYS", "DEFAULT_CMDLINE", "GuestMachine", "find_qemu")

QEMU = "qemu-system-x86_64"
ALWAYS = "console=ttyS0 nokaslr no_timer_check panic=-1"
"""What the lab itself relies on; a busy host is too slow for the check of the timer."""
DEFAULT_CMDLINE = "kho=on liveupdate=on log_buf_len=16M memblock=debug quiet"
_MIB = 1 << 20
_MIN_BYTES = 128 * _MIB
_MAX_BYTES = 1 << 40
_MAX_CMDLINE = 2000
_MAX_NODES = 8


def find_qemu() -> str:
    """The path of QEMU; :class:`InputError` that says how to get it."""
    found = shutil.which(QEMU)
    if found is None:
        raise InputError("khosim lab", f"needs {QEMU} (Debian: qemu-system-x86), not installed")
    return found


@dataclass(frozen=True, slots=True)
class GuestMachine:
    """Memory per node in bytes, and the command line that every generation gets."""

    node_bytes: tuple[int, ...]
    cmdline: str

    @classmethod
    def of(cls, memory: str, numa: str | None, cmdline: str, append: str) -> GuestMachine:
        """From the user's words; :class:`InputError` for what no such machine can be."""
        what = "--memory" if numa is None else "--numa"
        sizes = [memory] if numa is None else numa.split(",")
        nodes = tuple(parse_size(size, what=what) for size in sizes)
        if len(nodes) > _MAX_NODES:
            raise InputError(what, f"{len(nodes)} nodes; the lab knows up to {_MAX_NODES}")
        for size in nodes:
            if size % _MIB or size < 16 * _MIB:
                raise InputError(what, f"{format_size(size)} is not at least 16M in whole MiB")
        if not _MIN_BYTES <= sum(nodes) <= _MAX_BYTES:
            raise InputError(what, f"{format_size(sum(nodes))} is not between 128M and 1T")
        whole = " ".join(part for part in (ALWAYS, cmdline.strip(), append.strip()) if part)
        if len(whole) > _MAX_CMDLINE or not whole.isascii() or not whole.isprintable():
            cause = f"is not printable ASCII of up to {_MAX_CMDLINE} characters"
            raise InputError("--append", f"the command line {cause}")
        return cls(nodes, whole)

    def qemu_arguments(
        self,
        qemu: str,
        *,
        kernel: Path,
        initrd: Path,
        ram: Sequence[Path],
        console: Path,
        port: Path,
        gdb: Path,
        cmdline: str,
    ) -> list[str]:
        """What QEMU is called with; ``console``, ``port`` and ``gdb`` are sockets that listen."""
        nodes = self.node_bytes
        machine = f"pc,accel=tcg,max-ram-below-4g={LOW_BYTES}"
        if len(nodes) == 1:
            machine += ",memory-backend=ram0"
        arguments = [qemu, "-machine", machine, "-m", f"{sum(nodes) >> 20}M", "-smp", "2"]
        for number, (size, path) in enumerate(zip(nodes, ram, strict=True)):
            backend = f"memory-backend-file,id=ram{number},size={size},share=on"
            arguments += ["-object", f"{backend},mem-path={_escaped(path)}"]
            if len(nodes) > 1:
                arguments += ["-numa", f"node,nodeid={number},memdev=ram{number}"]
        for name, path in (("console", console), ("port", port), ("gdb", gdb)):
            arguments += ["-chardev", f"socket,id={name},path={_escaped(path)}"]
        arguments += ["-nodefaults", "-display", "none", "-no-reboot", "-S"]
        arguments += ["-serial", "chardev:console", "-serial", "chardev:port"]
        arguments += ["-gdb", "chardev:gdb", "-kernel", str(kernel), "-initrd", str(initrd)]
        return [*arguments, "-append", cmdline]


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
