"""Hostile handovers: machines about to boot a successor, and ways to spoil what it will read.

A :class:`Target` is a machine that has just jumped: RAM and registers are ready, nobody has booted
yet. It knows its :class:`Site` list: everything in RAM that the successor reads and that a torn
write, a stray DMA or a broken predecessor could have changed. :func:`mutate` spoils it; the same
target, seed and index spoil it in the same way, whatever was tried before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from khosim import Machine
from khosim.kernel.kernel import Kernel
from khosim.machine.ram import Ram

__all__ = ("TARGETS", "Site", "Target", "build_target", "mutate")

_BY = (-1, "mutation")
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_INT_EDGES = ((1 << 31) - 1, 1 << 31, _U32)
_ORDERS = (0, 0, 1, 2, 0, 3, 1, 0, 4, 0, 0, 1, 0, 2, 0, 5)
_NR_PAGES = 11
_BLOB_BYTES = 300


class Site(NamedTuple):
    """``len_bytes`` bytes at ``phys`` that the successor reads; ``kind`` says as what."""

    name: str
    kind: str
    phys: int
    len_bytes: int


class Target:
    """A machine between jump and boot, and what lies where in it."""

    __slots__ = ("blocks", "machine", "name", "pages", "registers", "sites", "values")

    def __init__(
        self,
        name: str,
        machine: Machine,
        sites: list[Site],
        blocks: list[int],
        pages: tuple[int, int],
    ) -> None:
        self.name = name
        self.machine = machine
        self.sites = sites
        self.blocks = blocks
        """Physical addresses of the preserved folios."""
        self.pages = pages
        """The preserved range of single pages: physical address and number."""
        self.registers = dict(machine.hardware.registers)
        self.values = _interesting(machine, sites)

    @property
    def ram(self) -> Ram:
        """The machine's RAM."""
        return self.machine.hardware.ram

    def site(self, name: str) -> Site:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)


def _interesting(machine: Machine, sites: list[Site]) -> list[int]:
    page = machine.hardware.page_size
    values = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 0xFF, 0xFFFF, _U32, _U64]
    values += [page - 1, page, page + 1, 2 * page, 1 << 31, (1 << 31) - 1, 1 << 32, _U64 - 15]
    values += [1 << 44, 1 << 47, 1 << 51, 1 << 52, 1 << 62, 1 << 63, -page & _U64, _U64 - 7]
    for start, end in machine.hardware.ram_ranges:
        values += [start, end, end - 1, end - 8, end - page, end + page, start - page & _U64]
    for site in sites:
        values += [site.phys, site.phys, site.phys + page, site.phys + 8, site.phys + 1]
    return values


# -- machines -----------------------------------------------------------------------------------


def _jumped(name: str, machine: Machine, cmdline: str) -> Target:
    kernel = machine.boot(cmdline=cmdline)
    blocks = []
    for order in _ORDERS:
        folio = kernel.alloc_folio(order)
        folio.write(0, b"preserved")
        kernel.kho_preserve_folio(folio)
        blocks.append(folio.phys)
    pfn = kernel.alloc_pages_exact(_NR_PAGES)
    kernel.kho_preserve_pages(pfn, _NR_PAGES)
    blob = kernel.kho_alloc_preserve(_BLOB_BYTES)
    kernel.kho_add_subtree("guests", blob.phys, _BLOB_BYTES)
    machine.load_successor(kernel)
    sites = [*_sites(kernel), *_blobs(machine)]
    return Target(name, machine, sites, blocks, (pfn << kernel.arch.page_shift, _NR_PAGES))


