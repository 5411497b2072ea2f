"""kexec: where segments go, what a load refuses, and the bytes that the next kernel is given."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

import pytest

from khosim import InputError, KernelError, KernelPanic, KhoSimError, Machine
from khosim.abi.boot_params import build_bzimage
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kexec import Kimage, Segment
from khosim.kernel.release import find_release

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SMALL = KernelImage.build("7.3", size="4M")


@pytest.fixture
def kernel():
    """A kernel whose scratch areas are 16, 8 and 4 MiB."""
    return Machine("128M").boot(
        cmdline="kho=on kho_scratch=16M,8M,4M", kernel_size="4M", initrd="1M"
    )


@pytest.fixture
def plain():
    """A kernel without KHO."""
    return Machine("128M").boot(cmdline="kho=off", kernel_size="4M", initrd="1M")


def add(kimage, memsz, *, align=4096, low=0, high=(1 << 64) - 1, top_down=True, name="x"):
    """kexec_add_buffer; where it went."""
    return kimage.add_buffer(
        b"", name=name, memsz=memsz, align=align, buf_min=low, buf_max=high, top_down=top_down
    ).mem


# -- placement ------------------------------------------------------------------------------------


def test_top_down_in_the_first_area_that_fits(kernel):
    """From the end of the area down, one under the other."""
    (low, size), *_ = kernel.scratch_areas()
    end = low + size
    kimage = Kimage(kernel)
    assert add(kimage, MIB) == end - MIB
    assert add(kimage, MIB) == end - 2 * MIB
    assert add(kimage, 1) == end - 2 * MIB - 4096  # at least a page
    assert add(kimage, 4097) == end - 2 * MIB - 3 * 4096


def test_bottom_up(kernel):
    """From the start of the area up."""
    (low, _), *_ = kernel.scratch_areas()
    kimage = Kimage(kernel)
    assert add(kimage, MIB, top_down=False) == low
    assert add(kimage, MIB, top_down=False) == low + MIB
    assert add(kimage, 1, top_down=False) == low + 2 * MIB


def test_alignment(kernel):
    """Rounded down from the top and up from the bottom; never less than a page."""
    (low, size), *_ = kernel.scratch_areas()
    end = low + size
    kimage = Kimage(kernel)
    assert add(kimage, 3 * 4096, align=MIB) == end - MIB
    assert add(kimage, 4096, align=1) == end - 4096  # the gap above is used
    assert add(kimage, 4096, align=2 * MIB, top_down=False) == low
    assert add(kimage, 4096, align=2 * MIB, top_down=False) == low + 2 * MIB
    assert add(kimage, 4096, align=0, top_down=False) == low + 4096


def test_a_clash_moves_on_by_the_alignment(kernel):
    """Past the segment in the way, to the next aligned place."""
    (low, size), *_ = kernel.scratch_areas()
    end = low + size
    kimage = Kimage(kernel)
    assert add(kimage, 4096, align=4096, low=end - MIB, high=end - MIB + 4095) == end - MIB
    # 1 MiB at the top is free but for its first page: 2 MiB must go below it.
    assert add(kimage, 2 * MIB, align=MIB) == end - 3 * MIB
    assert add(kimage, MIB - 4096, align=4096) == end - MIB + 4096


def test_buf_min_and_buf_max(kernel):
    """Both bounds hold for the whole buffer; buf_max is inclusive."""
    (low, size), *_ = kernel.scratch_areas()
    kimage = Kimage(kernel)
    assert add(kimage, MIB, high=low + 4 * MIB - 1) == low + 3 * MIB
    assert add(kimage, MIB, low=low + 4 * MIB, top_down=False) == low + 4 * MIB
    assert add(kimage, MIB, low=low + 5 * MIB, high=low + 6 * MIB - 1) == low + 5 * MIB
    top = low + size
    assert add(kimage, 4096, low=top - 4096) == top - 4096
    with pytest.raises(KernelError):
        add(Kimage(kernel), MIB, low=low + 5 * MIB, high=low + 6 * MIB - 2)


def test_the_next_area_when_the_first_is_full(kernel):
    """In the order of the array: lowmem, global, nodes."""
    (low, low_size), (far, far_size), (node, node_size) = kernel.scratch_areas()
    kimage = Kimage(kernel)
    assert add(kimage, low_size) == low
    assert add(kimage, far_size - 4096) == far + 4096
    assert add(kimage, 4096) == far
    assert add(kimage, node_size) == node
    with pytest.raises(KernelError) as refused:
        add(kimage, 4096)
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert refused.value.symbol == "kho_locate_mem_hole"


def test_larger_than_every_area(kernel):
    """-EADDRNOTAVAIL, though there is enough memory outside of scratch."""
    kimage = Kimage(kernel)
    with pytest.raises(KernelError) as refused:
        add(kimage, 16 * MIB + 1)
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert kimage.segments == []


def test_an_area_of_nothing_holds_nothing():
    """Size 0 is skipped like any area that is too small."""
    kernel = Machine("128M").boot(cmdline="kho=on kho_scratch=0,4M,0", kernel_size="4M")
    areas = kernel.scratch_areas()
    assert add(Kimage(kernel), 4096) == areas[1][0] + 4 * MIB - 4096


def test_sixteen_segments_at_most(kernel):
    """The seventeenth is -EINVAL, whether there is room or not."""
    kimage = Kimage(kernel)
    for _ in range(16):
        add(kimage, 4096)
    with pytest.raises(KernelError) as refused:
        add(kimage, 4096)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.symbol == "kexec_add_buffer"


def test_without_kho_all_of_ram_is_searched(plain):
    """System RAM from the top, or from the bottom; the firmware's reservations are no obstacle."""
    ranges = plain.system_ram
    assert ranges[0] == (0x1000, 0x9FC00)
    assert ranges[-1] == (MIB, 128 * MIB - 128 * KIB)
    kimage = Kimage(plain)
    assert add(kimage, MIB) == 128 * MIB - 128 * KIB - MIB
    assert add(kimage, 4096, top_down=False) == 0x1000
    assert add(kimage, 0x9E000, top_down=False) == MIB
    with pytest.raises(KernelError) as refused:
        add(kimage, 128 * MIB)
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert refused.value.symbol == "kexec_locate_mem_hole"


