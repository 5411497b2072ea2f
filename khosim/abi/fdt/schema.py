"""What kind of value each handover property holds.

Property values are bytes. KHO stores its integers as the writing kernel has them in memory, so a
value cannot be typed by looking at it: this table says, by the ``compatible`` string of the
enclosing nodes and the property's name, what ``include/linux/kho/abi/*.h``, ``mm/memblock.c``,
``lib/test_kho.c`` and their predecessors since 6.16 put there. x86-64 and arm64 kernels are
little-endian; ``cells`` are big-endian as in any device tree.

Left out: trees that are not a handover. They are shown as dtc shows them, by guessing, which
:func:`property_kind` does where no enclosing node is known.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ("KINDS", "SCHEMA", "property_kind", "typed_value")

#: ``strings``: NUL-terminated; ``u32``, ``u64``: native integers; ``cells``: big-endian 32-bit.
KINDS = ("strings", "u32", "u64", "cells", "bytes")

_KHO = {
    "preserved-memory-map": "u64",
    "preserved-data": "u64",
    "blob-size": "u64",
    "fdt": "u64",
}
#: compatible string of a node -> property of that node or of one below -> kind
SCHEMA: dict[str, dict[str, str]] = {
    **{f"kho-v{version}": _KHO for version in (1, 2, 3, 4)},
    "memblock-v1": {},
    "reserve-mem-v1": {"start": "u64", "size": "u64"},
    "kho-test-v1": {"magic": "u32", "nr_folios": "u32", "folios_info": "bytes", "csum": "u32"},
    "luo-v1": {"liveupdate-number": "u64"},
    "luo-session-v1": {"luo-session-header": "u64"},
    "luo-session-v2": {"luo-session-header": "u64"},
    "luo-flb-v1": {"luo-flb-header": "u64"},
}


def _is_strings(raw: bytes) -> bool:
    """Whether the bytes are one or more non-empty printable strings, each with its NUL."""
    if not raw or raw[-1]:
        return False
    return all(part and all(0x20 <= c < 0x7F for c in part) for part in raw[:-1].split(b"\0"))


def property_kind(compatibles: Sequence[str], name: str, raw: bytes) -> str:
    """The kind of a property, given the ``compatible`` of its node and of those around it.

    ``compatibles`` runs outwards from the node; the first that the table knows decides. A value
    that does not have its kind's shape is ``bytes``.
    """
    if name == "compatible":
        return "strings" if _is_strings(raw) else "bytes"
    known = [SCHEMA[compatible] for compatible in compatibles if compatible in SCHEMA]
    kind = next((table[name] for table in known if name in table), "bytes" if known else "")
    if not kind:
        kind = "strings" if _is_strings(raw) else "cells" if raw and len(raw) % 4 == 0 else "bytes"
    width = {"u32": 4, "u64": 8}.get(kind)
    return kind if width is None or len(raw) == width else "bytes"


def typed_value(kind: str, raw: bytes) -> int | list[str] | list[int] | bytes:
    """``raw`` as its kind reads: an int, a list of strings, a list of cells, or bytes."""
    if kind in ("u32", "u64"):
        return int.from_bytes(raw, "little")
    if kind == "strings":
        return [part.decode("ascii", "replace") for part in raw[:-1].split(b"\0")]
    if kind == "cells":
        return [int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), 4)]
    return raw