def _sites(kernel: Kernel) -> Iterator[Site]:
    """Everything that a dead kernel left for its successor."""
    page = kernel.arch.page_size
    yield Site("root FDT", "fdt", kernel.kho_out.fdt_phys, page)
    levels = [[kernel.kho_out.tree.root]]
    for _ in range(kernel.arch.tree_depth - 1):
        levels.append([child for table in levels[-1] for child in _entries(kernel, table)])
    for depth, tables in enumerate(levels):
        for i, phys in enumerate(tables):
            kind = "table" if depth + 1 < len(levels) else "leaf"
            yield Site(f"{kind} {depth}.{i}", kind, phys, page)
    image = kernel.kexec_image
    assert image is not None
    for segment in image.segments:
        size = len(segment.data)
        if segment.name == "KHO scratch array":
            yield Site("scratch array", "scratch", segment.mem, size)
        elif segment.name == "boot parameters":
            yield Site("boot parameters", "params", segment.mem, page)
            yield Site("command line", "text", segment.mem + page, 64)
            (setup_data,) = struct.unpack_from("<Q", segment.data, 0x250)
            yield Site("setup_data", "kho_data", setup_data, 48)
        elif segment.name == "device tree":
            yield Site("device tree", "fdt", segment.mem, size)
        elif segment.name == "kernel":
            yield Site("kernel image", "text", segment.mem, min(size, 2 * page))


def _blobs(machine: Machine) -> list[Site]:
    # A first successor says where they are; its boot is undone.
    hardware = machine.hardware
    registers = dict(hardware.registers)
    token = hardware.snapshot()
    kernel = machine.resume()
    names = (("memblock", "fdt"), ("kexec-metadata", "blob"), ("guests", "blob"))
    sites = [Site(name, kind, *kernel.kho_retrieve_subtree(name)) for name, kind in names]
    hardware.rollback(token)
    hardware.discard(token)
    hardware.registers = registers
    return sites


def _entries(kernel: Kernel, table: int) -> list[int]:
    words = kernel.ram.view(table, kernel.arch.page_size).view("<u8")
    return [int(word) for word in words if word]


def _small(name: str, checks: bool) -> Target:
    return _jumped(name, Machine("64M", checks=checks), "kho=on reserve_mem=64K:4096:oops")


def _arm64(name: str, checks: bool) -> Target:
    machine = Machine("256M", arch="arm64", page_size=16384, checks=checks)
    return _jumped(name, machine, "kho=on reserve_mem=64K:16384:oops")


def _two_nodes(name: str, checks: bool) -> Target:
    nodes = ("52M", "76M")
    machine = Machine("128M", nodes=nodes, holes=[(0x5000000, 0x5200000)], checks=checks)
    return _jumped(name, machine, "kho=on kho_scratch=8M,8M,4M reserve_mem=64K:4096:oops")


_BUILDERS: dict[str, Callable[[str, bool], Target]] = {
    "x86-64 64M": _small,
    "arm64 16K pages": _arm64,
    "two nodes 128M": _two_nodes,
}
TARGETS = tuple(_BUILDERS)
"""Names of the targets there are."""


def build_target(name: str, *, checks: bool = False) -> Target:
    """The target called ``name``, one of :data:`TARGETS`, newly made; with ``checks`` audited."""
    return _BUILDERS[name](name, checks)


# -- mutations ----------------------------------------------------------------------------------


def mutate(target: Target, seed: int, index: int) -> list[str]:
    """Spoil the target's RAM; returns what was done, one line for each change."""
    random = Random(f"{seed}/{target.name}/{index}")
    nr_changes = random.choice((1, 1, 1, 2, 3))
    return [_change(target, random) for _ in range(nr_changes)]


def _change(target: Target, random: Random) -> str:
    kinds = sorted({site.kind for site in target.sites})
    kind = random.choice(kinds)
    site = random.choice([site for site in target.sites if site.kind == kind])
    special = _SPECIAL.get(site.kind)
    change = special if special is not None and random.random() < 0.5 else random.choice(_GENERAL)
    return f"{site.name} at {site.phys:#x}: {change(target, site, random)}"


def _offset(target: Target, site: Site, random: Random, width: int) -> int:
    """An offset in the site, aligned to ``width``; mostly one where something stands."""
    if random.random() < 0.7:
        content = target.ram.read(site.phys, site.len_bytes)
        for _ in range(20):
            at = random.randrange(site.len_bytes)
            at = next((i for i in range(at, min(at + 200, len(content))) if content[i]), -1)
            if at >= 0:
                return min(at, site.len_bytes - width) & -width
    return max(0, random.randrange(0, max(1, site.len_bytes - width + 1)) & -width)


def _write(target: Target, phys: int, data: bytes) -> None:
    target.ram.write(phys, data, _BY)


