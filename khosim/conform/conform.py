"""``khosim conform``: one capture, item by item, everything khosim models held against it.

For each generation: its log's memblock calls made again, its handover decoded and rebuilt byte for
byte, what its successor did with it, what debugfs and ``/proc`` showed; and what a simulated
successor does with it, and a simulated predecessor on that machine. An item that differs only
because another one already says that the capture contradicts itself is not counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khosim.capture.folder import Capture
from khosim.conform.debugfs_items import debugfs_items
from khosim.conform.handover_items import handover_items
from khosim.conform.held import Held
from khosim.conform.items import Item
from khosim.conform.log_items import log_items
from khosim.conform.machine_items import files_item, machine_items
from khosim.conform.successor_items import predecessor_items, successor_items
from khosim.conform.told_twice import told_twice_items
from khosim.kernel.arch import find_arch
from khosim.kernel.release import Release

__all__ = ("Report", "conform_capture")

_TAKEN_OVER = "KHO: found kexec handover data"


@dataclass(frozen=True, slots=True)
class Report:
    """How a capture came out: the items of each generation, in order."""

    capture: Capture
    generations: dict[str, list[Item]]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not any(item.ok is False for items in self.generations.values() for item in items)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "capture": self.capture.name,
            "release": self.capture.release,
            "arch": self.capture.arch,
            "page_size": self.capture.page_size,
            "ok": self.ok,
            "generations": {
                name: {item.name: item.as_json() for item in items}
                for name, items in self.generations.items()
            },
        }


def conform_capture(path: str | Path, release: Release | None = None) -> Report:
    """Hold khosim against the capture at ``path``; :class:`InputError` where it is none.

    ``release`` is that of the simulated kernels; None is what was captured.
    """
    capture = Capture(path)
    arch = find_arch(capture.arch, capture.page_size)
    found: dict[str, list[Item]] = {}
    before: Held | None = None
    areas: list[tuple[int, int]] | None = None
    for generation in capture.generations:
        held = Held(generation)
        if before is None and generation.has("dmesg") and _TAKEN_OVER in generation.dmesg:
            before = Held(generation, why="the capture begins after it")
        items = [files_item(capture, generation)]
        logged, replay = log_items(capture, generation, before, areas)
        items += logged
        items += handover_items(held, arch)
        items += debugfs_items(generation, before, held)
        items += machine_items(capture, generation, replay, before)
        items += told_twice_items(capture, generation)
        if before is None:
            items += predecessor_items(capture, generation, release)
        else:
            items += successor_items(capture, before, generation, release)
        found[generation.name] = items
        is_told = before is None or before.generation is not generation
        areas = list(replay.scratch) if replay is not None and replay.scratch and is_told else None
        before = held
    return Report(capture, _without_echoes(capture, found))


def _without_echoes(capture: Capture, found: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """Items whose need is known to be wrong cannot be judged where they differ."""
    wrong = {
        (name, item.name) for name, items in found.items() for item in items if item.ok is False
    }
    names = [generation.name for generation in capture.generations]
    judged: dict[str, list[Item]] = {}
    for index, name in enumerate(names):
        judged[name] = []
        for item in found[name]:
            blame = [need for need in item.needs if _key(names, index, need) in wrong]
            if item.ok is False and blame:
                why = ", ".join(need.replace("-1/", "the predecessor's ") for need in blame)
                note = f"not judged: {why} already differs"
                item = item._replace(ok=None, note=note)
            judged[name].append(item)
    return judged


def _key(names: list[str], index: int, need: str) -> tuple[str, str]:
    name = need.removeprefix("-1/")
    at = index - (name != need)
    return (names[at] if at >= 0 else "", name)
