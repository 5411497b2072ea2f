"""What the checkers read of a kernel: plain data, described by shape.

A :class:`KernelView` is any object with these attributes; the checkers never see the class behind
it, and call nothing on it that computes. Addresses are physical, in bytes; a pfn is a page frame
number.
"""

# ruff: noqa: D102 (an attribute is named as in the kernel; its class says what it belongs to)
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = (
    "ImageView",
    "KernelView",
    "LuoView",
    "MemblockView",
    "PageMapView",
    "PageStateView",
    "PagesView",
    "SegmentView",
    "ZoneView",
)


class ReleaseView(Protocol):
    """What a kernel's release declares, and what it allows."""

    @property
    def kho_compatible(self) -> str: ...
    @property
    def tracker(self) -> str: ...
    @property
    def decoder(self) -> str: ...
    @property
    def bitmap_bytes(self) -> int: ...
    @property
    def memory_map_prop(self) -> str: ...
    @property
    def subtree_phys_prop(self) -> str: ...
    @property
    def subtree_size_prop(self) -> str: ...
    @property
    def scratch_extension(self) -> bool: ...
    @property
    def luo_one_owner(self) -> bool: ...


class KhoInView(Protocol):
    """``struct kho_in``: both addresses are 0 unless a handover was taken over."""

    @property
    def fdt_phys(self) -> int: ...
    @property
    def scratch_phys(self) -> int: ...
    @property
    def restored(self) -> Sequence[tuple[int, int]]: ...


class KhoOutView(Protocol):
    """``struct kho_out``: where the root FDT for the successor is, 0 while there is none."""

    @property
    def handover_phys(self) -> int: ...


class RegionArrayView(Protocol):
    """One of memblock's arrays, as parallel columns sorted by address."""

    @property
    def base(self) -> Sequence[int]: ...
    @property
    def end(self) -> Sequence[int]: ...
    @property
    def flags(self) -> Sequence[int]: ...
    @property
    def nid(self) -> Sequence[int]: ...


class MemblockView(Protocol):
    """memblock; ``allocations`` are ``(phys, len_bytes)`` of all it ever handed out."""

    @property
    def memory(self) -> RegionArrayView: ...
    @property
    def reserved(self) -> RegionArrayView: ...
    @property
    def allocations(self) -> Sequence[tuple[int, int]]: ...


