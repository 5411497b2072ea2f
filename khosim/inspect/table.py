"""Reports as tables for people, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from khosim.checks.decode_luo import Luo, LuoFile
from khosim.checks.decode_memfd import Memfd
from khosim.checks.decode_root import KexecMetadata, Region
from khosim.checks.preserved import Preserved, orders_of
from khosim.inspect.blob import BlobReport
from khosim.inspect.damage import Damage
from khosim.inspect.debugfs import DebugfsReport
from khosim.inspect.memory import MemoryReport
from khosim.inspect.source import Report
from khosim.inspect.words import clean, fit, paragraph, size_text

__all__ = ("report_lines",)

_LABEL = 13


def report_lines(report: Report, *, folios: bool = False) -> Iterator[str]:
    """The lines of a report; with ``folios``, those of each file as well."""
    if isinstance(report, MemoryReport):
        yield from _memory(report, folios)
    elif isinstance(report, BlobReport):
        yield from _blob(report)
    elif isinstance(report, DebugfsReport):
        yield from _debugfs(report)
    else:
        why = "the last generation hands nothing over" if report.is_last else "memory was not kept"
        yield f"{clean(report.name)}: no ram.npz; {why}"
        if not report.damage:
            return
    yield ""
    yield from _damage(report.damage)


def _memory(report: MemoryReport, folios: bool) -> Iterator[str]:
    handover, memory = report.handover, report.memory
    size = size_text(handover.page_size)
    title = report.name or memory.place
    yield f"{clean(title)}: {memory.kind}, {size} pages"
    yield ""
    yield from _field("handover", f"{handover.compatible} at {handover.fdt_phys:#x}")
    yield from _written_by(handover.kexec_metadata)
    yield from _field(
        "root FDT", f"{len(handover.fdt)} bytes, {_number(handover.subtrees, 'subtree')}"
    )
    where = f"at {handover.map_phys:#x}" if handover.map_phys else "nowhere"
    yield from _field("map", f"{where}, {_number(handover.table_pages, 'page')}")
    for other in report.others:
        yield from _field("passed over", f"handover at {other}")
    yield from _preserved(handover.preserved)
    yield from _subtrees(handover.subtrees)
    yield from _reserve_mem(handover.reserve_mem)
    if report.luo is not None:
        yield from _luo(report.luo, folios)


def _preserved(preserved: Preserved) -> Iterator[str]:
    yield ""
    yield f"  {'preserved':<9} {'order':>5} {'of':>6} {'blocks':>12} {'pages':>14} {'bytes':>20}"
    for order in orders_of(preserved):
        blocks = int(preserved.nr_blocks[preserved.order == order].sum())
        yield _preserved_row("", str(order), preserved.page_size << order, blocks, blocks << order)
    total, pages = preserved.total_blocks, preserved.total_pages
    yield _preserved_row("in all", "", preserved.page_size, total, pages, show_size=False)


def _preserved_row(
    label: str, order: str, size: int, blocks: int, pages: int, *, show_size: bool = True
) -> str:
    page_size = size >> int(order or 0)
    of = size_text(size) if show_size else ""
    return f"  {label:<9} {order:>5} {of:>6} {blocks:>12} {pages:>14} {pages * page_size:>20}"


def _subtrees(subtrees: dict[str, Region]) -> Iterator[str]:
    if subtrees:
        yield ""
        yield f"  {'subtree':<31} {'address':>18} {'bytes':>12}"
    for name, blob in subtrees.items():
        yield f"  {fit(name, 31):<31} {blob.start:>#18x} {blob.size or '-':>12}"


def _reserve_mem(regions: dict[str, Region]) -> Iterator[str]:
    if regions:
        yield ""
        yield f"  {'reserve_mem':<31} {'address':>18} {'bytes':>12}"
    for name, region in regions.items():
        yield f"  {fit(name, 31):<31} {region.start:>#18x} {region.size:>12}"


def _luo(luo: Luo, folios: bool) -> Iterator[str]:
    yield ""
    if luo.compatible is None:
        yield from _field("LUO", "cannot be read")
        return
    nr_files = sum(len(session.files) for session in luo.sessions)
    flbs = "FLBs not in this image" if luo.flbs is None else _number(luo.flbs, "FLB")
    said = f"{luo.compatible}, live update {luo.liveupdate_num}: "
    said += f"{_number(luo.sessions, 'session')}, {nr_files} files, {flbs}"
    yield from _field("LUO", said)
    for session in luo.sessions:
        yield ""
        yield f"  session {fit(session.name, 64)}: {_number(session.files, 'file')}"
        if session.files:
            columns = f"{'size':>16} {'pos':>16} {'seals':>6} {'folios':>10}"
            yield f"    {'token':<18} {columns}"
        for file in session.files:
            yield from _file(file, folios)
    if luo.flbs:
        yield ""
        yield f"  {'FLB':<48} {'data':>18} {'files':>8}"
    for flb in luo.flbs or ():
        yield f"  {fit(flb.name, 48):<48} {flb.data:>#18x} {flb.nr_files:>8}"


def _file(file: LuoFile, folios: bool) -> Iterator[str]:
    memfd = file.memfd
    if memfd is None:
        yield f"    {file.token:<#18x} {fit(file.compatible, 30)}, data {file.data:#x}"
        return
    numbers = f"{memfd.size:>16} {memfd.pos:>16} {memfd.seals:>#6x} {memfd.nr_folios:>10}"
    yield f"    {file.token:<#18x} {numbers}"
    if memfd.sha256 is not None:
        yield f"      sha256 {memfd.sha256}"
    if folios and len(memfd.pfn):
        yield from _folio_runs(memfd)


def _folio_runs(memfd: Memfd) -> Iterator[str]:
    """Folios that follow each other in the file and in memory are one line."""
    yield f"      {'index':>20} {'page frame':>16} {'folios':>10} {'order':>6} {'flags':>6}"
    columns = (memfd.index, memfd.pfn, memfd.order, memfd.folio_flags)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    head = 0
    for at in range(1, len(rows) + 1):
        if at < len(rows):
            index, pfn, order, flags = rows[at]
            before = rows[at - 1]
            step = 1 << before[2]
            follows = (index, pfn) == (before[0] + step, before[1] + step)
            if follows and (order, flags) == before[2:]:
                continue
        index, pfn, order, flags = rows[head]
        yield f"      {index:>20} {pfn:>#16x} {at - head:>10} {order:>6} {flags:>#6x}"
        head = at


def _blob(report: BlobReport) -> Iterator[str]:
    kind = "root FDT of a handover" if report.root is not None else "device tree"
    yield f"{clean(report.place)}: {kind}, {len(report.data)} bytes"
    yield ""
    yield from _field("compatible", report.compatible or "not said")
    if report.root is not None:
        if report.root.map_phys is not None:
            yield from _field("map", f"at {report.root.map_phys:#x}, which is not in this file")
        yield from _subtrees(report.root.subtrees)
    elif report.fdt.root is not None:
        inner = [node.name.decode("ascii", "backslashreplace") for node in report.fdt.root.children]
        yield from _field("nodes", ", ".join(inner) or "none")
    yield from _reserve_mem(report.reserve_mem)
    for name, region in report.chosen.items():
        yield from _field("chosen", f"{name} at {region.start:#x}, {region.size} bytes")


def _debugfs(report: DebugfsReport) -> Iterator[str]:
    what = "what this kernel was handed" if report.name == "in" else "what it hands over"
    yield f"{report.name}: debugfs, {what} ({clean(report.place)})"
    yield ""
    root = report.root
    if root is not None:
        yield from _field("handover", f"{root.compatible}")
    yield from _written_by(report.kexec_metadata)
    if report.side.fdt is None:
        if report.name == "out":
            yield from _field("root FDT", "not shown, as in every kernel that was handed over")
    elif report.cut_bytes:
        said = f"{len(report.side.fdt)} bytes: the kernel shows as many as there were at boot, "
        yield from _field("root FDT", said + f"{report.cut_bytes} fewer than there are now")
    else:
        yield from _field("root FDT", f"{len(report.side.fdt)} bytes")
    if root is not None and root.map_phys is not None:
        yield from _field("map", f"at {root.map_phys:#x}, which debugfs does not show")
    if report.luo is not None:
        compatible, number, sessions, _ = report.luo
        where = f"sessions at {sessions:#x}" if sessions else "no sessions"
        yield from _field("LUO", f"{compatible}, live update {number}, {where}")
    elif report.name == "in" and "LUO" in report.side.blobs:
        yield from _field("LUO", "given back when it was read; that page holds something else")
    if root is not None:
        yield from _subtrees(root.subtrees)
    elif report.side.blobs:
        yield ""
        yield f"  {'blob':<31} {'bytes':>12}"
        for name, data in report.side.blobs.items():
            yield f"  {fit(name, 31):<31} {len(data):>12}"
    yield from _reserve_mem(report.reserve_mem)
    if report.side.scratch:
        yield ""
        yield f"  {'scratch':<31} {'address':>18} {'bytes':>12}"
        for number, (phys, len_bytes) in enumerate(report.side.scratch):
            label = ("lowmem", "global")[number] if number < 2 else f"node {number - 2}"
            yield f"  {label:<31} {phys:>#18x} {len_bytes:>12}"


def _damage(damage: list[Damage]) -> Iterator[str]:
    for item in damage:
        yield from paragraph("", f"torn: {item.path or '/'} [{item.code}]", 0)
        yield from paragraph("      at", item.where, 18)
        if item.expected:
            yield from paragraph("      expected", item.expected, 18)
        yield from paragraph("      found", item.found, 18)
        yield from paragraph("      still read", item.still_read, 18)
        yield ""
    if damage:
        yield f"{len(damage)} thing{'s'[: len(damage) > 1]} torn"
    else:
        yield "nothing torn"


def _written_by(metadata: KexecMetadata | None) -> Iterable[str]:
    if metadata is None:
        return ()
    said = f"Linux {metadata.previous_release}, kexec count {metadata.kexec_count}"
    return _field("written by", said)


def _field(label: str, text: str) -> Iterable[str]:
    return paragraph(f"  {label}", text, _LABEL + 2)


def _number(things: object, noun: str) -> str:
    count = len(things)  # type: ignore[arg-type]
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
