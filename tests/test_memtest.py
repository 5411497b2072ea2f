"""Tests of RAM at boot: what ``memtest=`` overwrites, and what spares a handover."""

from __future__ import annotations

import pytest

from khosim.errors import KernelPanic
from khosim.explore.kit import Stage

MARK = b"left by the kernel before"
AT = 40 << 20


@pytest.mark.parametrize(
    ("word", "is_tested"),
    [
        ("memtest", True),
        ("memtest=1", True),
        ("memtest=0x11", True),
        ("memtest=010", True),
        ("memtest=0", False),
        ("memtest=x", False),
        ("memtest=08", False),
        ("memtest=4294967296", False),
        ("memtest=1 memtest=no", True),
        ("memtest=1 memtest=0", False),
    ],
)
def test_free_memory_is_zero_after_a_test(word: str, is_tested: bool) -> None:
    """A number of passes, base 0, or nothing for all patterns; what is no number is ignored."""
    machine = Stage("64M")
    machine.hardware.ram.write(AT, MARK, machine.boot(cmdline="kho=off").by("user"))
    kernel = machine.boot(cmdline=f"kho=off {word}")
    assert (kernel.ram.read(AT, len(MARK)) != MARK) is is_tested
    assert any("early_memtest" in line for line in kernel.messages) is is_tested


@pytest.mark.parametrize("spec", [{"ram": "64M"}, {"ram": "512M", "arch": "arm64"}])
def test_a_handover_is_spared_by_the_fix_alone(spec: dict[str, str]) -> None:
    """Scratch is tested in both; what was preserved is overwritten unless the switch is on."""
    for release, survives in (("7.3", False), ("7.3+fix_memtest=on", True)):
        machine = Stage(**spec)
        kernel = machine.boot(release, cmdline="kho=on")
        folio = kernel.alloc_folio(0)
        folio.write(0, MARK)
        kernel.kho_preserve_folio(folio)
        if not survives:
            with pytest.raises(KernelPanic):
                kernel.kexec(cmdline="kho=on memtest=1")
            assert machine.hardware.ram.read(folio.phys, len(MARK)) == bytes(len(MARK))
            continue
        kernel = kernel.kexec(cmdline="kho=on memtest=1")
        restored = kernel.kho_restore_folio(folio.phys)
        assert restored is not None
        assert restored.read(0, len(MARK)) == MARK


@pytest.mark.parametrize("word", ["debugfs=off", "debugfs=no-mount", "debugfs=on debugfs=off"])
def test_without_debugfs_there_is_no_kho(word: str) -> None:
    """``kho_init`` fails where debugfs has no folder for it, and not with the switch."""
    kernel = Stage("64M").boot(cmdline=f"kho=on {word}")
    assert not kernel.kho_enable
    assert not kernel.debugfs.files()
    kernel = Stage("64M").boot("7.3+fix_debugfs_refused=on", cmdline=f"kho=on {word}")
    assert kernel.kho_enable
    assert not kernel.debugfs.files()
    assert Stage("64M").boot(cmdline="kho=on debugfs=off debugfs=on debugfs=x").kho_enable
