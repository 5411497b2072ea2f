"""KVM's file handlers: virtual machines and vCPUs across a kexec.

The machine's follows "liveupdate: kvm: Guest_memfd preservation" v4 (Tarun Sahu, 2026-07-28), the
vCPU's Layer 1 of the OrphanVM RFC (Pasha Tatashin, 2026-09-20); no release has them. A vCPU is
stopped when it is frozen, and what it is made of is written down then. Its posted-interrupt
descriptor stays where it is, so that interrupts of the blackout wait in it (no series preserves
those; khosim's own). Memory slots are user space's to set up again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from khosim.abi.kvm import (
    KVM_LUO_FH_COMPATIBLE,
    KVM_LUO_SER_BYTES,
    KVM_VCPU_LUO_FH_COMPATIBLE,
    KVM_VCPU_LUO_SER_BYTES,
    KVM_X86_SNP_VM,
    KvmLuoSer,
    KvmVcpuLuoSer,
    VcpuArchState,
    vcpu_arch_state_bytes,
)
from khosim.drivers.kvm import Kvm, KvmFile, VcpuFile
from khosim.drivers.sev import SnpGuest
from khosim.errors import KernelError
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel

__all__ = ("KvmVcpuHandler", "KvmVmHandler")

_MAX_STATE_BYTES = 1 << 16


def _folio(kernel: Kernel, phys: int) -> Folio:
    return Folio(kernel, phys >> kernel.arch.page_shift, 0)


class KvmVmHandler(FileHandler):
    """``kvm_luo_handler``: a machine's type, and the context page of an encrypted one."""

    compatible = KVM_LUO_FH_COMPATIBLE

    def __init__(self, kvm: Kvm) -> None:
        super().__init__()
        self._kvm = kvm

    def can_preserve(self, file: File) -> bool:
        """Virtual machines."""
        return isinstance(file, KvmFile)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """A record; an encrypted guest also has to be kept by the SEV driver. Raises -ENOMEM."""
        file = args.file
        assert isinstance(file, KvmFile)
        ser = args.kernel.kho_alloc_preserve(KVM_LUO_SER_BYTES)
        guest = file.guest
        if guest is not None and self._kvm.sev is not None:
            try:
                self._kvm.sev.preserve(guest)
            except KernelError:
                args.kernel.kho_unpreserve_free(ser)
                raise
        record = KvmLuoSer(file.type, 0 if guest is None else guest.gctx_phys)
        ser.write(0, record.pack(), by="kvm_luo_preserve")
        args.serialized_data, args.private_data = ser.phys, ser

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Undo it."""
        file = args.file
        assert isinstance(file, KvmFile)
        if file.guest is not None and self._kvm.sev is not None:
            self._kvm.sev.unpreserve(file.guest)
        args.kernel.kho_unpreserve_free(args.private_data)

    def _read(self, args: LiveupdateFileOpArgs) -> KvmLuoSer:
        kernel, phys = args.kernel, args.serialized_data
        at = kernel.virt(phys, KVM_LUO_SER_BYTES)
        return KvmLuoSer.unpack(kernel.ram.read(at, KVM_LUO_SER_BYTES))

    def _guest(self, ser: KvmLuoSer) -> SnpGuest | None:
        if ser.type != KVM_X86_SNP_VM or self._kvm.sev is None:
            return None
        return self._kvm.sev.adopt(ser.arch_state)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A machine of that type, without memory and vCPUs.

        Raises -EIO for a guest that is gone.
        """
        ser = self._read(args)
        guest = self._guest(ser)
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = KvmFile(self._kvm, "vm", guest)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Where nobody asked for it, the record and an encrypted guest's context go."""
        if args.retrieve_status:
            return
        sev = self._kvm.sev
        guest = self._guest(self._read(args))
        if guest is not None and sev is not None:
            sev.free_guest(guest, [])
        args.kernel.kho_restore_free(args.serialized_data)


