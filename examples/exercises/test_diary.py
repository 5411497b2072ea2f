"""Exercise 2: a diary that outlives its kernels."""

from __future__ import annotations

from diary import load, save

from khosim.explore.kit import Stage, audit

LINES = [f"day {day}: nothing broke" for day in range(1, 6)] + ["day 6: ünïcode", ""]


def test_the_first_kernel_finds_nothing() -> None:
    """After a cold boot the diary is empty."""
    kernel = Stage("64M").boot(cmdline="kho=on")
    assert load(kernel) == []


def test_a_successor_without_a_predecessor_that_saved() -> None:
    """A handover without a diary is an empty diary."""
    kernel = Stage("64M").boot(cmdline="kho=on").kexec()
    assert load(kernel) == []


def test_every_line_comes_through() -> None:
    """Seven generations, a line more in each; every invariant holds at every jump."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    for number, line in enumerate(LINES):
        lines = load(kernel)
        assert lines == LINES[:number]
        save(kernel, [*lines, line])
        assert audit(machine) == []
        kernel = kernel.kexec()
    assert load(kernel) == LINES
    assert audit(machine) == []


def test_nothing_is_left_behind() -> None:
    """Who has loaded the diary has as much free memory as before it was there."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on").kexec()
    empty = kernel.pages.nr_free_pages()
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    save(kernel, LINES)
    kernel = kernel.kexec()
    assert load(kernel) == LINES
    assert kernel.pages.nr_free_pages() == empty
