"""What the kit does with memory: folios, ranges of pages, vmalloc areas, from birth to restore.

As a driver would (``include/linux/kexec_handover.h`` @ 7.3): it takes back what it preserved
before it frees it, and asks for nothing twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from khosim.testing.rules import Operation
from khosim.testing.step import Thing, Written

if TYPE_CHECKING:
    from khosim.testing.life import Life

__all__ = ("MEMORY", "VMALLOC")

_PICK = st.integers(0, 7)
_OWNERS = ("guest", "iommu", "agent")
_HELD_MAX = 24


def _can(life: Life, function: str) -> bool:
    return life.kernel.kho_enable and life.kernel.release.has(function)


def _drop(life: Life, thing: Thing, source: str) -> Written:
    def done() -> None:
        del life.things[thing.name]

    return Written(source, done)


def _move(thing: Thing, state: str, source: str) -> Written:
    def done() -> None:
        thing.state = state

    return Written(source, done)


# -- folios --------------------------------------------------------------------------------------


def _alloc_folio(life: Life, order: int, owner: str, content: bytes) -> Written:
    name = life.fresh("folio")

    def done() -> None:
        life.add(name, "folio", nr=1 << order, order=order, content=content)

    source = f"{name} = kernel.alloc_folio({order}, owner={owner!r})"
    return Written(source, done, after=(f"{name}.write(0, {content!r})",))


def _write_folio(life: Life, pick: int, content: bytes) -> Written | None:
    thing = life.pick(pick, "folio", "held", "preserved")
    if thing is None:
        return None

    def done() -> None:
        thing.facts["content"] = content + thing.facts["content"][len(content) :]

    return Written(f"{thing.name}.write(0, {content!r})", done)


def _preserve_folio(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "folio", "held")
    if thing is None or not life.kernel.kho_enable:
        return None
    return _move(thing, "preserved", f"kernel.kho_preserve_folio({thing.name})")


def _unpreserve_folio(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "folio", "preserved")
    if thing is None or not life.kernel.release.has("kho_unpreserve_folio"):
        return None
    device = thing.facts.get("device")
    written = _move(thing, "held", f"kernel.kho_unpreserve_folio({thing.name})")
    if device:
        written.before = (f"{device}.stop()",)
        thing.facts.pop("device")
    return written


def _free_folio(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "folio", "held")
    return None if thing is None else _drop(life, thing, f"{thing.name}.put()")


def _restore_folio(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "folio", "incoming")
    if thing is None:
        return None
    name, content = thing.name, thing.facts["content"]
    after: tuple[str, ...] = (
        f"assert {name} is not None, '{name} cannot be restored'",
        f"assert {name}.order == {thing.facts['order']}",
        f"assert {name}.read(0, {len(content)}) == {content!r}",
    )
    written = _move(thing, "held", f"{name} = kernel.kho_restore_folio({name}.phys)")
    device = thing.facts.pop("device", "")
    if device:
        after += (
            f"{device}.stop()",
            f"assert {name}.read(8, 8) == {device}.count.to_bytes(8, 'little')",
        )
    written.after = after
    return written


# -- ranges of pages -----------------------------------------------------------------------------


def _alloc_pages(life: Life, nr_pages: int, owner: str) -> Written:
    name = life.fresh("pfn")
    return Written(
        f"{name} = kernel.alloc_pages_exact({nr_pages}, owner={owner!r})",
        lambda: life.add(name, "pages", nr=nr_pages),
    )


def _preserve_pages(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "pages", "held")
    if thing is None or not _can(life, "kho_preserve_pages"):
        return None
    source = f"kernel.kho_preserve_pages({thing.name}, {thing.facts['nr']})"
    return _move(thing, "preserved", source)


def _unpreserve_pages(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "pages", "preserved")
    if thing is None or not life.kernel.release.has("kho_unpreserve_pages"):
        return None
    source = f"kernel.kho_unpreserve_pages({thing.name}, {thing.facts['nr']})"
    return _move(thing, "held", source)


def _restore_pages(life: Life, pick: int) -> Written | None:
    thing = life.pick(pick, "pages", "incoming")
    if thing is None or not life.kernel.release.has("kho_restore_pages"):
        return None
    name, nr_pages = thing.name, thing.facts["nr"]
    source = (
        f"assert kernel.kho_restore_pages({name} * kernel.arch.page_size, {nr_pages}) == {name}"
    )
    return _move(thing, "held", source)


# -- vmalloc areas -------------------------------------------------------------------------------


def _vmalloc(life: Life, nr_pages: int, huge: bool) -> Written:
    name = life.fresh("area")
    source = f"{name} = vmalloc(kernel, {nr_pages} * kernel.arch.page_size, huge={huge})"
    content = name.encode()

    def done() -> None:
        if life.vars[name] is not None:
            life.add(name, "area", content=content, nr=nr_pages)
            life.vars[name].write(0, content)
            life.lines.append(f"{name}.write(0, {content!r})")

    return Written(source, done)


def _preserve_vmalloc(life: Life, pick: int) -> Written | None:
    area = life.pick(pick, "area", "held")
    if area is None or not _can(life, "kho_preserve_vmalloc"):
        return None
    source = f"kho_preserve_vmalloc(kernel, {area.name}, {area.name}_slot)"
    written = _move(area, "preserved", source)
    written.before = (f"{area.name}_slot = KhoVmallocSlot(kernel)",)
    return written


def _unpreserve_vmalloc(life: Life, pick: int) -> Written | None:
    area = life.pick(pick, "area", "preserved")
    if area is None or not life.kernel.release.has("kho_unpreserve_vmalloc"):
        return None
    name = area.name
    written = _move(area, "held", f"kho_unpreserve_vmalloc(kernel, {name}_slot)")
    if not life.kernel.release.finalize:
        written.after = (
            f"for pfn, nr_pages in {name}.runs:\n    assert_not_preserved(kernel, pfn, nr_pages)",
        )
    return written


def _restore_vmalloc(life: Life, pick: int) -> Written | None:
    area = life.pick(pick, "area", "incoming")
    if area is None or not life.kernel.release.has("kho_restore_vmalloc"):
        return None
    name, content = area.name, area.facts["content"]
    written = _move(area, "held", f"{name} = kho_restore_vmalloc(kernel, slot)")
    written.before = ("slot = KhoVmallocSlot(kernel)", f"slot.store({name}_slot.load())")
    written.after = (
        f"assert {name} is not None, '{name} cannot be restored'",
        f"assert {name}.read(0, {len(content)}) == {content!r}",
    )
    return written


def _vfree(life: Life, pick: int) -> Written | None:
    area = life.pick(pick, "area", "held")
    return None if area is None else _drop(life, area, f"vfree(kernel, {area.name})")


_SIMPLEST = {"pick": 0, "order": 0, "nr_pages": 1, "huge": False, "content": b"a"}


def _op(
    name: str, write: Any, weight: int, needs: str = "", *, can_fail: bool = False, **args: Any
) -> Operation:
    # needs: "KIND STATE ..." of the things of which there has to be one.
    simplest = {arg: _SIMPLEST[arg] for arg in args if arg in _SIMPLEST}
    kind, *states = needs.split() or [""]

    def when(life: Life) -> bool:
        return bool(life.of(kind, *states)) if kind else len(life.things) < _HELD_MAX

    may_refuse = frozenset() if kind else frozenset(("ENOMEM",))  # large folios are rare
    return Operation(name, write, args, weight, may_refuse, when, can_fail, None, simplest)


_CONTENT = st.binary(min_size=1, max_size=4)
_ORDER = st.sampled_from((0, 0, 0, 1, 2, 3, 5, 9))
_NR = st.integers(1, 9)
_NR_VMALLOC = st.sampled_from((1, 3, 511, 512))
_OWNER = st.sampled_from(_OWNERS)

MEMORY: tuple[Operation, ...] = (
    _op(
        "alloc_folio", _alloc_folio, 6, can_fail=True, order=_ORDER, owner=_OWNER, content=_CONTENT
    ),
    _op("write_folio", _write_folio, 3, "folio held preserved", pick=_PICK, content=_CONTENT),
    _op("preserve_folio", _preserve_folio, 8, "folio held", can_fail=True, pick=_PICK),
    _op("unpreserve_folio", _unpreserve_folio, 4, "folio preserved", pick=_PICK),
    _op("free_folio", _free_folio, 3, "folio held", pick=_PICK),
    _op("restore_folio", _restore_folio, 10, "folio incoming", pick=_PICK),
    _op("alloc_pages", _alloc_pages, 3, can_fail=True, nr_pages=_NR, owner=_OWNER),
    _op("preserve_pages", _preserve_pages, 4, "pages held", can_fail=True, pick=_PICK),
    _op("unpreserve_pages", _unpreserve_pages, 3, "pages preserved", pick=_PICK),
    _op("restore_pages", _restore_pages, 6, "pages incoming", pick=_PICK),
)
"""Folios and ranges of pages."""

VMALLOC: tuple[Operation, ...] = (
    _op("vmalloc", _vmalloc, 3, nr_pages=_NR_VMALLOC, huge=st.booleans()),
    _op("preserve_vmalloc", _preserve_vmalloc, 4, "area held", can_fail=True, pick=_PICK),
    _op("unpreserve_vmalloc", _unpreserve_vmalloc, 3, "area preserved", pick=_PICK),
    _op("restore_vmalloc", _restore_vmalloc, 5, "area incoming", pick=_PICK),
    _op("vfree", _vfree, 2, "area held", pick=_PICK),
)
"""Vmalloc areas; the successor gets the descriptor from the program."""
