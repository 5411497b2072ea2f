"""kexec: loading the next kernel and jumping into it.

Models ``kernel/kexec_file.c`` (``kexec_file_load``, ``kexec_add_buffer``, ``locate_mem_hole_*``)
and ``kernel/kexec_core.c`` (``sanity_check_segment_list``, ``kimage_load_segment``,
``kimage_free``, ``kernel_kexec``, ``machine_kexec``) @ 7.3. A segment's bytes wait in pages of the
page allocator until the jump copies them to their place; a crash image's are put into place at
once. Left out: signatures, purgatory's digests, CMA segments, ``kexec_load``, random placement, the
way back from a preserve-context image.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from khosim.errors import InputError, KernelError
from khosim.kernel.kexec_arm64 import load_arm64_image, probe_arm64_image
from khosim.kernel.kexec_bzimage import load_bzimage, probe_bzimage
from khosim.kernel.kho import kho_fill_kimage, kho_locate_mem_hole

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KexecBuf", "Kimage", "Segment", "kernel_kexec", "kexec_file_load", "machine_kexec")

_ULONG_MAX = (1 << 64) - 1
_SEGMENT_MAX = 16


class KexecBuf(NamedTuple):
    """``struct kexec_buf``: what one buffer asks for; sizes and addresses in bytes."""

    name: str
    memsz: int
    align: int
    buf_min: int
    buf_max: int
    top_down: bool


class Segment(NamedTuple):
    """``struct kexec_segment``: ``data`` goes to ``[mem, mem + memsz)``, the rest is zero."""

    name: str
    data: bytes
    mem: int
    memsz: int


class Kimage:
    """``struct kimage``: the segments of one kernel to jump to.

    ``entry`` are the registers the new kernel starts with. ``source_runs`` are the pages that hold
    the segments' bytes until the jump, as ``(start_pfn, nr_pages)`` per segment; ``control_runs``
    those of the image's own bookkeeping.
    """

    __slots__ = (
        "_kernel",
        "control_runs",
        "elf_headers_bytes",
        "elf_load_addr",
        "entry",
        "is_crash",
        "kho_fdt",
        "kho_scratch",
        "preserve_context",
        "segments",
        "source_runs",
    )

    def __init__(self, kernel: Kernel, *, is_crash: bool = False) -> None:
        self._kernel = kernel
        self.is_crash = is_crash
        self.preserve_context = False
        """``KEXEC_PRESERVE_CONTEXT``: only ``kexec_load`` makes such images; set it by hand."""
        self.segments: list[Segment] = []
        self.source_runs: list[list[tuple[int, int]]] = []
        self.control_runs: list[tuple[int, int]] = []
        self.kho_fdt = 0
        self.kho_scratch: Segment | None = None
        self.elf_load_addr = 0
        self.elf_headers_bytes = 0
        self.entry: dict[str, int] = {}

    def add_buffer(
        self,
        data: bytes,
        *,
        name: str,
        memsz: int,
        align: int,
        buf_min: int = 0,
        buf_max: int = _ULONG_MAX,
        top_down: bool,
    ) -> Segment:
        """``kexec_add_buffer``: find a place and add the segment.

        Raises -EINVAL for too many segments, -EADDRNOTAVAIL where nothing fits.
        """
        if len(self.segments) >= _SEGMENT_MAX:
            raise KernelError(errno.EINVAL, "kexec_add_buffer", "too many segments")
        page = self._kernel.arch.page_size
        memsz = (memsz + page - 1) & -page
        kbuf = KexecBuf(name, memsz, max(align, page), buf_min, buf_max, top_down)
        segment = Segment(name, data, self._locate(kbuf), memsz)
        self.segments.append(segment)
        if self._kernel.trace is not None:
            self._kernel.emit("kexec_add_buffer", {"name": name, "memsz": memsz}, segment.mem)
        return segment

    def replace(self, segment: Segment, data: bytes) -> None:
        """Give a placed segment its final bytes (the loader patches its buffers last)."""
        i = self.segments.index(segment)
        self.segments[i] = segment._replace(data=data)

    def _locate(self, kbuf: KexecBuf) -> int:
        # kexec_locate_mem_hole
        found: list[int] = []

        def fits(start: int, end: int, wanted: KexecBuf) -> bool:
            at = self._locate_in(start, end, wanted)
            if at is not None:
                found.append(at)
            return at is not None

        if not kho_locate_mem_hole(self._kernel, self, kbuf, fits) and not any(
            fits(start, end, kbuf) for start, end in self._free_ranges(kbuf.top_down)
        ):
            raise KernelError(
                errno.EADDRNOTAVAIL, "kexec_locate_mem_hole", f"no room for {kbuf.name}"
            )
        return found[0]

    def _free_ranges(self, top_down: bool) -> Iterable[tuple[int, int]]:
        # kexec_walk_resources, or kexec_walk_memblock where memblock is kept after boot.
        kernel = self._kernel
        if self.is_crash:
            return kernel.crashk_res
        if kernel.arch.name == "arm64":
            free = kernel.memblock.for_each_free_mem_range(reverse=top_down)
            return [(start, end) for start, end, _ in free]
        return reversed(kernel.system_ram) if top_down else kernel.system_ram

    def _locate_in(self, start: int, end: int, kbuf: KexecBuf) -> int | None:
        # locate_mem_hole_callback; the kernel's ranges are inclusive there.
        last = end - 1
        if end - start < kbuf.memsz or last < kbuf.buf_min or start > kbuf.buf_max:
            return None
        if kbuf.top_down:
            at = (min(last, kbuf.buf_max) - kbuf.memsz + 1) & -kbuf.align
            while at >= start and at >= kbuf.buf_min:
                clash = self._clash(at, at + kbuf.memsz)
                if clash is None:
                    return at
                # The kernel steps page by page; every step down to the clash clashes too.
                at = (clash.mem - kbuf.memsz) & -kbuf.align
            return None
        at = (max(start, kbuf.buf_min) + kbuf.align - 1) & -kbuf.align
        while at + kbuf.memsz - 1 <= min(last, kbuf.buf_max):
            clash = self._clash(at, at + kbuf.memsz)
            if clash is None:
                return at
            at = (clash.mem + clash.memsz + kbuf.align - 1) & -kbuf.align
        return None

    def _clash(self, start: int, end: int) -> Segment | None:
        # kimage_is_destination_range
        for segment in self.segments:
            if start < segment.mem + segment.memsz and end > segment.mem:
                return segment
        return None

    def sanity_check(self) -> None:
        """``sanity_check_segment_list``: raises -EINVAL.

        For a segment with more bytes than room, and for an image of more than half of memory.
        """
        kernel = self._kernel
        shift = kernel.arch.page_shift
        symbol = "sanity_check_segment_list"
        half = kernel.total_ram_pages() // 2
        total = 0
        for segment in self.segments:
            if len(segment.data) > segment.memsz:
                raise KernelError(errno.EINVAL, symbol, f"{segment.name} is larger than its place")
            total += segment.memsz >> shift
        if total > half:
            raise KernelError(errno.EINVAL, symbol, "more than half of memory")

    def load_segments(self) -> None:
        """``kimage_load_segment`` for each: copy the bytes into RAM.

        Source pages that hold nothing but zeros are taken but not cleared.

        Raises -ENOMEM without pages and gives back what it took.
        """
        kernel = self._kernel
        by = kernel.by("kimage_load_segment")
        ram, shift = kernel.ram, kernel.arch.page_shift
        if self.is_crash:
            # kimage_load_crash_segment: nobody else uses the crash region.
            for segment in self.segments:
                filled = len(segment.data)
                ram.zero(segment.mem + filled, segment.memsz - filled, by)
                if filled:
                    ram.write(segment.mem, segment.data, by)
            return
        page = kernel.arch.page_size
        nr_total = sum(segment.memsz >> shift for segment in self.segments)
        # The control page, the swap page, and a page of entries for each page full of them.
        entries = nr_total + len(self.segments) + 1
        self._take(2 + -(-entries // (page // 8 - 1)), "kimage_alloc_control_pages")
        for segment in self.segments:
            runs = self._take(segment.memsz >> shift, segment.name)
            done = 0
            for pfn, count in runs:
                size = count << shift
                piece = segment.data[done : done + size]
                if not piece:
                    break  # pages of zeros: written at their destination alone
                ram.write(pfn << shift, piece, by)
                ram.zero((pfn << shift) + len(piece), -len(piece) & (page - 1), by)
                done += size

    def _take(self, nr_pages: int, what: str) -> list[tuple[int, int]]:
        runs = self._kernel.pages.alloc_pages_bulk(0, nr_pages, "kimage_load_segment")
        if what == "kimage_alloc_control_pages":
            self.control_runs = runs
        else:
            self.source_runs.append(runs)
        if sum(count for _, count in runs) < nr_pages:
            self.unload()
            raise KernelError(errno.ENOMEM, "kimage_load_segment", what)
        return runs

    def unload(self) -> None:
        """``kimage_free``: give the source and control pages back."""
        for runs in (*self.source_runs, self.control_runs):
            for pfn, count in runs:
                self._kernel.pages.free_range(pfn, pfn + count)
        self.source_runs, self.control_runs = [], []

    def relocate(self) -> None:
        """The jump's copy loop: every segment to its destination, zeros after its bytes."""
        kernel = self._kernel
        shift = kernel.arch.page_shift
        by = kernel.by("relocate_kernel")
        page = kernel.arch.page_size
        pieces: list[tuple[int, int, int]] = []
        zeros: list[tuple[int, int, int]] = []
        for segment, runs in zip(self.segments, self.source_runs, strict=False):
            filled = (len(segment.data) + page - 1) & -page
            end = segment.mem + filled
            zeros += self._onto_ram(0, end, segment.memsz - filled)
            at = segment.mem
            for pfn, count in runs:
                if at >= end:
                    break
                pieces += self._onto_ram(pfn << shift, at, min(count << shift, end - at))
                at += count << shift
        # Without KHO a destination may hold another segment's source: read all first then.
        overlap = any(
            src < segment.mem + segment.memsz and src + size > segment.mem
            for segment in self.segments
            for src, _, size in pieces
        )
        if overlap:
            contents = [kernel.ram.read(src, size) for src, _, size in pieces]
            for (_, dst, _), content in zip(pieces, contents, strict=True):
                kernel.ram.write(dst, content, by)
        else:
            tells = kernel.trace is not None and kernel.hardware.devices is not None
            for src, dst, size in pieces:
                kernel.ram.copy(src, dst, size, by)
                if tells:  # devices act in between
                    kernel.emit("relocate_kernel", {"src": src, "dst": dst, "size": size}, None)
        for _, dst, size in zeros:
            kernel.ram.zero(dst, size, by)

    def _onto_ram(self, src: int, dst: int, size: int) -> list[tuple[int, int, int]]:
        # Scratch that a hostile handover has put where no RAM is takes what is written, and is as
        # empty as before; the jump there is the end.
        hardware = self._kernel.hardware
        if hardware.is_ram(dst, size):
            return [(src, dst, size)]
        pieces = []
        for start, end in hardware.ram_ranges:
            low, high = max(start, dst), min(end, dst + size)
            if low < high:
                pieces.append((src + low - dst, low, high - low))
        return pieces


