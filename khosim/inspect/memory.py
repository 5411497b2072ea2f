"""A handover in memory: found, decoded, judged.

The root FDT is at an address that somebody gives, or is searched for: a page that begins with an
FDT whose root is compatible with some ``kho-v*``. Memory of a machine that went through several
kernels may hold several. The one that lists its own page among the preserved ones, has no problem,
and counts the most kernels wins; the others are named.

A page size that is not known is found out in the same way: the map that was read with the right one
holds the root FDT's page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from khosim.checks.decode import Handover, decode_handover, to_json
from khosim.checks.decode_fdt import decode_fdt, parse_fdt
from khosim.checks.decode_luo import Luo, decode_luo, luo_json
from khosim.checks.decode_root import FORMATS, Format
from khosim.checks.preserved import covers, overlaps
from khosim.checks.reader import PAGE_SIZES, Problem, ProblemLog, Reader
from khosim.checks.strict_root import check_layout
from khosim.checks.unpreserved import unpreserved
from khosim.errors import InputError, RamFault
from khosim.inspect.damage import Damage, damage_json, explain

__all__ = ("Memory", "MemoryReport", "SearchableReader", "inspect_memory")

_MAGIC = b"\xd0\x0d\xfe\xed"
_MAX_FDT_BYTES = 65536
_MAX_CANDIDATES = 64
_JSON_BLOCKS = 1 << 22


class SearchableReader(Reader, Protocol):
    """Memory in which pages can be looked for by their first bytes."""

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """Addresses of the 4 KiB pages that begin with ``magic``."""


class Memory(NamedTuple):
    """Memory from some source. ``place`` is its path, ``kind`` what it is, in words.

    ``page_size`` is None where it is not known. ``fdt_hint`` is where the root FDT was,
    ``preserve_bits`` the size of a kho-v1 bitmap, as far as the source knows. ``written`` is a
    format that Linux does not have, and ``compatible`` how the names of root FDTs begin.
    """

    place: str
    kind: str
    reader: SearchableReader
    page_size: int | None
    fdt_hint: int | None = None
    preserve_bits: int | None = None
    problems: tuple[Problem, ...] = ()
    written: Format | None = None
    compatible: bytes = b"kho-v"


@dataclass(frozen=True, slots=True, eq=False)
class MemoryReport:
    """What one memory says. ``others`` tells of handovers that were passed over."""

    name: str
    memory: Memory
    handover: Handover
    luo: Luo | None
    damage: list[Damage]
    others: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values; ``damage`` stands there only where there is any."""
        said = to_json(self.memory.reader, self.handover, limit=_JSON_BLOCKS)
        del said["problems"]
        if self.luo is not None:
            said["luo"] = luo_json(self.luo)
        if self.damage:
            said["damage"] = damage_json(self.damage)
        return said


class _Candidate(NamedTuple):
    """A handover that might be meant, and how much speaks for it."""

    holds_itself: bool
    sound: bool
    kexec_count: int
    handover: Handover

    @property
    def score(self) -> tuple[bool, bool, int]:
        return self.holds_itself, self.sound, self.kexec_count

    def __str__(self) -> str:
        handover = self.handover
        state = "sound" if self.sound else f"{len(handover.problems)} problems"
        count = "no" if handover.kexec_metadata is None else f"{self.kexec_count}"
        return f"{handover.fdt_phys:#x}: {handover.compatible}, kexec count {count}, {state}"


def inspect_memory(
    memory: Memory,
    *,
    name: str = "",
    fdt_phys: int | None = None,
    content: bool = True,
) -> MemoryReport:
    """Decode the handover at ``fdt_phys``, or the one that is found.

    Raises :class:`InputError` where there is none, or ``fdt_phys`` is no memory. Without
    ``content`` the content of files is not digested.
    """
    best, *rest = _choose(memory, fdt_phys)
    handover = best.handover
    reader, page_size = memory.reader, handover.page_size
    log = ProblemLog()
    log.extend(memory.problems)
    problems = handover.problems
    if memory.written is not None and handover.compatible == memory.compatible.decode():
        problems = tuple(one for one in problems if one.code != "kho-compatible")
    log.extend(problems)
    fdt = parse_fdt(handover.fdt, handover.fdt_phys)
    is_zeroed = handover.compatible not in (None, "kho-v1")
    for problem in check_layout(fdt, zeroed=is_zeroed, phys=handover.fdt_phys):
        log.add(*problem)
    luo = None
    blob = handover.subtrees.get("LUO")
    if blob is not None:
        preserved = handover.preserved if handover.table_pages else None
        luo = decode_luo(reader, blob, page_size, preserved, content=content)
        log.extend(luo.problems)
    log.extend(unpreserved(handover, luo))
    for overlap in overlaps(handover.preserved):
        start, end = overlap.start_pfn * page_size, overlap.end_pfn * page_size
        found = f"[{start:#x}-{end:#x}) in two blocks"
        log.add("map-overlap", start, found, "/preserved-memory-map")
    others = [str(candidate) for candidate in rest]
    return MemoryReport(
        name, memory, handover, luo, explain(log.done(), formats=_formats()), others
    )


def _formats() -> str:
    return ", ".join(key.decode() for key in FORMATS)


def _choose(memory: Memory, fdt_phys: int | None) -> list[_Candidate]:
    """The handovers in question, the one that is meant first."""
    if fdt_phys is not None:
        try:
            memory.reader.read(fdt_phys, 4)
        except RamFault as fault:
            raise InputError("--fdt", f"{fdt_phys:#x} in {memory.place}: {fault.cause}") from None
        return [_decode(memory, fdt_phys)]
    found = list(_search(memory))
    if not found and memory.fdt_hint is not None:
        return [_decode(memory, memory.fdt_hint)]
    if not found:
        cause = (
            f"{memory.kind}: no handover in it (no page begins with a device tree that is "
            f"compatible with {memory.compatible.decode(errors='replace')}*); --fdt ADDR would "
            "name one"
        )
        raise InputError(memory.place, cause)
    candidates = [_decode(memory, phys) for phys in found]
    candidates.sort(key=lambda candidate: candidate.score, reverse=True)
    return candidates


def _search(memory: Memory) -> Iterator[int]:
    """Addresses of root FDTs of any format."""
    reader = memory.reader
    nr_found = 0
    for phys in reader.pages_with(_MAGIC):
        try:
            size = int.from_bytes(reader.read(phys + 4, 4), "big")
            if memory.compatible not in reader.read(phys, min(size, _MAX_FDT_BYTES)):
                continue
        except RamFault:
            continue
        root = decode_fdt(reader, phys, _MAX_FDT_BYTES).root
        strings = () if root is None else root.strings(b"compatible")
        if any(string.startswith(memory.compatible) for string in strings):
            yield phys
            nr_found += 1
            if nr_found == _MAX_CANDIDATES:
                return


def _decode(memory: Memory, phys: int) -> _Candidate:
    """The handover at an address, with the page size that makes the most of it."""
    sizes = PAGE_SIZES if memory.page_size is None else (memory.page_size,)
    best: _Candidate | None = None
    for page_size in sizes:
        handover = decode_handover(
            memory.reader,
            phys,
            page_size,
            preserve_bits=memory.preserve_bits,
            written=memory.written,
        )
        pfn = np.array([phys // page_size])
        count = handover.kexec_metadata.kexec_count if handover.kexec_metadata else -1
        found = _Candidate(
            bool(covers(handover.preserved, pfn).all()), not handover.problems, count, handover
        )
        if best is None or found.score > best.score:
            best = found
        if best.holds_itself and best.sound:
            break
    assert best is not None
    return best
