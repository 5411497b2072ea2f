"""Which of the modelled kernel a run reached: symbols, branches, refusals and words in the log.

:func:`watching` measures a piece of work with the package ``coverage`` (the extra of that name) and
leaves a :class:`Reached`, plain data that can be sent, kept and put together with others by ``|``:
the arcs taken, pairs of line numbers, by module of :mod:`khosim.abi` and :mod:`khosim.kernel`.
:class:`Account` holds them against what there is (:mod:`khosim.explore.kernel_source`). What
happens when modules are imported is left out, so that it does not matter who imported them.

Nothing is slower while nobody watches; watched, a search takes about twice as long.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim import abi, kernel
from khosim.errors import InputError
from khosim.explore.kernel_source import KINDS, Module, Site, modules, package_path

if TYPE_CHECKING:
    import coverage

__all__ = ("Account", "Reached", "Row", "Watch", "watching")

_Arcs = frozenset[tuple[int, int]]
_TOLD_MAX = 12
_WIDTH = 96


@dataclass(frozen=True)
class Reached:
    """The arcs that were taken, by module (``kernel/kho.py``). ``one | other`` is both."""

    arcs: Mapping[str, _Arcs] = field(default_factory=dict)

    def __or__(self, other: Reached) -> Reached:
        """What either of two has reached."""
        none: _Arcs = frozenset()
        paths = sorted({*self.arcs, *other.arcs})
        return Reached({p: self.arcs.get(p, none) | other.arcs.get(p, none) for p in paths})

    def as_json(self) -> dict[str, list[list[int]]]:
        """As plain data, in order."""
        return {p: [list(arc) for arc in sorted(arcs)] for p, arcs in sorted(self.arcs.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Iterable[Iterable[int]]]) -> Reached:
        """What :meth:`as_json` gave."""
        told = {path: [tuple(arc) for arc in arcs] for path, arcs in data.items()}
        return cls({p: frozenset((a, b) for a, b in arcs) for p, arcs in told.items()})


class Watch:
    """``reached`` is what was reached while it watched, complete once it is over."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = Reached()


def _meter() -> coverage.Coverage:
    try:
        import coverage
    except ImportError:
        cause = 'it needs the package coverage: pip install "khosim[coverage]"'
        raise InputError("--coverage", cause) from None
    root = package_path()
    include = [str(root / layer / "*") for layer in ("abi", "kernel")]
    return coverage.Coverage(data_file=None, config_file=False, branch=True, include=include)


def _begin_anew() -> None:
    # What was reached must not depend on what ran before: imports and caches would show.
    for package in (abi, kernel):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    clear_caches()


