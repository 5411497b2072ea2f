"""The root FDT of each release, its bytes worked out by hand from the format's description."""

from __future__ import annotations

import struct

import pytest

from khosim import Machine

PROPERTY, BEGIN, END_NODE, END = 3, 1, 2, 9

# Name of the format, of the property with a blob's address, and whether its size is told.
FORMATS = {
    "6.16": ("kho-v1", "fdt", False),
    "6.17": ("kho-v1", "fdt", False),
    "6.18": ("kho-v1", "fdt", False),
    "6.19": ("kho-v1", "fdt", False),
    "7.0": ("kho-v1", "fdt", False),
    "7.1": ("kho-v3", "preserved-data", True),
    "7.2": ("kho-v4", "preserved-data", True),
    "7.3": ("kho-v4", "preserved-data", True),
}


def _structure(blob: bytes) -> list[tuple[str, object]]:
    """Nodes and properties in order, read word by word as the device tree's rules say."""
    magic, total, at, strings = struct.unpack_from(">4I", blob)
    assert (magic, total) == (0xD00DFEED, len(blob))
    found: list[tuple[str, object]] = []
    while True:
        (token,) = struct.unpack_from(">I", blob, at)
        at += 4
        if token == BEGIN:
            end = blob.index(b"\0", at)
            found.append(("node", blob[at:end].decode()))
            at = (end + 4) & -4
        elif token == PROPERTY:
            size, name = struct.unpack_from(">2I", blob, at)
            end = blob.index(b"\0", strings + name)
            found.append((blob[strings + name : end].decode(), blob[at + 8 : at + 8 + size]))
            at = (at + 8 + size + 3) & -4
        elif token == END_NODE:
            found.append(("end", ""))
        else:
            assert token == END
            return found


@pytest.mark.parametrize("release", FORMATS)
def test_the_root_fdt_of_each_release(release: str) -> None:
    """Compatible string, map, and one subtree with address and, since 7.1, size; native u64s."""
    compatible, address, sized = FORMATS[release]
    machine = Machine("64M")
    kernel = machine.boot(release, cmdline="kho=on")
    folio = kernel.alloc_folio(owner="test")
    kernel.kho_preserve_folio(folio)
    phys = folio.phys

    def add(action: str = "KEXEC_KHO_FINALIZE") -> int:
        if action == "KEXEC_KHO_FINALIZE":
            kernel.kho_add_subtree("mine", phys, 100)
        return 0

    if release in ("6.16", "6.17", "6.18"):
        kernel.register_kho_notifier(add)  # subtrees are added while KHO is finalized
    else:
        add()
    kernel.finalize()
    handover = kernel.kho_out.handover_phys
    size = struct.unpack(">I", machine.hardware.ram.read(handover + 4, 4))[0]
    found = _structure(machine.hardware.ram.read(handover, size))
    assert found[:2] == [("node", ""), ("compatible", compatible.encode() + b"\0")]
    name, value = found[2]
    assert name == "preserved-memory-map"
    assert isinstance(value, bytes)
    (map_phys,) = struct.unpack("<Q", value)
    assert map_phys % 4096 == 0 < map_phys
    mine = found.index(("node", "mine"))
    expected = [(address, struct.pack("<Q", phys))]
    if sized:
        expected.append(("blob-size", struct.pack("<Q", 100)))
    end = found.index(("end", ""), mine)
    assert sorted(found[mine + 1 : end]) == sorted(expected)
