"""The dimensions of a distribution's kernel: what the model takes for granted when nobody tells.

Each assumption has a value and where it comes from: ``"default"``, ``"log"`` (read from the boot
log or ``/proc/iomem`` that the memory map came from) or ``"given"`` (on the command line). The
defaults are those of generic Debian and Ubuntu kernels of 2026 in round numbers: see
``docs/plan.md`` for where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.kernel.image import KernelConfig
from khosim.kernel.release import Release

__all__ = ("Assumptions", "Value")

_MIB = 1 << 20
_PAGE_64K = 1 << 16


@dataclass(frozen=True, slots=True)
class Value:
    """One assumption: bytes or a count (None: no such thing), and where it comes from."""

    value: int | None
    source: str = "default"


_COMMON: dict[str, int | None] = {
    "initrd_bytes": 64 * _MIB,
    "nr_cpus": 4,
    "percpu_bytes": 63 << 12,
    "log_buf_bytes": 256 << 10,
    "swiotlb_bytes": 64 * _MIB,
}
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "x86_64": {**_COMMON, "kernel_bytes": 64 * _MIB, "cma_bytes": None, "zone_dma": 0},
    "arm64": {**_COMMON, "kernel_bytes": 70 * _MIB, "cma_bytes": 32 * _MIB, "zone_dma": 1},
}


class Assumptions:
    """All dimensions of one kernel on one machine."""

    __slots__ = ("arch", "values")

    def __init__(
        self, arch: str, found: dict[str, int | None], given: dict[str, int | None]
    ) -> None:
        self.arch = arch
        self.values = {name: Value(value) for name, value in _DEFAULTS[arch].items()}
        self.values |= {name: Value(value, "log") for name, value in found.items()}
        self.values |= {name: Value(value, "given") for name, value in given.items()}

    def __getitem__(self, name: str) -> int:
        return self.values[name].value or 0

    def evolve(self, **changes: int | None) -> Assumptions:
        """The same with some values changed, as if they were given."""
        twin = Assumptions(self.arch, {}, {})
        twin.values = self.values | {name: Value(to, "given") for name, to in changes.items()}
        return twin

    def config(self, release: Release) -> KernelConfig:
        """A kernel of these dimensions, built so that KHO is on unless ``kho=`` says otherwise."""
        kernel_bytes = self["kernel_bytes"] & -_PAGE_64K
        return KernelConfig(
            release=release,
            enable_default=True,
            kernel_bytes=kernel_bytes,
            init_offset_bytes=kernel_bytes * 3 // 4 & -_PAGE_64K,
            init_bytes=kernel_bytes // 8 & -_PAGE_64K,
            init_size_bytes=kernel_bytes * 5 // 4 & -_PAGE_64K,
            nr_cpus=self["nr_cpus"],
            percpu_bytes=self["percpu_bytes"],
            log_buf_shift=self["log_buf_bytes"].bit_length() - 1,
            swiotlb_bytes=self["swiotlb_bytes"],
            cma_bytes=self.values["cma_bytes"].value,
            zone_dma=bool(self["zone_dma"]),
        )

    def as_json(self) -> dict[str, Any]:
        """Every assumption with its source."""
        return {name: [one.value, one.source] for name, one in sorted(self.values.items())}