class PageStateView(Protocol):
    """What the blocks of a run of the page map share."""

    @property
    def kind(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def owner(self) -> str: ...


class PageMapView(Protocol):
    """The state of every page that is not free, as sorted runs of page frames."""

    def columns(self) -> tuple[Sequence[int], Sequence[int], Sequence[PageStateView]]:
        """First frames, ends and states of all runs."""


class ZoneView(Protocol):
    """A zone: ``free[migrate type][order]`` holds first pfns, ``max_runs`` the largest blocks."""

    @property
    def name(self) -> str: ...
    @property
    def start_pfn(self) -> int: ...
    @property
    def end_pfn(self) -> int: ...
    @property
    def max_order(self) -> int: ...
    @property
    def managed_pages(self) -> int: ...
    @property
    def nr_free(self) -> Sequence[int]: ...
    @property
    def free(self) -> Sequence[Sequence[Mapping[int, None]]]: ...
    @property
    def max_runs(self) -> Sequence[Iterable[Sequence[int]]]: ...


class PagesView(Protocol):
    """The page allocator: its zones, its page map, and what is not initialised yet."""

    @property
    def zones(self) -> Sequence[ZoneView]: ...
    @property
    def deferred(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def pages(self) -> PageMapView: ...


class ReserveMemView(Protocol):
    """``reserved_mem_table``: ``(name, start, size)``, size 0 once released."""

    @property
    def regions(self) -> Sequence[tuple[str, int, int]]: ...


class SegmentView(Protocol):
    """A piece of a kexec image and where it goes."""

    @property
    def name(self) -> str: ...
    @property
    def mem(self) -> int: ...
    @property
    def memsz(self) -> int: ...


class ImageView(Protocol):
    """A kexec image; ``kho_scratch`` is None where it carries no handover."""

    @property
    def segments(self) -> Sequence[SegmentView]: ...
    @property
    def kho_fdt(self) -> int: ...
    @property
    def kho_scratch(self) -> SegmentView | None: ...


class BlockSetView(Protocol):
    """A set of KHO blocks: physical addresses of all, in order; ``head_pa`` is the first or 0."""

    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def head_pa(self) -> int: ...


class CacheRunView(Protocol):
    """Folios of a file: pages ``index`` to ``end`` of it are at ``pfn`` and on."""

    @property
    def index(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def pfn(self) -> int: ...
    @property
    def uptodate(self) -> bool: ...


class InodeView(Protocol):
    """A shmem inode; ``mapping`` iterates over its folios in order."""

    @property
    def i_size(self) -> int: ...
    @property
    def i_blocks(self) -> int: ...
    @property
    def seals(self) -> int: ...
    @property
    def mapping(self) -> Iterable[CacheRunView]: ...


class MemfdView(Protocol):
    """An open memfd."""

    @property
    def f_pos(self) -> int: ...
    @property
    def f_count(self) -> int: ...
    @property
    def inode(self) -> InodeView: ...


class HandlerView(Protocol):
    """A file handler, known by its name."""

    @property
    def compatible(self) -> str: ...


class LuoFileView(Protocol):
    """``struct luo_file``; ``file`` is None until it is retrieved in the successor."""

    @property
    def handler(self) -> HandlerView: ...
    @property
    def token(self) -> int: ...
    @property
    def serialized_data(self) -> int: ...
    @property
    def retrieve_status(self) -> int: ...
    @property
    def file(self) -> Any: ...


class LuoFileSetView(Protocol):
    """``struct luo_file_set``: files in the order of preservation, and their blocks."""

    @property
    def files(self) -> Sequence[LuoFileView]: ...
    @property
    def block_set(self) -> BlockSetView: ...


class LuoSessionView(Protocol):
    """``struct luo_session``; ``retrieved`` is for those that came from the predecessor."""

    @property
    def name(self) -> str: ...
    @property
    def retrieved(self) -> bool: ...
    @property
    def file_set(self) -> LuoFileSetView: ...


class SessionHeaderView(Protocol):
    """``struct luo_session_header``: sessions by name, in order, and their blocks."""

    @property
    def sessions(self) -> Mapping[str, LuoSessionView]: ...
    @property
    def block_set(self) -> BlockSetView: ...


class LuoSessionsView(Protocol):
    """``luo_session_global``; ``serialized`` from the reboot system call on."""

    @property
    def incoming(self) -> SessionHeaderView: ...
    @property
    def outgoing(self) -> SessionHeaderView: ...
    @property
    def serialized(self) -> bool: ...
    @property
    def deserialized(self) -> int | None: ...


class RefcountView(Protocol):
    """``refcount_t``; a negative ``value`` is a saturated one."""

    @property
    def value(self) -> int: ...


class FlbStateView(Protocol):
    """``struct luo_flb_private_state``: one direction of an object."""

    @property
    def count(self) -> RefcountView: ...
    @property
    def data(self) -> int: ...


class LuoFlbView(Protocol):
    """``struct luo_flb_private``."""

    @property
    def flb(self) -> HandlerView: ...
    @property
    def incoming(self) -> FlbStateView: ...
    @property
    def outgoing(self) -> FlbStateView: ...


class LuoFlbsView(Protocol):
    """``luo_flb_global``: ``links`` are the objects of each handler.

    ``retrieved`` has an entry for each time that an object's ``retrieve`` was called.
    """

    @property
    def registered(self) -> Sequence[LuoFlbView]: ...
    @property
    def links(self) -> Mapping[Any, Sequence[LuoFlbView]]: ...
    @property
    def retrieved(self) -> Sequence[LuoFlbView]: ...


class LuoView(Protocol):
    """The orchestrator; ``preserved_files`` maps the id of each owned file to the file.

    ``retrieved`` has an entry for each time that a handler was asked to retrieve a file.
    """

    @property
    def enabled(self) -> bool: ...
    @property
    def liveupdate_num(self) -> int: ...
    @property
    def luo_ser_out(self) -> int: ...
    @property
    def preserved_files(self) -> Mapping[int, Any]: ...
    @property
    def retrieved(self) -> Sequence[LuoFileView]: ...
    @property
    def sessions(self) -> LuoSessionsView: ...
    @property
    def flb(self) -> LuoFlbsView: ...


class KernelView(Protocol):
    """One kernel generation, as far as the checkers look at it.

    ``gigantic_pages`` are the ``(first pfn, pages)`` of huge pages that came from memblock.
    """

    @property
    def generation(self) -> int: ...
    @property
    def messages(self) -> Sequence[str]: ...
    @property
    def release(self) -> ReleaseView: ...
    @property
    def kho_enable(self) -> bool: ...
    @property
    def kho_in(self) -> KhoInView: ...
    @property
    def kho_out(self) -> KhoOutView: ...
    @property
    def liveupdate(self) -> LuoView: ...
    @property
    def kho_scratch_phys(self) -> int: ...
    @property
    def kho_scratch_cnt(self) -> int: ...
    @property
    def gigantic_pages(self) -> Sequence[tuple[int, int]]: ...
    @property
    def memblock(self) -> MemblockView: ...
    @property
    def pages(self) -> PagesView: ...
    @property
    def reserve_mem(self) -> ReserveMemView: ...
    @property
    def kexec_image(self) -> ImageView | None: ...
    @property
    def drivers(self) -> Any: ...
