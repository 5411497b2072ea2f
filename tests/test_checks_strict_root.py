"""Root FDTs that any reader takes and no kernel writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from khosim.abi.fdt import FdtNode
from khosim.abi.fdt.text import build_blob
from khosim.checks.decode_fdt import parse_fdt
from khosim.checks.decode_root import decode_root
from khosim.checks.reader import ProblemLog
from khosim.checks.strict_root import check_layout, check_values

GOLDEN = Path(__file__).parent / "golden"
ROOTS = sorted(GOLDEN.glob("captures/*/gen[12]/kho/in/fdt")) + sorted(
    GOLDEN.glob("kho-v1/*/gen2/kho/in/fdt")
)


def findings(blob: bytes) -> list[tuple[str, str]]:
    """Kinds and paths of all problems of a root FDT."""
    fdt = parse_fdt(blob)
    assert fdt.root is not None
    log = ProblemLog()
    root = decode_root(fdt.root, 0, log)
    check_values(root, log)
    for problem in check_layout(fdt, zeroed=root.format.size_prop is not None):
        log.add(*problem)
    return [(problem.code, problem.path) for problem in (*fdt.problems, *log.done())]


def u64(value: int) -> bytes:
    """A native-endian property."""
    return value.to_bytes(8, "little")


def root(*blobs: tuple[str, int, int], map_phys: int = 0x5000) -> bytes:
    """A root FDT with a map and blobs (name, address, size)."""
    return build_blob(
        FdtNode(
            b"",
            [(b"compatible", b"kho-v4\0"), (b"preserved-memory-map", u64(map_phys))],
            [
                FdtNode(
                    name.encode("latin-1"),
                    [(b"preserved-data", u64(start)), (b"blob-size", u64(size))],
                    [],
                )
                for name, start, size in blobs
            ],
        )
    )


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: f"{path.parts[-5]}-{path.parts[-4]}")
def test_real_roots_pass(path: Path) -> None:
    """Nothing is held against what real kernels wrote."""
    assert findings(path.read_bytes()) == []


def test_made_roots_pass() -> None:
    """Nor against blobs of unknown owners, which may lie anywhere and be of any size."""
    assert findings(root()) == []
    assert findings(root(("LUO", 0x6000, 32), ("mine", 0x7123, 1), ("his", 0x7200, 99))) == []


@pytest.mark.parametrize(
    ("blob", "code", "path"),
    [
        (root(map_phys=0), "kho-map", "/preserved-memory-map"),
        (root(map_phys=0x5008), "kho-map", "/preserved-memory-map"),
        (root(map_phys=1 << 52), "kho-map", "/preserved-memory-map"),
        (root(("LUO", 0x6001, 32)), "kho-subtree", "/LUO/preserved-data"),
        (root(("LUO", 0x6000, 33)), "kho-subtree", "/LUO/blob-size"),
        (root(("kexec-metadata", 0x6000, 72)), "kho-subtree", "/kexec-metadata/blob-size"),
        (root(("memblock", 0x6000, 71)), "kho-subtree", "/memblock/blob-size"),
        (root(("memblock", 0x6000, 65537)), "kho-subtree", "/memblock/blob-size"),
        (root(("mine", 0, 5)), "kho-subtree", "/mine/preserved-data"),
        (root(("mine", 1 << 52, 5)), "kho-subtree", "/mine/preserved-data"),
        (root(("mine", 0x6000, 0)), "kho-subtree", "/mine/blob-size"),
        (root(("LUO", 0x5000, 32)), "kho-subtree", "/LUO"),
        (root(("LUO", 0x6000, 32), ("memblock", 0x6000, 200)), "kho-subtree", "/memblock"),
        (root(("m\xffne", 0x6000, 5)), "fdt-name", "/m\\xffne"),
    ],
)
def test_impossible_values_are_found(blob: bytes, code: str, path: str) -> None:
    """Each by itself, at its path."""
    assert findings(blob) == [(code, path)]


def test_reserved_fields_are_found() -> None:
    """A boot CPU, a memory reservation, and something where libfdt pads."""
    sound = bytearray(root(("LUO", 0x6000, 32)))
    for at, code in ((31, "fdt-reserved"), (sound.index(b"kho-v4\0") + 7, "fdt-padding")):
        spoilt = bytearray(sound)
        spoilt[at] = 1
        assert findings(bytes(spoilt)) == [(code, "/")]
    reserved = build_blob(
        FdtNode(b"", [(b"compatible", b"kho-v4\0"), (b"preserved-memory-map", u64(0x5000))], []),
        [(0x1000, 0x1000)],
    )
    assert findings(reserved) == [("fdt-reserved", "/")]
