"""kexec on arm64: the device tree that the next kernel is given, and where things may lie."""

from __future__ import annotations

import errno
import struct

import pytest

from khosim import KernelError, Machine
from khosim.abi import fdt
from khosim.kernel.image import KernelImage

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def segments_of(kimage):
    """Segments by name."""
    return {segment.name: segment for segment in kimage.segments}


@pytest.mark.parametrize(
    ("page_size", "ram"), [(4096, "512M"), (16384, "512M"), (65536, "4G")], ids=["4K", "16K", "64K"]
)
def test_chosen(page_size, ram):
    """linux,kho-fdt, linux,kho-scratch, initrd, bootargs, and a reservation for the initrd."""
    machine = Machine(ram, arch="arm64", page_size=page_size)
    kernel = machine.boot(cmdline="kho=on kho_scratch=64M,64M,0", kernel_size="4M", initrd="1M")
    image = KernelImage.build("7.3", arch="arm64", page_size=page_size, size="4M")
    kimage = kernel.kexec_file_load(image, initrd=b"i" * 70000, cmdline="kho=on quiet")
    segments = segments_of(kimage)
    tree = segments["device tree"].data
    chosen = fdt.fdt_path_offset(tree, "/chosen")

    def prop(name):
        value, _ = fdt.fdt_getprop(tree, chosen, name)
        return None if value is None else bytes(value)

    assert prop("linux,kho-fdt") == struct.pack(">QQ", kernel.kho_out.fdt_phys, page_size)
    array = segments["KHO scratch array"]
    assert prop("linux,kho-scratch") == struct.pack(">QQ", array.mem, 48)
    initrd = segments["initrd"].mem
    assert prop("linux,initrd-start") == struct.pack(">Q", initrd)
    assert prop("linux,initrd-end") == struct.pack(">Q", initrd + 70000)
    assert prop("bootargs") == b"kho=on quiet\0"
    assert prop("linux,booted-from-kexec") == b""
    assert fdt.fdt_num_mem_rsv(tree) == 1
    assert fdt.fdt_get_mem_rsv(tree, 0) == (0, initrd, 70000)
    # Kernel bottom up, initrd above it, the tree at a 2 MiB border below the scratch array.
    (low, size), *_ = kernel.scratch_areas()
    assert segments["kernel"].mem == low
    assert initrd == low + 4 * MIB
    assert array.mem == low + size - 64 * KIB
    assert segments["device tree"].mem == low + size - 2 * MIB
    assert kimage.entry == {"pc": low, "x0": segments["device tree"].mem}


def chosen_of(kimage):
    """The new device tree and the properties of its /chosen."""
    tree = segments_of(kimage)["device tree"].data
    chosen = fdt.fdt_path_offset(tree, "/chosen")

    def prop(name):
        value, _ = fdt.fdt_getprop(tree, chosen, name)
        return None if value is None else bytes(value)

    rsv = [fdt.fdt_get_mem_rsv(tree, i)[1:] for i in range(fdt.fdt_num_mem_rsv(tree))]
    return prop, rsv


def test_chosen_of_a_crash_image():
    """The ELF core headers, reserved too, and the region as the only memory; no KHO."""
    machine = Machine("256M", arch="arm64")
    cmdline = "kho=on crashkernel=32M"
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    (start, end), = kernel.crashk_res
    image = KernelImage.build("7.3", arch="arm64", size="4M")
    kimage = kernel.kexec_file_load(image, initrd_bytes=MIB, on_crash=True)
    segments = segments_of(kimage)
    assert list(segments) == ["kernel", "elfcorehdr", "initrd", "device tree"]
    prop, rsv = chosen_of(kimage)
    headers = segments["elfcorehdr"]
    assert headers.mem == end - 64 * KIB
    assert prop("linux,elfcorehdr") == struct.pack(">QQ", headers.mem, 4096)
    assert prop("linux,usable-memory-range") == struct.pack(">QQ", start, end - start)
    assert prop("linux,kho-fdt") is None
    assert prop("bootargs") is None
    assert rsv == [(segments["initrd"].mem, MIB), (headers.mem, 4096)]
    usual = kernel.kexec_file_load(image)
    assert list(segments_of(usual)) == ["KHO scratch array", "kernel", "device tree"]
    prop, rsv = chosen_of(usual)
    assert (prop("linux,elfcorehdr"), prop("linux,usable-memory-range")) == (None, None)
    assert prop("linux,initrd-start") is None
    assert rsv == []


@pytest.mark.parametrize("firmware_rounds", [False, True], ids=["exact", "whole pages"])
def test_the_old_initrds_reservation_goes(firmware_rounds):
    """Whether of its size or of whole pages; the tree's own goes too, others stay."""
    machine = Machine("256M", arch="arm64")
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd=5000)
    tree = bytearray(kernel.boot_fdt()) + bytes(4096)
    assert fdt.fdt_open_into(bytes(tree), tree, len(tree)) == 0
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    (start,) = struct.unpack(">Q", fdt.fdt_getprop(tree, chosen, "linux,initrd-start")[0])
    (end,) = struct.unpack(">Q", fdt.fdt_getprop(tree, chosen, "linux,initrd-end")[0])
    assert end - start == 5000
    own = (kernel.boot_fdt_phys, fdt.fdt_totalsize(tree))
    for rsv in ((start, 8192 if firmware_rounds else 5000), own, (GIB, 5000), (start, 4096)):
        assert fdt.fdt_add_mem_rsv(tree, *rsv) == 0
    kernel.ram.write(kernel.boot_fdt_phys, bytes(tree), (0, "test"))
    image = KernelImage.build("7.3", arch="arm64", size="4M")
    _, rsv = chosen_of(kernel.kexec_file_load(image))
    assert rsv == [(GIB, 5000), (start, 4096)]