def kexec_file_load(
    kernel: Kernel,
    image: bytes,
    initrd: bytes,
    cmdline: str,
    *,
    initrd_bytes: int = 0,
    on_crash: bool = False,
) -> Kimage:
    """``kexec_file_load``: place kernel, initrd, boot parameters and scratch array.

    ``image`` is a bzImage or an arm64 ``Image``; ``initrd`` is padded with zeros to
    ``initrd_bytes``. Replaces the image that was loaded before. Raises
    :class:`~khosim.errors.KernelError`: -ENOEXEC (x86-64) or -EINVAL (arm64) for another file,
    -EINVAL, -EADDRNOTAVAIL, -ENOMEM. A failed load leaves nothing.
    """
    if not cmdline.isascii() or "\0" in cmdline:
        raise InputError("cmdline", f"{cmdline!r} is not ASCII text without NUL")
    kimage = Kimage(kernel, is_crash=on_crash)
    x86 = kernel.arch.name == "x86_64"
    if on_crash and kernel.crash_image is not None:
        # The old one goes first: it lies where the new one will.
        kernel.crash_image.unload()
        kernel.crash_image = None
    (probe_bzimage if x86 else probe_arm64_image)(image)
    kho_fill_kimage(kernel, kimage)
    size = max(initrd_bytes, len(initrd))
    (load_bzimage if x86 else load_arm64_image)(kernel, kimage, image, initrd, size, cmdline)
    kimage.sanity_check()
    kimage.load_segments()
    if on_crash:
        kernel.crash_image = kimage
    else:
        if kernel.kexec_image is not None:
            kernel.kexec_image.unload()
        kernel.kexec_image = kimage
    if kernel.trace is not None:
        segments = {segment.name: segment.mem for segment in kimage.segments}
        kernel.emit("kexec_file_load", {"segments": segments}, 0)
    return kimage


