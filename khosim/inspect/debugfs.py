"""One side of a debugfs folder: a root FDT and blobs without the memory around them.

The real kernel's quirks are no damage: ``out/fdt`` shows as many bytes as the FDT had at boot, so
it usually ends too early, and is missing where the kernel was itself handed over. ``in`` has no
excuse: it shows the FDT whole and each blob with the size that the FDT names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.capture.debugfs import DebugfsSide
from khosim.checks.decode_fdt import Fdt, parse_fdt
from khosim.checks.decode_luo import parse_luo_header
from khosim.checks.decode_root import (
    FORMATS,
    KexecMetadata,
    Region,
    RootFdt,
    decode_kexec_metadata,
    decode_reserve_mem,
)
from khosim.checks.reader import ProblemLog
from khosim.inspect.blob import FileBytes, check_root, is_root
from khosim.inspect.damage import Damage, damage_json, explain

__all__ = ("DebugfsReport", "inspect_debugfs")

_FDT_MAGIC = b"\xd0\x0d\xfe\xed"


@dataclass(frozen=True, slots=True, eq=False)
class DebugfsReport:
    """What one side says. ``cut_bytes`` is how much of ``out/fdt`` the kernel did not show.

    ``luo`` holds LUO's ``compatible``, ``liveupdate_num``, ``sessions_pa`` and ``flbs_pa``, and is
    None as well where that page has been given back.
    """

    name: str
    side: DebugfsSide
    fdt: Fdt | None
    cut_bytes: int
    root: RootFdt | None
    reserve_mem: dict[str, Region]
    kexec_metadata: KexecMetadata | None
    luo: tuple[str, int, int, int] | None
    damage: list[Damage]

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.side.path)

    def to_json(self) -> dict[str, Any]:
        """As plain values; what only memory could tell is None."""
        root = self.root
        subtrees: dict[str, Any] = {}
        if root is not None:
            for name, blob in root.subtrees.items():
                subtrees[name] = {"phys": blob.start, "size": blob.size or None, "hex": None}
        for name, data in self.side.blobs.items():
            known = subtrees.setdefault(name, {"phys": None, "size": len(data), "hex": None})
            known["hex"] = data.hex()
            known["size"] = known["size"] or len(data)
        said: dict[str, Any] = {
            "compatible": None if root is None else root.compatible,
            "fdt_phys": None,
            "fdt": None if self.side.fdt is None else self.side.fdt.hex(),
            "mem_map": None if root is None else root.map_phys,
            "radix_nodes": None,
            "preserved": None,
            "subtrees": subtrees,
        }
        if self.luo is not None:
            compatible, number, _, _ = self.luo
            said["luo"] = {"compatible": compatible, "liveupdate_num": number, "sessions": None}
        if self.side.scratch is not None:
            said["scratch"] = [list(area) for area in self.side.scratch]
        if self.damage:
            said["damage"] = damage_json(self.damage)
        return said


def inspect_debugfs(name: str, side: DebugfsSide, label: str = "") -> DebugfsReport:
    """Decode the files of the side ``name`` ("in" or "out")."""
    damage: list[Damage] = []
    fdt = root = None
    cut_bytes = 0
    if side.fdt is not None:
        cut_bytes = _cut_bytes(side.fdt) if name == "out" else 0
        log = ProblemLog()
        fdt = parse_fdt(side.fdt)
        if cut_bytes == 0:
            log.extend(fdt.problems, "/")
            if fdt.root is not None and is_root(fdt.root):
                root = check_root(fdt, log)
            elif fdt.root is not None:
                log.add("kho-compatible", 0, "another device tree", "/compatible")
        damage += _explain(log, f"{side.path.name}/fdt")
    elif name == "in":
        log = ProblemLog()
        log.add("debugfs-file", 0, "no such file", "/", "the root FDT that was handed over")
        damage += _explain(log, f"{side.path.name}/fdt")
    reserve_mem: dict[str, Region] = {}
    metadata = luo = None
    for blob_name, data in side.blobs.items():
        log = ProblemLog()
        memory, region = FileBytes(data), Region(0, len(data))
        if blob_name == "memblock":
            reserve_mem = decode_reserve_mem(memory, region, max(len(data), 4096), log)
        elif blob_name == "kexec-metadata":
            metadata = decode_kexec_metadata(memory, region, log)
        elif blob_name == "LUO":
            header_log = ProblemLog()
            luo = parse_luo_header(data, 0, header_log)
            if name == "in" and header_log.done():
                luo = None
            else:
                log.extend(header_log.done())
        elif data.startswith(_FDT_MAGIC):
            log.extend(parse_fdt(data).problems, f"/{blob_name}")
        _compare_size(name, blob_name, len(data), root, log)
        damage += _explain(log, f"{side.path.name}/sub_fdts/{blob_name}")
    if name == "in" and root is not None:
        for blob_name in root.subtrees.keys() - side.blobs.keys():
            log = ProblemLog()
            log.add("debugfs-file", 0, "no such file", f"/{blob_name}", "the blob of this subtree")
            damage += _explain(log, f"{side.path.name}/sub_fdts/{blob_name}")
    return DebugfsReport(
        label or name, side, fdt, cut_bytes, root, reserve_mem, metadata, luo, damage
    )


def _cut_bytes(data: bytes) -> int:
    """How many bytes an FDT says it has beyond those that the kernel shows."""
    if not data.startswith(_FDT_MAGIC) or len(data) < 8:
        return 0
    total = int.from_bytes(data[4:8], "big")
    return total - len(data) if len(data) < total <= 65536 else 0


def _compare_size(
    side: str, name: str, len_bytes: int, root: RootFdt | None, log: ProblemLog
) -> None:
    if side != "in" or root is None:
        return
    blob = root.subtrees.get(name)
    if blob is None:
        log.add("debugfs-file", 0, "a blob", f"/{name}", "only blobs that the root FDT names")
    elif root.format.size_prop is not None and blob.size != len_bytes:
        found = f"{len_bytes} bytes"
        log.add("debugfs-size", 0, found, f"/{name}", f"{blob.size} bytes, as the root FDT says")


def _explain(log: ProblemLog, place: str) -> list[Damage]:
    formats = ", ".join(key.decode() for key in FORMATS)
    return explain(log.done(), formats=formats, place=place)