def test_mem_limits_the_search():
    """mem= takes memory out of /proc/iomem, and so out of the search."""
    kernel = Machine("128M").boot(cmdline="kho=off mem=64M", kernel_size="4M", initrd="1M")
    assert kernel.system_ram[-1][1] == 64 * MIB
    assert add(Kimage(kernel), 4096) == 64 * MIB - 4096


def test_arm64_searches_what_memblock_has_free():
    """CONFIG_ARCH_KEEP_MEMBLOCK: not below the kernel that runs, nor in its page tables."""
    machine = Machine("128M", arch="arm64", page_size=16384)
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd="1M")
    kimage = Kimage(kernel)
    for _ in range(8):
        at = add(kimage, MIB)
        assert not kernel.memblock.memblock_is_region_reserved(at, MIB)
    at = add(kimage, 64 * KIB, top_down=False)
    assert at == GIB  # RAM begins here, 2 MiB in front of the kernel


# -- what a load refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (0x202, b"XdrS"),
        (0x1FE, b"\x55\xab"),
        (0x206, b"\x0b\x02"),
        (0x211, b"\0"),
        (0x236, b"\x02\0"),
        (0x236, b"\x01\0"),
    ],
)
def test_not_a_bzimage(kernel, at, data):
    """Magic, boot sector, protocol version, load flags and both xloadflags are looked at."""
    image = bytearray(SMALL.data)
    image[at : at + len(data)] = data
    free = kernel.pages.nr_free_pages()
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(bytes(image), cmdline="x")
    assert refused.value.errno == errno.ENOEXEC
    assert kernel.pages.nr_free_pages() == free


@pytest.mark.parametrize("image", [b"", b"MZ" * 500, b"\x7fELF" + bytes(2000)])
def test_other_files(kernel, image):
    """-ENOEXEC on x86-64."""
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(image)
    assert refused.value.errno == errno.ENOEXEC


def test_a_truncated_bzimage(kernel):
    """Shorter than its own setup sectors."""
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(SMALL.data[:1500])
    assert refused.value.errno == errno.ENOEXEC
    assert refused.value.symbol == "bzImage64_load"


def test_the_probe_comes_first(kernel):
    """A wrong file is -ENOEXEC even where scratch has no room for the scratch array."""
    kernel.ram.write(kernel.kho_scratch_phys, bytes(48), (0, "test"))
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(b"")
    assert refused.value.errno == errno.ENOEXEC
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(SMALL)
    assert refused.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize(("length", "fits"), [(2047 - 30 - 1, True), (2047 - 30, False)])
