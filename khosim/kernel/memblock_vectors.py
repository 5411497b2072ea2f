"""Running recorded sequences of memblock calls.

A *case* is one JSON object: ``id`` and ``ops``, a list of ``[name, numbers...]`` with the kernel
function's name less its ``memblock_`` prefix (``alloc`` is ``memblock_alloc_range_nid``, ``limit``
``memblock_set_current_limit``, ``trim`` ``memblock_trim_memory``, ``scratch_only`` and
``bottom_up`` set or clear their switch). Its outcome: what each call returned (0 where the kernel
function returns nothing), and the final arrays as ``[base, size, flags, nid]``, nid -1 for none.

The setting is that of the kernel's user-space harness (``tools/testing/memblock`` @ 7.3, with
NUMA): 4 KiB pages, 32-byte cache lines, 64 nodes, arrays of 128 regions that never grow, so that a
call that would need a 129th is a kernel panic and the end of its case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from khosim.errors import InputError, KernelPanic
from khosim.kernel.memblock import Memblock, RegionArray, numa_valid_node

__all__ = ("Case", "Outcome", "parse_case", "run_case")

_ADDRESS = (0, (1 << 64) - 1)
_SWITCH = (0, 1)
_NODE = (-(1 << 31), (1 << 31) - 1)
_FLAGS = (0, (1 << 32) - 1)
_A, _S, _N, _F = _ADDRESS, _SWITCH, _NODE, _FLAGS


def _scratch_only(memblock: Memblock, enable: int) -> None:
    if enable:
        memblock.memblock_set_kho_scratch_only()
    else:
        memblock.memblock_clear_kho_scratch_only()


_OPS: dict[str, tuple[Callable[..., int | None], tuple[tuple[int, int], ...]]] = {
    "add": (Memblock.memblock_add, (_A, _A)),
    "add_node": (Memblock.memblock_add_node, (_A, _A, _N, _F)),
    "remove": (Memblock.memblock_remove, (_A, _A)),
    "reserve": (Memblock.memblock_reserve, (_A, _A)),
    "reserve_kern": (Memblock.memblock_reserve_kern, (_A, _A)),
    "phys_free": (Memblock.memblock_phys_free, (_A, _A)),
    "mark_hotplug": (Memblock.memblock_mark_hotplug, (_A, _A)),
    "clear_hotplug": (Memblock.memblock_clear_hotplug, (_A, _A)),
    "mark_mirror": (Memblock.memblock_mark_mirror, (_A, _A)),
    "mark_nomap": (Memblock.memblock_mark_nomap, (_A, _A)),
    "clear_nomap": (Memblock.memblock_clear_nomap, (_A, _A)),
    "mark_kho_scratch": (Memblock.memblock_mark_kho_scratch, (_A, _A)),
    "clear_kho_scratch": (Memblock.memblock_clear_kho_scratch, (_A, _A)),
    "reserved_mark_noinit": (Memblock.memblock_reserved_mark_noinit, (_A, _A)),
    "reserved_mark_kern": (Memblock.memblock_reserved_mark_kern, (_A, _A)),
    "set_node": (Memblock.memblock_set_node, (_A, _A, _N)),
    "trim": (Memblock.memblock_trim_memory, (_A,)),
    "trim_memory": (Memblock.memblock_trim_memory, (_A,)),
    "enforce_memory_limit": (Memblock.memblock_enforce_memory_limit, (_A,)),
    "cap_memory_range": (Memblock.memblock_cap_memory_range, (_A, _A)),
    "mem_limit_remove_map": (Memblock.memblock_mem_limit_remove_map, (_A,)),
    "limit": (Memblock.memblock_set_current_limit, (_A,)),
    "set_current_limit": (Memblock.memblock_set_current_limit, (_A,)),
    "get_current_limit": (Memblock.memblock_get_current_limit, ()),
    "bottom_up": (Memblock.memblock_set_bottom_up, (_S,)),
    "set_bottom_up": (Memblock.memblock_set_bottom_up, (_S,)),
    "scratch_only": (_scratch_only, (_S,)),
    "alloc": (Memblock.memblock_alloc_range_nid, (_A, _A, _A, _A, _N, _S)),
    "alloc_range_nid": (Memblock.memblock_alloc_range_nid, (_A, _A, _A, _A, _N, _S)),
    "phys_alloc_range": (Memblock.memblock_phys_alloc_range, (_A, _A, _A, _A)),
    "phys_alloc": (Memblock.memblock_phys_alloc, (_A, _A)),
    "phys_alloc_try_nid": (Memblock.memblock_phys_alloc_try_nid, (_A, _A, _N)),
    "phys_mem_size": (Memblock.memblock_phys_mem_size, ()),
    "reserved_size": (Memblock.memblock_reserved_size, ()),
    "reserved_kern_size": (Memblock.memblock_reserved_kern_size, (_A,)),
    "reserved_hugetlb_size": (Memblock.memblock_reserved_hugetlb_size, (_A,)),
    "estimated_nr_free_pages": (Memblock.memblock_estimated_nr_free_pages, ()),
    "start_of_DRAM": (Memblock.memblock_start_of_DRAM, ()),
    "end_of_DRAM": (Memblock.memblock_end_of_DRAM, ()),
    "is_memory": (Memblock.memblock_is_memory, (_A,)),
    "is_map_memory": (Memblock.memblock_is_map_memory, (_A,)),
    "is_reserved": (Memblock.memblock_is_reserved, (_A,)),
    "is_region_memory": (Memblock.memblock_is_region_memory, (_A, _A)),
    "is_region_reserved": (Memblock.memblock_is_region_reserved, (_A, _A)),
    "validate_numa_coverage": (Memblock.memblock_validate_numa_coverage, (_A,)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A sequence of calls, checked: every op is known and has the right numbers."""

    id: str | int
    ops: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to. ``panic`` is the last line of a kernel that died on the way."""

    id: str | int
    results: tuple[int, ...]
    memory: tuple[tuple[int, int, int, int], ...]
    reserved: tuple[tuple[int, int, int, int], ...]
    panic: str = ""

    def as_json(self) -> dict[str, Any]:
        """The case as the vectors write it; ``panic`` only where there was one."""
        fields: dict[str, Any] = {
            "id": self.id,
            "results": list(self.results),
            "memory": [list(region) for region in self.memory],
            "reserved": [list(region) for region in self.reserved],
        }
        if self.panic:
            fields["panic"] = self.panic
        return fields


def parse_case(text: str, place: str) -> Case:
    """The case that ``text``, one line of JSON, holds.

    Raises :class:`InputError` at ``place`` for what is no case. Keys other than ``id`` and ``ops``
    are not looked at.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(place, f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise InputError(place, "not a case: nested too deeply") from None
    except ValueError:
        raise InputError(place, "a number has too many digits") from None
    if not isinstance(fields, dict):
        raise InputError(place, f"a case is an object, not {_kind(fields)}")
    for key in ("id", "ops"):
        if key not in fields:
            raise InputError(place, f"key {key!r} is missing")
    case_id, ops = fields["id"], fields["ops"]
    if isinstance(case_id, bool) or not isinstance(case_id, (str, int)):
        raise InputError(place, f"'id' is text or a number, not {_kind(case_id)}")
    if not isinstance(ops, list):
        raise InputError(place, f"'ops' is a list, not {_kind(ops)}")
    return Case(case_id, tuple(_parse_op(op, nth, place) for nth, op in enumerate(ops)))


def run_case(case: Case) -> Outcome:
    """Run the calls of ``case`` on a fresh memblock."""
    memblock = Memblock(page_size=4096, smp_cache_bytes=32, max_regions=128)
    results: list[int] = []
    panic = ""
    try:
        for name, numbers in case.ops:
            results.append(int(_OPS[name][0](memblock, *numbers) or 0))
    except KernelPanic as error:
        panic = error.message
    return Outcome(case.id, tuple(results), _rows(memblock.memory), _rows(memblock.reserved), panic)


def _parse_op(op: object, nth: int, place: str) -> tuple[str, tuple[int, ...]]:
    if not isinstance(op, list) or not op or not isinstance(op[0], str):
        raise InputError(place, f"ops[{nth}] is not a list of a name and numbers")
    name, numbers = op[0], op[1:]
    known = _OPS.get(name)
    if known is None:
        raise InputError(place, f"ops[{nth}]: unknown op {_shown(name)}")
    limits = known[1]
    if len(numbers) != len(limits):
        raise InputError(place, f"ops[{nth}]: {name} takes {len(limits)}, got {len(numbers)}")
    for at, (number, (lowest, highest)) in enumerate(zip(numbers, limits, strict=True), 1):
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError(
                place, f"ops[{nth}]: {name}: argument {at} is {_kind(number)}, not a whole number"
            )
        if not lowest <= number <= highest:
            raise InputError(
                place,
                f"ops[{nth}]: {name}: argument {at} is outside {lowest} to {highest}",
            )
    return name, tuple(numbers)


def _rows(array: RegionArray) -> tuple[tuple[int, int, int, int], ...]:
    return tuple(
        (base, size, flags, nid if numa_valid_node(nid) else -1)
        for base, size, flags, nid in array.rows()
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a fraction"}
    return names[type(value)]


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= 40 else name[:40] + "...")
