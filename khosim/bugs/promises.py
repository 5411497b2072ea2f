"""Promises of single calls, beside the invariants that hold for all of the machine.

The auditor sees memory; it does not know what a caller was promised. A scenario does, and says
which of these was broken. The names stand beside those of the invariants in every report.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("PROMISES", "Promise")


@dataclass(frozen=True, slots=True)
class Promise:
    """A promise by name, and one sentence of what it protects."""

    name: str
    protects: str


PROMISES: dict[str, Promise] = {
    promise.name: promise
    for promise in (
        Promise(
            "errno-as-documented",
            "A call that cannot be carried out is refused, with the errno its documentation names.",
        ),
        Promise(
            "call-succeeds",
            "A call that asks for something lawful is carried out.",
        ),
        Promise("call-returns", "Every call comes to an end."),
        Promise("kernel-survives", "No lawful call and no lawful handover kills a kernel."),
        Promise("failure-is-told", "A kernel that gives something up says so in its log."),
        Promise(
            "undo-restores-state", "What is done and undone leaves everything as it was before."
        ),
        Promise(
            "content-equal", "Whoever restores or retrieves something finds in it what was there."
        ),
        Promise(
            "attributes-equal",
            "What is handed over keeps its attributes: seals, sizes, positions, names, counts.",
        ),
        Promise(
            "preserved-restorable", "What could be preserved can be restored in the successor."
        ),
        Promise("pages-freeable", "What is restored can be freed, without a report of bad pages."),
        Promise("preserved-whole", "What is preserved is all that was asked for."),
        Promise("kho-stays-on", "A machine on which scratch fits keeps KHO switched on."),
        Promise("kdump-undisturbed", "A crash kernel is as it would be without KHO."),
        Promise(
            "huge-pages-kept", "A successor gets as many huge pages at boot as its predecessor."
        ),
        Promise(
            "accounting-exact", "Counters say what is there: pages, blocks, references, lengths."
        ),
        Promise("references-hold", "What somebody has a reference to is not freed."),
        Promise(
            "failure-frees", "A call that fails leaves nothing that nobody can free any more."
        ),
        Promise(
            "text-ends-with-its-field", "Text from a predecessor is read as far as its field goes."
        ),
        Promise("right-allocator", "Memory goes back to the allocator it came from."),
    )
}
