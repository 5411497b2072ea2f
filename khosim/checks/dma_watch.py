"""Judging each DMA of a running kernel's devices at its moment.

From boot on: where a device has a file of vfio, a request that was done has to have gone where the
mappings of its iommufd say, by the memfds behind them and not by the tables, and to pages that are
not free. A device that nobody has open is to reach nothing, and from the jump until the next kernel
is up no device that no session carries. What a session carried and has not finished is not asked
here but by the record of the jump (:mod:`khosim.checks.device_watch`).

Left out: requests to BARs of other devices, machines whose kernels have no driver for a unit.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.checks.device_watch import memory_of, target_of

if TYPE_CHECKING:
    from khosim.checks.history import History
    from khosim.checks.kernel_view import KernelView
    from khosim.machine.devices import HardwareEvent
    from khosim.machine.hardware import Hardware

__all__ = ("DmaWatch", "Stray")

_STRAYS_MAX = 16


class Stray(NamedTuple):
    """What is wrong with a request, and where it went."""

    message: str
    phys: int


class DmaWatch:
    """A listener on a machine's devices, which writes into ``history.strays``."""

    __slots__ = ("_kernel", "_known", "_shift", "history")

    def __init__(self, hardware: Hardware, history: History) -> None:
        assert hardware.devices is not None
        self.history = history
        self._shift = hardware.page_shift
        self._kernel: weakref.ref[Any] | None = None
        self._known: dict[str, tuple[tuple[Any, ...], tuple[tuple[int, int, int], ...]]] = {}
        hardware.devices.listen(self._hear)

    def run(self, kernel: KernelView | None) -> None:
        """A kernel is up, with its drivers; None: it is leaving, or gone."""
        self._kernel = None if kernel is None else weakref.ref(kernel)
        self._known.clear()

    def _hear(self, event: HardwareEvent) -> None:
        if event.kind != "dma" or event.detail["dma"].outcome != "done":
            return
        watch = self.history.devices
        if self._kernel is None:
            if watch is not None and event.source not in watch.devices:
                at = event.detail["dma"].runs[0][0]
                where = f"reached {at:#x} between the kernels"
                self._say(f"{event.source} {where}, carried by none", at)
            return
        kernel = self._kernel()
        drivers = getattr(kernel, "drivers", None)
        if kernel is not None and drivers is not None and drivers.vfio is not None:
            self._judge(kernel, drivers.vfio, event.detail["dma"])

    def _judge(self, kernel: KernelView, vfio: Any, dma: Any) -> None:
        watch = self.history.devices
        kept = None if watch is None else watch.devices.get(dma.name)
        file = vfio.open_files.get(dma.rid)
        # Of what came without a file yet, the session is being read just now, or was lost.
        if kept is not None and file is None:
            return
        if watch is not None and kept is not None and watch.is_carried(kernel, kept.session):
            return
        at = dma.runs[0][0]
        if file is None or file.iommufd is None:
            self._say(f"{dma.name} reached {at:#x}, and nobody lets it", at)
            return
        memory = self._memory(dma.name, file.iommufd)
        if not memory and kept is not None:  # a page table without an address space behind it
            memory = kept.memory
        wanted = target_of(memory, dma.iova, dma.len_bytes)
        if wanted is None:
            self._say(f"{dma.name} reached {at:#x}, which nobody mapped for it", at)
        elif list(dma.runs) != wanted:
            self._say(f"{dma.name} reached {at:#x}, and not {wanted[0][0]:#x}", at)
        else:
            self._look_at_pages(kernel, dma)

    def _memory(self, name: str, iommufd: Any) -> tuple[tuple[int, int, int], ...]:
        mappings = tuple(iommufd.mappings)
        known = self._known.get(name)
        if known is None or known[0] != mappings:
            known = mappings, tuple(memory_of(iommufd, {}, self._shift))
            self._known[name] = known
        return known[1]

    def _look_at_pages(self, kernel: KernelView, dma: Any) -> None:
        starts, ends, _ = kernel.pages.pages.columns()
        for phys, size in dma.runs:
            pfn, end = phys >> self._shift, phys + size - 1 >> self._shift
            while pfn <= end:
                i = bisect_right(starts, pfn) - 1
                if i < 0 or pfn >= ends[i]:
                    where = pfn << self._shift
                    self._say(f"DMA of {dma.name} at page {where:#x}, which is free", where)
                    return
                pfn = ends[i]

    def _say(self, message: str, phys: int) -> None:
        strays = self.history.strays
        if len(strays) < _STRAYS_MAX:
            strays.append(Stray(message, phys))