def test_an_initrd_without_an_end():
    """-EINVAL: its reservation cannot be found."""
    machine = Machine("256M", arch="arm64")
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd=5000)
    tree = bytearray(kernel.boot_fdt())
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    assert fdt.fdt_delprop(tree, chosen, "linux,initrd-end") == 0
    kernel.ram.write(kernel.boot_fdt_phys, bytes(tree), (0, "test"))
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(KernelImage.build("7.3", arch="arm64", size="4M"))
    # Each hole is tried with the same result, and the error is that of the last try.
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert kernel.kexec_image is None


def test_a_crash_kernels_limits_go():
    """What kexecs on from a crash kernel is given all memory again."""
    machine = Machine("256M", arch="arm64")
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd=5000)
    tree = bytearray(kernel.boot_fdt()) + bytes(4096)
    assert fdt.fdt_open_into(bytes(tree), tree, len(tree)) == 0
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    for name in ("linux,elfcorehdr", "linux,usable-memory-range"):
        assert fdt.fdt_appendprop_addrrange(tree, 0, chosen, name, GIB, MIB) == 0
    kernel.ram.write(kernel.boot_fdt_phys, bytes(tree), (0, "test"))
    prop, _ = chosen_of(kernel.kexec_file_load(KernelImage.build("7.3", arch="arm64", size="4M")))
    assert prop("linux,elfcorehdr") is None
    assert prop("linux,usable-memory-range") is None


def test_a_tree_without_chosen_gets_one():
    """And with it the initrd, which the old one did not have."""
    machine = Machine("256M", arch="arm64")
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd=5000)
    tree = bytearray(kernel.boot_fdt())
    assert fdt.fdt_del_node(tree, fdt.fdt_path_offset(tree, "/chosen")) == 0
    kernel.ram.write(kernel.boot_fdt_phys, bytes(tree), (0, "test"))
    image = KernelImage.build("7.3", arch="arm64", size="4M")
    kimage = kernel.kexec_file_load(image, initrd_bytes=5000, cmdline="quiet")
    prop, rsv = chosen_of(kimage)
    assert prop("bootargs") == b"quiet\0"
    assert rsv == [(segments_of(kimage)["initrd"].mem, 5000)]


def test_chosen_is_edited_not_rebuilt():
    """Generation after generation the properties are replaced, and the tree does not grow."""
    machine = Machine("256M", arch="arm64")
    cmdline = "kho=on kho_scratch=32M,32M,0"
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    sizes = []
    for _ in range(3):
        kernel = kernel.kexec()
        tree = kernel.boot_fdt()
        sizes.append(fdt.fdt_totalsize(tree))
        assert fdt.fdt_num_mem_rsv(tree) == 1
    assert sizes[0] == sizes[1] == sizes[2]


def test_kho_properties_go_where_kho_is_off():
    """A successor without KHO, kexecing on, hands over no old addresses."""
    machine = Machine("256M", arch="arm64")
    cmdline = "kho=on kho_scratch=32M,32M,0"
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    off = kernel.kexec(cmdline="kho=off")
    assert off.is_kho_boot
    after = off.kexec(cmdline="kho=off")
    chosen = fdt.fdt_path_offset(after.boot_fdt(), "/chosen")
    assert fdt.fdt_getprop(after.boot_fdt(), chosen, "linux,kho-fdt")[0] is None
    assert not after.is_kho_boot


def test_a_kernel_that_leaves_no_room_tries_the_next_hole():
    """The initrd must lie within 32 GiB above the kernel: too far away, and all of it moves on."""
    machine = Machine("48G", arch="arm64")
    kernel = machine.boot(cmdline="kho=on kho_scratch=8M,32M,0", kernel_size="4M", initrd="1M")
    image = KernelImage.build("7.3", arch="arm64", size="4M")
    low, far = 2 * GIB, 40 * GIB
    areas = struct.pack("<6Q", low, 8 * MIB, far, 32 * MIB, 0, 0)
    kernel.ram.write(kernel.kho_scratch_phys, areas, (0, "test"))
    kimage = kernel.kexec_file_load(image, initrd_bytes=MIB)
    assert segments_of(kimage)["kernel"].mem == low
    kimage = kernel.kexec_file_load(image, initrd_bytes=6 * MIB)
    segments = segments_of(kimage)
    assert segments["kernel"].mem == far
    assert segments["initrd"].mem == far + 4 * MIB
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(image, initrd_bytes=64 * MIB)
    assert refused.value.errno == errno.EADDRNOTAVAIL


def test_nothing_goes_below_the_kernel():
    """Hazard: lowmem, tried first, lies above the larger global area, out of bounds then."""
    machine = Machine("256M", arch="arm64")
    kernel = machine.boot(cmdline="kho=on kho_scratch=8M,32M,0", kernel_size="4M", initrd="1M")
    (low, _), (lower, size), _ = kernel.scratch_areas()
    assert lower < low
    assert size == 32 * MIB
    image = KernelImage.build("7.3", arch="arm64", size="4M")
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(image, initrd_bytes=6 * MIB)
    assert refused.value.errno == errno.EADDRNOTAVAIL
