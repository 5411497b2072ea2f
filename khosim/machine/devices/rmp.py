"""The reverse map table of SEV-SNP: who owns each page of physical memory.

Rules of AMD's "SEV Secure Nested Paging Firmware ABI Specification" and of the manual's RMPUPDATE,
PSMASH and PVALIDATE; ``arch/x86/virt/svm/sev.c @ 7.3`` is the host's side. Kept as runs of pages
with equal entries, as RMPREAD would show them: the table's own bytes are not in RAM, and neither is
the memory reserved that firmware sets aside for them. Left out: VMPL permissions, the 2 MiB
write check of a host mapping that is larger than the page it hits, page swapping.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from khosim.errors import RmpFault
from khosim.machine.devices.events import EventLog
from khosim.machine.shadow import RunMap

__all__ = (
    "FAIL_INPUT",
    "FAIL_INUSE",
    "FAIL_OVERLAP",
    "FAIL_PERMISSION",
    "KINDS",
    "Rmp",
    "RmpEntry",
)

FAIL_INPUT, FAIL_PERMISSION, FAIL_INUSE, FAIL_OVERLAP = 1, 2, 3, 4
KINDS = (
    "hypervisor",
    "firmware",
    "context",
    "metadata",
    "pre-guest",
    "guest-invalid",
    "guest-valid",
    "reclaim",
)
_2M = 2 << 20
_IMMUTABLE, _VALIDATED, _VMSA = 1, 2, 4
_Held = tuple[str, int, int | None, int, int]
"""(kind, asid, guest frame minus frame or None, page size, flags)."""


class RmpEntry(NamedTuple):
    """One page's entry. ``kind`` is one of :data:`KINDS`; ``page_size`` 4096 or 2 MiB."""

    kind: str
    assigned: bool = False
    asid: int = 0
    gpa: int = 0
    page_size: int = 4096
    validated: bool = False
    immutable: bool = False
    vmsa: bool = False


_SHARED = RmpEntry("hypervisor")


