"""Where the parts of a handover lie, by name: read from RAM with the checkers' own decoder.

``root FDT``, ``scratch array``, ``map`` (the tree's root table), ``table`` (its last one), each
subtree by its name, and each page of LUO by its path below ``/LUO``, once it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.checks.decode import decode_handover
from khosim.checks.decode_luo import decode_luo
from khosim.checks.formats import format_of

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("places",)


def places(kernel: Kernel) -> dict[str, int]:
    """Addresses in bytes of what ``kernel`` hands over; empty without KHO."""
    fdt_phys = kernel.kho_out.fdt_phys if kernel.kho_enable else 0
    if not fdt_phys:
        return {}
    ram, page = kernel.ram, kernel.arch.page_size
    found = {"root FDT": fdt_phys, "scratch array": kernel.kho_scratch_phys}
    tables = [phys for nr_keys, phys in kernel.kho_out.tree.walk() if not nr_keys]
    if tables:
        found["map"], found["table"] = tables[0], tables[-1]
    handover = decode_handover(ram, fdt_phys, page, written=format_of(kernel.release))
    for name, blob in handover.subtrees.items():
        found[name] = blob.start
    root = handover.subtrees.get("LUO")
    if root is not None:
        luo = decode_luo(ram, root, page, handover.preserved, content=False)
        for phys, path in luo.pages.items():
            found.setdefault(path, phys)
    return found
