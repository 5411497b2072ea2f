"""Puts khosim's handover in the place of the first kernel's, and compares what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256

from khosim.checks.decode_fdt import parse_fdt
from khosim.lab.guest_ram import GuestRam
from khosim.lab.predecessor import Handed, Predecessor
from khosim.lab.run import Generation, RetrievedFile
from khosim.lab.verdict import Item, reserved_blocks

__all__ = ("StandIn",)

_EXEC_FROM = re.compile(r"KHO: exec from: (\S+) \(count (\d+)\)")
_PAGE = 4096


class StandIn:
    """An observer of a guest with the memory ``ram``; ``items`` fills up when its heir is up."""

    def __init__(
        self, predecessor: Predecessor, ram: GuestRam, progress: Callable[[str], None]
    ) -> None:
        self._predecessor = predecessor
        self._ram = ram
        self._progress = progress
        self._handed: Handed | None = None
        self.items: list[Item] = []

    def at_jump(self, generation: Generation, fdt_phys: int) -> None:
        """Overwrite the first handover; later ones are the real kernels' own."""
        if generation.index:
            return
        log = _text(generation, "dmesg")
        handed = self._predecessor.hand_over(self._ram, log, generation.release, fdt_phys)
        self._progress(f"gen0: {handed.uname} wrote {len(handed.blocks)} preserved blocks")
        self._handed = handed

    def when_up(self, generation: Generation) -> None:
        """Compare the successor with what khosim wrote, while it stands still."""
        if generation.index != 1 or self._handed is None:
            return
        handed = self._handed
        log = _text(generation, "dmesg")
        self._add("predecessor named", *_named(log, handed.uname))
        wanted = [(phys, _PAGE << order) for phys, order in handed.blocks]
        said = reserved_blocks(log)
        same = sum(a == b for a, b in zip(said, wanted, strict=False))
        detail = f"{same} of {len(wanted)} of khosim's blocks, in khosim's order"
        self._add("khosim's blocks reserved", said == wanted, detail)
        owned = _owned_regions(generation)
        for name, (start, content) in handed.belongings.regions.items():
            revived = f"Revived memory reservation '{name}' from KHO" in log
            detail = f"{len(content)} bytes at {start:#x}"
            if not revived or owned.get(name) != (start, len(content)):
                self._add(f"region {name}", False, f"{detail}: not revived")
                continue
            intact = self._ram.read(start, len(content)) == content
            which = "khosim's" if intact else "other"
            self._add(f"region {name}", intact, f"{detail}, with {which} content")
        if "test_kho: " in log:
            ok = "test_kho: KHO restore succeeded" in log
            self._add("kho_test folios", ok, "restored and summed by the kernel's test module")

        if handed.belongings.files and generation.has_liveupdate:
            left = {
                key: RetrievedFile(
                    file.pos, file.seals, len(file.content), sha256(file.content).hexdigest()
                )
                for key, file in handed.belongings.files.items()
            }
            same = sum(generation.retrieved.get(key) == file for key, file in left.items())
            detail = f"{same} of {len(left)} retrieved, with khosim's content"
            self._add("khosim's memfds", same == len(left), detail)

    def _add(self, name: str, ok: bool, detail: str) -> None:
        self.items.append(Item("gen1", name, ok, detail))


def _text(generation: Generation, name: str) -> str:
    return generation.files.files.get(name, b"").decode("utf-8", "replace")


def _named(log: str, uname: str) -> tuple[bool, str]:
    match = _EXEC_FROM.search(log)
    if match is None:
        return False, "no 'exec from' in the log"
    return match.groups() == (uname, "1"), match[0]


def _owned_regions(generation: Generation) -> dict[str, tuple[int, int]]:
    """The regions that the successor in its turn hands on: (start, bytes) by name."""
    tree = parse_fdt(generation.files.files.get("kho/out/sub_fdts/memblock", b""), 0)
    found = {}
    for node in tree.root.children if tree.root is not None else ():
        start, size = node.u64(b"start"), node.u64(b"size")
        if start is not None and size is not None:
            found[node.name.decode("ascii", "replace")] = start, size
    return found
