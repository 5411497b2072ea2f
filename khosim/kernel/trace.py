"""What a running kernel tells: its events, and who is told of its stages.

Stands beside the kernel (no Linux source): every modelled step emits one :class:`Event`; nothing is
emitted while nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("DriverSet", "Event", "Host", "Initcall", "Trace")


class Event(NamedTuple):
    """One step of a kernel: what the trace is made of.

    ``symbol`` is the kernel function, ``args`` and ``result`` are plain numbers and strings.
    """

    generation: int
    phase: str
    symbol: str
    args: dict[str, Any]
    result: Any


Trace = Callable[[Event], None]

Initcall = Callable[["Kernel", str], None]
"""Told of each level of a kernel's initcalls where drivers come up: subsys, rootfs, device."""


class DriverSet(Protocol):
    """Drivers of one kernel, as its reboot path knows them."""

    def shutdown(self) -> None:
        """``device_shutdown`` and ``machine_shutdown``: this kernel is about to leave."""


class Host(Protocol):
    """Who runs the kernel: told of its stages, and asked to carry out a whole kexec."""

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        """The kernel has reached ``stage``.

        "takeover": what was preserved is reserved, memblock still serves; "booted";
        "retrieved": a file of a session came back just now; "reboot": about to be frozen (only
        where there are devices); "jump": frozen and about to leave.
        """

    def kexec(self, kernel: Kernel, **options: Any) -> Kernel:
        """Load, jump, boot: the successor of ``kernel``."""
