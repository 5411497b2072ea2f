"""Items about what a kernel's log says: memblock calls, preserved blocks, messages.

The log of a successor is held against what its predecessor's pages say
(``kernel/liveupdate/kexec_handover.c:kho_mem_retrieve``, ``kho_in_kexec_metadata``,
``mm/memblock.c:reserve_mem_kho_revive`` @ 7.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from khosim.abi.fdt import FDT_ERR_NOTFOUND
from khosim.abi.memblock import MEMBLOCK_KHO_FDT
from khosim.capture.folder import Capture, CapturedGeneration
from khosim.checks.decode_root import Region
from khosim.conform.dmesg_calls import Reserve, parse_calls, symbol_of
from khosim.conform.final_state import compare_final_arrays
from khosim.conform.handover import PRESERVING
from khosim.conform.held import Held
from khosim.conform.items import Item, in_order, unknown
from khosim.conform.misread import behind, blocks_read, dies
from khosim.conform.replay import Replay, replay_generation
from khosim.conform.state import told
from khosim.errors import InputError
from khosim.kernel.cmdline import kstrtobool, parse_words
from khosim.kernel.kho_scratch import ScratchSizes
from khosim.units import memparse

__all__ = ("kho_lines", "log_items", "preserved_lines")

_MOST = 8
_LINES = re.compile(
    r"(KHO: (?:found kexec|exec from|scratch |disabl|[Ff]ailed|setup: |kexec-metadata|broken).*"
    r"|Revived memory reservation .*|KHO reserve-mem .*|luo: Retrieved .*|FDT 'memblock' .*"
    r"|reserve_mem: .*)"
)
"""The messages that khosim models, and those that say that something failed."""
_CALL = re.compile(r"memblock_\w+: |__memblock_reserve: |Command line|command line")
_AREAS = ("kho/out/scratch_phys", "kho/out/scratch_len")
_FOUND = "KHO: found kexec handover data."
_REPLAY, _PRESERVED, _SCRATCH = "replay", "preserved", "scratch"


def preserved_lines(text: str, place: str) -> list[tuple[int, int, int]]:
    """``(line, start, end)`` of each reservation of a preserved block, in the log's order."""
    return [
        (event.line, event.base, event.end)
        for event in parse_calls(text, place=place)
        if isinstance(event, Reserve)
        and not event.flags
        and symbol_of(event.caller).startswith(PRESERVING)
        and symbol_of(event.caller) != "kho_populate"
    ]


def kho_lines(text: str) -> list[str]:
    """The handover's messages in a log, in order, without what stands before them."""
    found = []
    for line in text.splitlines():
        match = _LINES.search(line)
        if match is not None and not _CALL.search(line):
            found.append(match.group(1).rstrip())
    return found


def log_items(
    capture: Capture,
    generation: CapturedGeneration,
    before: Held | None,
    areas: list[tuple[int, int]] | None,
) -> tuple[list[Item], Replay | None]:
    """The items of one log, and the replay of it; ``before`` is the predecessor's handover.

    ``areas`` are the predecessor's scratch areas where a replay has told them.
    """
    if not generation.has("dmesg"):
        return [Item(_REPLAY, False, 0, 1, (f"{generation.name}/dmesg: no such file",))], None
    try:
        text = generation.dmesg
        preserved, lines = _preserved(generation, before, text)
    except InputError as error:
        return [Item(_REPLAY, False, 0, 1, (str(error),))], None
    items = [] if preserved is None else [preserved]
    replay = None
    try:
        root_fdt = None if before is None else before.root_fdt()
        replay = replay_generation(
            capture,
            generation,
            root_fdt=root_fdt,
            areas=areas,
            compare_areas=_areas_are_told(generation),
        )
    except InputError as error:
        if dies(generation):
            items.append(unknown(_REPLAY, f"the kernel dies: {error}"))
        else:
            items.append(Item(_REPLAY, False, 0, 1, (str(error),), needs=("-1/handover",)))
    else:
        items += _replayed(generation, replay, lines, preserved)
    items.append(_messages(before, text, replay))
    return items, replay


def _preserved(
    generation: CapturedGeneration, before: Held | None, text: str
) -> tuple[Item | None, list[int]]:
    lines = preserved_lines(text, str(generation.path / "dmesg"))
    numbers = [line for line, _, _ in lines]
    if before is None:
        return None, numbers
    handover = before.handover
    if handover is None:
        return unknown(_PRESERVED, f"the predecessor's pages: {before.why}"), numbers
    page = handover.page_size
    blocks, is_known = blocks_read(before, generation)
    own = [(phys, phys + (page << order)) for phys, order in blocks]
    real = [(start, end) for _, start, end in lines]
    if dies(generation):
        own = own[: len(real)]
    places = [f"line {line}" for line in numbers]
    item = in_order(_PRESERVED, real, own, places, needs=("-1/handover",))
    return item if item.ok or is_known else behind(item), numbers


def _areas_are_told(generation: CapturedGeneration) -> bool:
    return all(generation.has(name) for name in _AREAS) and not _why_unread(generation)


def _why_unread(generation: CapturedGeneration) -> str:
    """What is wrong with the files of the scratch areas; empty for nothing."""
    try:
        _ = generation.scratch_areas
    except InputError as error:
        return str(error)
    return ""


