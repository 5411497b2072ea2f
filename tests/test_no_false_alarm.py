"""Programs at which the search once spoke without cause, on the fixed protocol: silent now."""

from __future__ import annotations

from contextlib import suppress

import pytest

from khosim.errors import KernelError
from khosim.explore.hazards import fixed
from khosim.explore.kit import Stage, audit, failing
from khosim.explore.search import KINDS, replay
from khosim.explore.work import run_unit
from khosim.explore.world import Step

LINE = "kho=on liveupdate=on"
FIXED = fixed("7.3")
BOOT = Step("boot", ('"64M"', LINE, FIXED))
SESSION = Step("create_session", ("s0", "vm"))

PROGRAMS = {
    # liveupdate=off finishes the predecessor's sessions also where memory is short.
    "sessions that nobody can ask for": (
        BOOT,
        Step("memfd", ("m0", 1, 2)),
        SESSION,
        Step("preserve_file", ("s0", "m0", 0)),
        Step("kexec", ("kho=on",), 10, boot=True),
    ),
    # A file whose handler was not asked yet still waits, and may be busy.
    "a busy token that was not asked for": (
        BOOT,
        Step("ledger", ("g0",)),
        Step("token", ("k0", "finish")),
        SESSION,
        Step("preserve_file", ("s0", "k0", 0)),
        Step("kexec", (LINE,)),
        Step("ledger", ("g0",)),
        Step("retrieve_session", ("s0", "vm")),
        Step("retrieve_file", ("s0", "k0", 0, "token"), 1),
        Step("close_unfinished", ("s0",)),
    ),
    # Tokens came, though mem= let nobody expect any: who asks for a session first is told -EIO.
    "sessions of which there are no books": (
        BOOT,
        Step("ledger", ("g0",)),
        SESSION,
        Step("token", ("k0", "")),
        Step("preserve_file", ("s0", "k0", 0)),
        Step("kexec", (f"{LINE} mem=1073610496",)),
        SESSION,
    ),
    # Twice what a kernel and its initrd take is more than there is, whatever else is set aside.
    "scratch that has no room beside an initrd": (
        Step("boot", ('"64M"', f"{LINE} elfcorehdr=1M", FIXED)),
        Step("kexec", (f"{LINE} elfcorehdr=1M reserve_mem=2097152:4096:b", 'initrd="4M"')),
        Step("kexec", (f"{LINE} reserve_mem=2097152:4096:b",)),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_silent(name: str) -> None:
    """The program is lawful, and nothing speaks."""
    world = replay(PROGRAMS[name], FIXED)
    assert world is not None
    assert world.problems == []
    assert [step.kind for step in world.steps] == [step.kind for step in PROGRAMS[name]]


def test_nobody_puts_what_a_dead_task_was_putting() -> None:
    """Whether it was put is not known: a program that puts it again is none that anyone means."""
    steps = (
        BOOT,
        Step("ledger", ("g0",)),
        Step("token", ("k0", "")),
        SESSION,
        Step("preserve_file", ("s0", "k0", 0)),
        Step("get_outgoing", ("g0",)),
        Step("close_session", ("s0",)),
        Step("put_outgoing", ("g0",), 1, dies=True),
    )
    assert replay(steps, FIXED) is not None
    assert replay((*steps, Step("put_outgoing", ("g0",))), FIXED) is None


def test_nobody_maps_what_there_is_not() -> None:
    """An area is asked for where there is memory for it: half of what is free and no scratch."""
    steps = [Step("boot", ('"64M"', "mem=25165824", FIXED))]
    steps += [Step("alloc_folio", (f"f{n}", order)) for n, order in enumerate((9, 10))]
    assert replay([*steps, Step("vmalloc", ("v0", 2093056, False))], FIXED) is not None
    steps += [Step("alloc_folio", ("f2", 9)), Step("load_image", ("mem=25165824",))]
    assert replay([*steps, Step("vmalloc", ("v0", 4097, False))], FIXED) is not None
    assert replay([*steps, Step("vmalloc", ("v0", 2093056, False))], FIXED) is None


def test_many_need_room() -> None:
    """Huge pages and an image that waits take nearly all: nobody wants a half of many then."""
    full = Step("boot", ('"64M"', f"{LINE} hugepages=16", FIXED))
    steps = [full, SESSION, Step("load_image", (f"{LINE} hugepages=16",))]
    assert replay([BOOT, SESSION, Step("preserve_files", ("s0", 64))], FIXED) is not None
    assert replay([*steps, Step("preserve_files", ("s0", 64))], FIXED) is None
    assert replay([*steps, Step("create_sessions", ("c0", 52))], FIXED) is None


def test_what_a_task_died_at_is_lost() -> None:
    """Named by the step, or by the text of its program: nobody goes on with it."""
    steps = (
        Step("boot", ('"64M"', "kho=on", FIXED)),
        Step("vmalloc", ("v0", 1, False)),
        Step("preserve_vmalloc", ("v0",)),
        Step("unpreserve_vmalloc", ("v0",), 1, dies=True),
    )
    assert replay(steps, FIXED) is not None
    assert replay((*steps, Step("unpreserve_vmalloc", ("v0",))), FIXED) is None
    second = Step("create_session", ("s1", "x" * 63))
    killed = (BOOT, SESSION, second, Step("kill", ("",), 1, dies=True))
    assert replay(killed, FIXED) is not None
    assert replay((*killed, Step("close_session", ("s1",))), FIXED) is None


def test_nobody_kexecs_past_a_lock_of_the_dead() -> None:
    """liveupdate_reboot waits for ever where a task died in a session's call; a reset helps."""
    steps = (
        BOOT,
        Step("memfd_huge", ("m1", 2 << 20)),
        SESSION,
        Step("preserve_file", ("s0", "m1", 1)),
        Step("close_session", ("s0",), 3, dies=True),
    )
    assert replay(steps, FIXED) is not None
    assert replay((*steps, Step("kexec", (LINE,))), FIXED) is None
    again = replay((*steps, Step("reset"), Step("kexec", (LINE,))), FIXED)
    assert again is not None
    assert again.problems == []


@pytest.mark.parametrize("n", range(1, 15))
def test_a_refused_retrieve_leaves_nothing(n: int) -> None:
    """Whichever allocation fails while a memfd comes back, its pages are somebody's, or free."""
    machine = Stage("64M")
    kernel = machine.boot(FIXED, cmdline=LINE)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(kernel.memfd("m", size=1, flags=2), 0)
    kernel = kernel.kexec()
    session = kernel.liveupdate.retrieve_session("vm")
    with suppress(KernelError), failing(kernel, n):
        session.retrieve(0).close()
    session.close()
    assert audit(machine, drained=True) == []


def test_all_calls_of_sessions_lock() -> None:
    """Whatever is done to a session locks it; its files are closed without."""
    of_sessions = {n for n, kind in KINDS.items() if kind.group in ("session", "crowd", "agent")}
    assert {n for n in of_sessions if not KINDS[n].locks} == {"close_file"}


def test_who_dies_while_a_call_is_undone_is_mourned() -> None:
    """What it had freed is freed again with its session: nobody's finding, as any dead task's."""
    assert not run_unit("5", "all", FIXED, 80293, 1).suspects
