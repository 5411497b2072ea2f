"""From the text of a scenario file to a :class:`~khosim.scenario.model.Scenario`.

Whatever is wrong is an :class:`~khosim.errors.InputError` that names file, generation and step.
Generations count from 0, as kernels do; steps count from 1. ``docs/scenarios.md`` is the format.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from khosim.capture.dmesg import parse_dmesg
from khosim.capture.folder import Capture
from khosim.capture.iomem import parse_iomem
from khosim.drivers.core import PIECES
from khosim.errors import InputError
from khosim.kernel.arch import find_arch
from khosim.kernel.release import Release, find_release, option_release
from khosim.machine.hardware import PAGE_SIZES
from khosim.machine.memory_map import ARCHES, MemoryMap
from khosim.scenario.fields import Table, did_you_mean
from khosim.scenario.model import (
    ACCEPTED,
    COLD,
    MAX_GENERATIONS,
    MAX_STEPS,
    OUTCOMES,
    GenerationSpec,
    KernelSpec,
    KexecSpec,
    Limits,
    Scenario,
)
from khosim.scenario.steps import parse_step
from khosim.scenario.steps_base import check_expect
from khosim.scenario.topology import read_topology
from khosim.scenario.verdict import invariant_names
from khosim.simulator import ALLOCATORS

__all__ = ("MAX_SEED", "Overrides", "parse_scenario", "read_document")

MAX_SEED = (1 << 63) - 1
_DEFAULT_RELEASE = "7.3"
_MAX_TEXT_BYTES = 1 << 20
_MAX_LOG_BYTES = 16 << 20
_CMDLINE_CHARS_MAX = 2000
_KERNEL_MIN, _KERNEL_MAX = 2 << 20, 1 << 30
_SIZE_KEYS = ("ram", "nodes", "memoryless", "holes", "arch")
_SOURCES = ("capture", "dmesg", "iomem")
_TOML_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the caller wants otherwise than the file says; None leaves it."""

    seed: int | None = None
    release: str | None = None
    capture: str | None = None
    ram: str | None = None
    nodes: int | None = None
    generations: int | None = None
    allocator: str | None = None
    without: tuple[str, ...] = ()


def parse_scenario(
    text: str | bytes,
    place: str = "scenario",
    *,
    folder: str | Path = ".",
    overrides: Overrides | None = None,
) -> Scenario:
    """Read a scenario; ``folder`` is where paths in it start."""
    overrides = overrides or Overrides()
    return _Reader(read_document(text, place), place, Path(folder), overrides).scenario()


def read_document(text: str | bytes, place: str) -> dict[str, Any]:
    """The TOML document in ``text``; :class:`InputError` names the line of a mistake."""
    if len(text) > _MAX_TEXT_BYTES:
        raise InputError(place, "larger than 1M: not a scenario")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise InputError(f"{place}: line {line}", "not UTF-8 text") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _TOML_PLACE.fullmatch(str(error))
        if found is None:
            raise InputError(place, str(error)) from None
        cause, line_text = found[1], found[2]
        if line_text is None:
            last = text.count("\n") + 1
            raise InputError(f"{place}: line {last}", f"{cause}, at the end of the file") from None
        raise InputError(f"{place}: line {line_text}, column {found[3]}", cause) from None
    except (RecursionError, ValueError):
        raise InputError(place, "nested too deeply, or a number is too long") from None


