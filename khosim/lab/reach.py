"""Pages that a handover reaches and that the inspector has no reason to read.

Today that is the list of folios that the kernel's test module keeps in a vmalloc area
(``lib/test_kho.c:kho_test_preserve_data`` @ 7.3). A page is kept by reading it through a
:class:`~khosim.lab.guest_ram.RecordingReader`.
"""

from __future__ import annotations

from khosim.checks.decode import Handover, read_blob
from khosim.checks.decode_fdt import parse_fdt
from khosim.checks.decode_vmalloc import VMALLOC_BYTES, decode_vmalloc, read_vmalloc
from khosim.checks.decode_walk import Walk
from khosim.checks.reader import ProblemLog, Reader

__all__ = ("read_the_rest",)

_FDT_MAGIC = b"\xd0\x0d\xfe\xed"
_MAX_BYTES = 1 << 20


def read_the_rest(handover: Handover, reader: Reader) -> None:
    """Read these pages; what is torn there is for others to say."""
    where = handover.subtrees.get("kho_test")
    blob = read_blob(reader, where) if where is not None else b""
    root = parse_fdt(blob).root if blob.startswith(_FDT_MAGIC) else None
    data = root.child(b"data") if root is not None else None
    raw = data.prop(b"folios_info") if data is not None else None
    if where is None or raw is None or len(raw) != VMALLOC_BYTES:
        return
    walk = Walk(reader, handover.page_size, ProblemLog())
    area = decode_vmalloc(walk, raw, where.start, "/kho_test")
    read_vmalloc(walk, area, min(area.total_pages * handover.page_size, _MAX_BYTES), "/kho_test")
