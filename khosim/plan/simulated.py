"""A simulated cold boot of a kernel of given dimensions: the model behind ``khosim plan``.

It is :func:`khosim.kernel.boot.boot`, the same engine that ``khosim run`` uses, so every formula is
the kernel's own (see :mod:`khosim.kernel.boot_memory`). This module only watches: which function
took which range, what was reserved when scratch was sized, and what the kernel said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.errors import KernelError, KernelPanic
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import Release
from khosim.kernel.trace import Event
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap
from khosim.plan.ledger import Ledger, Owner, owner_of, owners_in
from khosim.plan.model import Assumptions

__all__ = ("Outcome", "Simulation", "simulate")

_PLACED = ("memblock_reserve_kern", "memblock_reserve", "memblock_reserve_node")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How scratch came out: areas as (address, length), owners, and the kernel's own lines.

    ``enabled`` is whether KHO is on after boot, ``panic`` what the kernel died of before that.
    ``scale_percent`` is 0 where ``kho_scratch=`` gives sizes.
    """

    areas: tuple[tuple[int, int], ...]
    nodes: tuple[int, ...]
    owners: tuple[Owner, ...]
    scale_percent: int
    enabled: bool
    asked: bool
    messages: tuple[str, ...]
    panic: str = ""

    @property
    def scratch_bytes(self) -> int:
        """Bytes in all areas."""
        return sum(size for _, size in self.areas)

    @property
    def boot_bytes(self) -> int:
        """What boot had reserved, as far as it counts."""
        return sum(owner.reserved_bytes for owner in self.owners)


class _SeenEnough(Exception):
    """Scratch is reserved, and no more was asked."""


class _Watcher:
    """The host of a kernel that is only looked at."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.ledger = Ledger()
        self.kernel: Kernel | None = None
        self.owners: tuple[Owner, ...] = ()

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        self.kernel = kernel
        if stage == "takeover":
            for at, name in ((kernel.kernel_range, "kernel image"), (kernel.initrd, "initrd")):
                self._name_early(kernel, at, name)
            self.owners = owners_in(
                kernel.memblock,
                self.ledger,
                kernel.arch.low_address_limit,
                excludes_hugetlb=kernel.release.scratch_excludes_hugetlb,
            )
            if not self.whole:
                raise _SeenEnough

    def kexec(self, kernel: Kernel, **options: Any) -> Kernel:
        raise AssertionError(f"nobody asks {kernel!r} to hand over {options!r}")

    def _name_early(self, kernel: Kernel, at: tuple[int, int], name: str) -> None:
        page = kernel.arch.page_size
        start, end = at
        if name == "kernel image":
            end += kernel.config.brk_bytes if kernel.arch.name == "x86_64" else 0
        self.ledger.take(start, end + page - 1 & -page, name)

    def trace(self, event: Event) -> None:
        args = event.args.get("args")
        if args is None:
            return
        symbol = event.symbol
        if symbol == "memblock_phys_free":
            self.ledger.free(args[0], args[0] + args[1])
        elif symbol in _PLACED:
            self.ledger.take(args[0], args[0] + args[1], owner_of(event.phase))
        elif "alloc" in symbol and event.result:
            self.ledger.take(event.result, event.result + args[0], owner_of(event.phase))


class Simulation:
    """A booted (or dead) simulated kernel, and what it would do next."""

    __slots__ = ("_assumed", "_cmdline", "_hardware", "_image", "_kernel", "outcome")

    def __init__(
        self,
        memory_map: MemoryMap,
        page_size: int,
        cmdline: str,
        assumed: Assumptions,
        release: Release,
        whole: bool,
    ) -> None:
        self._hardware = Hardware(memory_map, page_size)
        self._assumed, self._cmdline = assumed, cmdline
        self._image = KernelImage.build(
            arch=memory_map.arch, page_size=page_size, config=assumed.config(release)
        )
        load_kernel(
            self._hardware,
            self._image.data,
            initrd_bytes=assumed["initrd_bytes"],
            cmdline=cmdline,
        )
        watcher, panic = _Watcher(whole), ""
        self._kernel: Kernel | None = None
        try:
            self._kernel = boot(self._hardware, 0, trace=watcher.trace, host=watcher)
        except KernelPanic as died:
            panic = died.message
        except _SeenEnough:
            pass
        self.outcome = _outcome(watcher, panic)

    def load(self) -> str:
        """``kexec_file_load`` of the same kernel and initrd: "" or why it is refused."""
        assert self._kernel is not None
        try:
            self._kernel.kexec_file_load(
                self._image, initrd_bytes=self._assumed["initrd_bytes"], cmdline=self._cmdline
            )
        except KernelError as refused:
            return str(refused)
        return ""

    def hand_over(self) -> str:
        """Load the same kernel again and boot it through a handover: "" or why that fails.

        The successor has nothing but scratch to boot in, as if memory preserved in every 1 GiB
        block left it no other place.
        """
        if self._kernel is None or not self.outcome.enabled:
            return "KHO is off"
        config = self._image.config
        config = config.evolve(release=config.release.evolve(scratch_extension=False))
        image = KernelImage.build(
            arch=self._hardware.arch, page_size=self._hardware.page_size, config=config
        )
        try:
            kimage = self._kernel.kexec_file_load(
                image, initrd_bytes=self._assumed["initrd_bytes"], cmdline=self._cmdline
            )
            self._kernel.kernel_kexec(kimage)
            successor = boot(self._hardware, 1)
        except (KernelError, KernelPanic) as failed:
            return str(failed)
        lost = [line for line in successor.messages if "ailed" in line or "annot allocate" in line]
        return lost[0] if lost else ""


def simulate(
    memory_map: MemoryMap,
    page_size: int,
    cmdline: str,
    assumed: Assumptions,
    release: Release,
    *,
    whole: bool = True,
) -> Simulation:
    """Boot once, or (not ``whole``) up to where scratch is reserved.

    Raises :class:`InputError` where the boot loader finds no place for the kernel.
    """
    return Simulation(memory_map, page_size, cmdline, assumed, release, whole)


def _outcome(watcher: _Watcher, panic: str) -> Outcome:
    kernel = watcher.kernel
    if kernel is None:
        return Outcome((), (), (), 0, False, False, (), panic or "it does not boot")
    areas = tuple(kernel.scratch_areas()) if kernel.kho_enable else ()
    failed = any("disabling kexec handover" in line for line in kernel.messages)
    return Outcome(
        areas=areas,
        nodes=tuple(kernel.memory_nodes()),
        owners=watcher.owners,
        scale_percent=kernel.scratch_sizes.scale_percent,
        enabled=bool(areas),
        asked=bool(areas) or failed,
        messages=tuple(kernel.messages),
        panic=panic,
    )

