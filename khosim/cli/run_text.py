"""The account of a run for people: plain text, at most 80 columns, the same bytes every time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from textwrap import wrap

from khosim.scenario.facts import GenerationFacts, SessionFact, StepRecord
from khosim.scenario.fields import count_text, size_text
from khosim.scenario.model import LEFT_OUT, Scenario
from khosim.scenario.result import Result

__all__ = ("generation", "heading", "verdict")

_WIDTH = 80
_LABEL = 13
_MESSAGES_MAX = 12
_VIOLATIONS_MAX = 20
_DULL = re.compile(r"Freeing (initrd|unused kernel image)")

_ARRIVALS = {
    "cold": "cold boot",
    "accepted": "took the handover over",
    "refused": "refused the handover, cold boot",
    "panic": "panic",
}
_DONE = {
    "folios": "allocated",
    "pages": "allocated",
    "blob": "allocated",
    "preserve": "preserved",
    "unpreserve": "unpreserved",
    "restore": "restored",
    "free": "freed",
    "write": "written",
    "check": "intact",
    "preserve_at": "preserved",
    "corrupt": "corrupted",
    "guest": "started",
    "device": "opened",
    "stop": "stopped",
    "preserve_fd": "preserved",
    "retrieve": "retrieved",
    "finish": "finished",
    "close": "closed",
    "kill": "killed",
}
_SESSION_STEPS = ("retrieve", "finish", "close")
_TELL_ORDERS = ("session", "preserve_fd", "retrieve")


def heading(scenario: Scenario) -> list[str]:
    """Which scenario, on which machine."""
    nodes = scenario.memory_map.online_nodes
    ram = f"{size_text(scenario.memory_map.ram_bytes)} of RAM on {count_text(len(nodes), 'node')}"
    machine = f"{ram}, {scenario.memory_map.arch}, {scenario.page_size >> 10} KiB pages"
    kernels = f"Linux {scenario.kernel.release.name} ({scenario.kernel.release.kho_compatible})"
    lines = wrap(f"{scenario.name}: {scenario.about}" if scenario.about else scenario.name, _WIDTH)
    lines += wrap(f"{machine}; {kernels}; {scenario.allocator} allocator, seed {scenario.seed}",
                  _WIDTH)
    return lines


def generation(facts: GenerationFacts, before: GenerationFacts | None = None) -> list[str]:
    """One generation, from its boot to its jump; ``before`` is the one before it."""
    lines = ["", f"generation {facts.generation}: {_arrival(facts)}"]
    if before is None or facts.cmdline != before.cmdline:
        lines += _row("command line", facts.cmdline)
    if before is not None and facts.release != before.release:
        lines += _row("release", facts.release)
    if facts.outcome != "panic":
        lines += _scratch(facts)
    lines += _messages(facts)
    for step in facts.steps:
        lines += _step(step)
    if facts.outcome != "panic":
        lines += _preserved(facts)
        lines += _row(
            "memory",
            f"{size_text(_pages(facts, facts.free_pages))} free of the "
            f"{size_text(_pages(facts, facts.managed_pages))} that the page allocator manages",
        )
    lines += _end(facts)
    return lines


def _arrival(facts: GenerationFacts) -> str:
    text = _ARRIVALS[facts.outcome]
    if facts.previous_release:
        text += f" (from {facts.previous_release}, handover {facts.kexec_count})"
    return text


def _row(label: str, text: str) -> list[str]:
    body = wrap(text, _WIDTH - _LABEL - 2, break_on_hyphens=False) or [""]
    first = f"  {label:<{_LABEL}}{body[0]}".rstrip()
    return [first, *(f"  {'':<{_LABEL}}{line}" for line in body[1:])]


def _rows(label: str, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _row(label, text)
        label = ""


def _pages(facts: GenerationFacts, nr_pages: int) -> int:
    return nr_pages * facts.page_size


def _scratch(facts: GenerationFacts) -> list[str]:
    if not facts.scratch:
        return _row("scratch", "none: KHO is off")
    if facts.outcome == "accepted":
        total = sum(area.len_bytes for area in facts.scratch)
        count = count_text(len(facts.scratch), "area")
        return _row("scratch", f"{count}, {size_text(total)}, as handed over")
    lines = list(
        _rows(
            "scratch",
            (
                f"{area.name:<7} {size_text(area.len_bytes):>6} at {area.phys:#x}: {area.why}"
                for area in facts.scratch
            ),
        )
    )
    pages = size_text(facts.struct_page_bytes)
    return lines + _row("", f"sized by what boot reserved, of which {pages} are struct pages")


def _messages(facts: GenerationFacts) -> list[str]:
    wanted = [message for message in facts.messages if not _DULL.match(message)]
    shown = wanted[:_MESSAGES_MAX]
    lines = list(_rows("kernel log", shown))
    if len(wanted) > len(shown):
        lines += _row("", f"... and {len(wanted) - len(shown)} more lines")
    return lines


def _step(step: StepRecord) -> list[str]:
    what = _DONE.get(step.do, step.do)
    if step.outcome == LEFT_OUT:
        return _row(step.do, ", ".join(filter(None, (_named(step), f"left out: {step.note}"))))
    if step.outcome != "ok":
        verdict = "as expected" if step.outcome == step.expect else "NOT AS EXPECTED"
        return _row(step.do, ", ".join(filter(None, (_named(step), f"{verdict}: {step.note}"))))
    blocks = count_text(step.blocks, step.unit) if step.blocks else ""
    size = size_text(step.len_bytes) if step.len_bytes else ""
    if size and step.do == "check":
        size += " of content"
    parts = [_named(step), blocks, size, step.note]
    if not blocks:
        parts = [_named(step), step.note, size]
    lines = _row(what, ", ".join(filter(None, parts)))
    if step.by_order and step.do in _TELL_ORDERS:
        lines += _row("", f"folios {_orders(step.by_order)}")
    return lines


def _named(step: StepRecord) -> str:
    if step.name != "*":
        return step.name
    if step.do in _SESSION_STEPS:
        return "" if step.unit == "session" else "every session"
    return "every guest" if step.unit == "page" else "everything"


def _orders(by_order: dict[str, int]) -> str:
    return "by order: " + ", ".join(f"{order}: {count:,}" for order, count in by_order.items())


def _preserved(facts: GenerationFacts) -> list[str]:
    preserved = facts.preserved
    label = "hands over" if facts.end == "kexec" else "map holds"
    if not preserved.blocks:
        return _row(label, "nothing")
    blocks, size = count_text(preserved.blocks, "block"), size_text(preserved.len_bytes)
    tables = count_text(preserved.table_pages, "table page")
    lines = _row(label, f"{blocks}, {size}, in a tree of {tables}")
    lines += _row("", _orders(preserved.by_order))
    lines += _row("", "subtrees: " + ", ".join(facts.subtrees))
    return lines + list(_rows("sessions", map(_session, facts.sessions)))


def _session(session: SessionFact) -> str:
    files = (
        f"{name or 'a file'} ({session.handlers[token]}) under token {token}"
        for token, name in session.files.items()
    )
    return f"{session.name}: {', '.join(files) or 'no files'}"


def _end(facts: GenerationFacts) -> list[str]:
    if facts.end not in ("kexec", "crash"):
        return [] if facts.end in ("running", "panic") else _row("end", facts.end)
    return list(
        _rows(
            "jump",
            (
                f"{segment.name:<18} {size_text(segment.len_bytes):>6} at {segment.phys:#x}"
                + (f" in {segment.area} scratch" if segment.area else "")
                for segment in facts.segments
            ),
        )
    )


def verdict(result: Result, more: Iterable[str] = ()) -> list[str]:
    """Every invariant with its sentence, what was violated, ``more``, and one line at the end."""
    lines = ["", "invariants"]
    for item in result.invariants:
        state = "  ok  " if item.ok else "  VIOLATED  "
        text = f"{item.name}: {item.sentence}"
        lines += wrap(
            text,
            _WIDTH,
            initial_indent=state,
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    if result.violations:
        lines += ["", "violations"]
        for violation in result.violations[:_VIOLATIONS_MAX]:
            lines += wrap(str(violation), _WIDTH, initial_indent="  ", subsequent_indent="    ")
        if len(result.violations) > _VIOLATIONS_MAX:
            lines += [f"  ... and {len(result.violations) - _VIOLATIONS_MAX} more (see --json)"]
    if result.failures:
        lines += ["", "not as the scenario says"]
        for failure in result.failures:
            lines += wrap(failure, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *more, "", *_summary(result)]


def _summary(result: Result) -> list[str]:
    broken = sum(not item.ok for item in result.invariants)
    held = len(result.invariants) - broken
    parts = [
        count_text(len(result.kernels), "generation"),
        count_text(result.handovers, "handover"),
        f"{size_text(result.preserved_bytes)} preserved; "
        f"{count_text(held, 'invariant')} hold" + ("s" if held == 1 else ""),
    ]
    if broken:
        parts.append(f"{broken} violated")
    return [f"{'ok' if result.ok else 'FAILED'}: {', '.join(parts)}"]
