"""Loading an ``Image``: where arm64 puts kernel, initrd and device tree.

Models ``arch/arm64/kernel/{kexec_image,machine_kexec_file}.c`` and
``drivers/of/kexec.c:of_kexec_alloc_and_setup_fdt`` with ``kho_add_chosen`` @ 7.3. The next kernel's
device tree is this kernel's own with ``/chosen`` and the memory reservations edited. ELF core
headers are a segment of the right size without content. Left out: random seeds, IMA.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.abi.arm64_image import Arm64ImageHeader, parse_arm64_image
from khosim.errors import KernelError
from khosim.kernel.kexec_bzimage import elf_headers_bytes

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kexec import Kimage, Segment

__all__ = ("load_arm64_image", "probe_arm64_image")

_MIN_KIMG_ALIGN = 2 << 20
_FDT_EXTRA_SPACE = 0x1000
_GIB = 1 << 30
_64_KIB = 64 << 10
_U64 = struct.Struct(">Q")


def probe_arm64_image(image: bytes) -> Arm64ImageHeader:
    """``image_probe``: raises -EINVAL (not -ENOEXEC) for another kind of file."""
    header = parse_arm64_image(image)
    if header is None:
        raise KernelError(errno.EINVAL, "image_probe", "not an arm64 Image")
    return header


def load_arm64_image(
    kernel: Kernel, kimage: Kimage, image: bytes, initrd: bytes, initrd_bytes: int, cmdline: str
) -> None:
    """``image_load``: the kernel bottom up, then the rest; the next hole where that fails."""
    header = probe_arm64_image(image)
    if not header.image_size:
        raise KernelError(errno.EINVAL, "image_load", "the image does not say its size")
    before = len(kimage.segments)
    buf_min = 0
    while True:
        loaded = kimage.add_buffer(
            image,
            name="kernel",
            memsz=header.image_size + header.text_offset,
            align=_MIN_KIMG_ALIGN,
            buf_min=buf_min,
            top_down=False,
        )
        try:
            dtb = _load_other_segments(kernel, kimage, loaded, initrd, initrd_bytes, cmdline)
            break
        except KernelError:
            # Whatever it was: try the next hole. The error of the last one is what is returned.
            del kimage.segments[before:]
            buf_min = loaded.mem + loaded.memsz
    start = loaded.mem + header.text_offset
    i = kimage.segments.index(loaded)
    memsz = loaded.memsz - header.text_offset
    kimage.segments[i] = loaded._replace(mem=start, memsz=memsz)
    kimage.entry = {"pc": start, "x0": dtb.mem}


def _load_other_segments(
    kernel: Kernel,
    kimage: Kimage,
    loaded: Segment,
    initrd: bytes,
    initrd_bytes: int,
    cmdline: str,
) -> Segment:
    buf_min = loaded.mem + loaded.memsz  # nothing goes below the kernel
    if kimage.is_crash:
        ranges = list(kernel.memblock.for_each_mem_range())
        size = elf_headers_bytes(kernel, len(ranges) + len(kernel.crashk_res))
        headers = kimage.add_buffer(
            b"", name="elfcorehdr", memsz=size, align=_64_KIB, buf_min=buf_min, top_down=True
        )
        kimage.elf_load_addr, kimage.elf_headers_bytes = headers.mem, size
    initrd_mem = 0
    if initrd_bytes:
        initrd_mem = kimage.add_buffer(
            initrd,
            name="initrd",
            memsz=initrd_bytes,
            align=0,
            buf_min=buf_min,
            buf_max=(loaded.mem & -_GIB) + 32 * _GIB,
            top_down=False,
        ).mem
    dtb = _setup_fdt(kernel, kimage, initrd_mem, initrd_bytes, cmdline)
    return kimage.add_buffer(
        dtb, name="device tree", memsz=len(dtb), align=2 << 20, buf_min=buf_min, top_down=True
    )


def _setup_fdt(
    kernel: Kernel, kimage: Kimage, initrd_mem: int, initrd_bytes: int, cmdline: str
) -> bytes:
    old = kernel.boot_fdt()
    size = fdt.fdt_totalsize(old) + len(cmdline) + _FDT_EXTRA_SPACE
    tree = memoryview(bytearray(size))
    error = (
        fdt.fdt_open_into(old, tree, size)
        or _del_mem_rsv(tree, kernel.boot_fdt_phys, fdt.fdt_totalsize(old))
        or _edit_chosen(kernel, kimage, tree, initrd_mem, initrd_bytes, cmdline)
    )
    if error:
        raise KernelError(
            errno.EINVAL, "of_kexec_alloc_and_setup_fdt", f"the new device tree: {error}"
        )
    fdt.fdt_pack(tree)
    return bytes(tree[: fdt.fdt_totalsize(tree)])


def _edit_chosen(
    kernel: Kernel,
    kimage: Kimage,
    tree: memoryview,
    initrd_mem: int,
    initrd_bytes: int,
    cmdline: str,
) -> int:
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    if chosen == -fdt.FDT_ERR_NOTFOUND:
        chosen = fdt.fdt_add_subnode(tree, 0, "chosen")
    if chosen < 0:
        return chosen
    error = _delprop(tree, chosen, "linux,elfcorehdr") or _delprop(
        tree, chosen, "linux,usable-memory-range"
    )
    if not error:
        error = _forget_old_initrd(kernel, tree, chosen)
    if not error and initrd_mem:
        end = initrd_mem + initrd_bytes
        error = (
            fdt.fdt_setprop(tree, chosen, "linux,initrd-start", _U64.pack(initrd_mem))
            or fdt.fdt_setprop(tree, chosen, "linux,initrd-end", _U64.pack(end))
            or fdt.fdt_add_mem_rsv(tree, initrd_mem, initrd_bytes)
        )
    elif not error:
        error = _delprop(tree, chosen, "linux,initrd-start") or _delprop(
            tree, chosen, "linux,initrd-end"
        )
    if not error and kimage.is_crash:
        error = _describe_crash(kernel, kimage, tree, chosen)
    error = error or _kho_add_chosen(kernel, kimage, tree, chosen)
    if not error and cmdline:
        text = cmdline.encode("utf-8", "surrogateescape") + b"\0"
        error = fdt.fdt_setprop(tree, chosen, "bootargs", text)
    elif not error:
        error = _delprop(tree, chosen, "bootargs")
    return error or fdt.fdt_setprop(tree, chosen, "linux,booted-from-kexec", b"")


def _delprop(tree: memoryview, node: int, name: str) -> int:
    error = fdt.fdt_delprop(tree, node, name)
    return 0 if error == -fdt.FDT_ERR_NOTFOUND else error


def _del_mem_rsv(tree: memoryview, start: int, size: int) -> int:
    # fdt_find_and_del_mem_rsv, less its answer for "not found".
    for i in range(fdt.fdt_num_mem_rsv(tree)):
        if fdt.fdt_get_mem_rsv(tree, i)[1:] == (start, size):
            return fdt.fdt_del_mem_rsv(tree, i)
    return 0


def _forget_old_initrd(kernel: Kernel, tree: memoryview, chosen: int) -> int:
    start, _ = fdt.fdt_getprop(tree, chosen, "linux,initrd-start")
    if start is None:
        return 0
    end, _ = fdt.fdt_getprop(tree, chosen, "linux,initrd-end")
    if end is None:
        return -errno.EINVAL
    begin = int.from_bytes(start, "big")
    size = int.from_bytes(end, "big") - begin
    page = kernel.arch.page_size
    before = fdt.fdt_num_mem_rsv(tree)
    error = _del_mem_rsv(tree, begin, size)
    if not error and fdt.fdt_num_mem_rsv(tree) == before:
        error = _del_mem_rsv(tree, begin, (size + page - 1) & -page)
    return error


def _describe_crash(kernel: Kernel, kimage: Kimage, tree: memoryview, chosen: int) -> int:
    start, end = kernel.crashk_res[0]
    headers = kimage.elf_load_addr, kimage.elf_headers_bytes
    return (
        fdt.fdt_appendprop_addrrange(tree, 0, chosen, "linux,elfcorehdr", *headers)
        or fdt.fdt_add_mem_rsv(tree, *headers)
        or fdt.fdt_appendprop_addrrange(
            tree, 0, chosen, "linux,usable-memory-range", start, end - start
        )
    )


def _kho_add_chosen(kernel: Kernel, kimage: Kimage, tree: memoryview, chosen: int) -> int:
    error = _delprop(tree, chosen, "linux,kho-fdt") or _delprop(tree, chosen, "linux,kho-scratch")
    scratch = kimage.kho_scratch
    if error or not kimage.kho_fdt or scratch is None:
        return error
    page_size = kernel.arch.page_size
    return fdt.fdt_appendprop_addrrange(
        tree, 0, chosen, "linux,kho-fdt", kimage.kho_fdt, page_size
    ) or fdt.fdt_appendprop_addrrange(
        tree, 0, chosen, "linux,kho-scratch", scratch.mem, len(scratch.data)
    )
