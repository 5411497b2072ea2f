"""The secure processor of SEV-SNP: its commands, as a host's driver issues them.

States and status codes of AMD's "SEV Secure Nested Paging Firmware ABI Specification" (56860), of
which ``include/linux/psp-sev.h`` and ``drivers/crypto/ccp/sev-dev.c @ 7.3`` use the same part. A
guest's key and state belong to the context page the hypervisor donated: what stands in that page is
sealed, and a command that finds it changed refuses. The key itself is never in RAM.

Left out: attestation, measurements, migration, page swapping, VLEKs, mailbox registers and
command buffers (a call is a command), caches (WBINVD is never asked for).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from khosim.machine.devices.cipher import scramble
from khosim.machine.devices.clock import mix64
from khosim.machine.devices.events import EventLog
from khosim.machine.devices.rmp import Rmp
from khosim.machine.ram import Ram

__all__ = ("Guest", "SecureProcessor", "SnpStatus")

_BY = (-1, "psp")
_2M = 2 << 20
INIT, LAUNCH, RUNNING = 0, 1, 2
_SHARED_TYPES = (1, 2, 3, 4, 5, 6)  # normal, VMSA, zero, unmeasured, secret, CPUID


class SnpStatus(IntEnum):
    """Status codes (``include/uapi/linux/psp-sev.h:enum sev_ret_code @ 7.3``), those in use."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    ALREADY_OWNED = 0x05
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    INVALID_PARAM = 0x16
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_PAGE_OWNER = 0x1C
    RMP_INIT_REQUIRED = 0x20


class Guest(NamedTuple):
    """What firmware knows of a guest: ``state`` 0 init, 1 launch, 2 running; ASID 0: none."""

    state: int
    asid: int
    policy: int
    key: int


