"""Hypothesis strategies for what a handover begins with.

What is drawn is lawful unless its name says otherwise, shrinks towards the simplest (a machine of
64 MiB, one node, an empty plan) and prints as something that can be typed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.kernel.release import MAINLINE, RELEASES, Release
from khosim.machine.memory_map import MemoryMap
from khosim.testing.faults import KINDS, PLAIN, Fault, FaultPlan
from khosim.testing.plans import FolioPlan, MachinePlan, MemfdPlan, SessionPlan
from khosim.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.simulator import Machine

__all__ = (
    "cmdlines",
    "fault_plans",
    "folio_sets",
    "machine_plans",
    "machines",
    "memfd_plans",
    "memory_maps",
    "mutated_cmdlines",
    "release_pairs",
    "session_plans",
)

_MIB = 1 << 20
_BASE = {"x86_64": 0, "arm64": 1 << 30}
_PAGE_SIZES = {"x86_64": (4096,), "arm64": (4096, 16384, 65536)}
_OWNERS = ("guest", "iommu", "agent")


@st.composite
def machine_plans(
    draw: st.DrawFn,
    *,
    arches: Sequence[str] = ("x86_64",),
    rams: Sequence[str] = ("64M", "96M", "128M"),
    nodes_max: int = 2,
    holes_max: int = 1,
    memoryless: bool = True,
    allocators: Sequence[str] = ("linux", "adversarial"),
) -> MachinePlan:
    """Machines on which 7.3 boots with ``kho=on``: architecture, page size, RAM, nodes, holes.

    A hole is 1 to 4 MiB in the upper half of RAM; 64 MiB with a hole have no room for scratch, so
    that machines of less than 96 MiB have none. Machines with pages of 16 and 64 KiB have at
    least 512 MiB, those with several nodes 64 MiB and 32 MiB for each. ``memoryless`` puts a node
    without memory behind the others now and then.
    """
    for arch in arches:
        if arch not in _PAGE_SIZES:
            raise InputError("machine_plans: arches", f"{arch!r} is none of x86_64, arm64")
    if nodes_max < 1 or holes_max < 0:
        raise InputError("machine_plans", f"{nodes_max} nodes and {holes_max} holes at most")
    arch = draw(st.sampled_from(tuple(arches)))
    page_size = draw(st.sampled_from(_PAGE_SIZES[arch]))
    ram = draw(st.sampled_from(tuple(rams)))
    nodes = draw(st.integers(1, nodes_max))
    least = "512M" if page_size > 4096 else f"{32 * nodes + 64}M" if nodes > 1 else ram
    if parse_size(ram) < parse_size(least):
        ram = least
    total = parse_size(ram)
    low = (_BASE[arch] + total // 2) // _MIB
    high = (_BASE[arch] + total) // _MIB - 8
    most = holes_max if total >= 96 * _MIB else 0
    starts = draw(st.lists(st.integers(low // 8, high // 8 - 1), max_size=most, unique=True))
    holes = tuple(
        (8 * start * _MIB, (8 * start + draw(st.integers(1, 4))) * _MIB)
        for start in sorted(starts)
    )
    empty = (nodes,) if memoryless and draw(st.integers(0, 3)) == 3 else ()
    return MachinePlan(
        ram,
        nodes,
        empty,
        holes,
        arch,
        page_size,
        draw(st.sampled_from(tuple(allocators))),
        draw(st.integers(0, 1 << 16)),
    )


def machines(**options: Any) -> st.SearchStrategy[Machine]:
    """Machines, built; options of :func:`machine_plans`."""
    return machine_plans(**options).map(MachinePlan.build)


def memory_maps(**options: Any) -> st.SearchStrategy[MemoryMap]:
    """Memory maps with nodes and holes; options of :func:`machine_plans`."""

    def laid_out(plan: MachinePlan) -> MemoryMap:
        return MemoryMap.from_size(
            plan.ram,
            nodes=plan.nodes,
            arch=plan.arch,
            holes=plan.holes,
            memoryless=plan.memoryless,
        )

    return machine_plans(**options).map(laid_out)


# -- command lines -------------------------------------------------------------------------------

_WORDS = (
    "liveupdate=on",
    "kho_scratch=8M,8M,0",
    "kho_scratch=150%",
    "kho_scratch=300%",
    "reserve_mem=4096:4096:log",
    "reserve_mem=3M:2M:trace",
    "reserve_mem=12289:64:oops",
    "hugepages=1",
    "log_buf_len=256K",
    "quiet",
)


@st.composite
def cmdlines(draw: st.DrawFn, *, kho: bool | None = True) -> str:
    """Command lines that a kernel of 64 MiB and more boots with; ``kho`` None: on or off."""
    on = draw(st.booleans()) if kho is None else kho
    words = draw(st.lists(st.sampled_from(_WORDS), max_size=4, unique_by=_key))
    return " ".join([f"kho={'on' if on else 'off'}", *words])


def _key(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={value.rsplit(':', 1)[-1]}" if name == "reserve_mem" else name


@st.composite
def mutated_cmdlines(draw: st.DrawFn) -> str:
    """Command lines with mistakes: characters lost, doubled, changed, words cut and swapped.

    A kernel boots with them or panics as Linux would; the simulator must not fall over.
    """
    text = draw(cmdlines(kho=None))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        how = draw(st.sampled_from(("lose", "double", "put", "cut", "swap")))
        if how == "lose":
            text = text[:at] + text[at + 1 :]
        elif how == "double":
            text = text[:at] + text[at : at + 3] + text[at:]
        elif how == "put":
            char = draw(st.sampled_from('=:,%@"- 0189kKMGTx'))
            text = text[:at] + char + text[at:]
        elif how == "cut":
            text = text[:at]
        else:
            text = " ".join(reversed(text.split(" ")))
    return text


# -- what is handed over -------------------------------------------------------------------------


def _folios(owners: Sequence[str], orders: Sequence[int], nodes: int) -> Any:
    nids: tuple[int | None, ...] = (None, *range(nodes)) if nodes > 1 else (None,)
    return st.builds(
        FolioPlan,
        st.sampled_from(tuple(orders)),
        st.sampled_from(tuple(owners)),
        st.sampled_from(nids),
        st.binary(min_size=1, max_size=8),
    )


def folio_sets(
    *,
    max_size: int = 12,
    orders: Sequence[int] = (0, 1, 2, 3, 5, 9, 10),
    owners: Sequence[str] = _OWNERS,
    nodes: int = 1,
) -> st.SearchStrategy[list[FolioPlan]]:
    """Folios to allocate and preserve: orders, owners, nodes, content."""
    return st.lists(_folios(owners, orders, nodes), max_size=max_size)


@st.composite
def memfd_plans(draw: st.DrawFn, *, pages_max: int = 6) -> MemfdPlan:
    """Memfds: a size, often not of whole pages, and content somewhere in it."""
    size = draw(st.integers(0, pages_max)) * 4096 + draw(st.sampled_from((0, 0, 1, 4095)))
    content = draw(st.binary(max_size=min(size, 16)))
    at = draw(st.integers(0, size - len(content)))
    return MemfdPlan(draw(st.sampled_from(("ram", "rom", "x" * 249))), size, at, content)


@st.composite
def session_plans(draw: st.DrawFn, *, max_size: int = 3, files_max: int = 3) -> list[SessionPlan]:
    """Sessions with memfds by token; names of 1 to 63 bytes, tokens of 64 bits."""
    names = draw(
        st.lists(st.sampled_from(("vm-a", "b", "x" * 63)), max_size=max_size, unique=True)
    )
    tokens = st.sampled_from((0, 1, 7, (1 << 64) - 1))
    files = st.lists(
        st.tuples(tokens, memfd_plans()), max_size=files_max, unique_by=lambda file: file[0]
    )
    return [SessionPlan(name, tuple(draw(files))) for name in names]


def fault_plans(
    *,
    kinds: Sequence[str] = PLAIN,
    steps: int = 40,
    max_size: int = 3,
    n_max: int = 12,
) -> st.SearchStrategy[FaultPlan]:
    """Faults within the first ``steps`` steps of a life; see :class:`~khosim.testing.Fault`.

    "oops" and "bytes" are for the kit's own operations; yours have to be able to forget.
    """
    least = {"steps": 0, "max_size": 0, "n_max": 1}
    for name, value in (("steps", steps), ("max_size", max_size), ("n_max", n_max)):
        if value < least[name]:
            raise InputError(f"fault_plans: {name}", f"{value!r} is less than {least[name]}")
    if not kinds:
        raise InputError("fault_plans: kinds", "there is none")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError("fault_plans: kinds", f"{kind!r} is none of {', '.join(KINDS)}")
    fault = st.builds(Fault, st.sampled_from(tuple(kinds)), st.integers(0, steps), _numbers(n_max))
    return st.lists(fault, max_size=max_size).map(lambda faults: FaultPlan(tuple(faults)))


def _numbers(n_max: int) -> st.SearchStrategy[int]:
    return st.integers(1, n_max)


# -- releases ------------------------------------------------------------------------------------


def _formats(release: Release) -> tuple[object, ...]:
    return (
        release.kho_compatible,
        release.tracker,
        release.bitmap_bytes,
        release.luo,
        release.luo_flb,
        release.memfd,
    )


def release_pairs(
    *, compatible: bool = True, releases: Sequence[str] = MAINLINE
) -> st.SearchStrategy[tuple[str, str]]:
    """(first kernel, its successors), updates as well as downgrades.

    ``compatible`` keeps to pairs that speak the same formats; else the successor may find nothing
    that it understands. Shrinks towards two of the newest.
    """
    for name in releases:
        if name not in RELEASES:
            raise InputError("release_pairs", f"{name!r} is none of {', '.join(RELEASES)}")
    newest_first = list(reversed(releases))
    pairs = [
        (old, new)
        for old in newest_first
        for new in newest_first
        if not compatible or _formats(RELEASES[old]) == _formats(RELEASES[new])
    ]
    return st.sampled_from(pairs)
