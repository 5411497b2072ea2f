"""Where a plan's memory map comes from: a log, ``/proc/iomem``, a capture, or a mere size.

A log also tells dimensions of the kernel that wrote it: lines of
``mm/mm_init.c:mem_init_print_info``, ``mm/percpu.c``, ``kernel/printk/printk.c``,
``arch/x86/kernel/setup.c:reserve_initrd`` and ``mm/cma.c`` @ 7.3. ``/proc/iomem`` tells the size of
the kernel image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from khosim.capture.dmesg import parse_dmesg
from khosim.capture.folder import Capture
from khosim.capture.iomem import parse_iomem
from khosim.errors import InputError
from khosim.kernel.cmdline import parse_words
from khosim.machine.memory_map import MemoryMap
from khosim.units import parse_size

__all__ = ("Source", "read_source")

_MAX_BYTES = 128 << 20
_IOMEM_LINE = re.compile(r"\s*[0-9a-fA-F]{8,16}-[0-9a-fA-F]{8,16} : ")
_MEMORY = re.compile(
    r"Memory: \d+K/\d+K available \((\d+)K kernel code, (\d+)K rwdata, (\d+)K rodata, (\d+)K init, "
    r"(\d+)K bss, \d+K reserved, (\d+)K cma-reserved"
)
_RAMDISK = re.compile(r"RAMDISK: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]")
_FREED_INITRD = re.compile(r"Freeing initrd memory: (\d+)K")
_CPUS = re.compile(r"nr_cpu_ids[:=](\d+)")
_PERCPU = re.compile(r"percpu: Embedded \d+ pages/cpu s(\d+) r(\d+) d(\d+) u\d+")
_LOG_BUF = re.compile(r"log_buf_len min size: (\d+) bytes")
_ZONE = re.compile(r"  (?:DMA|DMA32)[ \t]+(\[mem|empty)")
_HASH = re.compile(r"entries: \d+ \(order: (\d+), (\d+) bytes")
_BRK = re.compile(r"__memblock_reserve: \[0x([0-9a-f]+)-0x([0-9a-f]+)\] nid=-1 flags=20 setup_arch")
_OWN = re.compile(r" reserved\[0x[0-9a-f]+\]\s+\[0x([0-9a-f]+)-0x([0-9a-f]+)\], .* flags: 0x20")
_CODE = re.compile(r"Kernel code|Kernel rodata|Kernel data|Kernel bss", re.IGNORECASE)
_PAGE_SIZES = (4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Source:
    """A memory map and what else its origin tells.

    ``kind`` is "size", "iomem" or "log"; ``uname`` and ``cmdline`` are None where nothing tells;
    ``found`` has dimensions for :class:`~khosim.plan.model.Assumptions`; ``log`` is a log's text.
    """

    place: str
    kind: str
    memory_map: MemoryMap
    page_size: int
    cmdline: str | None = None
    uname: str | None = None
    found: dict[str, int | None] = field(default_factory=dict)
    log: str | None = None


def read_source(
    text: str,
    *,
    nodes: int | None = None,
    arch: str | None = None,
    page_size: int | None = None,
) -> Source:
    """Read ``text``: a file, a folder, or a size such as ``"16G"``.

    ``nodes``, ``arch`` and ``page_size`` (bytes) describe a machine of which only the size is
    known; a file says itself, but for the page size. Raises :class:`InputError` for anything else.
    """
    path = Path(text)
    if path.is_dir():
        source = _from_folder(path)
    elif path.exists():
        source = _from_text(_read(path), str(path), page_size)
    else:
        return _from_size(text, nodes, arch, page_size)
    _refuse(nodes is not None, "--nodes", text)
    _refuse(arch not in (None, source.memory_map.arch), "--arch", text)
    _refuse(page_size not in (None, source.page_size), "--page-size", text)
    return source


def _refuse(wrong: bool, option: str, place: str) -> None:
    if wrong:
        raise InputError(option, f"{place} says itself what its machine is like")


def _from_size(
    text: str, nodes: int | None, arch: str | None, page_size: int | None
) -> Source:
    try:
        size = parse_size(text)
    except InputError:
        raise InputError(text, "neither a file nor a size like '16G'") from None
    memory_map = MemoryMap.from_size(
        size, nodes=1 if nodes is None else nodes, arch=arch or "x86_64"
    )
    return Source(text, "size", memory_map, page_size or 4096)


def _from_folder(path: Path) -> Source:
    if (path / "capture.json").exists():
        capture = Capture(path)
        generation = capture.generations[0]
    elif (path / "dmesg").exists() and (path.resolve().parent / "capture.json").exists():
        capture = Capture(path.resolve().parent)
        generation = capture.generation(path.resolve().name)
    elif (path / "dmesg").exists():
        return _from_text(_read(path / "dmesg"), str(path / "dmesg"), None)
    else:
        raise InputError(str(path), "neither a capture (no capture.json) nor a folder with a dmesg")
    place = str(generation.path / "dmesg")
    source = _from_log(generation.dmesg, place, capture.page_size)
    return replace(source, uname=capture.release)  # which may be a kernel with older KHO code


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    if len(data) > _MAX_BYTES:
        raise InputError(str(path), f"too large for a log or a map (over {_MAX_BYTES} bytes)")
    return data.decode("utf-8", "replace")


def _from_text(text: str, place: str, page_size: int | None) -> Source:
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not _IOMEM_LINE.match(first):
        return _from_log(text, place, page_size)
    iomem = parse_iomem(text, place=place)
    image = [(start, end) for start, end, name in iomem.inside_ram if _CODE.match(name)]
    found: dict[str, int | None] = {}
    if image:
        found["kernel_bytes"] = max(end for _, end in image) - min(start for start, _ in image)
    return Source(place, "iomem", iomem.memory_map, page_size or 4096, found=found)


def _from_log(text: str, place: str, page_size: int | None) -> Source:
    log = parse_dmesg(text, place=place)
    arch = log.memory_map.arch
    words = {name for name, _ in parse_words(log.command_line or "")}
    return Source(
        place,
        "log",
        log.memory_map,
        page_size or _page_size(text, arch),
        log.command_line,
        log.release,
        _dimensions(text, arch, words),
        text,
    )


def _page_size(text: str, arch: str) -> int:
    if arch == "arm64":
        for found in _HASH.finditer(text):
            if int(found[2]) >> int(found[1]) in _PAGE_SIZES:
                return int(found[2]) >> int(found[1])
    return 4096


def _dimensions(text: str, arch: str, words: set[str]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    if line := _MEMORY.search(text):
        code, rwdata, rodata, init, bss, cma = (int(word) << 10 for word in line.groups())
        # On x86-64 code and read-only data are padded to large pages.
        pad = (2 << 20) - 1 if arch == "x86_64" else (64 << 10) - 1
        found["kernel_bytes"] = (code + pad & ~pad) + (rodata + pad & ~pad) + rwdata + init + bss
        if "cma" not in words:
            found["cma_bytes"] = cma or None
    if arch == "x86_64" and (line := _BRK.search(text)):
        # With memblock=debug: brk begins where the image ends; the first dump has both as one.
        brk = int(line[1], 16)
        for row in _OWN.finditer(text):
            if int(row[1], 16) < brk <= int(row[2], 16) + 1:
                found["kernel_bytes"] = brk - int(row[1], 16)
                break
    if line := _RAMDISK.search(text):
        found["initrd_bytes"] = int(line[2], 16) + 1 - int(line[1], 16)
    elif line := _FREED_INITRD.search(text):
        found["initrd_bytes"] = int(line[1]) << 10
    elif "Kernel command line" in text and "Memory:" in text:
        found["initrd_bytes"] = 0
    if line := _CPUS.search(text):
        found["nr_cpus"] = int(line[1])
    if line := _PERCPU.search(text):
        found["percpu_bytes"] = sum(int(word) for word in line.groups())
    if line := _LOG_BUF.search(text):
        found["log_buf_bytes"] = int(line[1])
    zones = _ZONE.findall(text)
    if arch == "arm64" and "Zone ranges:" in text:
        found["zone_dma"] = int("[mem" in zones)
    return {name: value for name, value in found.items() if _is_sane(name, value)}


def _is_sane(name: str, value: int | None) -> bool:
    # A damaged line is no reason to build an absurd kernel.
    limits = {
        "kernel_bytes": (2 << 20, 1 << 30),
        "initrd_bytes": (0, 1 << 34),
        "nr_cpus": (1, 8192),
        "percpu_bytes": (4096, 2 << 20),
        "log_buf_bytes": (4096, 1 << 25),
        "cma_bytes": (0, 1 << 40),
        "zone_dma": (0, 1),
    }
    low, high = limits[name]
    return value is None or low <= value <= high