def test_the_command_line_has_a_limit(kernel, length, fits):
    """The image's cmdline_size, less room for elfcorehdr=, less the NUL."""
    if fits:
        kernel.kexec_file_load(SMALL, cmdline="x" * length)
        return
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(SMALL, cmdline="x" * length)
    assert refused.value.errno == errno.EINVAL


def test_arm64_says_einval_for_another_file():
    """image_probe has its own errno."""
    kernel = Machine("64M", arch="arm64").boot(cmdline="kho=on", kernel_size="4M", initrd="1M")
    for image in (b"", SMALL.data):
        with pytest.raises(KernelError) as refused:
            kernel.kexec_file_load(image)
        assert (refused.value.errno, refused.value.symbol) == (errno.EINVAL, "image_probe")


def test_arm64_wants_an_image_size():
    """An image_size of 0 is from before 3.17."""
    kernel = Machine("64M", arch="arm64").boot(cmdline="kho=on", kernel_size="4M", initrd="1M")
    image = bytearray(KernelImage.build("7.3", arch="arm64", size="4M").data)
    image[16:24] = bytes(8)
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(bytes(image))
    assert (refused.value.errno, refused.value.symbol) == (errno.EINVAL, "image_load")


def test_code_longer_than_its_place(kernel):
    """init_size smaller than the file: the sanity check says -EINVAL."""
    image = build_bzimage(
        bytes(3 * MIB),
        kernel_alignment=2 * MIB,
        pref_address=16 * MIB,
        init_size=2 * MIB,
        cmdline_size=2047,
    )
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(image)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.symbol == "sanity_check_segment_list"


def test_more_than_half_of_memory(plain):
    """-EINVAL, and the count is of all segments together."""
    half = plain.total_ram_pages() // 2 << 12
    plain.kexec_file_load(SMALL, initrd_bytes=half - 8 * MIB)
    with pytest.raises(KernelError) as refused:
        plain.kexec_file_load(SMALL, initrd_bytes=half - 3 * MIB)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.symbol == "sanity_check_segment_list"


def test_exactly_half_of_memory(plain):
    """totalram_pages / 2 are not too many yet; one more page is."""
    half = plain.total_ram_pages() // 2 << 12
    kimage = Kimage(plain)
    kimage.segments = [Segment("x", b"", 0, half - 4096), Segment("y", b"", half, 4096)]
    kimage.sanity_check()
    kimage.segments.append(Segment("z", b"", 2 * half, 4096))
    with pytest.raises(KernelError, match="more than half"):
        kimage.sanity_check()


def test_no_pages_for_the_segments(kernel):
    """-ENOMEM at each allocation; everything is given back."""
    free = kernel.pages.nr_free_pages()
    for failing in range(6):
        calls = 0

        def fail(order, owner, failing=failing):
            nonlocal calls
            calls += 1
            return calls > failing * 200

        kernel.pages.fail = fail
        with pytest.raises(KernelError) as refused:
            kernel.kexec_file_load(SMALL, initrd_bytes=MIB)
        assert refused.value.errno == errno.ENOMEM
        assert kernel.pages.nr_free_pages() == free
        kernel.pages.fail = None


def test_source_pages_never_lie_in_scratch(kernel):
    """They are not movable, so that no segment is copied onto another one's bytes."""
    kimage = kernel.kexec_file_load(SMALL, initrd_bytes=MIB)
    for runs in kimage.source_runs:
        for pfn, count in runs:
            assert not kernel.kho_scratch_overlap(pfn << 12, count << 12)


def test_loading_again_frees_the_first_image(kernel):
    """kexec_image is exchanged; a refused load leaves the loaded one alone."""
    free = kernel.pages.nr_free_pages()
    first = kernel.kexec_file_load(SMALL, initrd_bytes=MIB)
    used = free - kernel.pages.nr_free_pages()
    assert used >= sum(segment.memsz for segment in first.segments) >> 12
    second = kernel.kexec_file_load(SMALL, initrd_bytes=MIB)
    assert kernel.kexec_image is second
    assert free - kernel.pages.nr_free_pages() == used
    with pytest.raises(KernelError):
        kernel.kexec_file_load(b"")
    assert kernel.kexec_image is second
    assert free - kernel.pages.nr_free_pages() == used


