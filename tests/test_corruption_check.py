"""Low memory that is zeroed and kept, to see whether a BIOS writes to it."""

from __future__ import annotations

import pytest

from khosim.errors import KernelPanic
from khosim.explore.kit import Stage
from khosim.kernel.kernel import Kernel

MARK = b"left by the kernel before"
AT = 6 << 20
ON = "memory_corruption_check=1"


def booted(words: str, *, arch: str = "x86_64") -> Kernel:
    """A kernel on a machine whose memory at ``AT`` bears a mark."""
    machine = Stage("512M" if arch == "arm64" else "64M", arch=arch)
    before = machine.boot(cmdline="kho=off")
    machine.hardware.ram.write(AT + machine.hardware.ram_ranges[0][0], MARK, before.by("user"))
    return machine.boot(cmdline=f"kho=off {words}")


@pytest.mark.parametrize(
    ("words", "size_bytes"),
    [
        (f"{ON} memory_corruption_check_size=8M", 8 << 20),
        (f"{ON} memory_corruption_check_size=6292480", 6295552),
        (f"memory_corruption_check_size=8M {ON}", 8 << 20),
        (f"{ON} memory_corruption_check_size=4294967296", 0),
        (f"{ON} memory_corruption_check_size=8Mx", 0),
        (f"{ON} memory_corruption_check_size=8M memory_corruption_check=0", 0),
        ("memory_corruption_check=x memory_corruption_check_size=8M", 0),
        ("memory_corruption_check_size=8M", 0),
        (ON, 0),
    ],
)
def test_what_is_checked_is_zero_and_nobodys(words: str, size_bytes: int) -> None:
    """Free memory below a size, rounded up to pages; by default there is none."""
    kernel = booted(words)
    assert (kernel.ram.read(AT, len(MARK)) == MARK) is (size_bytes == 0)
    assert kernel.alloc_folio(0).phys >= size_bytes
    said = "Scanning" in "".join(kernel.messages)
    assert said is (size_bytes != 0)


def test_arm64_has_no_such_check() -> None:
    """Its kernels do not know the words."""
    kernel = booted(f"{ON} memory_corruption_check_size=8M", arch="arm64")
    assert kernel.ram.read(AT + kernel.hardware.ram_ranges[0][0], len(MARK)) == MARK


def test_a_handover_is_spared_by_the_fix_alone() -> None:
    """Its root FDT lies in low memory here: without the switch the successor dies."""
    line = f"kho=on {ON} memory_corruption_check_size=8M"
    kernel = Stage("64M").boot(cmdline="kho=on")
    with pytest.raises(KernelPanic):
        kernel.kexec(cmdline=line)
    machine = Stage("64M")
    kernel = machine.boot("7.3+fix_corruption_check=on", cmdline="kho=on")
    folio = kernel.alloc_folio(0)
    folio.write(0, MARK)
    kernel.kho_preserve_folio(folio)
    kernel = kernel.kexec(cmdline=line)
    restored = kernel.kho_restore_folio(folio.phys)
    assert restored is not None
    assert restored.read(0, len(MARK)) == MARK
    assert not machine.check()
