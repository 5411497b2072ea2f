"""Behaviours of a release, flipped one at a time on a release with every known hazard fixed.

Three look for each flip: *search*, random programs of
``khosim explore``; *pair*, a handover from the release as it is to the flipped one or back, with
something of everything in it; *museum*, the scenario of the upstream bug that the flip brings back.
All of them are judged by the invariants and oracles alone; none is told what was flipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from khosim.bugs.catalogue import all_bugs
from khosim.bugs.exhibit import release_of
from khosim.bugs.stage import Stage as MuseumStage
from khosim.errors import InputError, KernelError, KernelPanic, KhoSimError
from khosim.explore.kit import Stage, Token, audit, ledger
from khosim.explore.search import random_run
from khosim.kernel.behaviours import CHOICES, TRACKERS, Release
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_restore_vmalloc
from khosim.kernel.release import RELEASES
from khosim.kernel.vmalloc import vmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("LOOKERS", "Flip", "Noticed", "flips", "judge", "pair")

SCENARIOS = (
    *("all", "sessions", "memfd", "shared", "vmalloc", "reserve-mem", "pages", "successors"),
    *("subtrees", "oops"),
)
LOOKERS = ("search", "pair", "museum")
"""Who looks."""
_CMDLINE = "kho=on liveupdate=on reserve_mem=64K:4096:oops"
_NAMES = ("name", "uname", "functions", "decoder")
"""What is no behaviour, or says which calls there are."""


class Flip(NamedTuple):
    """Behaviour ``name`` has another ``value``."""

    name: str
    value: object

    def __str__(self) -> str:
        told = {True: "on", False: "off"}.get(self.value) if isinstance(self.value, bool) else None
        return f"{self.name}={told or self.value or '-'}"


class Noticed(NamedTuple):
    """What spoke, by looker ("search", "pair", "museum"); after how many ``runs`` of a search."""

    flip: Flip
    spoke: dict[str, str]
    runs: int


def flips(base: Release) -> list[Flip]:
    """Every other value of every behaviour: the opposite, a listed one, or that of a release."""
    found = []
    for field in dataclasses.fields(Release):
        now = getattr(base, field.name)
        if field.name in _NAMES:
            continue
        values: list[object] = []
        if isinstance(now, bool):
            values = [not now]
        elif field.name == "tracker":
            values = list(TRACKERS)
        else:
            values = list(CHOICES.get(field.name, ()))
            values += [getattr(release, field.name) for release in RELEASES.values()]
        for value in dict.fromkeys(values):
            if value != now:
                with suppress(InputError):  # that value is for another tracker
                    base.evolve(**{field.name: value})
                    found.append(Flip(field.name, value))
    return found


def judge(flip: Flip, base: Release, runs: int, seed: int) -> Noticed:
    """Who notices a flip of ``base``; the search makes ``runs`` runs."""
    flipped = base.evolve(name=f"{base.name}, {flip}", **{flip.name: flip.value})
    searched, made = _search(flipped, base, runs, seed)
    spoke = {"search": searched, "pair": pair(base, flipped), "museum": _museum(flip)}
    return Noticed(flip, {name: what for name, what in spoke.items() if what}, made)


def _search(release: Release, base: Release, runs: int, seed: int) -> tuple[str, int]:
    for n in range(runs):
        problems = _run(release, n, seed)
        # What speaks without the flip as well has not noticed it.
        if problems and not problems & _run(base, n, seed):
            return min(problems), n + 1
    return "", runs


def _run(release: Release, n: int, seed: int) -> set[str]:
    world = random_run(f"{seed}:{n}", SCENARIOS[n % len(SCENARIOS)], release)
    return {problem.invariant for problem in world.problems}


def pair(base: Release, flipped: Release) -> str:
    """What speaks when ``flipped`` hands over to itself, or to and from ``base``."""
    for chain in ((flipped, flipped, flipped), (base, flipped, base), (flipped, base, flipped)):
        what = next(_handover(*chain), "")
        if what:
            return what
    return ""


def _handover(first: Release, second: Release, third: Release) -> Iterator[str]:
    """One of everything handed over twice; what speaks."""
    machine = Stage("128M")
    try:
        kernel = machine.boot(cmdline=_CMDLINE, release=first)
        ledger(kernel)
        for release in (second, third):
            kernel, lost = _over(kernel, release)
            if lost:
                yield lost
        for violation in audit(machine):
            yield violation.invariant
    except KernelPanic:
        yield "kernel-panic"
    except KernelError as refused:
        yield f"refused: {refused}"
    except KhoSimError as error:
        yield f"misuse: {error}"


def _over(kernel: Kernel, release: Release) -> tuple[Kernel, str]:
    """Preserve, jump, restore: the successor, and what it lost."""
    folios = [kernel.alloc_folio(order) for order in (0, 3, 9)]
    for folio in folios:
        folio.write(0, b"folio")
        kernel.kho_preserve_folio(folio)
    phys = kernel.alloc_pages_exact(13) << kernel.arch.page_shift
    kernel.kho_preserve_pages(phys >> kernel.arch.page_shift, 13)
    area = vmalloc(kernel, 3 << 20)
    assert area is not None
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    descriptor = slot.load()
    blob = kernel.kho_alloc_preserve(100)
    kernel.kho_add_subtree("mine", blob.phys, 100)
    session = kernel.liveupdate.create_session("one")
    session.preserve(Token(kernel, 7), 1)
    memfd = kernel.memfd("m", size=5000)
    memfd.write(0, b"memfd")
    session.preserve(memfd, 2)
    kernel = kernel.kexec(release=release)
    if not kernel.is_kho_boot:
        return kernel, "handover-refused"
    ledger(kernel)
    session = kernel.liveupdate.retrieve_session("one")
    files = session.retrieve(1), session.retrieve(2)
    is_kept = files[0].value == 7 and files[1].read(0, 5) == b"memfd"
    session.finish()
    session.close()
    is_kept &= kernel.kho_retrieve_subtree("mine")[0] == blob.phys
    for folio in folios:
        restored = kernel.kho_restore_folio(folio.phys)
        is_kept &= restored is not None and restored.read(0, 5) == b"folio"
    is_kept &= kernel.kho_restore_pages(phys, 13) is not None
    slot = KhoVmallocSlot(kernel)
    slot.store(descriptor)
    is_kept &= kho_restore_vmalloc(kernel, slot) is not None
    return kernel, "" if is_kept else "promise-kept"


def _museum(flip: Flip) -> str:
    # On the release of the exhibit, where the bug was: older than 7.3 for some.
    for bug in all_bugs():
        without, with_ = bug.without_fix, bug.with_fix
        brings = flip.name in without and without[flip.name] == flip.value
        if brings or (flip.name in with_ and with_[flip.name] != flip.value):
            stage = MuseumStage(release_of(bug, is_fixed=False))
            stage.play(bug.scenario)
            if stage.spoke:
                return f"{bug.id} {stage.spoke[0]}"
    return ""
