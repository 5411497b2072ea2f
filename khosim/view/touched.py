"""Which memory an event is about, by what its arguments and its result are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khosim.kernel.trace import Event

__all__ = ("touched",)


def touched(event: Event, page_shift: int) -> tuple[int, int]:
    """``[start, end)`` in physical addresses; ``(0, 0)`` where it is about no place in particular.

    memblock's calls carry a base and a size, or return the base of the size they were asked for.
    """
    args, result = event.args, event.result
    if event.symbol.startswith("memblock_"):
        return _memblock(event.symbol, args.get("args", ()), result)
    size = _size(args, page_shift)
    for name in ("phys", "pfn"):
        value = args.get(name)
        if isinstance(value, int) and _is_number(value):
            start = value << page_shift if name == "pfn" else value
            return start, start + size
    if not isinstance(result, int) or not _is_number(result) or not result:
        return 0, 0
    if event.symbol in ("alloc_pages", "alloc_pages_exact", "vmalloc"):
        return result << page_shift, (result << page_shift) + size
    if event.symbol in ("kho_radix_alloc_node", "kexec_add_buffer", "reserve_mem"):
        return result, result + size
    return 0, 0


def _size(args: dict[str, Any], page_shift: int) -> int:
    for name in ("size", "memsz"):
        if _is_number(args.get(name)):
            return int(args[name])
    pages = args.get("nr_pages", args.get("nr_blocks", 1))
    pages = pages if _is_number(pages) else 1
    order = args.get("order", 0)
    return int(pages) << ((order if _is_number(order) and 0 <= order < 40 else 0) + page_shift)


def _memblock(symbol: str, args: Any, result: Any) -> tuple[int, int]:
    if not isinstance(args, (list, tuple)) or len(args) < 2:
        return 0, 0
    first, second = args[:2]
    if not _is_number(first) or not _is_number(second):
        return 0, 0
    if "alloc" in symbol:
        return (result, result + first) if _is_number(result) and result else (0, 0)
    return first, first + second


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