class KvmVcpuHandler(FileHandler):
    """``kvm_vcpu_luo_handler``: a vCPU's state, its descriptor and its save area."""

    compatible = KVM_VCPU_LUO_FH_COMPATIBLE

    def __init__(self, kvm: Kvm) -> None:
        super().__init__()
        self._kvm = kvm

    def can_preserve(self, file: File) -> bool:
        """vCPUs."""
        return isinstance(file, VcpuFile)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Room for its state; its pages stay where they are. Raises -ENOMEM."""
        file = args.file
        assert isinstance(file, VcpuFile)
        kernel = args.kernel
        ser = kernel.kho_alloc_preserve(KVM_VCPU_LUO_SER_BYTES)
        undo: list[Callable[[], None]] = [lambda: kernel.kho_unpreserve_free(ser)]
        try:
            state = kernel.kho_alloc_preserve(vcpu_arch_state_bytes(len(file.programme)))
            undo.append(lambda: kernel.kho_unpreserve_free(state))
            for phys in filter(None, (file.pi_desc, file.vmsa)):
                page = _folio(kernel, phys)
                kernel.kho_preserve_folio(page)
                undo.append(partial(kernel.kho_unpreserve_folio, page))
        except KernelError:
            for step in reversed(undo):
                step()
            raise
        record = KvmVcpuLuoSer(file.vcpu_id, 0, 0, state.phys)
        ser.write(0, record.pack(), by="kvm_vcpu_luo_preserve")
        args.serialized_data, args.private_data = ser.phys, (undo, state)
        self._write(file, state)

    @staticmethod
    def _write(file: VcpuFile, state: Folio) -> None:
        arch = VcpuArchState(file.rip, file.pi_desc, file.vmsa, file.programme)
        state.write(0, arch.pack(), by="kvm_arch_vcpu_luo_preserve")

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """It stops, and its state is written down as it is now."""
        file = args.file
        assert isinstance(file, VcpuFile)
        file.pauses_for_update = file.is_running
        file.pause()
        self._write(file, args.private_data[1])

    def unfreeze(self, args: LiveupdateFileOpArgs) -> None:
        """It runs on, if it did."""
        file = args.file
        assert isinstance(file, VcpuFile)
        if file.pauses_for_update:
            file.run()
        file.pauses_for_update = False

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Undo it."""
        for step in reversed(args.private_data[0]):
            step()

    def _read(self, args: LiveupdateFileOpArgs) -> tuple[KvmVcpuLuoSer, VcpuArchState]:
        kernel, phys = args.kernel, args.serialized_data
        at = kernel.virt(phys, KVM_VCPU_LUO_SER_BYTES)
        ser = KvmVcpuLuoSer.unpack(kernel.ram.read(at, KVM_VCPU_LUO_SER_BYTES))
        at = kernel.virt(ser.arch_state, kernel.arch.page_size)
        return ser, VcpuArchState.unpack(kernel.ram.read(at, _state_bytes(kernel, at)))

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A vCPU at rest, to be bound to its machine."""
        kernel = args.kernel
        ser, arch = self._read(args)
        for phys in filter(None, (arch.pi_desc, arch.vmsa)):
            kernel.kho_restore_folio(phys)
        kernel.kho_restore_free(ser.arch_state)
        kernel.kho_restore_free(args.serialized_data)
        args.file = VcpuFile(
            self._kvm, "vm", ser.vcpu_id, arch.programme, arch.pi_desc, arch.vmsa, arch.rip
        )

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Where nobody asked for it, all its pages go."""
        if args.retrieve_status:
            return
        kernel = args.kernel
        ser, arch = self._read(args)
        if arch.vmsa and self._kvm.sev is not None:
            self._kvm.sev.make_shared(arch.vmsa, kernel.arch.page_size)
        for phys in (arch.pi_desc, arch.vmsa, ser.arch_state, args.serialized_data):
            if phys:
                kernel.kho_restore_free(phys)


def _state_bytes(kernel: Kernel, at: int) -> int:
    room = kernel.ram.size_bytes - at
    return min(_MAX_STATE_BYTES, room)
