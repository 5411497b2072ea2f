"""``khosim replay``: real boots replayed, from a capture, one of its generations, or a lone log.

Every memblock call that ``memblock=debug`` logged is made again and each address compared; then
``kho_memory_init`` reserves scratch, or on a handover what the predecessor preserved. See
:mod:`khosim.conform.engine` for how, :mod:`khosim.conform.silent_steps` for what is not in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khosim.capture.folder import Capture, CapturedGeneration
from khosim.conform.boot_facts import BootFacts, read_facts
from khosim.conform.dmesg_calls import parse_calls
from khosim.conform.engine import Engine
from khosim.conform.held import Held
from khosim.conform.predecessor import Predecessor
from khosim.conform.start import merged_ranges, start_memblock
from khosim.conform.state import Difference
from khosim.errors import InputError
from khosim.kernel.memblock import Memblock

__all__ = ("Replay", "replay_dmesg", "replay_generation", "replay_path")

_MAX_LOG_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Replay:
    """How one boot's replay came out.

    ``allocations`` is the number of logged allocations, ``same`` how many of them khosim placed
    identically, ``preserved`` how many reservations of preserved memory came out the same of
    ``nr_preserved`` logged ones. ``scratch`` lists the areas, (address, length), that the simulator
    reserved, or took over from the predecessor; ``memblock`` is left as ``kho_memory_init`` left
    it. ``messages`` are what the simulator had to say about reserving scratch.
    """

    name: str
    facts: BootFacts
    allocations: int
    same: int
    differences: tuple[Difference, ...]
    scratch: tuple[tuple[int, int], ...]
    preserved: int
    nr_preserved: int
    memblock: Memblock
    messages: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The outcome for programs."""
        return {
            "allocations": self.allocations,
            "same": self.same,
            "different": [difference._asdict() for difference in self.differences],
            "scratch": [list(area) for area in self.scratch],
            "preserved": self.nr_preserved,
            "preserved_same": self.preserved,
        }


def replay_path(path: str | Path) -> list[Replay]:
    """Replay a capture folder, a generation's folder, or a log file.

    Raises :class:`InputError` for what cannot be replayed.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "capture.json").exists() and (path / "dmesg").exists():
            folder = path.resolve()
            if (folder.parent / "capture.json").exists():
                capture = Capture(folder.parent)
                return [_replay_captured(capture, capture.generation(folder.name))]
            path = path / "dmesg"
        else:
            capture = Capture(path)
            replays: list[Replay] = []
            for one in capture.generations:
                replays.append(_replay_captured(capture, one, replays[-1:]))
            return replays
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LOG_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    if len(data) > _MAX_LOG_BYTES:
        raise InputError(str(path), f"too large for a kernel log (over {_MAX_LOG_BYTES} bytes)")
    text = data.decode("utf-8", "replace")
    return [replay_dmesg(text, name=path.name, place=str(path))]


def _replay_captured(
    capture: Capture, generation: CapturedGeneration, done: Sequence[Replay] = ()
) -> Replay:
    """Replay one generation; ``done`` ends with the replay of the one before it, if there was one.

    A kernel without debugfs showed neither its scratch areas nor the root FDT that it was handed.
    """
    root_fdt, areas = None, None
    before = capture.generations[generation.index - 1] if generation.index else None
    if before is not None and not before.has("kho") and done:
        areas = list(done[-1].scratch) or None
    if before is not None and not generation.has("kho") and before.has("ram.npz"):
        root_fdt = Held(before).root_fdt()
    return replay_generation(
        capture,
        generation,
        root_fdt=root_fdt,
        areas=areas,
        compare_areas=generation.has("kho"),
    )


def replay_dmesg(text: str, *, name: str = "dmesg", place: str = "dmesg") -> Replay:
    """Replay a lone log. What a predecessor handed over is read from the log's own dumps."""
    return _replay(text, name, place, None, None, None)


def replay_generation(
    capture: Capture,
    generation: CapturedGeneration,
    *,
    root_fdt: bytes | None = None,
    areas: list[tuple[int, int]] | None = None,
    compare_areas: bool = True,
) -> Replay:
    """Replay one generation of a capture, the one before it as its predecessor.

    The scratch areas are compared with those that the kernel showed in debugfs, unless
    ``compare_areas`` is False. ``root_fdt`` and ``areas`` are the predecessor's root FDT and
    scratch areas, where they are known better.
    """
    before = capture.generations[generation.index - 1] if generation.index else None
    predecessor = None
    if before is not None:
        predecessor = Predecessor(
            before, generation, capture.arch, root_fdt=root_fdt, areas=areas
        )
    place = str(generation.path / "dmesg")
    text, shown = generation.dmesg, generation if compare_areas else None
    return _replay(text, generation.name, place, capture, predecessor, shown)


def _replay(
    text: str,
    name: str,
    place: str,
    capture: Capture | None,
    predecessor: Predecessor | None,
    generation: CapturedGeneration | None,
) -> Replay:
    events = parse_calls(text, place=place)
    facts = read_facts(
        events,
        place=place,
        arch=capture.arch if capture else None,
        page_size=capture.page_size if capture else None,
    )
    if not facts.kho_boot:
        predecessor = None
    starts, incoming = start_memblock(
        events, facts, predecessor.scratch_areas() if predecessor else None
    )
    if predecessor is not None:
        predecessor.found_areas(incoming)
    if not facts.complete:
        last = text.count("\n") + 1
        cause = f"cut short at line {last}: boot does not come to the page allocator"
        raise InputError(place, cause)
    engine = Engine(events, facts, predecessor, incoming)
    state = engine.run(starts)
    differences = list(state.differences)
    if generation is not None and (state.scratch or generation.has("kho/out/scratch_phys")):
        shown = generation.scratch_areas
        if facts.kho_boot and predecessor is None:
            # Read from the log, which has neither order nor where one area ends and another begins.
            ranges = merged_ranges([(base, base + size) for base, size in shown if size])
            shown = tuple((base, end - base) for base, end in ranges)
        differences += _compare_areas(state.scratch, shown)
    return Replay(
        name=name,
        facts=facts,
        allocations=engine.nr_allocations,
        same=state.same,
        differences=tuple(sorted(set(differences), key=_by_line)),
        scratch=tuple(state.scratch),
        preserved=state.preserved,
        nr_preserved=engine.nr_preserved,
        memblock=state.memblock,
        messages=state.said,
    )


def _by_line(difference: Difference) -> tuple[int, str]:
    return difference.line, difference.call


def _compare_areas(
    simulated: list[tuple[int, int]], real: tuple[tuple[int, int], ...]
) -> list[Difference]:
    found = []
    for nth in range(max(len(simulated), len(real))):
        said = real[nth] if nth < len(real) else (None, None)
        own = simulated[nth] if nth < len(simulated) else (None, None)
        for name, left, right in zip(("scratch_phys", "scratch_len"), said, own, strict=True):
            if left != right:
                found.append(Difference(0, f"kho/out/{name}[{nth}]", left, right))
    return found