class _Reader:
    """Reads one document, part by part."""

    def __init__(
        self, document: dict[str, Any], place: str, folder: Path, overrides: Overrides
    ) -> None:
        self._top = Table(document, place)
        self._place = place
        self._folder = folder
        self._wanted = overrides
        self._capture_cmdline: str | None = None
        self._last = 0

    def scenario(self) -> Scenario:
        """The whole of it."""
        top, wanted = self._top, self._wanted
        name = top.name("name", Path(self._place).stem[:31] if _is_name(self._place) else "")
        about = top.text("about", "")
        seed = top.integer("seed", 0, 0, MAX_SEED)
        tables = top.items("generation", MAX_GENERATIONS)
        if not tables:
            raise top.error("there is no [[generation]]")
        generations = top.integer("generations", len(tables), 1, MAX_GENERATIONS)
        self._last = generations - 1
        if wanted.generations is not None:
            generations = wanted.generations
        machine = Table(top.any("machine") or {}, f"{self._place}: machine")
        memory_map, page_size = self._machine(machine)
        allocator = machine.choice("allocator", ALLOCATORS, "linux")
        topology = read_topology(machine, memory_map.arch)
        machine.done()
        kernel = self._kernel(Table(top.any("kernel") or {}, f"{self._place}: kernel"))
        violations = frozenset(top.each("violations", 100, self._invariant))
        without = self._without(Table(top.any("without") or {}, f"{self._place}: without"))
        if wanted.without:
            violations = frozenset().union(*(without.get(x, ()) for x in wanted.without))
        top.done()
        arch = find_arch(memory_map.arch, page_size)
        limits = Limits(page_size, arch.max_page_order, memory_map.ram_bytes)
        limits.devices = topology.names
        limits.seed = seed if wanted.seed is None else wanted.seed
        specs = tuple(
            self._generation(value, number, _repeats(number, len(tables), generations), limits)
            for number, value in enumerate(tables)
        )
        return Scenario(
            place=self._place,
            name=name or self._place,
            about=about,
            seed=seed if wanted.seed is None else wanted.seed,
            memory_map=memory_map,
            page_size=page_size,
            allocator=wanted.allocator or allocator,
            kernel=kernel,
            generations=generations,
            specs=specs,
            violations=violations,
            parts=topology.parts,
            devices=topology.names,
        )

    def _without(self, table: Table) -> dict[str, frozenset[str]]:
        # The invariants that must speak when a piece is left out.
        found = {
            piece: frozenset(table.each(piece, 100, self._invariant)) for piece in PIECES
        }
        table.done()
        return found

    def _machine(self, table: Table) -> tuple[MemoryMap, int]:
        wanted = self._wanted
        sources = [key for key in _SOURCES if table.has(key)]
        sizes = [key for key in _SIZE_KEYS if table.has(key)]
        if sources and (len(sources) > 1 or sizes):
            raise table.error(f"{(sources + sizes)[1]!r} does not go together with {sources[0]!r}")
        given_page_size = table.integer("page_size", 4096, 1, 1 << 20)
        path = table.text(sources[0]) if sources else ""
        arguments = self._size_arguments(table)
        if wanted.capture is not None:
            if wanted.ram is not None or wanted.nodes is not None:
                option = "--ram" if wanted.ram is not None else "--nodes"
                raise InputError("--machine", f"does not go together with {option}")
            return self._captured(wanted.capture)
        if wanted.ram is not None or wanted.nodes is not None:
            sources = []
            if wanted.ram is not None:
                arguments["size"] = wanted.ram
            if wanted.nodes is not None:
                arguments["nodes"] = wanted.nodes
            elif not isinstance(arguments["nodes"], int):
                arguments["nodes"] = len(arguments["nodes"])
        place = table.place if wanted.ram is None else "--ram"
        try:
            if sources == ["capture"]:
                return self._captured(str(self._folder / path))
            if sources:
                text = _read_log(self._folder / path)
                read = parse_dmesg if sources == ["dmesg"] else parse_iomem
                memory_map = read(text, place=path).memory_map
            else:
                memory_map = MemoryMap.from_size(**arguments)
        except InputError as error:
            raise InputError(f"{place}: {error.place}", error.cause) from None
        if given_page_size not in PAGE_SIZES[memory_map.arch]:
            known = ", ".join(map(str, PAGE_SIZES[memory_map.arch]))
            raise table.error(
                f"page_size: {given_page_size} is none of those that {memory_map.arch} has: {known}"
            )
        return memory_map, given_page_size

    def _size_arguments(self, table: Table) -> dict[str, Any]:
        nodes = table.any("nodes")
        if nodes is None:
            nodes = 1
        if isinstance(nodes, list):
            nodes = [table.bytes_of("nodes", size) for size in nodes[:65]]
        else:
            nodes = table.whole("nodes", nodes, 1, 64)
        return {
            "size": table.size("ram", high=16 << 40) or (1 << 30),
            "nodes": nodes,
            "memoryless": table.each(
                "memoryless", 64, lambda what, nid: table.whole(what, nid, 0, 63)
            ),
            "holes": table.each("holes", 1000, lambda what, hole: _hole(table, what, hole)),
            "arch": table.choice("arch", ARCHES, "x86_64"),
        }

    def _captured(self, path: str) -> tuple[MemoryMap, int]:
        capture = Capture(path)
        if capture.generations[0].has("cmdline"):
            self._capture_cmdline = capture.generations[0].cmdline
        else:
            self._capture_cmdline = capture.generations[0].boot_log.command_line or ""
        return capture.memory_map(), capture.page_size

    def _kernel(self, table: Table) -> KernelSpec:
        has_cmdline = table.has("cmdline")
        cmdline = _cmdline(table, "kho=on")
        if self._capture_cmdline is not None and (self._wanted.capture or not has_cmdline):
            cmdline = self._capture_cmdline
        release = _release(table, "release", table.text("release", _DEFAULT_RELEASE))
        if self._wanted.release is not None:
            release = option_release(self._wanted.release) or release
        spec = KernelSpec(
            release=release,
            cmdline=cmdline,
            kernel_size=table.size("kernel_size", low=_KERNEL_MIN, high=_KERNEL_MAX),
            initrd=table.size("initrd", high=_KERNEL_MAX),
            debug=table.flag("debug"),
            without=self._wanted.without or _pieces(table),
        )
        table.done()
        return spec

    def _generation(
        self, value: object, number: int, repeats: int, limits: Limits
    ) -> GenerationSpec:
        place = f"{self._place}: generation {number}"
        table = Table(value, place)
        limits.repeats = repeats
        steps = tuple(
            parse_step(step, f"{place}, step {i}", limits)
            for i, step in enumerate(table.items("steps", MAX_STEPS), 1)
        )
        if table.has("kexec") and number == self._last:
            cause = "there is no later generation: give a table for it, or raise 'generations'"
            raise InputError(f"{place}: kexec", cause)
        kexec = self._kexec(Table(table.any("kexec") or {}, f"{place}: kexec"))
        table.done()
        return GenerationSpec(place=place, steps=steps, kexec=kexec)

    def _kexec(self, table: Table) -> KexecSpec:
        release = table.text("release", "")
        found = _release(table, "release", release) if release else None
        if self._wanted.release is not None:
            found = option_release(self._wanted.release)
        crash = table.flag("crash")
        expect = table.text("expect", COLD if crash else ACCEPTED)
        check_expect(table, expect, OUTCOMES)
        spec = KexecSpec(
            place=table.place,
            release=found,
            cmdline=_cmdline(table, "") if table.has("cmdline") else None,
            kernel_size=table.size("kernel_size", low=_KERNEL_MIN, high=_KERNEL_MAX),
            initrd=table.size("initrd", high=_KERNEL_MAX),
            debug=table.flag("debug") if table.has("debug") else None,
            without=_pieces(table) if table.has("without") else None,
            crash=crash,
            expect=expect,
        )
        table.done()
        return spec

    def _invariant(self, what: str, value: object) -> str:
        known = invariant_names()
        if not isinstance(value, str) or (known and value not in known):
            close = did_you_mean(str(value), known)
            raise self._top.error(f"{what}: {value!r} is no invariant{close}")
        return value