def _flip_bits(target: Target, site: Site, random: Random) -> str:
    flipped = []
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        at = _offset(target, site, random, 1)
        bit = random.randrange(8)
        old = target.ram.read(site.phys + at, 1)[0]
        _write(target, site.phys + at, bytes([old ^ 1 << bit]))
        flipped.append(f"{at:#x}.{bit}")
    return f"flip bits {' '.join(flipped)}"


def _set_byte(target: Target, site: Site, random: Random) -> str:
    at = _offset(target, site, random, 1)
    value = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    _write(target, site.phys + at, bytes([value]))
    return f"byte {at:#x} = {value:#x}"


def _value(target: Target, random: Random) -> int:
    value = random.choice(target.values)
    twist = random.random()
    if twist < 0.1:
        value += random.choice((-1, 1, 8, 4, target.ram.page_size))
    elif twist < 0.15:
        value = random.getrandbits(64)
    elif twist < 0.2:
        value = random.randrange(target.ram.size_bytes) & -target.ram.page_size
    return value & _U64


def _set_word(target: Target, site: Site, random: Random) -> str:
    width = random.choice((2, 4, 4, 8, 8))
    order = "<" if random.random() < 0.5 else ">"
    if site.len_bytes < width:
        return _set_byte(target, site, random)
    at = _offset(target, site, random, width)
    value = _value(target, random) & ((1 << 8 * width) - 1)
    data = value.to_bytes(width, "little" if order == "<" else "big")
    _write(target, site.phys + at, data)
    return f"u{8 * width}{order} {at:#x} = {value:#x}"


def _add_to_word(target: Target, site: Site, random: Random) -> str:
    at = _offset(target, site, random, 8)
    if site.len_bytes < 8:
        return _set_byte(target, site, random)
    step = random.choice((-4096, -8, -1, 1, 8, 16, 4096, 1 << 20, 1 << 32))
    value = (target.ram.read_u64(site.phys + at) + step) & _U64
    _write(target, site.phys + at, value.to_bytes(8, "little"))
    return f"u64< {at:#x} += {step}"


def _fill(target: Target, site: Site, random: Random) -> str:
    start = random.choice((0, _offset(target, site, random, 1)))
    end = random.choice((site.len_bytes, min(site.len_bytes, start + random.randrange(1, 129))))
    what = random.choice((0, 0, 0xFF, 0x5A, -1))
    data = random.randbytes(end - start) if what < 0 else bytes([what]) * (end - start)
    _write(target, site.phys + start, data)
    return f"[{start:#x}, {end:#x}) = {'noise' if what < 0 else hex(what)}"


def _swap(target: Target, site: Site, random: Random) -> str:
    other = random.choice(target.sites)
    size = min(site.len_bytes, other.len_bytes)
    mine, theirs = target.ram.read(site.phys, size), target.ram.read(other.phys, size)
    _write(target, site.phys, theirs)
    if random.random() < 0.5:
        _write(target, other.phys, mine)
        return f"swap with {other.name}"
    return f"copy of {other.name}"


_GENERAL = (_flip_bits, _set_byte, _set_word, _set_word, _add_to_word, _fill, _swap)


def _spoil_fdt(target: Target, site: Site, random: Random) -> str:
    """Header fields, tags, property lengths and names, and values of eight bytes."""
    header = struct.unpack(">10I", target.ram.read(site.phys, 40))
    total, off_struct, off_strings = (min(word, site.len_bytes) for word in header[1:4])
    where = random.randrange(4)
    if where == 0:
        at = 4 * random.randrange(10)
        near = (total - 1, total, total + 1, off_struct + 4, off_strings, _value(target, random))
        value = random.choice((*near, 0, 1, 4, 16, 17, 18, 39, 40, 41, 1 << 20, *_INT_EDGES))
    elif where == 1 and off_struct + 4 < off_strings:
        at = random.randrange(off_struct, off_strings) & -4
        value = random.choice((0, 1, 2, 3, 4, 9, 8, 16, 0x7FFFFFFF, _U32, header[8], total))
    elif where == 2 and off_struct + 8 < off_strings:
        at = random.randrange(off_struct, off_strings - 4) & -4
        wide = _value(target, random)
        _write(target, site.phys + at, wide.to_bytes(8, random.choice(("little", "big"))))
        return f"value at {at:#x} = {wide:#x}"
    else:
        at = min(off_strings, site.len_bytes - 4) + random.randrange(0, 32, 4)
        at = min(at, site.len_bytes - 4)
        value = random.getrandbits(32)
    _write(target, site.phys + at, (value & _U32).to_bytes(4, "big"))
    return f"word {at:#x} = {value & _U32:#x}"