class Rmp:
    """The table of one machine. Without SYSCFG.SNP_EN nothing is checked (``enabled``)."""

    __slots__ = ("asids", "enabled", "end_phys", "log", "runs_held")

    def __init__(self, end_phys: int, asids: int, log: EventLog) -> None:
        self.end_phys, self.asids, self.log = end_phys, asids, log
        self.enabled = False
        self.runs_held: RunMap[_Held | None] = RunMap()

    def power_on(self) -> None:
        """SNP off and every page the hypervisor's."""
        self.enabled = False
        self.runs_held = RunMap()

    # -- reading ----------------------------------------------------------------------------------

    def _entry(self, pfn: int, held: _Held | None) -> RmpEntry:
        if held is None:
            return _SHARED
        kind, asid, delta, size, flags = held
        gpa = 0 if delta is None else pfn + delta << 12
        return RmpEntry(
            kind,
            True,
            asid,
            gpa,
            size,
            bool(flags & _VALIDATED),
            bool(flags & _IMMUTABLE),
            bool(flags & _VMSA),
        )

    def entry(self, pfn: int) -> RmpEntry:
        """The entry of a page frame of 4 KiB, as RMPREAD gives it."""
        index = self.runs_held.find(pfn)
        return self._entry(pfn, None if index < 0 else self.runs_held.values[index])

    def raw(self, pfn: int) -> bytes:
        """The entry's 16 bytes as family 19h has them (``sev.c:struct rmpentry_raw @ 7.3``)."""
        entry = self.entry(pfn)
        low = (
            int(entry.assigned)
            | int(entry.page_size == _2M) << 1
            | int(entry.immutable) << 2
            | (entry.gpa >> 12 & (1 << 39) - 1) << 12
            | entry.asid << 51
            | int(entry.vmsa) << 61
            | int(entry.validated) << 62
        )
        return low.to_bytes(8, "little") + bytes(8)

    def runs(
        self, start_phys: int = 0, end_phys: int | None = None
    ) -> list[tuple[int, int, RmpEntry]]:
        """Assigned pages as ordered (start, end, entry of the first page); gaps: hypervisor."""
        first = start_phys >> 12
        end = (self.end_phys if end_phys is None else end_phys) + 4095 >> 12
        return [
            (start << 12, stop << 12, self._entry(start, held))
            for start, stop, held in self.runs_held.overlapping(first, end)
            if held is not None
        ]

    # -- checks -----------------------------------------------------------------------------------

    def first_assigned(self, phys: int, len_bytes: int) -> int:
        """The first address of a range that is not the hypervisor's; its end if none."""
        end = phys + len_bytes
        if self.enabled:
            for start, _, held in self.runs_held.overlapping(phys >> 12, end + 4095 >> 12):
                if held is not None:
                    return max(phys, start << 12)
        return end

    def check_host_write(self, phys: int, len_bytes: int) -> None:
        """The check of a write by a kernel: :class:`RmpFault` where a page is assigned."""
        at = self.first_assigned(phys, len_bytes)
        if at < phys + len_bytes:
            entry = self.entry(at >> 12)
            raise RmpFault(phys, len_bytes, f"page {at & ~0xFFF:#x} is {entry.kind}", entry.asid)

    def guest_may(self, asid: int, gpa: int, phys: int, len_bytes: int) -> str:
        """Why a guest may not use its private memory at ``phys``, or ""."""
        frame, end = phys >> 12, phys + len_bytes + 4095 >> 12
        delta = (gpa >> 12) - frame
        for start, stop, held in self.runs_held.overlapping(frame, end):
            if start > frame or held is None:
                break
            if held[1] != asid:
                return f"page {start << 12:#x} belongs to ASID {held[1]}"
            if held[2] != delta:
                return f"page {start << 12:#x} is mapped at another guest address"
            if not held[4] & _VALIDATED:
                return f"page {start << 12:#x} is {held[0]}"
            frame = stop
        return "" if frame >= end else f"page {frame << 12:#x} is hypervisor"

    # -- instructions -----------------------------------------------------------------------------

    def rmpupdate(
        self,
        phys: int,
        len_bytes: int,
        *,
        assigned: bool,
        asid: int = 0,
        gpa: int = 0,
        page_size: int = 4096,
        immutable: bool = False,
    ) -> int:
        """RMPUPDATE of each page of a range: 0 or one of the FAIL codes, and nothing changed then.

        A page that changes hands is not validated any more.
        """
        if page_size not in (4096, _2M) or (phys | len_bytes | gpa) % page_size or len_bytes <= 0:
            return FAIL_INPUT
        if phys < 0 or phys + len_bytes > self.end_phys or not 0 <= asid <= self.asids:
            return FAIL_INPUT
        if not assigned and (asid or immutable):
            return FAIL_INPUT
        first, end = phys >> 12, phys + len_bytes >> 12
        for _, _, held in self.runs_held.overlapping(first, end):
            if held is not None:
                if held[4] & _IMMUTABLE:
                    return FAIL_PERMISSION
                if held[3] != page_size:
                    return FAIL_OVERLAP
        if not assigned:
            self.runs_held.assign(first, end, None)
            self._log("rmpupdate", phys, len_bytes, "hypervisor")
            return 0
        kind = "pre-guest" if asid and immutable else "guest-invalid" if asid else "reclaim"
        if immutable and not asid:
            kind = "firmware"
        delta = (gpa >> 12) - first if asid else None
        self.runs_held.assign(
            first, end, (kind, asid, delta, page_size, _IMMUTABLE if immutable else 0)
        )
        self._log("rmpupdate", phys, len_bytes, kind)
        return 0

    def psmash(self, phys: int) -> int:
        """PSMASH: one entry of 2 MiB becomes 512 of 4 KiB."""
        first = phys >> 12
        held = self._held(first)
        if phys % _2M or held is None or held[3] != _2M:
            return FAIL_INPUT
        self.runs_held.assign(first, first + 512, (*held[:3], 4096, held[4]))
        return 0

    def pvalidate(self, asid: int, gpa: int, phys: int, len_bytes: int, validate: bool) -> str:
        """PVALIDATE by a guest of the pages at ``gpa``, which its host maps to ``phys``.

        Returns "" or why not: a page that is not the guest's, or mapped at another address.
        """
        first, end = phys >> 12, phys + len_bytes >> 12
        delta = (gpa >> 12) - first
        pieces = list(self.runs_held.overlapping(first, end))
        if sum(stop - start for start, stop, _ in pieces) != end - first:
            return "a page is hypervisor"
        for start, _, held in pieces:
            if held is None or held[0] not in ("guest-invalid", "guest-valid"):
                return f"page {start << 12:#x} is {'hypervisor' if held is None else held[0]}"
            if held[1] != asid or held[2] != delta:
                return f"page {start << 12:#x} is not this guest's page"
        kind = "guest-valid" if validate else "guest-invalid"
        flag = _VALIDATED if validate else 0
        for start, stop, held in pieces:
            assert held is not None
            self.runs_held.assign(start, stop, (kind, *held[1:4], held[4] & ~_VALIDATED | flag))
        return ""

    # -- what the secure processor may do ---------------------------------------------------------

    def _held(self, pfn: int) -> _Held | None:
        index = self.runs_held.find(pfn)
        return None if index < 0 else self.runs_held.values[index]

    def set_kind(self, first: int, end: int, kind: str, *, vmsa: bool = False) -> None:
        """Firmware moves frames from their state to another (what it allows is the caller's)."""
        for start, stop, held in list(self.runs_held.overlapping(first, end)):
            if held is None:
                continue
            flags = held[4]
            if kind in ("guest-valid", "reclaim"):
                flags &= ~_IMMUTABLE
            if kind == "guest-valid":
                flags |= _VALIDATED | (_VMSA if vmsa else 0)
            asid, delta = (0, None) if kind == "reclaim" else held[1:3]
            self.runs_held.assign(start, stop, (kind, asid, delta, held[3], flags))
        self._log("firmware", first << 12, end - first << 12, kind)

    def clear(self) -> None:
        """Every page is the hypervisor's again (SNP_INIT with INIT_RMP)."""
        self.runs_held = RunMap()
        self._log("cleared", 0, self.end_phys, "hypervisor")

    def _log(self, how: str, phys: int, len_bytes: int, kind: str) -> None:
        self.log.add("rmp", "rmp", how=how, phys=phys, len_bytes=len_bytes, kind=kind)

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        held = self.runs_held
        return [self.enabled, list(held.starts), list(held.ends), [*held.values]]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        self.enabled, starts, ends, values = state
        self.runs_held = RunMap()
        self.runs_held.starts, self.runs_held.ends = list(starts), list(ends)
        self.runs_held.values = [None if value is None else tuple(value) for value in values]
