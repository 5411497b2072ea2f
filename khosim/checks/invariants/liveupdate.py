"""What the Live Update Orchestrator promises: sessions, their files, and the memory of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.invariants.base import REPORTED_MAX, Invariant
from khosim.checks.live_files import attributes_of, is_memfd, outgoing_files, pieces_of
from khosim.checks.look import AT_ANY_TIME, BOOTED, JUMP, RETRIEVED
from khosim.checks.luo_reach import reachable_pages
from khosim.checks.ranges import both, merged, minus, pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.kernel_view import KernelView, LuoFileView
    from khosim.checks.look import Look
    from khosim.checks.ranges import Ranges
    from khosim.checks.reader import Problem
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)

_SHARED = frozenset(("luo-shared",))
_UNPRESERVED = frozenset(("not-preserved", "memfd-not-preserved"))
_MEMFD_OWNERS = frozenset(
    ("shmem_alloc_folio", "memfd_luo_preserve_folios", "alloc_migration_target")
)
"""Owners of pages that nobody but a memfd has; the last for what was moved out of CMA."""
_RESTORED = "kho_restore"
"""Owner of pages that came from the predecessor: of memfds, where it knew them as such."""
_LUO_WRITERS = ("luo_", "memfd_luo_", "kho_block_")
"""How the kernel symbols begin that write to LUO's own pages and nowhere else."""


def _kernel_with_luo(look: Look) -> KernelView | None:
    kernel = look.kernel
    if kernel is None or not kernel.liveupdate.enabled or look.outgoing is None:
        return None
    return kernel


def _tell(look: Look, name: str, problems: Sequence[Problem]) -> list[Violation]:
    return [
        look.says(
            name,
            f"{problem.path}: {problem.detail} [{problem.code}]",
            problem.phys,
            look.owner(problem.phys >> look.page_shift),
        )
        for problem in problems[:REPORTED_MAX]
    ]


def _wellformed(look: Look) -> Sequence[Violation]:
    decoded = look.luo
    if decoded is None:
        return ()
    others = _SHARED | _UNPRESERVED
    return _tell(look, "luo-wellformed", [p for p in decoded[1] if p.code not in others])


def _preserved(look: Look) -> Sequence[Violation]:
    decoded = look.luo
    if decoded is None:
        return ()
    return _tell(look, "luo-preserved", [p for p in decoded[1] if p.code in _UNPRESERVED])


def _one_owner(look: Look) -> Sequence[Violation]:
    decoded = look.luo
    if decoded is None:
        return ()
    return _tell(look, "luo-one-owner", [p for p in decoded[1] if p.code in _SHARED])


def _serialized_live(look: Look) -> Sequence[Violation]:
    kernel, decoded = look.kernel, look.luo
    if kernel is None or decoded is None:
        return ()
    luo = decoded[0]
    if luo.compatible is None:
        return ()  # luo-wellformed tells
    told = [
        (session.name, [(f.compatible, f.data, f.token) for f in session.files])
        for session in luo.sessions
    ]
    live = [
        (
            session.name,
            [(f.handler.compatible, f.serialized_data, f.token) for f in session.file_set.files],
        )
        for session in kernel.liveupdate.sessions.outgoing.sessions.values()
    ]
    name, blob = "luo-serialized-live", kernel.liveupdate.luo_ser_out
    found = []
    if [one[0] for one in told] != [one[0] for one in live]:
        text = (
            f"the successor is told of sessions {[one[0] for one in told]}, "
            f"there are {[one[0] for one in live]}"
        )
        found.append(look.says(name, text, blob))
    else:
        for (session_name, now), (_, then) in zip(live, told, strict=True):
            if now != then:
                text = (
                    f"session {session_name!r} has files {_files(now)}, "
                    f"the successor is told of {_files(then)}"
                )
                found.append(look.says(name, text, blob))
    if luo.liveupdate_num != kernel.liveupdate.liveupdate_num + 1:
        text = (
            f"the successor is told that it is live update {luo.liveupdate_num}, "
            f"after {kernel.liveupdate.liveupdate_num} of them"
        )
        found.append(look.says(name, text, blob))
    flbs = [
        (private.flb.compatible, private.outgoing.data, private.outgoing.count.value)
        for private in kernel.liveupdate.flb.registered
        if private.outgoing.count.value > 0
    ]
    if luo.flbs is not None and [tuple(flb) for flb in luo.flbs] != flbs:
        text = f"shared objects are {flbs}, the successor is told {[tuple(f) for f in luo.flbs]}"
        found.append(look.says(name, text, blob))
    return found[:REPORTED_MAX]