def _spoil_table(target: Target, site: Site, random: Random) -> str:
    """Point an entry at a table or leaf: cycles, shared children, keys of strange orders."""
    nr_entries = site.len_bytes // 8
    at = random.choice((0, 1, 2, nr_entries - 1, random.randrange(nr_entries)))
    if random.random() < 0.3:
        at = _offset(target, site, random, 8) // 8
    tree = [other.phys for other in target.sites if other.kind in ("table", "leaf")]
    value = random.choice((*tree, site.phys, _value(target, random)))
    _write(target, site.phys + 8 * at, value.to_bytes(8, "little"))
    return f"entry {at} = {value:#x}"


def _spoil_leaf(target: Target, site: Site, random: Random) -> str:
    """Set bits: blocks that nobody preserved, anywhere and of any order."""
    at = random.choice((0, 8, _offset(target, site, random, 8), random.randrange(site.len_bytes)))
    at &= -8
    noise = random.getrandbits(64), 1 << random.randrange(64)
    value = random.choice((1, 2, 3, _U64, 1 << 63, *noise))
    value |= target.ram.read_u64(site.phys + at) * random.getrandbits(1)
    _write(target, site.phys + at, value.to_bytes(8, "little"))
    return f"bits {8 * at} = {value:#x}"


def _spoil_scratch(target: Target, site: Site, random: Random) -> str:
    """An entry: huge, empty, overlapping another, in a hole, beyond RAM."""
    at = 16 * random.randrange(site.len_bytes // 16)
    addr, size = struct.unpack("<QQ", target.ram.read(site.phys + at, 16))
    if random.random() < 0.6:
        addr = random.choice((addr + 1, addr - 4096, addr + (1 << 20), _value(target, random)))
    if random.random() < 0.6:
        size = random.choice((0, 1, 4095, size + 1, size * 4, _U64, -addr, _value(target, random)))
    _write(target, site.phys + at, struct.pack("<QQ", addr & _U64, size & _U64))
    return f"area {at // 16} = {addr & _U64:#x} + {size & _U64:#x}"


def _spoil_kho_data(target: Target, site: Site, random: Random) -> str:
    """``setup_data`` (next, type, length) and ``kho_data`` (two addresses, two sizes)."""
    at = random.choice((0, 8, 12, 16, 24, 24, 32, 40, 40))
    width = 4 if at in (8, 12) else 8
    value = _value(target, random)
    if random.random() < 0.3:
        value = random.choice((0, 1, 10, 31, 32, 33, 48, 64, 1 << 18, site.phys, 1 << 44))
    value &= (1 << 8 * width) - 1
    _write(target, site.phys + at, value.to_bytes(width, "little"))
    return f"u{8 * width} {at} = {value:#x}"


def _spoil_params(target: Target, site: Site, random: Random) -> str:
    """``boot_params``: the E820 map, and where initrd, command line and setup_data lie."""
    at = random.choice((0x1E8, 0x218, 0x21C, 0x228, 0x250, 0xC0, 0xC4, 0xC8))
    width = {0x1E8: 1, 0x250: 8}.get(at, 4)
    if random.random() < 0.5:
        entry = 0x2D0 + 20 * random.randrange(4)
        at, width = random.choice(((entry, 8), (entry + 8, 8), (entry + 16, 4)))
    value = _value(target, random) & ((1 << 8 * width) - 1)
    _write(target, site.phys + at, value.to_bytes(width, "little"))
    return f"u{8 * width} {at:#x} = {value:#x}"


_SPECIAL: dict[str, Callable[[Target, Site, Random], str]] = {
    "fdt": _spoil_fdt,
    "table": _spoil_table,
    "leaf": _spoil_leaf,
    "scratch": _spoil_scratch,
    "kho_data": _spoil_kho_data,
    "params": _spoil_params,
}