class SecureProcessor:
    """The PSP of one machine. Every command returns an :class:`SnpStatus`.

    ``rmp`` is the table, ``initialized`` whether SNP_INIT was done. ``enforces_dma`` says whether
    the IOMMU checks the table.
    """

    __slots__ = (
        "_nr_keys",
        "_seed",
        "_unflushed",
        "enforces_dma",
        "guests",
        "initialized",
        "log",
        "ram",
        "rmp",
    )

    def __init__(self, ram: Ram, end_phys: int, asids: int, seed: int, log: EventLog) -> None:
        self.ram, self.log = ram, log
        self.rmp = Rmp(end_phys, asids, log)
        self._seed = seed
        self._nr_keys = 0
        self.guests: dict[int, Guest] = {}
        """Guests by the address of their context page."""
        self.power_on()

    def power_on(self) -> None:
        """Off, and no guests."""
        self.rmp.power_on()
        self.guests.clear()
        self._unflushed: set[int] = set()
        self.initialized = self.enforces_dma = False

    @property
    def enabled(self) -> bool:
        """SYSCFG.SNP_EN: writes are checked against the table."""
        return self.rmp.enabled

    def enable(self) -> None:
        """Set SYSCFG.SNP_EN on all CPUs; only a power cycle or an x86 shutdown clears it."""
        self.rmp.enabled = True

    def _done(self, command: str, status: SnpStatus, **detail: int) -> SnpStatus:
        self.log.add("psp", "psp", command=command, status=status.name, **detail)
        return status

    # -- the platform -----------------------------------------------------------------------------

    def init(self, *, init_rmp: bool = True) -> SnpStatus:
        """SNP_INIT_EX. ``init_rmp`` makes every page the hypervisor's."""
        if self.initialized:
            status = SnpStatus.INVALID_PLATFORM_STATE
        elif not self.rmp.enabled:
            status = SnpStatus.INVALID_CONFIG
        else:
            if init_rmp:
                self.rmp.clear()
                self.guests.clear()
            self.initialized = self.enforces_dma = True
            status = SnpStatus.SUCCESS
        return self._done("SNP_INIT", status)

    def shutdown(self, *, iommu: bool = True, x86: bool = False) -> SnpStatus:
        """SNP_SHUTDOWN_EX: guests end and their keys are gone; the table stays as it is.

        ``iommu`` stops the check of DMA. ``x86`` clears SYSCFG.SNP_EN too, as newer firmware can.
        """
        if not self.initialized:
            return self._done("SNP_SHUTDOWN", SnpStatus.SUCCESS)
        if self._unflushed:
            return self._done("SNP_SHUTDOWN", SnpStatus.DFFLUSH_REQUIRED)
        self.guests.clear()
        self.initialized = False
        if iommu:
            self.enforces_dma = False
        if x86:
            self.rmp.enabled = False
        return self._done("SNP_SHUTDOWN", SnpStatus.SUCCESS)

    def df_flush(self) -> SnpStatus:
        """SNP_DF_FLUSH: ASIDs of guests that are gone can be used again."""
        self._unflushed.clear()
        return self._done("SNP_DF_FLUSH", SnpStatus.SUCCESS)

    def platform_status(self) -> dict[str, int]:
        """SNP_PLATFORM_STATUS: state (0 uninit, 1 init), guests, and what else is set."""
        return {
            "state": int(self.initialized),
            "guest_count": len(self.guests),
            "snp_en": int(self.rmp.enabled),
        }

    # -- guests -----------------------------------------------------------------------------------

    def gctx_create(self, gctx_phys: int) -> SnpStatus:
        """SNP_GCTX_CREATE: a firmware page becomes the context of a new guest."""
        status = SnpStatus.SUCCESS
        if not self.initialized:
            status = SnpStatus.INVALID_PLATFORM_STATE
        elif gctx_phys & 4095 or not 0 <= gctx_phys < self.rmp.end_phys:
            status = SnpStatus.INVALID_ADDRESS
        elif self.rmp.entry(gctx_phys >> 12).kind != "firmware":
            status = SnpStatus.INVALID_PAGE_STATE
        elif self.rmp.entry(gctx_phys >> 12).page_size != 4096:
            status = SnpStatus.INVALID_PAGE_SIZE
        else:
            self._nr_keys += 1
            key = mix64(mix64(self._seed) + self._nr_keys)
            self.rmp.set_kind(gctx_phys >> 12, (gctx_phys >> 12) + 1, "context")
            self._keep(gctx_phys, Guest(INIT, 0, 0, key))
        return self._done("SNP_GCTX_CREATE", status, gctx=gctx_phys)

    def launch_start(self, gctx_phys: int, policy: int = 0x30000) -> SnpStatus:
        """SNP_LAUNCH_START; bit 17 of ``policy`` must be one."""
        guest, status = self._guest(gctx_phys)
        if guest is not None:
            if guest.state != INIT:
                status = SnpStatus.INVALID_GUEST_STATE
            elif not policy >> 17 & 1:
                status = SnpStatus.POLICY_FAILURE
            else:
                self._keep(gctx_phys, guest._replace(state=LAUNCH, policy=policy))
        return self._done("SNP_LAUNCH_START", status, gctx=gctx_phys)

    def activate(self, gctx_phys: int, asid: int) -> SnpStatus:
        """SNP_ACTIVATE: the guest's key is what memory of this ASID is encrypted with."""
        guest, status = self._guest(gctx_phys)
        if guest is not None:
            if not 0 < asid <= self.rmp.asids:
                status = SnpStatus.INVALID_ASID
            elif any(other.asid == asid for other in self.guests.values()):
                status = SnpStatus.ASID_OWNED
            elif guest.asid:
                status = SnpStatus.ACTIVE
            elif asid in self._unflushed:
                status = SnpStatus.DFFLUSH_REQUIRED
            elif guest.state == INIT:
                status = SnpStatus.INVALID_GUEST_STATE
            else:
                self._keep(gctx_phys, guest._replace(asid=asid))
        return self._done("SNP_ACTIVATE", status, gctx=gctx_phys, asid=asid)

    def launch_update(
        self, gctx_phys: int, phys: int, len_bytes: int = 4096, page_type: int = 1
    ) -> SnpStatus:
        """SNP_LAUNCH_UPDATE of each page of a range: encrypted in place, validated, measured.

        The pages have to be in the state pre-guest, with this guest's ASID. ``page_type`` 3 (zero)
        takes no notice of what is in them.
        """
        guest, status = self._guest(gctx_phys)
        if guest is not None:
            status = self._may_launch(guest, phys, len_bytes, page_type)
            if status == SnpStatus.SUCCESS:
                plain = self.ram.view(phys, len_bytes)
                data = bytes(len_bytes) if page_type == 3 else plain.tobytes()
                Ram.write(self.ram, phys, scramble(guest.key, phys, data), _BY)
                first, end = phys >> 12, phys + len_bytes >> 12
                self.rmp.set_kind(first, end, "guest-valid", vmsa=page_type == 2)
        return self._done("SNP_LAUNCH_UPDATE", status, gctx=gctx_phys, phys=phys)

    def _may_launch(self, guest: Guest, phys: int, len_bytes: int, page_type: int) -> SnpStatus:
        if guest.state != LAUNCH:
            return SnpStatus.INVALID_GUEST_STATE
        if not guest.asid:
            return SnpStatus.INACTIVE
        if page_type not in _SHARED_TYPES or (phys | len_bytes) & 4095 or len_bytes <= 0:
            return SnpStatus.INVALID_PARAM
        if phys + len_bytes > self.rmp.end_phys:
            return SnpStatus.INVALID_ADDRESS
        runs = self.rmp.runs(phys, phys + len_bytes)
        if sum(end - start for start, end, _ in runs) != len_bytes:
            return SnpStatus.INVALID_PAGE_STATE
        if any(entry.kind != "pre-guest" for _, _, entry in runs):
            return SnpStatus.INVALID_PAGE_STATE
        if any(entry.asid != guest.asid for _, _, entry in runs):
            return SnpStatus.INVALID_PAGE_OWNER
        return SnpStatus.SUCCESS

    def launch_finish(self, gctx_phys: int) -> SnpStatus:
        """SNP_LAUNCH_FINISH: the guest can run."""
        guest, status = self._guest(gctx_phys)
        if guest is not None:
            if guest.state != LAUNCH:
                status = SnpStatus.INVALID_GUEST_STATE
            else:
                self._keep(gctx_phys, guest._replace(state=RUNNING))
        return self._done("SNP_LAUNCH_FINISH", status, gctx=gctx_phys)

    def guest_status(self, gctx_phys: int) -> tuple[SnpStatus, int, int]:
        """SNP_GUEST_STATUS: status, the guest's state, its ASID."""
        guest, status = self._guest(gctx_phys)
        self._done("SNP_GUEST_STATUS", status, gctx=gctx_phys)
        return (status, guest.state, guest.asid) if guest is not None else (status, 0, 0)

    def decommission(self, gctx_phys: int) -> SnpStatus:
        """SNP_DECOMMISSION: the guest is gone, its context page a firmware page again."""
        guest, status = self._guest(gctx_phys)
        if guest is not None:
            if guest.asid:
                self._unflushed.add(guest.asid)
            del self.guests[gctx_phys]
            Ram.zero(self.ram, gctx_phys, 4096, _BY)
            self.rmp.set_kind(gctx_phys >> 12, (gctx_phys >> 12) + 1, "firmware")
        return self._done("SNP_DECOMMISSION", status, gctx=gctx_phys)

    def page_reclaim(self, phys: int, page_size: int = 4096) -> SnpStatus:
        """SNP_PAGE_RECLAIM: a page firmware holds becomes one the hypervisor can take back."""
        entry = self.rmp.entry(phys >> 12)
        status = SnpStatus.SUCCESS
        if phys % page_size or not 0 <= phys < self.rmp.end_phys:
            status = SnpStatus.INVALID_ADDRESS
        elif entry.kind not in ("firmware", "metadata", "pre-guest"):
            status = SnpStatus.INVALID_PAGE_STATE
        elif entry.page_size != page_size:
            status = SnpStatus.INVALID_PAGE_SIZE
        else:
            self.rmp.set_kind(phys >> 12, phys + page_size >> 12, "reclaim")
        return self._done("SNP_PAGE_RECLAIM", status, phys=phys)

    # -- contexts ---------------------------------------------------------------------------------

    @staticmethod
    def _sealed(gctx_phys: int, guest: Guest) -> bytes:
        """What a context page holds: made from the guest's state, and of no use without the key."""
        words = (guest.state, guest.asid, guest.policy)
        plain = b"".join(word.to_bytes(8, "little") for word in words).ljust(4096, b"\0")
        return scramble(mix64(guest.key), gctx_phys, plain)

    def _keep(self, gctx_phys: int, guest: Guest) -> None:
        self.guests[gctx_phys] = guest
        Ram.write(self.ram, gctx_phys, self._sealed(gctx_phys, guest), _BY)

    def _guest(self, gctx_phys: int) -> tuple[Guest | None, SnpStatus]:
        if not self.initialized:
            return None, SnpStatus.INVALID_PLATFORM_STATE
        guest = self.guests.get(gctx_phys)
        if guest is None or self.rmp.entry(gctx_phys >> 12).kind != "context":
            return None, SnpStatus.INVALID_GUEST
        if self.ram.read(gctx_phys, 4096) != self._sealed(gctx_phys, guest):
            return None, SnpStatus.INVALID_GUEST
        return guest, SnpStatus.SUCCESS

    def key_of(self, asid: int) -> int | None:
        """The key that the memory controller uses for an ASID; None where none is installed."""
        for guest in self.guests.values():
            if guest.asid == asid and asid:
                return guest.key
        return None

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        guests = [[phys, list(guest)] for phys, guest in self.guests.items()]
        flags = [self.initialized, self.enforces_dma, self._nr_keys]
        return [flags, guests, sorted(self._unflushed), self.rmp.state()]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        flags, guests, unflushed, rmp = state
        self.initialized, self.enforces_dma, self._nr_keys = flags
        self.guests.clear()
        self.guests.update((phys, Guest(*guest)) for phys, guest in guests)
        self._unflushed = set(unflushed)
        self.rmp.restore(rmp)