def kernel_kexec(kernel: Kernel, image: Kimage | None = None) -> None:
    """``kernel_kexec``: the reboot system call's way into ``image``, or into the loaded one.

    Raises -EINVAL without an image, and what a file refuses the live update with: then the image
    stays loaded and nothing has happened. A crash image is left for without asking anybody.
    """
    if image is None:
        image = kernel.kexec_image
    if image is None:
        raise KernelError(errno.EINVAL, "kernel_kexec", "no image is loaded")
    comes_back = image.preserve_context and kernel.release.luo_skips_preserve_context
    if not comes_back and not image.is_crash:
        if kernel.host is not None and kernel.drivers is not None:
            kernel.host.checkpoint(kernel, "reboot")
        kernel.liveupdate.reboot()
        if kernel.drivers is not None:
            kernel.drivers.shutdown()
    machine_kexec(kernel, image)


def machine_kexec(kernel: Kernel, image: Kimage) -> None:
    """``machine_kexec``: copy the segments and leave; the kernel is dead afterwards.

    Only RAM and the entry registers are left for whoever boots next. An image that preserves the
    context comes back (``CONFIG_KEXEC_JUMP``): what runs in between is left out, and nothing is
    changed.
    """
    if image.preserve_context:
        if kernel.trace is not None:
            kernel.emit("machine_kexec", {"preserve_context": True}, None)
        return
    kernel.phase = "machine_kexec"
    kernel.kexec_image = image
    if kernel.trace is not None:
        kernel.emit("machine_kexec", dict(image.entry), None)
    if kernel.host is not None:
        kernel.host.checkpoint(kernel, "jump")
    image.relocate()
    kernel.hardware.registers = dict(image.entry)
    kernel.alive = False
