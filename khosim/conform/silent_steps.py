"""What a boot does to memblock without a line in the log, and when.

Taken from ``arch/x86/kernel/{setup,e820}.c``, ``arch/x86/realmode/init.c``,
``arch/x86/mm/init.c``, ``arch/arm64/mm/{init,mmu}.c``, ``mm/numa_memblks.c``, ``mm/hugetlb.c`` and
``kernel/liveupdate/kexec_handover.c`` @ 7.3. Where boot stands is read from the callers of the
logged calls and from other lines, never from an address that is to be predicted.

=====================  =====================================================================
step                   when
=====================  =====================================================================
``e820``               x86, first ``memblock_add``: bottom-up for ``movable_node``, allocate
                       below 1 MiB only, arrays may grow
``low-scratch``        x86, first dump: the first MiB is scratch, memory is cut to whole pages
``real-mode``          x86, after ``reserve_real_mode`` took the first MiB: scratch no more
``mapped``             x86, first call after ``init_mem_mapping``: allocate anywhere
``nomap``              arm64 with EFI, before the first request: memory that is not mapped
``nodes``              before the first node's data: nodes, hotplug marks, top-down again
``extended``           7.3, when the tree of busy blocks is done: scratch extension
``hugetlb``            after each boot-time huge page: its tail needs no struct pages
=====================  =====================================================================

Left out: firmware marks that no line shows (mirrored memory), confidential guests.
"""

from __future__ import annotations

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import (
    Add,
    Dump,
    Event,
    Free,
    Note,
    Remove,
    Request,
    Reserve,
    symbol_of,
)
from khosim.conform.nodes import numa_memblks_init
from khosim.conform.state import State
from khosim.kernel.memblock import (
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NOMAP,
    PHYS_ADDR_MAX,
)

__all__ = ("SilentSteps",)

_MIB = 1 << 20
_BEFORE_MAPPED = (
    "e820__", "efi_", "__efi_", "mem_encrypt", "sme_", "cc_", "snp_", "reserve_real_mode",
    "init_mem_mapping", "memory_map_", "alloc_low_page", "init_memory_mapping", "init_trampoline",
    "kernel_physical_mapping", "phys_", "early_memtest", "memtest", "do_one_pass",
    "reserve_bad_mem", "setup_bios_corruption", "xen_", "smp_scan_config", "setup_arch",
    "reserve_brk", "memblock_",
)  # fmt: skip


class SilentSteps:
    """The steps of one boot, in the order of its architecture."""

    def __init__(self, facts: BootFacts, events: list[Event]) -> None:
        self.facts = facts
        self.x86 = facts.arch == "x86_64"
        dumps = [event for event in events if isinstance(event, Dump)]
        # A kernel built without KHO never marks the first MiB.
        self.marks_low = any(row.flags & MEMBLOCK_KHO_SCRATCH for row in dumps[0].memory)
        self.nomap = [row for row in dumps[-1].memory if row.flags & MEMBLOCK_NOMAP]
        self.mirrored = [row for row in dumps[-1].memory if row.flags & MEMBLOCK_MIRROR]

    def start(self, state: State) -> None:
        """Before the first event."""
        if not self.x86:
            # arm64 allows it only in paging_init, but a log that goes on never needed it before.
            state.memblock.memblock_allow_resize()

    def before(self, state: State, event: Event) -> None:
        """Take the steps that are due before ``event``."""
        if self.x86:
            self._before_x86(state, event)
        elif isinstance(event, Request) and state.take("nomap"):
            for row in self.nomap:
                state.memblock.memblock_mark_nomap(row.base, row.size)
        if isinstance(event, Note):
            self._on_note(state, event)

    def _before_x86(self, state: State, event: Event) -> None:
        memblock = state.memblock
        if isinstance(event, Add):
            if state.take("e820"):
                memblock.memblock_set_bottom_up(self.facts.movable_node)
                memblock.memblock_set_current_limit(_MIB)
                memblock.memblock_allow_resize()
        elif isinstance(event, Dump):
            if state.take("low-scratch"):
                if self.marks_low:
                    memblock.memblock_mark_kho_scratch(0, _MIB)
                memblock.memblock_trim_memory(self.facts.page_size)
        elif state.did("low-scratch") and not state.did("mapped") and self._past_mapping(event):
            self._map(state)

    def _past_mapping(self, event: Event) -> bool:
        if isinstance(event, Note):
            return event.kind in ("mapped", "faked-node", "no-numa", "srat", "node-data", "zones")
        if isinstance(event, (Request, Reserve, Free, Remove)):
            symbol = symbol_of(event.caller)
            return not symbol.startswith(_BEFORE_MAPPED) and not symbol.startswith("0x")
        return False

    def _map(self, state: State) -> None:
        if state.take("mapped"):
            memblock = state.memblock
            end = memblock.memblock_end_of_DRAM() // self.facts.page_size * self.facts.page_size
            memblock.memblock_set_current_limit(end)

    def _on_note(self, state: State, note: Note) -> None:
        memblock = state.memblock
        if note.kind == "srat":
            _, first, last, more = note.words
            if "hotplug" in more:
                start, end = int(first, 16), int(last, 16) + 1
                memblock.memblock_mark_hotplug(start, end - start)
        elif note.kind == "faked-node":
            # What the firmware's tables said was no use: numa_memblks_init starts over.
            memblock.memblock_clear_hotplug(0, PHYS_ADDR_MAX)
        elif note.kind == "esrt":
            self._mark_esrt(state, *(int(word, 16) for word in note.words))
        elif note.kind == "zones":
            self.nodes(state)

    def _mark_esrt(self, state: State, start: int, end: int) -> None:
        # efi_mem_reserve: what is reserved already is the kernel's own from now on.
        memblock = state.memblock
        if start < end and memblock.memblock_is_region_reserved(start, end - start):
            memblock.memblock_reserved_mark_kern(start, end - start)

    def nodes(self, state: State) -> None:
        """``numa_memblks_init``, due before the first node's data is allocated."""
        if self.x86:
            self._map(state)
        if state.take("nodes"):
            if self.x86:
                state.memblock.memblock_set_bottom_up(False)
            if self.facts.numa:
                numa_memblks_init(state.memblock, self.facts.blocks)

    def after(self, state: State, event: Event) -> None:
        """Take the steps that follow ``event``."""
        if not self.x86:
            return
        memblock = state.memblock
        if isinstance(event, Dump):
            if self.facts.mirrored and state.take("mirrored"):
                for row in self.mirrored:
                    memblock.memblock_mark_mirror(row.base, row.size)
        elif (
            isinstance(event, Reserve)
            and _takes_low_memory(event)
            and state.did("low-scratch")
            and state.take("real-mode")
        ):
            memblock.memblock_clear_kho_scratch(0, _MIB)


def _takes_low_memory(event: Reserve) -> bool:
    return (event.base, event.end) == (0, _MIB) or symbol_of(event.caller) == "reserve_real_mode"