@pytest.mark.parametrize(("initrd_pages", "tables"), [(239, 3), (240, 4)])
def test_the_pages_a_load_takes(kernel, initrd_pages, tables):
    """The segments' own, a control and a swap page, and tables of 511 entries.

    One entry per page, one per segment, one to end the list: scratch array 1, purgatory 5, boot
    parameters 2, kernel 1280, and the initrd, with 511 * 3 = 1533 entries in three tables.
    """
    free = kernel.pages.nr_free_pages()
    kimage = kernel.kexec_file_load(SMALL, initrd_bytes=initrd_pages * 4096)
    total = 1 + 5 + 2 + 1280 + initrd_pages
    assert [segment.memsz >> 12 for segment in kimage.segments] == [1, 5, 2, 1280, initrd_pages]
    assert free - kernel.pages.nr_free_pages() == total + 2 + tables
    kimage.unload()
    assert kernel.pages.nr_free_pages() == free


def test_a_load_is_traced():
    """Each placement, then the load, then the jump with its registers."""
    events = []
    machine = Machine("128M")
    machine.listen(events.append)
    kernel = machine.boot(
        cmdline="kho=on kho_scratch=16M,8M,4M", kernel_size="4M", initrd="1M"
    )
    events.clear()
    kimage = kernel.kexec_file_load(SMALL, initrd_bytes=5000)
    placed = [(e.args, e.result) for e in events if e.symbol == "kexec_add_buffer"]
    assert placed == [
        ({"name": segment.name, "memsz": segment.memsz}, segment.mem)
        for segment in kimage.segments
    ]
    assert [segment.memsz for segment in kimage.segments if segment.name == "initrd"] == [8192]
    (load,) = [event for event in events if event.symbol == "kexec_file_load"]
    assert load.args == {"segments": {segment.name: segment.mem for segment in kimage.segments}}
    assert load.result == 0
    kernel.kernel_kexec(kimage)
    (jump,) = [event for event in events if event.symbol == "machine_kexec"]
    assert (jump.phase, jump.args, jump.result) == ("machine_kexec", kimage.entry, None)


# -- the bytes, x86-64 ----------------------------------------------------------------------------


def segments_of(kimage):
    """Segments by name."""
    return {segment.name: segment for segment in kimage.segments}


def test_boot_parameters_by_struct_offsets(kernel):
    """struct boot_params, the command line after it, and SETUP_KEXEC_KHO after that."""
    kimage = kernel.kexec_file_load(SMALL, initrd=b"i" * 5000, cmdline="kho=on quiet")
    segments = segments_of(kimage)
    params = segments["boot parameters"]
    page = params.data
    assert kimage.entry == {"rip": segments["kernel"].mem, "rsi": params.mem}
    # E820: as the firmware gave it.
    (count,) = struct.unpack_from("<B", page, 0x1E8)
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(count)]
    assert entries == kernel.firmware_map
    assert (MIB, 127 * MIB - 128 * KIB, 1) in entries
    # struct setup_header: the image's own, but for the loader's fields.
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206) == (0x20F,)
    assert struct.unpack_from("<BB", page, 0x210) == (0xD0, 0)
    assert struct.unpack_from("<QI", page, 0x258) == (16 * MIB, 5 * MIB)
    assert struct.unpack_from("<II", page, 0x218) == (segments["initrd"].mem, 5000)
    assert struct.unpack_from("<II", page, 0x0C0) == (0, 0)
    (alt_mem_k,) = struct.unpack_from("<I", page, 0x1E0)
    assert alt_mem_k == ((128 * MIB - 128 * KIB - 1) >> 10) - 1024
    # The command line.
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert cmdline == params.mem + 4096
    assert page[4096 : 4096 + 13] == b"kho=on quiet\0"
    # setup_data: 4096 + 13 + 30, rounded up to 16.
    at = 4144
    assert struct.unpack_from("<Q", page, 0x250) == (params.mem + at,)
    assert struct.unpack_from("<QII", page, at) == (0, 10, 32)
    fdt_addr, fdt_size, scratch_addr, scratch_size = struct.unpack_from("<4Q", page, at + 16)
    assert (fdt_addr, fdt_size) == (kernel.kho_out.fdt_phys, 4096)
    array = segments["KHO scratch array"]
    assert (scratch_addr, scratch_size) == (array.mem, 48)
    assert array.mem % (64 * KIB) == 0
    assert [
        struct.unpack_from("<QQ", array.data, 16 * i) for i in range(3)
    ] == kernel.scratch_areas()