def _files(files: list[tuple[str, int, int]]) -> str:
    return ", ".join(f"{name} {token:#x} at {data:#x}" for name, data, token in files) or "none"


def _no_leftovers(look: Look) -> Sequence[Violation]:
    kernel = _kernel_with_luo(look)
    if kernel is None or look.outgoing is None:
        return ()
    suspects = _suspects(look, kernel)
    if not len(suspects[0]):
        return ()
    lost = minus(suspects, reachable_pages(look.hardware, kernel))
    found = []
    for start, end in pairs(lost, REPORTED_MAX):
        text = (
            f"page {start << look.page_shift:#x} (pfn {start:#x}, {end - start} pages) is "
            "preserved, but no session, file or shared object leads to it"
        )
        found.append(
            look.says("luo-no-leftovers", text, start << look.page_shift, look.owner(start))
        )
    return found


def _suspects(look: Look, kernel: KernelView) -> Ranges:
    # Preserved pages that can belong to LUO or to a memfd only.
    assert look.outgoing is not None
    covered = look.outgoing.covered
    starts, ends, states = kernel.pages.pages.columns()
    memfds = [
        (start, end)
        for start, end, state in zip(starts, ends, states, strict=True)
        if state.owner in _MEMFD_OWNERS
    ]
    others = [
        (start, end)
        for start, end, state in zip(starts, ends, states, strict=True)
        if state.owner == "kho_alloc_preserve"
    ]
    ram = look.hardware.ram
    own = []
    for start, end in _shared_with(covered, others):
        writers = ram.last_writers(list(range(start, end)))
        own += [
            (pfn, pfn + 1)
            for pfn, by in zip(range(start, end), writers, strict=True)
            if by is not None and by[1].startswith(_LUO_WRITERS)
        ]
    theirs = [] if look.handed is None else [was.pages for was in look.handed.memfds.values()]
    restored = _as_ranges(
        [
            (start, end)
            for start, end, state in zip(starts, ends, states, strict=True)
            if state.owner == _RESTORED
        ]
    )
    again = [both(restored, pages) for pages in theirs]
    return both(covered, merged(_as_ranges([*memfds, *own]), *again))


