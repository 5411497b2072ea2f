"""What must hold, as assertions that say what happened to which page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.checks.held import outgoing_pages, preserved_and_free
from khosim.checks.ranges import merged, minus, page_ranges, pairs
from khosim.errors import InputError
from khosim.faults.device import DEVICE
from khosim.kernel.liveupdate.luo_session import Session
from khosim.kernel.memfd import Memfd
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.ranges import Ranges
    from khosim.checks.violation import Violation
    from khosim.kernel.kernel import Kernel
    from khosim.simulator import Machine

__all__ = (
    "assert_no_violations",
    "assert_not_preserved",
    "assert_preserved",
    "assert_preserved_is_held",
    "assert_survives",
    "violation_report",
    "violations_of",
)

_TOLD_MAX = 12
_RUNS_MAX = 4


def violation_report(violations: list[Violation]) -> str:
    """Each violation by invariant, page, owner and last writer: a few lines for people."""
    count = len(violations)
    lines = [f"{count} {'violation' if count == 1 else 'violations'}"]
    for violation in violations[:_TOLD_MAX]:
        lines.append(f"{violation.invariant}: {violation.message}")
        lines.append(f"    seen in generation {violation.generation}")
        if violation.phys > 0:
            lines[-1] += f", at {violation.phys:#x}"
        if violation.owner:
            lines.append(f"    owner {violation.owner}")
        if violation.writer:
            by = "before any kernel"
            if violation.writer_generation >= 0:
                by = f"in generation {violation.writer_generation}"
            lines.append(f"    last written by {violation.writer} {by}")
    if count > _TOLD_MAX:
        lines.append(f"and {count - _TOLD_MAX} more")
    return "\n".join(lines)


def violations_of(machine: Machine) -> list[Violation]:
    """All of ``machine`` so far, but for what a :class:`~khosim.testing.Dma` wrote on purpose."""
    return [
        violation
        for violation in machine.check()
        if (violation.invariant, violation.writer) != ("preserved-content", DEVICE)
    ]


def assert_no_violations(machine: Machine, *, allowing: Sequence[str] = ()) -> None:
    """No invariant is broken on ``machine``, now and at any jump so far, but those ``allowing``."""
    found = [v for v in violations_of(machine) if v.invariant not in allowing]
    if found:
        raise AssertionError(violation_report(found))


# -- what is preserved ---------------------------------------------------------------------------


def _missing(kernel: Kernel, pfn: int, nr_pages: int) -> Ranges:
    # The checkers' own reading of the map in RAM, not the kernel's word.
    wanted = merged(page_ranges([(pfn, pfn + nr_pages)], 0))
    outgoing = outgoing_pages(kernel.hardware, kernel)
    return wanted if outgoing is None else minus(wanted, outgoing)


def _pages(ranges: Ranges) -> tuple[int, str]:
    starts, ends = ranges
    told = ", ".join(f"[{start:#x}-{end:#x})" for start, end in pairs(ranges, _RUNS_MAX))
    return int((ends - starts).sum()), f"pfn {told}"


def assert_preserved(kernel: Kernel, pfn: int, nr_pages: int = 1) -> None:
    """All ``nr_pages`` pages from ``pfn`` on would be handed over, by the bytes in RAM."""
    missing = _missing(kernel, pfn, nr_pages)
    if len(missing[0]):
        count, told = _pages(missing)
        raise AssertionError(f"{count} of {nr_pages} pages are not preserved: {told}")


def assert_not_preserved(kernel: Kernel, pfn: int, nr_pages: int = 1) -> None:
    """None of ``nr_pages`` pages from ``pfn`` on would be handed over, by the bytes in RAM."""
    wanted = merged(page_ranges([(pfn, pfn + nr_pages)], 0))
    there = minus(wanted, _missing(kernel, pfn, nr_pages))
    if len(there[0]):
        count, told = _pages(there)
        raise AssertionError(f"{count} of {nr_pages} pages are preserved still: {told}")


def assert_preserved_is_held(kernel: Kernel) -> None:
    """No page that would be handed over is free: who frees memory takes it back first.

    Not asked of releases that write their map at the end only (to 7.0), nor where KHO is off.
    """
    if kernel.release.finalize or not kernel.kho_enable:
        return
    outgoing = outgoing_pages(kernel.hardware, kernel)
    if outgoing is None:
        return
    free = preserved_and_free(kernel, outgoing)
    if len(free[0]):
        count, told = _pages(free)
        raise AssertionError(f"{count} preserved pages are free: {told}")


# -- what survives -------------------------------------------------------------------------------


def assert_survives(
    kernel: Kernel, *things: Folio | Session, **options: Any
) -> tuple[Kernel, list[Any]]:
    """Hand over, take ``things`` back and compare them byte by byte.

    ``things`` are preserved folios, and sessions with memfds in them. ``options`` are those of
    :meth:`khosim.Machine.kexec`. Returns the successor, and for each thing the restored folio, or
    the session's files by token (the session is finished and closed).
    """
    kept: list[tuple[Any, ...]] = []
    for thing in things:
        if isinstance(thing, Folio):
            assert_preserved(kernel, thing.pfn, thing.nr_pages)
            kept.append((thing.phys, thing.order, thing.read(0, thing.len_bytes)))
        elif isinstance(thing, Session):
            files = {f.token: f.file for f in thing.session.file_set.files}
            kept.append((thing.name, {token: _facts(file) for token, file in files.items()}))
        else:
            raise InputError("assert_survives", f"{thing!r} is neither a folio nor a session")
    machine = kernel.host
    successor = kernel.kexec(**options)
    back: list[Any] = []
    for facts in kept:
        take = _folio_back if len(facts) == 3 else _session_back
        back.append(take(successor, *facts))
    if machine is not None:
        assert_no_violations(machine)  # type: ignore[arg-type]
    return successor, back


def _facts(file: Any) -> tuple[int, int, int, bytes] | None:
    if not isinstance(file, Memfd):
        return None
    return file.size, file.seals, file.f_pos, file.read(0, file.size)


def _folio_back(kernel: Kernel, phys: int, order: int, content: bytes) -> Folio:
    folio = kernel.kho_restore_folio(phys)
    assert folio is not None, f"the folio at {phys:#x} cannot be restored"
    assert folio.order == order, f"the folio at {phys:#x} had order {order}, has {folio.order}"
    _same(f"the folio at {phys:#x}", content, folio.read(0, len(content)))
    return folio


def _session_back(kernel: Kernel, name: str, facts: dict[int, Any]) -> dict[int, Any]:
    session = kernel.liveupdate.retrieve_session(name)
    files = {token: session.retrieve(token) for token in facts}
    for token, was in facts.items():
        if was is None:
            continue
        now = _facts(files[token])
        assert now is not None, f"file {token} of {name!r} is no memfd any more"
        for what, old, new in zip(("size", "seals", "position"), was, now, strict=False):
            assert old == new, f"file {token} of {name!r}: {what} was {old}, is {new}"
        _same(f"file {token} of {name!r}", was[3], now[3])
    session.finish()
    session.close()
    return files


def _same(what: str, old: bytes, new: bytes) -> None:
    if old == new:
        return
    at = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    raise AssertionError(f"{what}: byte {at} was {old[at]:#04x}, is {new[at]:#04x}")