def test_addresses_above_4_gib_have_high_halves():
    """ext_ramdisk_image, ext_cmd_line_ptr; the kernel and its parameters lie up there, too."""
    machine = Machine("6G")
    cmdline = "kho=on kho_scratch=4M,64M,0"
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    _, (far, size), _ = kernel.scratch_areas()
    assert far > 4 * GIB
    kimage = kernel.kexec_file_load(SMALL, initrd_bytes=8 * MIB, cmdline="x")
    segments = segments_of(kimage)
    # Kernel: 5 MiB at a border of 2 MiB; below it the initrd. The others fit into lowmem.
    assert segments["kernel"].mem == far + size - 6 * MIB
    assert segments["initrd"].mem == far + size - 14 * MIB
    page = segments["boot parameters"].data
    low, _ = struct.unpack_from("<II", page, 0x218)
    high, _ = struct.unpack_from("<II", page, 0x0C0)
    assert high << 32 | low == segments["initrd"].mem


def test_no_kho_data_without_kho(plain):
    """The place for it is there, and nothing points at it."""
    kimage = plain.kexec_file_load(SMALL, cmdline="x")
    segments = segments_of(kimage)
    assert "KHO scratch array" not in segments
    page = segments["boot parameters"].data
    assert struct.unpack_from("<Q", page, 0x250) == (0,)
    at = 4096 + 32
    assert struct.unpack_from("<QII", page, at) == (0, 10, 32)
    assert page[at + 16 : at + 48] == bytes(32)


def test_the_order_of_the_segments(kernel):
    """Scratch array, purgatory, boot parameters, kernel, initrd; each where the last left room."""
    (low, size), *_ = kernel.scratch_areas()
    end = low + size
    kimage = kernel.kexec_file_load(SMALL, initrd_bytes=MIB, cmdline="x")
    assert [segment.name for segment in kimage.segments] == [
        "KHO scratch array",
        "purgatory",
        "boot parameters",
        "kernel",
        "initrd",
    ]
    array, purgatory, params, code, initrd = kimage.segments
    assert array.mem == end - 64 * KIB
    assert purgatory.mem == end - 5 * 4096
    assert params.mem == purgatory.mem - 2 * 4096
    assert code.mem == (array.mem - 5 * MIB) & -(2 * MIB)  # init_size of a 4 MiB kernel
    assert initrd.mem == code.mem - MIB  # above the kernel only 960 KiB are free


# -- crash images ---------------------------------------------------------------------------------


def crash_machine(cmdline="kho=on crashkernel=32M", **options):
    """A machine with room for a crash kernel, and its first kernel."""
    machine = Machine("256M", **options)
    return machine, machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")


def test_no_crash_region():
    """-EADDRNOTAVAIL without crashkernel=."""
    _, kernel = crash_machine("kho=on")
    with pytest.raises(KernelError) as refused:
        kernel.kexec_file_load(SMALL, on_crash=True)
    assert refused.value.errno == errno.EADDRNOTAVAIL


def test_a_crash_image_lies_in_its_region_already():
    """Copied into place at load; no source pages, no KHO data, everything inside the region."""
    _, kernel = crash_machine()
    (start, end), = kernel.crashk_res
    assert end - start == 32 * MIB
    assert start % (16 * MIB) == 0
    free = kernel.pages.nr_free_pages()
    kimage = kernel.kexec_file_load(SMALL, initrd=b"crash!", cmdline="quiet", on_crash=True)
    assert kernel.pages.nr_free_pages() == free
    assert kimage.kho_fdt == 0
    assert kimage.kho_scratch is None
    for segment in kimage.segments:
        assert start <= segment.mem
        assert segment.mem + segment.memsz <= end
    segments = segments_of(kimage)
    assert kernel.ram.read(segments["initrd"].mem, 8) == b"crash!\0\0"
    page = segments["boot parameters"].data
    assert struct.unpack_from("<Q", page, 0x250) == (0,)
    headers = segments["elfcorehdr"]
    assert headers.mem == start
    command = f"elfcorehdr=0x{headers.mem:x} quiet\0".encode()
    assert page[4096 : 4096 + len(command)] == command
    assert kernel.kexec_image is None
    assert kernel.crash_image is kimage


def test_a_second_crash_image_takes_the_first_ones_place():
    """The first is dropped before anything of the second is looked at, even if that fails."""
    _, kernel = crash_machine()
    first = kernel.kexec_file_load(SMALL, initrd=b"first", on_crash=True)
    second = kernel.kexec_file_load(SMALL, initrd=b"2nd", on_crash=True)
    assert kernel.crash_image is second
    assert [s.mem for s in first.segments] == [s.mem for s in second.segments]
    assert kernel.ram.read(segments_of(second)["initrd"].mem, 6) == b"2nd\0\0\0"
    with pytest.raises(KernelError):
        kernel.kexec_file_load(b"", on_crash=True)
    assert kernel.crash_image is None