def _shared_with(covered: Ranges, pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    starts, ends = both(covered, _as_ranges(pages))
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _as_ranges(pages: list[tuple[int, int]]) -> Ranges:
    columns = np.array(pages, dtype=np.int64).reshape(-1, 2)
    return merged((columns[:, 0], columns[:, 1]))


def _references(look: Look) -> Sequence[Violation]:
    kernel = look.kernel
    if kernel is None or not kernel.liveupdate.enabled:
        return ()
    luo = kernel.liveupdate
    sessions = luo.sessions
    name = "luo-references"
    held: dict[int, LuoFileView] = {}
    found = []
    for header in (sessions.outgoing, sessions.incoming):
        for session in header.sessions.values():
            for luo_file in session.file_set.files:
                file = luo_file.file
                if file is None:
                    continue
                held[id(file)] = luo_file
                if file.f_count < 1:
                    text = f"session {session.name!r} holds {file!r}, which was released"
                    found.append(look.says(name, text, -1))
    owned = {id(file): file for file in luo.preserved_files.values()}
    for key, file in owned.items():
        if key not in held:
            found.append(look.says(name, f"{file!r} is owned by LUO and in no session", -1))
    for session_name, luo_file in outgoing_files(kernel):
        # 6.19 and 7.0 keep no table of the files that are in a session.
        is_known = id(luo_file.file) in owned or not kernel.release.luo_one_owner
        if luo_file.file is not None and not is_known:
            text = f"{luo_file.file!r} is in session {session_name!r} and LUO does not know it"
            found.append(look.says(name, text, -1))
    users: dict[int, int] = {}
    for _, luo_file in outgoing_files(kernel):
        for private in luo.flb.links.get(luo_file.handler, ()):
            users[id(private)] = users.get(id(private), 0) + 1
    for private in luo.flb.registered:
        count, nr_files = private.outgoing.count.value, users.get(id(private), 0)
        if count < nr_files:
            text = (
                f"{nr_files} files need the shared object {private.flb.compatible!r}, "
                f"which counts {count} references"
            )
            found.append(look.says(name, text, -1))
        if private.incoming.count.value < 0:
            text = f"the count of the shared object {private.flb.compatible!r} went below zero"
            found.append(look.says(name, text, -1))
    return found[:REPORTED_MAX]


def _retrieved_once(look: Look) -> Sequence[Violation]:
    kernel = look.kernel
    if kernel is None or not kernel.liveupdate.enabled:
        return ()
    seen: set[tuple[str, int, int]] = set()
    found = []
    for luo_file in kernel.liveupdate.retrieved:
        key = (luo_file.handler.compatible, luo_file.token, luo_file.serialized_data)
        if key in seen:
            text = f"token {luo_file.token:#x} of {luo_file.handler.compatible} was retrieved twice"
            found.append(look.says("luo-retrieved-once", text, luo_file.serialized_data))
        seen.add(key)
    objects = [private.flb.compatible for private in kernel.liveupdate.flb.retrieved]
    for name in sorted({name for name in objects if objects.count(name) > 1}):
        text = f"the shared object {name!r} was retrieved {objects.count(name)} times"
        found.append(look.says("luo-retrieved-once", text, -1))
    return found[:REPORTED_MAX]


def _file_equal(look: Look) -> Sequence[Violation]:
    kernel, handed = look.kernel, look.handed
    if kernel is None or handed is None or not kernel.liveupdate.retrieved:
        return ()
    luo_file = kernel.liveupdate.retrieved[-1]
    was = handed.memfds.get(luo_file.serialized_data)
    if was is None or luo_file.file is None or not is_memfd(luo_file):
        return ()
    name = "luo-file-equal"
    file, phys = luo_file.file, luo_file.serialized_data
    found = []
    for what, value in attributes_of(file, luo_file.handler.compatible).items():
        if value != was.attributes[what]:
            text = (
                f"the {what} of the memfd with token {luo_file.token:#x} was "
                f"{was.attributes[what]:#x} and is {value:#x}"
            )
            found.append(look.says(name, text, phys))
    now = pieces_of(file, look.page_size)
    for then, is_now in zip([*was.pieces, None], [*now, None], strict=False):
        if then != is_now:
            text = (
                f"the memfd with token {luo_file.token:#x} had {_piece(then)} and has "
                f"{_piece(is_now)}"
            )
            found.append(look.says(name, text, phys))
            break
    for pfn in look.by_kernels(was.kept.changed(was.pages))[:REPORTED_MAX]:
        text = (
            f"page {pfn << look.page_shift:#x} (pfn {pfn:#x}) of the memfd with token "
            f"{luo_file.token:#x} changed on the way"
        )
        found.append(look.says(name, text, pfn << look.page_shift))
    return found


def _piece(piece: tuple[int, int, int, bool] | None) -> str:
    if piece is None:
        return "nothing there"
    index, pfn, nr_pages, readable = piece
    state = "" if readable else " that read as zeros"
    return f"{nr_pages} pages{state} from page {index} on at pfn {pfn:#x}"


_LEAVING = frozenset((JUMP,))
_RUNNING = frozenset((BOOTED, JUMP, AT_ANY_TIME))

INVARIANTS = (
    Invariant(
        "luo-wellformed",
        "Sessions, files and their records are what the orchestrator writes, field by field.",
        _LEAVING,
        _wellformed,
    ),
    Invariant(
        "luo-preserved",
        "Every page that sessions, files and their records lie in is preserved.",
        _LEAVING,
        _preserved,
    ),
    Invariant(
        "luo-one-owner",
        "No page that the orchestrator hands over belongs to two files or two records.",
        _LEAVING,
        _one_owner,
    ),
    Invariant(
        "luo-serialized-live",
        "What the successor is told of sessions, files and shared objects is what there is.",
        _LEAVING,
        _serialized_live,
    ),
    Invariant(
        "luo-no-leftovers",
        "A page that was preserved for a session is let go when the session is.",
        _RUNNING,
        _no_leftovers,
    ),
    Invariant(
        "luo-references",
        "Files that are in a session are held, and files that are in none are not.",
        _RUNNING,
        _references,
    ),
    Invariant(
        "luo-retrieved-once",
        "A handler is asked at most once for the file behind a token, and for a shared object.",
        _RUNNING,
        _retrieved_once,
    ),
    Invariant(
        "luo-file-equal",
        "A memfd comes back with its size, position, seals, accounting, folios and bytes.",
        frozenset((RETRIEVED,)),
        _file_equal,
    ),
)