def _pieces(table: Table) -> tuple[str, ...]:
    names = table.items("without", len(PIECES))
    for i, name in enumerate(names, 1):
        if name not in PIECES:
            raise table.error(f"without, entry {i}: {name!r}{did_you_mean(str(name), PIECES)}")
    return tuple(names)


def _is_name(place: str) -> bool:
    stem = Path(place).stem[:31]
    return stem.isascii() and stem.replace("-", "").replace("_", "").replace(".", "").isalnum()


def _repeats(number: int, tables: int, generations: int) -> int:
    """How often a table is carried out: the last stands for all later generations too."""
    return max(0, generations - number) if number == tables - 1 else int(number < generations)


def _cmdline(table: Table, default: str) -> str:
    cmdline = table.text("cmdline", default, max_chars=_CMDLINE_CHARS_MAX)
    if not cmdline.isascii() or not cmdline.isprintable():
        raise table.error("cmdline: only printable ASCII characters can be passed to a kernel")
    return cmdline


def _release(table: Table, what: str, name: str) -> Release:
    try:
        return find_release(name)
    except InputError as error:
        why = error.cause if error.place == "release" else str(error)
        raise table.error(f"{what}: {why}") from None


def _hole(table: Table, what: str, hole: object) -> tuple[int, int]:
    if not isinstance(hole, list) or len(hole) != 2:
        raise table.error(f"{what}: not a pair of addresses, start and end")
    return table.bytes_of(what, hole[0]), table.bytes_of(what, hole[1])


def _read_log(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LOG_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    if len(data) > _MAX_LOG_BYTES:
        raise InputError(str(path), "larger than 16M: not a kernel log")
    return data.decode("utf-8", "replace")
