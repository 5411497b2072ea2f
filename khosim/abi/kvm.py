"""What KVM hands over of a virtual machine and of each of its vCPUs.

The headers follow ``include/linux/kho/abi/kvm.h`` as proposed in "liveupdate: kvm: Guest_memfd
preservation" v4 (the VM) and in the OrphanVM RFC (the vCPU); no release has them. The vCPU's state
is khosim's own: of a processor this model has no registers, so a vCPU is how far it has come
(``rip``), what it does (its programme, in the place of code), and where its posted interrupts go.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "KVM_LUO_FH_COMPATIBLE",
    "KVM_LUO_SER_BYTES",
    "KVM_VCPU_LUO_FH_COMPATIBLE",
    "KVM_VCPU_LUO_SER_BYTES",
    "KVM_X86_DEFAULT_VM",
    "KVM_X86_SNP_VM",
    "KvmLuoSer",
    "KvmVcpuLuoSer",
    "VcpuArchState",
    "vcpu_arch_state_bytes",
)

KVM_LUO_FH_COMPATIBLE = "kvm_vm_luo_v1"
KVM_VCPU_LUO_FH_COMPATIBLE = "kvm_vcpu_luo_v1"
KVM_X86_DEFAULT_VM = 0
KVM_X86_SNP_VM = 4

_VM = struct.Struct("<QQ")
_VCPU = struct.Struct("<IIQQQ")
_ARCH = struct.Struct("<QQQQ")
_WRITE = struct.Struct("<QQQ")


@dataclasses.dataclass(frozen=True, slots=True)
class KvmLuoSer:
    """``struct kvm_luo_ser``: ``type`` as in ``KVM_CREATE_VM``.

    ``arch_state`` is 0, or for an SNP guest the physical address of its context page.
    """

    type: int
    arch_state: int = 0

    def pack(self) -> bytes:
        """The bytes of it."""
        return _VM.pack(self.type, self.arch_state)

    @classmethod
    def unpack(cls, data: bytes) -> KvmLuoSer:
        """From its bytes."""
        return cls(*_VM.unpack_from(data))


KVM_LUO_SER_BYTES = _VM.size


@dataclasses.dataclass(frozen=True, slots=True)
class KvmVcpuLuoSer:
    """``struct kvm_vcpu_luo_ser``; ``cb`` is for a vCPU that runs on meanwhile, here 0."""

    vcpu_id: int
    flags: int
    vm_token: int
    arch_state: int
    cb: int = 0

    def pack(self) -> bytes:
        """The bytes of it."""
        return _VCPU.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> KvmVcpuLuoSer:
        """From its bytes."""
        return cls(*_VCPU.unpack_from(data))


KVM_VCPU_LUO_SER_BYTES = _VCPU.size


@dataclasses.dataclass(frozen=True, slots=True)
class VcpuArchState:
    """A vCPU at rest: ``programme`` are its writes as ``(gpa, len_bytes, pattern)``.

    ``pi_desc`` is the physical address of its posted-interrupt descriptor, ``vmsa`` of its save
    area where the guest is encrypted (else 0).
    """

    rip: int
    pi_desc: int
    vmsa: int
    programme: tuple[tuple[int, int, int], ...]

    def pack(self) -> bytes:
        """The bytes of it."""
        head = _ARCH.pack(self.rip, self.pi_desc, self.vmsa, len(self.programme))
        return head + b"".join(_WRITE.pack(*write) for write in self.programme)

    @classmethod
    def unpack(cls, data: bytes) -> VcpuArchState:
        """From its bytes; a programme that is cut short has fewer writes."""
        rip, pi_desc, vmsa, count = _ARCH.unpack_from(data)
        room = (len(data) - _ARCH.size) // _WRITE.size
        writes = [
            _WRITE.unpack_from(data, _ARCH.size + i * _WRITE.size)
            for i in range(min(count, room))
        ]
        return cls(rip, pi_desc, vmsa, tuple((gpa, size, word) for gpa, size, word in writes))


def vcpu_arch_state_bytes(nr_writes: int) -> int:
    """Bytes of the state of a vCPU with so many writes in its programme."""
    return _ARCH.size + nr_writes * _WRITE.size
