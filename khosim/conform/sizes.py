"""How large the parts of a real kernel are, from its own log and ``/proc/iomem``.

Read are the lines of ``arch/x86/kernel/setup.c`` (brk, ``RAMDISK``), ``mm/percpu.c``,
``mm/page_alloc.c:free_reserved_area`` and ``arch/arm64/mm/init.c:arm64_memblock_init`` @ 7.3. What
a log does not tell stays as it is in khosim's usual kernel.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from khosim.capture.folder import CapturedGeneration
from khosim.errors import InputError
from khosim.kernel.image import KernelConfig
from khosim.kernel.release import Release

__all__ = ("Sizes", "read_sizes")

_RANGE = r"\[(?:mem )?0x([0-9a-f]+)-0x([0-9a-f]+)\]"
_BRK = re.compile(rf"__memblock_reserve: {_RANGE} nid=-1 flags=20 setup_arch\+")
_RAMDISK = re.compile(rf"(?<!new )RAMDISK: {_RANGE}")
_RESERVED = re.compile(rf" reserved\[0x[0-9a-f]+\][ \t]+{_RANGE}, .* flags: 0x20")
_ARM64 = re.compile(rf"__memblock_reserve: {_RANGE} .*flags=0 arm64_memblock_init")
_PERCPU = re.compile(r"Embedded (\d+) pages/cpu")
_CPUS = re.compile(r"nr_cpu_ids:(\d+)")
_FREED = re.compile(r"Freeing unused kernel (?:image \(initmem\) )?memory: (\d+)K")
_TEXT_PHYS = 16 << 20
_ALIGN = 2 << 20
_LEAST, _MOST = 1 << 20, 256 << 20
_MOST_CPUS = 8192
_MOST_INITRD = 4 << 30
_DEFAULT_INITRD = 8 << 20


class Sizes(NamedTuple):
    """Bytes and CPUs of a kernel; None where its log does not tell. ``kernel_phys``: its start."""

    kernel_phys: int | None = None
    kernel_bytes: int | None = None
    brk_bytes: int | None = None
    init_bytes: int | None = None
    percpu_bytes: int | None = None
    nr_cpus: int | None = None
    initrd_bytes: int = _DEFAULT_INITRD

    def config(self, release: Release, arch: str) -> KernelConfig:
        """A kernel of ``release`` with these sizes."""
        config = KernelConfig(release=release)
        changes: dict[str, object] = {
            name: value
            for name, value in self._asdict().items()
            if value is not None and name not in ("kernel_phys", "initrd_bytes")
        }
        kernel_bytes = int(self.kernel_bytes or config.kernel_bytes)
        init_bytes = min(int(self.init_bytes or config.init_bytes), kernel_bytes)
        changes["init_bytes"] = init_bytes
        changes["init_offset_bytes"] = (kernel_bytes - init_bytes) // 2 & -(1 << 16)
        if arch == "x86_64":
            whole = kernel_bytes + int(self.brk_bytes or config.brk_bytes)
            changes["init_size_bytes"] = max(config.init_size_bytes, whole + 4095 & -4096)
        return config.evolve(**changes)


def read_sizes(generation: CapturedGeneration, arch: str) -> Sizes | None:
    """What the files of ``generation`` tell; None without a log."""
    if not generation.has("dmesg"):
        return None
    log = generation.dmesg
    page = generation.page_size
    code = _kernel_code(generation)
    sizes = Sizes(kernel_phys=code)
    if arch == "x86_64":
        brk = _span(_BRK.search(log))
        if brk is not None:
            start = _image_start(log, brk[1]) if code is None else code
            sizes = sizes._replace(
                kernel_bytes=_sane(brk[0] - start), brk_bytes=_sane(brk[1] - brk[0], 0)
            )
        initrd = _span(_RAMDISK.search(log))
    else:
        spans = [span for found in _ARM64.finditer(log) if (span := _span(found)) is not None]
        image = next((one for one in spans if code is not None and one[0] <= code < one[1]), None)
        if image is None and spans:
            image = spans[-1]
        if image is not None:
            sizes = sizes._replace(kernel_bytes=_sane(image[1] - image[0]))
        initrd = next((one for one in spans if one != image), None)
    nr_cpus = _number(_CPUS.search(log))
    freed, percpu = _number(_FREED.search(log)), _number(_PERCPU.search(log))
    return sizes._replace(
        init_bytes=None if freed is None else _sane(freed << 10, 0),
        percpu_bytes=None if percpu is None else _sane(percpu * page, 0),
        nr_cpus=nr_cpus if nr_cpus is not None and 0 < nr_cpus <= _MOST_CPUS else 1,
        initrd_bytes=0 if initrd is None else min(max(initrd[1] - initrd[0], 0), _MOST_INITRD),
    )


def _image_start(log: str, brk_end: int) -> int:
    """Where an image begins that ends at ``brk_end``: the first dump of memblock shows it whole."""
    for found in _RESERVED.finditer(log):
        span = _span(found)
        if span is not None and span[0] < brk_end <= span[1] and not span[0] % _ALIGN:
            return span[0]
    return _TEXT_PHYS


def _kernel_code(generation: CapturedGeneration) -> int | None:
    if not generation.has("iomem"):
        return None
    try:
        inside = generation.iomem.inside_ram
    except InputError:
        return None
    return next((start for start, _, name in inside if name == "Kernel code"), None)


def _span(found: re.Match[str] | None) -> tuple[int, int] | None:
    if found is None:
        return None
    return int(found.group(1), 16), int(found.group(2), 16) + 1


def _number(found: re.Match[str] | None) -> int | None:
    return None if found is None else int(found.group(1))


def _sane(size: int, least: int = _LEAST) -> int | None:
    return size if least <= size <= _MOST else None
