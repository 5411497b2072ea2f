"""What the architectures differ in, held against numbers that their kernels printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from khosim.errors import InputError
from khosim.kernel.arch import find_arch

GOLDEN = Path(__file__).parent / "golden" / "captures"


@pytest.mark.parametrize(
    ("name", "page_size", "max_order", "pageblock", "section", "scratch_align", "depth"),
    [
        ("x86_64", 4096, 10, 9, 128 << 20, 4 << 20, 6),
        ("arm64", 4096, 10, 9, 128 << 20, 4 << 20, 6),
        ("arm64", 16384, 11, 11, 128 << 20, 32 << 20, 5),
        ("arm64", 65536, 13, 13, 512 << 20, 512 << 20, 4),
    ],
)
def test_sizes(
    name: str,
    page_size: int,
    max_order: int,
    pageblock: int,
    section: int,
    scratch_align: int,
    depth: int,
) -> None:
    """Blocks, pageblocks, sections, scratch alignment and depth of the radix tree."""
    arch = find_arch(name, page_size)
    assert 1 << arch.page_shift == arch.page_size == page_size
    assert (arch.max_page_order, arch.pageblock_order) == (max_order, pageblock)
    assert arch.section_bytes == section
    assert arch.scratch_align_bytes == scratch_align
    assert arch.tree_depth == depth
    # A block never leaves its section.
    assert arch.scratch_align_bytes <= section


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_the_tree_is_as_deep_as_its_keys_are_wide(page_size: int) -> None:
    """Deep enough for order 0 at the top of the address space, and no deeper."""
    arch = find_arch("x86_64" if page_size == 4096 else "arm64", page_size)
    bits = 64 - arch.page_shift + 1
    leaf, table = arch.page_shift + 3, arch.page_shift - 3
    assert leaf + (arch.tree_depth - 2) * table < bits <= leaf + (arch.tree_depth - 1) * table


@pytest.mark.parametrize(
    ("name", "page_size"), [("x86_64", 16384), ("arm64", 8192), ("riscv", 4096), ("arm64", 0)]
)
def test_others_do_not_exist(name: str, page_size: int) -> None:
    """Combinations that Linux lacks are refused by name."""
    with pytest.raises(InputError, match=name):
        find_arch(name, page_size)


@pytest.mark.parametrize(("capture", "is_arm"), [("uma1g", False), ("arm64-16k", True)])
def test_low_memory_ends_where_real_kernels_said(capture: str, is_arm: bool) -> None:
    """The lowmem scratch area is asked for below ARCH_LOW_ADDRESS_LIMIT, aligned to a block."""
    dmesg = (GOLDEN / capture / "gen0" / "dmesg").read_text()
    call = re.search(r"align=(\w+) from=0x0+ max_addr=(0x0*[1-9a-f]\w+) kho_memory_init", dmesg)
    assert call is not None
    arch = find_arch("arm64", 16384) if is_arm else find_arch("x86_64", 4096)
    assert arch.scratch_align_bytes == int(call[1], 16)
    assert arch.low_address_limit == int(call[2], 16)


@pytest.mark.parametrize(("capture", "is_arm"), [("uma1g", False), ("arm64-16k", True)])
def test_buddyinfo_has_a_column_for_each_order(capture: str, is_arm: bool) -> None:
    """MAX_PAGE_ORDER as the real kernel shows it."""
    buddyinfo = (GOLDEN / capture / "gen0" / "buddyinfo").read_text()
    arch = find_arch("arm64", 16384) if is_arm else find_arch("x86_64", 4096)
    assert len(buddyinfo.splitlines()[0].split()) - 4 == arch.max_page_order + 1


@pytest.mark.parametrize(("capture", "page_size"), [("uma1g", 4096), ("arm64-16k", 16384)])
def test_the_memory_map_is_wanted_above_dma(capture: str, page_size: int) -> None:
    """``__pa(MAX_DMA_ADDRESS)`` is where the memmap's allocations begin to look."""
    dmesg = (GOLDEN / capture / "gen0" / "dmesg").read_text()
    starts = {int(at, 16) for at in re.findall(r"from=(0x\w+) .*memmap_alloc", dmesg)}
    starts |= {int(at, 16) for at in re.findall(r"from=(0x\w+) .*pcpu_fc_alloc", dmesg)}
    arch = find_arch("x86_64" if page_size == 4096 else "arm64", page_size)
    assert starts == {arch.dma_address}
