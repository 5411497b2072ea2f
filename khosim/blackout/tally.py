"""Counting what a live update does, from the trace of a run, and on which side of the stop it is.

A :class:`Tally` listens to a machine. Guests stop behind the last ``kexec_file_load`` before the
jump (``kernel_kexec`` freezes their files next), and go on behind the successor's last
``luo_retrieve_file``; where nothing is retrieved in sessions, behind its last ``kho_restore_*``,
and where nothing comes back at all, behind its boot.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from khosim.blackout.blocks import Regions, count_blocks
from khosim.kernel.trace import Event

__all__ = ("BLACKOUT", "STAGES", "Handover", "Item", "Tally")

STAGES = ("preserve", "load", "freeze", "jump", "boot", "retrieve", "resume")
"""In order; guests run during the first two."""
BLACKOUT = STAGES[2:]
_MIB = 1 << 20
_RUNNING = "running"
_ASKED_OF_DEVICES = ("scan_function_us", "device_register_us", "firmware_command_us")
_REGISTERS = ("dmar_writeq", "amd_iommu_writeq", "pci_write_config", "pci_write_msg_msix")


class Item(NamedTuple):
    """What is counted: a stage, the name of a cost, and the handler where it is a cost by one."""

    stage: str
    cost: str
    handler: str = ""


class Handover:
    """What was counted of one handover; ``events`` of the trace lie between stop and resumption."""

    __slots__ = ("at_jump", "at_resumption", "at_stop", "counts", "preserved_pages")

    def __init__(self, at_stop: int, at_jump: int) -> None:
        self.at_stop = at_stop
        self.at_jump = at_jump
        self.at_resumption = at_jump
        self.counts: dict[Item, float] = defaultdict(int)
        """Whole numbers, but for what is counted in MiB."""
        self.preserved_pages = 0
        """Pages that the successor reserved."""

    @property
    def events(self) -> int:
        """Events of the trace while guests stood still."""
        return self.at_resumption - self.at_stop

    def add(self, stage: str, found: Counter[tuple[str, str]]) -> None:
        """What was found happened in that stage."""
        for (cost, handler), count in found.items():
            self.counts[Item(stage, cost, handler)] += count


class Tally:
    """A listener that keeps a :class:`Handover` for each generation that jumped."""

    def __init__(self, page_size: int) -> None:
        self.handovers: dict[int, Handover] = {}
        self._page_size = page_size
        self._nr = 0
        self._generation = -1
        self._phase = ""
        self._arriving: Handover | None = None
        self._preserved: Counter[tuple[str, str]] = Counter()
        self._found: Counter[tuple[str, str]] = Counter()
        self._buffers: dict[str, int] = {}
        self._image: dict[str, int] = {}
        self._at_load = 0
        self._map_pages = self._last_map_pages = 0
        self._has_radix = self._has_sessions = False
        self._regions = Regions()
        self._readers: dict[str, Callable[[Event], None]] = {
            "machine_kexec": self._jump,
            "kexec_add_buffer": self._buffer,
            "kexec_file_load": self._load,
            "kho_radix_alloc_node": self._node,
            "kho_preserve_folio": self._preserve_folio,
            "kho_preserve_pages": self._preserve_pages,
            "kho_preserve_phys": self._preserve_pages,
            "kho_finalize": self._finalize,
            "kho_preserved_memory_reserve": self._reserve,
            "deserialize_bitmap": self._reserve,
            "kho_restore_folio": self._restore,
            "kho_restore_pages": self._restore,
            "memfd_luo_preserve": self._memfd_preserve,
            "memfd_luo_retrieve": self._memfd_retrieve,
            "luo_session_create": self._session_create,
            "luo_session_serialize": self._session_serialize,
            "luo_session_retrieve": self._session_retrieve,
            "luo_preserve_file": self._preserve_file,
            "luo_file_freeze": self._freeze_file,
            "luo_retrieve_file": self._retrieve_file,
            "luo_flb_file_preserve_one": self._shared_object,
            "luo_flb_retrieve_one": self._shared_object,
            "pci_scan_root_bus": self._scan,
            **dict.fromkeys(_REGISTERS, self._register),
            "sev_do_cmd": self._firmware,
            "memblock_reserve": self._memblock_place,
            "memblock_reserve_kern": self._memblock_place,
        }

    def __call__(self, event: Event) -> None:
        """Take one event down."""
        self._nr += 1
        if event.phase != self._phase or event.generation != self._generation:
            self._turn(event)
        read = self._readers.get(event.symbol)
        if read is not None:
            read(event)

    # -- where we are ---------------------------------------------------------------------------

    def _turn(self, event: Event) -> None:
        # Another phase of boot, or another kernel.
        if event.generation != self._generation:
            self._arriving = self.handovers.get(event.generation - 1)
            self._generation = event.generation
            self._preserved, self._found = Counter(), Counter()
            self._last_map_pages, self._map_pages = self._map_pages, 0
            self._has_radix = self._has_sessions = False
            self._regions = Regions()
        elif event.phase == _RUNNING:
            self._booted()
        self._phase = event.phase

    def _booted(self) -> None:
        if self._arriving is None:
            self._guests_run()
        else:
            if self._arriving.preserved_pages:
                self._found["walk_table_ns", ""] += self._last_map_pages
            self._arriving.add("boot", self._found)
            self._arriving.at_resumption = self._nr - 1
        self._found = Counter()

    def _came_back(self) -> None:
        # Until here guests stood still.
        if self._arriving is not None and self._phase == _RUNNING:
            self._arriving.add("retrieve", self._found)
            self._arriving.at_resumption = self._nr
            self._found = Counter()

    def _buffer(self, event: Event) -> None:
        self._buffers[event.args["name"]] = event.args["memsz"]

    def _guests_run(self) -> None:
        # What is asked of devices until the load is no part of an update: guests get them then.
        for key, number in self._found.items():
            if key[0] not in _ASKED_OF_DEVICES:
                self._preserved[key] += number

    def _load(self, event: Event) -> None:
        self._guests_run()
        self._found = Counter()
        self._image = {name: self._buffers.get(name, 0) for name in event.args["segments"]}
        self._at_load = self._nr

    def _jump(self, event: Event) -> None:
        handover = Handover(self._at_load, self._nr)
        handover.add("preserve", self._preserved)
        handover.add("freeze", self._found)
        size = sum(self._image.values()) / _MIB
        counts = {
            Item("load", "load_mib_us"): size,
            Item("jump", "relocate_mib_us"): size,
            Item("boot", "decompress_mib_us"): self._image.get("kernel", 0) / _MIB,
            Item("boot", "unpack_initrd_mib_us"): self._image.get("initrd", 0) / _MIB,
        }
        handover.counts.update(counts)
        for (cost, handler), number in self._found.items():
            if cost == "freeze_file_us":
                handover.counts[Item("boot", "probe_file_us", handler)] += number
        self.handovers[event.generation] = handover
        self._found = Counter()

    # -- in the old kernel ----------------------------------------------------------------------

    def _count(self, cost: str, number: int = 1, handler: str = "") -> None:
        self._found[cost, handler] += number

    def _node(self, event: Event) -> None:
        if event.phase == "mm_core_init_early":
            self._found["scan_key_ns", ""] += 0  # this kernel extends scratch
            return
        self._has_radix = True
        self._map_pages += 1

    def _preserve_folio(self, event: Event) -> None:
        if not event.result:
            self._keys(event.args.get("nr_folios", 1))

    def _keys(self, number: int) -> None:
        tracker = "radix" if self._has_radix else "xarray"
        self._count(f"preserve_key_{tracker}_ns", number)

    def _preserve_pages(self, event: Event) -> None:
        args = event.args
        if not event.result:
            nr_pages = args.get("nr_pages")  # a vmalloc area comes as runs of blocks
            blocks = args["nr_folios"] if nr_pages is None else count_blocks(args["pfn"], nr_pages)
            self._keys(blocks)

    def _finalize(self, event: Event) -> None:
        nr_bitmaps = event.args["nr_bitmaps"]
        self._count("serialize_bitmap_ns", nr_bitmaps)
        self._map_pages = nr_bitmaps

    def _memfd_preserve(self, event: Event) -> None:
        self._count("preserve_memfd_folio_ns", event.args.get("nr_folios", 0))

    def _session_create(self, event: Event) -> None:
        if not event.result:
            self._count("create_session_us")

    def _session_serialize(self, event: Event) -> None:
        self._count("serialize_session_us", event.args["count"])

    def _preserve_file(self, event: Event) -> None:
        if not event.result:
            self._count("preserve_file_us", 1, event.args["compatible"])

    def _freeze_file(self, event: Event) -> None:
        for compatible in event.args["compatible"]:
            self._count("freeze_file_us", 1, compatible)

    # -- devices, in both kernels ---------------------------------------------------------------

    def _shared_object(self, event: Event) -> None:
        if not event.result:
            self._count("shared_object_us")

    def _scan(self, event: Event) -> None:
        self._count("scan_function_us", event.result)

    def _register(self, event: Event) -> None:
        self._count("device_register_us")

    def _firmware(self, event: Event) -> None:
        self._count("firmware_command_us")

    # -- in the new kernel ----------------------------------------------------------------------

    def _memblock_place(self, event: Event) -> None:
        start, size = event.args["args"][:2]
        if event.phase not in ("kho_memory_init", _RUNNING):
            self._regions.add(start, start + size)

    def _reserve(self, event: Event) -> None:
        phys, order = event.args["phys"], event.args["order"]
        number = event.args.get("nr_blocks", 1)
        if self._arriving is None:
            return
        self._arriving.preserved_pages += number << order
        self._count("reserve_block_ns", number)
        self._regions.add(phys, phys + (number << order) * self._page_size)
        self._count("reserve_scan_ns", number * self._regions.count)
        if ("scan_key_ns", "") in self._found:
            self._count("scan_key_ns", number)

    def _restore(self, event: Event) -> None:
        if event.result is None:
            return
        number = event.args.get("nr_blocks", 1)
        self._count("restore_block_ns", number)
        self._count("restore_page_ns", number << event.args["order"])
        if not self._has_sessions:
            self._came_back()

    def _memfd_retrieve(self, event: Event) -> None:
        self._count("retrieve_memfd_folio_ns", event.args.get("nr_folios", 0))

    def _session_retrieve(self, event: Event) -> None:
        if not event.result:
            self._has_sessions = True
            self._count("retrieve_session_us")
            self._came_back()

    def _retrieve_file(self, event: Event) -> None:
        if not event.result:
            self._has_sessions = True
            self._count("retrieve_file_us", 1, event.args["compatible"])
            self._came_back()
