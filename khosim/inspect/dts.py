"""The device trees of a report as source, one after the other.

Each begins with a comment that says which it is and with ``/dts-v1/;``, so that it can be cut out
and compiled. Blobs that are no device trees are comments alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from khosim.abi.fdt.text import blob_to_dts
from khosim.checks.decode_root import read_blob
from khosim.errors import InputError
from khosim.inspect.blob import BlobReport
from khosim.inspect.debugfs import DebugfsReport
from khosim.inspect.memory import MemoryReport
from khosim.inspect.source import Report
from khosim.inspect.words import clean

__all__ = ("report_dts",)

_FDT_MAGIC = b"\xd0\x0d\xfe\xed"


def report_dts(report: Report) -> str:
    """All device trees of a report."""
    prefix = f"{report.name}: " if report.name else ""
    return "\n".join(_tree(prefix + title, data) for title, data in _blobs(report))


def _blobs(report: Report) -> Iterator[tuple[str, bytes]]:
    """Title and bytes of the root FDT and of each blob."""
    if isinstance(report, MemoryReport):
        handover = report.handover
        yield f"root FDT at {handover.fdt_phys:#x}", handover.fdt
        for name, blob in handover.subtrees.items():
            yield f"{name} at {blob.start:#x}", read_blob(report.memory.reader, blob)
    elif isinstance(report, BlobReport):
        yield f"{report.place}", report.fdt.data
    elif isinstance(report, DebugfsReport):
        if report.side.fdt is not None:
            yield "root FDT", report.side.fdt
        yield from report.side.blobs.items()


def _tree(title: str, data: bytes) -> str:
    title = clean(title)
    if not data.startswith(_FDT_MAGIC):
        return f"// {title}: {len(data)} bytes, no device tree\n"
    try:
        return f"// {title}\n{blob_to_dts(data, place=title)}"
    except InputError as error:
        return f"// {title}: cannot be written as source: {clean(error.cause)}\n"
