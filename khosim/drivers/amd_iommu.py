"""The AMD IOMMU driver: one unit, its device table, command buffer and event log.

Models ``drivers/iommu/amd/init.c`` (``alloc_dev_table``, ``init_device_table_dma``,
``early_enable_iommu``, ``disable_iommus``, ``reuse_device_table``) and ``iommu.c``
(``set_dte_entry``, ``clear_dte_entry``, ``iommu_queue_command``) @ 7.3. A kexec turns the unit off,
and a kernel that is not a crash kernel does so again when it comes up.

No live update of AMD's units has been proposed: the series for VT-d leaves them out. What is here
is khosim's own, with that series' records: the device table stays where it is and is used on, as a
crash kernel does with the one it finds. Before the jump the unit is told to read no command and to
log no event any more, for the memory of both is the next kernel's.

Left out: several units or segments, interrupt remapping and AVIC (messages go to a CPU as they
are), guest tables, PASIDs, SNP's restrictions on the unit, exclusion ranges, ``reuse_device_table``
for crash kernels. The device table covers the buses up to the last one with a function, as IVRS
would say it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from khosim.abi.amd_iommu import (
    CMD_BYTES,
    DTE_BYTES,
    complete_all,
    dte,
    dte_domain,
    dte_levels,
    empty_dte,
    invalidate_all,
    invalidate_devtab_entry,
    invalidate_domain,
)
from khosim.abi.iommu import IOMMU_AMD
from khosim.abi.vtd import address_of
from khosim.drivers.iommu_unit import IommuUnit
from khosim.drivers.page_table import AMD_FORMAT, LEVELS
from khosim.errors import KernelError, KernelPanic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from khosim.drivers.page_table import PageTable
    from khosim.kernel.kernel import Kernel
    from khosim.machine.devices import Devices

__all__ = ("AmdIommu",)

_DEV_TABLE, _CMD_BUF, _EVT_BUF, _CONTROL = 0x00, 0x08, 0x10, 0x18
_CMD_TAIL = 0x2008
_ENABLE, _LOGS, _COMMANDS = 1, 1 << 2, 1 << 12
_BUFFER_ORDER, _BUFFER_BYTES, _SIZE_512 = 1, 8192, 9 << 56
_TABLE_SIZE = 0x1FF


class AmdIommu(IommuUnit):
    """``struct amd_iommu``: a unit as one kernel drives it. ``base`` is its registers' address.

    ``root`` is the device table, ``domain_ids`` are those in use.
    """

    type = IOMMU_AMD
    format = AMD_FORMAT
    posts_interrupts = False
    irq_table = 0

    __slots__ = ("_cmd_buf", "_last_bdf", "_sem", "_tail")

    def __init__(self, kernel: Kernel, devices: Devices, base: int) -> None:
        super().__init__(kernel, devices, base)
        self._last_bdf = 0
        self._cmd_buf = self._sem = 0
        self._tail = 0

    # -- registers ------------------------------------------------------------------------------

    def _write(self, offset: int, value: int) -> None:
        self.devices.mmio_write(self.base + offset, value, 8)
        if self.kernel.trace is not None:
            self.kernel.emit("amd_iommu_writeq", {"offset": offset}, value)

    def _feature(self, set_bits: int = 0, clear_bits: int = 0) -> None:
        # iommu_feature_enable, iommu_feature_disable
        held = self.devices.mmio_read(self.base + _CONTROL, 8)
        self._write(_CONTROL, (held | set_bits) & ~clear_bits)

    @property
    def translates(self) -> bool:
        """``CONTROL_IOMMU_EN``."""
        return bool(self.devices.mmio_read(self.base + _CONTROL, 8) & _ENABLE)

    # -- coming up ------------------------------------------------------------------------------

    @property
    def _table_bytes(self) -> int:
        # tbl_size: a power of two of pages.
        size = (self._last_bdf + 1) * DTE_BYTES
        return max(4096, 1 << (size - 1).bit_length())

    @property
    def root_value(self) -> int:
        """What the device table base register holds: address, and size in pages less one."""
        return self.root | (self._table_bytes >> 12) - 1

    def bring_up(
        self, last_bdf: int, *, root: int = 0, irta: int = 0, domain_ids: set[int] | None = None
    ) -> None:
        """``amd_iommu_init`` as far as ``early_enable_iommus``; ``last_bdf`` is of IVRS.

        ``root`` is what the predecessor's register held, where it preserved its device table: then
        translation goes on all the while. A table of another size is fatal.
        """
        kernel = self.kernel
        self._last_bdf = last_bdf | 0xFF
        if root:
            self.root = address_of(root)
            if root != self.root_value:
                raise KernelPanic(
                    f"The device table size of IOMMU:0 is not expected! ({root & _TABLE_SIZE})",
                    kernel.generation,
                )
            self._feature(clear_bits=_LOGS | _COMMANDS)
        else:
            self._feature(clear_bits=_ENABLE | _LOGS | _COMMANDS)  # disable_iommus
            self.root = self._alloc((self._table_bytes >> 12).bit_length() - 1)
            entries = np.frombuffer(empty_dte() * (self._last_bdf + 1), dtype=np.uint8)
            kernel.ram.write(self.root, entries, kernel.by("init_device_table_dma"))
        self.domain_ids = set(domain_ids or ())
        self._cmd_buf, self._sem = self._alloc(_BUFFER_ORDER), self._alloc(0)
        self._tail = 0
        self._write(_DEV_TABLE, self.root_value)
        self._write(_CMD_BUF, self._cmd_buf | _SIZE_512)
        self._write(_EVT_BUF, self._alloc(_BUFFER_ORDER) | _SIZE_512)
        self._feature(_COMMANDS | _LOGS | _ENABLE)
        self.flush()
        if kernel.trace is not None:
            kernel.emit("early_enable_iommus", {"restored": bool(root)}, self.root)

    def _queue(self, *commands: bytes) -> None:
        # iommu_queue_command_sync: this unit is done with them when the tail is written.
        kernel = self.kernel
        by = kernel.by("iommu_queue_command")
        for command in (*commands, complete_all(self._sem, 1)):
            kernel.ram.write(self._cmd_buf + self._tail, command, by)
            self._tail = (self._tail + CMD_BYTES) % _BUFFER_BYTES
        self._write(_CMD_TAIL, self._tail)

    def flush(self, domain_id: int | None = None) -> None:
        """Forget cached entries and translations: of one domain, or all."""
        self._queue(invalidate_all() if domain_id is None else invalidate_domain(domain_id))

    # -- devices --------------------------------------------------------------------------------

    def bus_tables(self, bus: int) -> list[tuple[int, int]]:
        """None: one table has all buses."""
        return []

    def unit_tables(self) -> list[tuple[int, int]]:
        """(physical address, order) of the device table."""
        return [(self.root, (self._table_bytes >> 12).bit_length() - 1)]

    def set_context(self, rid: int, table: PageTable, domain_id: int) -> None:
        """``set_dte_entry``: a function translates through ``table`` from now on; -EBUSY."""
        kernel = self.kernel
        at = self.root + rid * DTE_BYTES
        if rid > self._last_bdf or dte_levels(kernel.ram.read_u64(at)):
            raise KernelError(errno.EBUSY, "set_dte_entry", f"requester {rid:#x}")
        entry = dte(table.top_phys, LEVELS, domain_id)
        by = kernel.by("set_dte_entry")
        kernel.ram.write(at + 8, entry[8:], by)  # write_dte_upper128 before the half that counts
        kernel.ram.write(at, entry[:8], by)
        self._queue(invalidate_devtab_entry(rid))
        if kernel.trace is not None:
            kernel.emit("set_dte_entry", {"rid": rid, "did": domain_id}, 0)

    def clear_context(self, rid: int) -> None:
        """``clear_dte_entry``: a function is blocked from now on."""
        kernel = self.kernel
        at = self.root + rid * DTE_BYTES
        if rid > self._last_bdf or not dte_levels(kernel.ram.read_u64(at)):
            return
        domain_id = dte_domain(kernel.ram.read_u64(at + 8))
        kernel.ram.write(at, empty_dte(), kernel.by("clear_dte_entry"))
        self._queue(invalidate_devtab_entry(rid), invalidate_domain(domain_id))
        if kernel.trace is not None:
            kernel.emit("clear_dte_entry", {"rid": rid}, 0)

    def contexts(self) -> Iterator[tuple[int, int]]:
        """Requester id and domain id of every function that has a page table."""
        words = np.frombuffer(
            self.kernel.ram.read(self.root, (self._last_bdf + 1) * DTE_BYTES), dtype=np.uint64
        ).reshape(-1, 4)
        for rid in np.flatnonzero(words[:, 0] >> np.uint64(9) & np.uint64(7)).tolist():
            yield rid, dte_domain(int(words[rid, 1]))

    # -- interrupts -----------------------------------------------------------------------------

    def post_interrupt(self, rid: int, pi_desc: int, vector: int, index: int | None = None) -> int:
        """Raises -EOPNOTSUPP: interrupt remapping is left out."""
        raise KernelError(errno.EOPNOTSUPP, "amd_ir_set_vcpu_affinity", "no interrupt remapping")

    def clear_irte(self, index: int) -> None:
        """Nothing was posted."""

    # -- live update ----------------------------------------------------------------------------

    def shutdown(self, preserved: set[int] | None, buses: set[int]) -> None:
        """``disable_iommus``: everything off; or, where requesters are ``preserved``, on.

        Then entries of others are cleared, and the unit works without commands and log.
        """
        if preserved is None:
            self._feature(clear_bits=_ENABLE | _LOGS | _COMMANDS)
        else:
            for rid, _ in list(self.contexts()):
                if rid not in preserved:
                    self.clear_context(rid)
            self.flush()
            self._feature(clear_bits=_LOGS | _COMMANDS)
        if self.kernel.trace is not None:
            self.kernel.emit("disable_iommus", {}, preserved is not None)