def _replayed(
    generation: CapturedGeneration, replay: Replay, lines: list[int], preserved: Item | None
) -> Iterator[Item]:
    shown = [one for one in replay.differences if one.call.startswith("kho/out/scratch_")]
    rest = [one for one in replay.differences if one not in shown]
    if preserved is not None and preserved.ok is False and lines:
        # Told by an item of its own.
        low, high = lines[0], lines[-1] + 1
        rest = [one for one in rest if not low <= one.line <= high]
    nr_allocations = replay.allocations
    wrong = min(len(rest), nr_allocations)
    same = replay.same if rest else nr_allocations
    yield Item.counted(
        _REPLAY,
        min(same, nr_allocations - wrong) if rest else same,
        nr_allocations,
        [told(one) for one in rest[:_MOST]],
        note="allocations",
        needs=("-1/handover",),
    )
    missing = [name for name in _AREAS if not generation.has(name)]
    if missing and not generation.has("kho/out"):
        yield unknown(_SCRATCH, "debugfs was not captured")
    elif missing:
        differences = [f"{generation.name}/{name}: no such file" for name in missing]
        yield Item(_SCRATCH, False, 0, 1, tuple(differences))
    elif not _areas_are_told(generation):
        yield Item(_SCRATCH, False, 0, 1, (_why_unread(generation),))
    else:
        nr_areas = len(generation.scratch_areas)
        yield Item.counted(
            _SCRATCH,
            max(0, nr_areas - len(shown)),
            nr_areas,
            [told(one) for one in shown],
            note="taken over" if replay.facts.kho_boot else "reserved",
            needs=(_REPLAY,),
        )
    try:
        arrays = compare_final_arrays(replay, generation)
    except InputError as error:
        yield Item("memblock arrays", False, 0, 1, (str(error),))
        return
    if arrays is not None:
        total = replay.memblock.memory.cnt + replay.memblock.reserved.cnt
        yield Item.counted(
            "memblock arrays",
            max(0, total - len(arrays)),
            total,
            [told(one) for one in arrays[:_MOST]],
            note="regions",
            needs=(_REPLAY, _PRESERVED),
        )


# -- messages -----------------------------------------------------------------------------------


def _messages(before: Held | None, text: str, replay: Replay | None) -> Item:
    """What the log says of the handover, against what the predecessor left and was asked for."""
    real = [_FOUND if line.startswith(_FOUND) else line for line in kho_lines(text)]
    expected: list[str] = []
    cmdline = _logged_cmdline(text)
    words = parse_words(cmdline)
    if before is not None:
        if before.handover is None:
            return unknown("messages", f"the predecessor's pages: {before.why}")
        expected.append(_FOUND)
    for name, value in words:
        if name == "kho_scratch":
            ScratchSizes().parse(value, expected.append)
    if replay is not None:
        expected += replay.messages
    if before is not None and before.handover is not None:
        if MEMBLOCK_KHO_FDT in before.handover.subtrees:
            expected += _revived(words, before.handover.reserve_mem)
        if before.luo is None or before.luo.compatible is None:
            real = [line for line in real if not line.startswith("luo: ")]  # another format's
        elif _asked(words):
            number = before.luo.liveupdate_num
            expected.append(f"luo: Retrieved live update data, liveupdate number: {number}")
        metadata = before.handover.kexec_metadata
        if metadata is not None:
            said = f"{metadata.previous_release} (count {metadata.kexec_count})"
            expected.append(f"KHO: exec from: {said}")
    # Initcalls of one level may come in any order.
    missing = list(expected)
    extra = []
    for line in real:
        if line in missing:
            missing.remove(line)
        else:
            extra.append(line)
    differences = [f"not in the log: {line}" for line in missing]
    differences += [f"only in the log: {line}" for line in extra]
    same = len(expected) - len(missing)
    total = len(expected) + len(extra)
    return Item.counted("messages", same, total, differences[:_MOST], needs=("-1/handover",))


def _revived(words: list[tuple[str, str | None]], regions: dict[str, Region]) -> Iterator[str]:
    """What ``reserve_mem_kho_revive`` has to say about each region that is asked for."""
    for parameter, value in words:
        if parameter != "reserve_mem" or value is None or value.count(":") < 2:
            continue
        size, at = memparse(value)
        align, _ = memparse(value, at + 1)
        name = value.rpartition(":")[2]
        if name not in regions:
            yield f"FDT '{MEMBLOCK_KHO_FDT}' has no child '{name}': {-FDT_ERR_NOTFOUND}"
        elif regions[name].start & max(align, 1) - 1:
            start = regions[name].start
            yield f"KHO reserve-mem '{name}' has wrong alignment ({align:#x}, {start:#x})"
        elif regions[name].size != size:
            own = regions[name].size
            yield f"KHO reserve-mem '{name}' has wrong size ({own:#x} != {size:#x})"
        else:
            yield f"Revived memory reservation '{name}' from KHO"


def _logged_cmdline(text: str) -> str:
    found = re.search(r"(?:Kernel c|\bC)ommand line: ([^\r\n]*)", text)
    return found.group(1) if found else ""


def _asked(words: list[tuple[str, str | None]]) -> bool:
    answers = [kstrtobool(value) for name, value in words if name == "liveupdate"]
    return bool(answers and answers[-1])
