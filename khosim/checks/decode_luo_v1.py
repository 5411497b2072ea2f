"""The checkers' reader of what is luo-v1's own: a device tree, and arrays of pages.

6.19 to 7.1 hand the orchestrator's state over as a device tree that leads to one array of sessions
and, from 7.0 on, to one page of FLBs; each session leads to one array of files
(``kernel/liveupdate/luo_{core,session,file,flb}.c`` @ 7.0). Entries are those of luo-v5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from khosim.checks.decode_fdt import Node, parse_fdt

if TYPE_CHECKING:
    from khosim.checks.decode_walk import Walk
    from khosim.checks.reader import ProblemLog

__all__ = ("FILE_PAGES", "SESSION_PAGES", "LuoV1Root", "decode_array", "parse_luo_v1")

SESSION_PAGES = 16
FILE_PAGES = 2


class LuoV1Root(NamedTuple):
    """What the tree says; ``flbs_phys`` is 0 where it has no node for FLBs."""

    compatible: str
    liveupdate_num: int
    sessions_phys: int
    flbs_phys: int


def parse_luo_v1(data: bytes, phys: int, log: ProblemLog, path: str) -> LuoV1Root | None:
    """The tree in ``data``, which lies at ``phys``; None where it is none of luo-v1."""
    fdt = parse_fdt(data, phys)
    root = fdt.root
    if root is None:
        log.add("luo-compatible", phys, "a torn device tree", path, "that of luo-v1, or luo-v5")
        return None
    for problem in fdt.problems:
        log.add(problem.code, problem.phys, problem.detail, path, "a device tree")
    if root.strings(b"compatible") != (b"luo-v1",):
        log.add("luo-compatible", phys, repr(root.strings(b"compatible")), path, "'luo-v1'")
        return None
    number = root.u64(b"liveupdate-number")
    if number is None:
        log.add("luo-number", phys, "no u64", f"{path}/liveupdate-number", "a number")
    sessions = _header(root, "luo-session", "luo-session-v2", phys, log, path)
    if sessions is None:
        log.add("luo-node", phys, "no node", f"{path}/luo-session", "the sessions")
    flbs = _header(root, "luo-flb", "luo-flb-v1", phys, log, path)
    return LuoV1Root("luo-v1", number or 0, sessions or 0, flbs or 0)


def _header(
    root: Node, name: str, compatible: str, phys: int, log: ProblemLog, path: str
) -> int | None:
    node = root.child(name.encode())
    if node is None:
        return None
    if node.strings(b"compatible") != (compatible.encode(),):
        log.add("luo-compatible", phys, f"{node.strings(b'compatible')!r}", f"{path}/{name}",
                repr(compatible))  # fmt: skip
    value = node.u64(f"{name}-header".encode())
    if value is None:
        log.add("luo-node", phys, "no u64", f"{path}/{name}/{name}-header", "an address")
    return value


def decode_array(
    walk: Walk, head: int, nr_pages: int, entry_bytes: int, count: int | None, path: str, at: int
) -> list[tuple[int, bytes]]:
    """Address and bytes of each entry of the array of ``nr_pages`` pages at ``head``.

    ``count`` is how many there should be, None where the array's first u64 says so; ``at`` is where
    the pointer to it stands.
    """
    pages = []
    for number in range(nr_pages):
        page = walk.page(head + number * walk.page_size, f"{path}/pages[{number}]", at)
        if page is None:
            break
        pages.append(page)
    data = b"".join(pages)
    start = 0
    if count is None:
        count, start = int.from_bytes(data[:8], "little"), 8
    capacity = max(0, len(data) - start) // entry_bytes
    if count > capacity:
        walk.note("luo-count", head, f"{count}", f"{path}/count", f"at most {capacity}")
        count = 0
    offsets = range(start, start + count * entry_bytes, entry_bytes)
    return [(head + offset, data[offset : offset + entry_bytes]) for offset in offsets]