@pytest.mark.parametrize(("nr_cpus", "size"), [(1, 4096), (68, 4096), (69, 8192)])
def test_the_size_of_the_elf_core_headers(nr_cpus, size):
    """64 + 56 * (CPUs + vmcoreinfo + 2 ranges + kernel text), whole pages: 68 CPUs fill one."""
    config = replace(KernelImage.build("7.3", size="4M").config, nr_cpus=nr_cpus)
    kernel = Machine("256M").boot(cmdline="crashkernel=32M", config=config, initrd="1M")
    kimage = kernel.kexec_file_load(SMALL, on_crash=True)
    assert kimage.elf_headers_bytes == size
    assert segments_of(kimage)["elfcorehdr"].memsz == size


def test_a_crash_kernels_memory_map():
    """The first MiB, what is not RAM, and the region less the ELF core headers."""
    _, kernel = crash_machine()
    (start, end), = kernel.crashk_res
    kimage = kernel.kexec_file_load(SMALL, on_crash=True)
    page = segments_of(kimage)["boot parameters"].data
    (count,) = struct.unpack_from("<B", page, 0x1E8)
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(count)]
    ram = [(addr, addr + size) for addr, size, kind in entries if kind == 1]
    assert ram == [(0x1000, 0x9FC00), (start + 4096, end)]
    assert all(kind == 2 for _, _, kind in entries[1:-1])


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_a_crash_kernel_boots_without_kho(arch):
    """It sees its region only, says that KHO is off, and reserves no scratch."""
    machine, kernel = crash_machine(arch=arch)
    image = KernelImage.build("7.3", arch=arch, size="4M")
    (start, end), = kernel.crashk_res
    kimage = kernel.kexec_file_load(image, initrd_bytes=MIB, cmdline="kho=on", on_crash=True)
    kernel.kernel_kexec(kimage)
    crashed = machine.resume()
    assert "KHO: disabled in the kdump kernel" in crashed.messages
    assert not crashed.kho_enable
    assert not crashed.is_kho_boot
    assert crashed.scratch_areas() == []
    memory = zip(crashed.memblock.memory.base, crashed.memblock.memory.end, strict=True)
    assert all(start <= low and high <= end for low, high in memory if high > MIB)


# -- the jump -------------------------------------------------------------------------------------


def test_the_jump_copies_and_kills(kernel):
    """Bytes at their places, zeros after them, registers set, and a dead kernel refuses use."""
    kimage = kernel.kexec_file_load(SMALL, initrd=b"initrd!", initrd_bytes=3 * 4096, cmdline="x")
    segments = segments_of(kimage)
    folio = kernel.alloc_folio(0)
    dirty = segments["initrd"].mem
    kernel.ram.write(dirty, b"\xee" * 3 * 4096, (0, "test"))
    kernel.kernel_kexec(kimage)
    assert kernel.ram.read(dirty, 3 * 4096) == b"initrd!".ljust(3 * 4096, b"\0")
    assert kernel.hardware.registers == kimage.entry
    for use in (
        folio.put,
        lambda: folio.read(0, 1),
        lambda: kernel.alloc_folio(0),
        lambda: kernel.kho_preserve_folio(folio),
        lambda: kernel.kexec_file_load(SMALL),
        lambda: kernel.kernel_kexec(kimage),
        lambda: kernel.kexec(),
    ):
        with pytest.raises(KhoSimError, match="has handed over"):
            use()


def test_a_jump_without_kho_may_overwrite_its_own_sources():
    """Destinations anywhere in RAM: the copy gets every byte there all the same."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd="1M")
    initrd = bytes(range(256)) * 4096 * 8
    kimage = kernel.kexec_file_load(SMALL, initrd=initrd, cmdline="x")
    wanted = {segment.mem: segment.data for segment in kimage.segments}
    kernel.kernel_kexec(kimage)
    for mem, data in wanted.items():
        assert machine.hardware.ram.read(mem, len(data)) == data


def test_nothing_to_start():
    """Registers that point at no kernel."""
    machine = Machine("64M")
    with pytest.raises(KernelPanic, match="no kernel to start"):
        machine.resume()
    with pytest.raises(InputError, match="bzImage"):
        machine.boot(image=KernelImage(KernelConfig(release=find_release("7.3")), "", 0, b"x"))