def clear_caches() -> None:
    """Empty every cache of khosim's functions, but that of the kernel's source."""
    for name, loaded in list(sys.modules.items()):
        if name.startswith("khosim.") and name != modules.__module__:
            for value in list(vars(loaded).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextmanager
def watching(*, on: bool = True) -> Iterator[Watch]:
    """Within, note what of the kernel is reached; with ``on`` False nothing is done at all.

    Raises :class:`InputError` without the package ``coverage``.
    """
    watch = Watch()
    if not on:
        yield watch
        return
    meter = _meter()
    _begin_anew()
    meter.start()
    try:
        yield watch
    finally:
        meter.stop()
        data = meter.get_data()
        watch.reached = Reached(
            {
                Path(file).relative_to(package_path()).as_posix(): frozenset(arcs)
                for file in sorted(data.measured_files())
                if (arcs := data.arcs(file))
            }
        )


# -- held against what there is ------------------------------------------------------------------


class Row(NamedTuple):
    """One module: how many symbols and branches there are, and how many were reached."""

    module: str
    symbols_reached: int
    symbols: int
    branches_reached: int
    branches: int


class _Missed(NamedTuple):
    lines: int
    name: str
    module: str


class Account:
    """What was reached of what there is.

    ``rows`` are the modules whose path begins with ``below``, ``missed`` the functions that were
    not reached, largest first, ``said`` and ``unsaid`` the statements that refuse, warn, log or
    panic.
    """

    def __init__(self, reached: Reached, below: str = "") -> None:
        self.rows: list[Row] = []
        self.missed: list[_Missed] = []
        self.said: list[tuple[str, Site]] = []
        self.unsaid: list[tuple[str, Site]] = []
        meter, root = _meter(), package_path()
        arcs = {str(root / path): found for path, found in reached.arcs.items()}
        meter.get_data().add_arcs(arcs)
        for module in modules():
            if module.functions and module.path.startswith(below):
                self._add(meter, module, reached.arcs.get(module.path, frozenset()))
        self.missed.sort(key=lambda missed: (-missed.lines, missed.module, missed.name))

    def _add(self, meter: coverage.Coverage, module: Module, arcs: _Arcs) -> None:
        done = {line for arc in arcs for line in arc}
        symbols: dict[str, bool] = {}
        inside: set[int] = set()
        for function in module.functions:
            inside.update(function.lines)
            is_reached = not done.isdisjoint(function.lines)
            if function.symbol:
                symbols[function.symbol] = symbols.get(function.symbol, False) or is_reached
            if not is_reached:
                name = function.symbol or function.name
                self.missed.append(_Missed(len(function.lines), name, module.path))
        for site in module.sites:
            spoke = not done.isdisjoint(site.lines)
            (self.said if spoke else self.unsaid).append((module.path, site))
        stats = meter.branch_stats(str(package_path() / module.path))
        exits = [counts for line, counts in stats.items() if line in inside]
        self.rows.append(
            Row(
                module.path,
                sum(symbols.values()),
                len(symbols),
                sum(taken for _, taken in exits),
                sum(there for there, _ in exits),
            )
        )

    def total(self) -> Row:
        """All modules together."""
        columns = [[row[i] for row in self.rows] for i in range(1, 5)]
        a, b, c, d = (sum(int(value) for value in column) for column in columns)
        return Row("all", a, b, c, d)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""

        def sites(found: list[tuple[str, Site]], kind: str) -> list[str]:
            told = [f"{site.where}: {site.what}" for _, site in found if site.kind == kind]
            return sorted(told)

        return {
            "modules": [row._asdict() for row in self.rows],
            "total": self.total()._asdict(),
            "missed": [missed._asdict() for missed in self.missed],
            "said": {kind: sites(self.said, kind) for kind in KINDS},
            "unsaid": {kind: sites(self.unsaid, kind) for kind in KINDS},
        }

    def lines(self) -> list[str]:
        """A table of modules, the largest functions missed, and what the kernel said."""
        heading = f"{'reached':<36} {'symbols':>12} {'branches':>14}"
        told = [heading, *(_line(row) for row in (*self.rows, self.total()))]
        told += ["", f"largest of {len(self.missed)} functions that were not reached (lines):"]
        told += [f"  {m.lines:>4}  {m.name} ({m.module})" for m in self.missed[:_TOLD_MAX]]
        for kind in KINDS:
            said = [site for _, site in self.said if site.kind == kind]
            unsaid = [site for _, site in self.unsaid if site.kind == kind]
            told += ["", f"{kind}: {len(said)} of {len(said) + len(unsaid)} places reached"]
            if kind == "refusal":
                numbers = Counter(site.what for site in said).most_common()
                told += [f"  {what} {n}" for what, n in sorted(numbers, key=lambda x: (-x[1], x))]
            told += [f"  + {_cut(site)}" for site in said[:_TOLD_MAX] if kind == "warning"]
            if kind != "log":
                told += [f"  - {_cut(site)}" for site in unsaid[:_TOLD_MAX]]
                more = len(unsaid) - _TOLD_MAX
                told += [f"  - and {more} more"] if more > 0 else []
        return told


def _line(row: Row) -> str:
    symbols = f"{row.symbols_reached}/{row.symbols}" if row.symbols else "-"
    branches = f"{row.branches_reached}/{row.branches}" if row.branches else "-"
    return f"{row.module:<36} {symbols:>12} {branches:>14}"


def _cut(site: Site) -> str:
    text = f"{site.where}: {site.what}"
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
