"""The errors khosim raises, one branch per kind of trouble.

* :class:`InputError`: what the user handed in is wrong. The command line prints it as one line and
  exits with status 2.
* :class:`KernelError`: a modelled kernel function refused with an errno, as the real one would.
* :class:`KernelPanic`: the modelled kernel died. The machine survives.
* :class:`HardwareFault`: the machine did not let somebody do what he tried. Kernel code turns it
  into a panic. :class:`RamFault`: an access outside its RAM; :class:`RmpFault`: a write to a page
  that belongs to a confidential guest.
"""

from __future__ import annotations

import errno as _errno

__all__ = (
    "HardwareFault",
    "InputError",
    "KernelError",
    "KernelPanic",
    "KhoSimError",
    "RamFault",
    "RmpFault",
)

_ENOTSUPP = 524  # kernel-internal, absent from the errno module


class KhoSimError(Exception):
    """Root of every error that khosim raises on purpose."""


class InputError(KhoSimError):
    """Bad input: one line that names the place and the cause.

    ``place`` is a file, a field or an argument (``"scenario.toml: run.generations"``).
    """

    def __init__(self, place: str, cause: str) -> None:
        self.place = place
        self.cause = cause
        super().__init__(f"{place}: {cause}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        return type(self), (self.place, self.cause)


class KernelError(KhoSimError):
    """A kernel function returned a negative errno.

    ``errno`` is positive, ``symbol`` the kernel function that refused, ``detail`` says why in
    khosim's words. ``str()`` reads like ``kho_preserve_folio: -EINVAL (overlaps scratch)``.
    """

    def __init__(self, errno: int, symbol: str, detail: str = "") -> None:
        self.errno = errno
        self.symbol = symbol
        self.detail = detail
        super().__init__(f"{symbol}: -{self.name}" + (f" ({detail})" if detail else ""))

    def __reduce__(self) -> tuple[type[KernelError], tuple[int, str, str]]:
        return type(self), (self.errno, self.symbol, self.detail)

    @property
    def name(self) -> str:
        """The kernel's name for the errno, such as ``EADDRNOTAVAIL``."""
        if self.errno == _ENOTSUPP:
            return "ENOTSUPP"
        return _errno.errorcode.get(self.errno, str(self.errno))


class KernelPanic(KhoSimError):
    """The modelled kernel panicked or oopsed; ``generation`` is the kernel that died."""

    def __init__(self, message: str, generation: int = -1) -> None:
        self.message = message
        self.generation = generation
        super().__init__(message)

    def __reduce__(self) -> tuple[type[KernelPanic], tuple[str, int]]:
        return type(self), (self.message, self.generation)


class HardwareFault(KhoSimError):
    """An access that the machine refuses."""


class RamFault(HardwareFault):
    """An access to physical addresses where the machine has no RAM.

    ``phys`` and ``len_bytes`` name the range asked for, in bytes.
    """

    def __init__(self, phys: int, len_bytes: int, cause: str) -> None:
        self.phys = phys
        self.len_bytes = len_bytes
        self.cause = cause
        super().__init__(f"RAM access [{phys:#x}-{phys + len_bytes:#x}): {cause}")

    def __reduce__(self) -> tuple[type[RamFault], tuple[int, int, str]]:
        return type(self), (self.phys, self.len_bytes, self.cause)


class RmpFault(HardwareFault):
    """A host's write to a page that the reverse map table assigns to a guest or to firmware.

    The #PF with its RMP bit set (``arch/x86/include/asm/trap_pf.h:X86_PF_RMP @ 7.3``). ``phys`` and
    ``len_bytes`` are the write's, ``asid`` the owner's: 0 for firmware.
    """

    def __init__(self, phys: int, len_bytes: int, cause: str, asid: int = 0) -> None:
        self.phys = phys
        self.len_bytes = len_bytes
        self.cause = cause
        self.asid = asid
        super().__init__(f"#PF(RMP) on a write to [{phys:#x}-{phys + len_bytes:#x}): {cause}")

    def __reduce__(self) -> tuple[type[RmpFault], tuple[int, int, str, int]]:
        return type(self), (self.phys, self.len_bytes, self.cause, self.asid)
