"""Finalizing and aborting, as each release before 7.1 does it."""

from __future__ import annotations

import errno

import pytest

from khosim import KernelError, KhoSimError, Machine
from khosim.abi import fdt
from khosim.kernel.release import find_release

NOTIFIERS = ["6.16", "6.17", "6.18"]
REFRESH = ["6.19", "7.0"]


def boot(release, cmdline="kho=on", **options):
    """A machine and its first kernel."""
    machine = Machine("128M", **options)
    return machine, machine.boot(release, cmdline=cmdline)


def refused(call, *args):
    """The name of the errno that a call is refused with."""
    with pytest.raises(KernelError) as info:
        call(*args)
    return info.value.name


def root_of(kernel):
    """The root FDT's bytes."""
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    return bytes(tree[: fdt.fdt_totalsize(tree)])


def written_map(kernel):
    """The blocks that the list in the root FDT tells of now, as (phys, order)."""
    value, _ = fdt.fdt_getprop(root_of(kernel), 0, "preserved-memory-map")
    tracker = type(kernel.kho_out.tree)(kernel, int.from_bytes(value, "little"))
    return [
        (phys + (n << order + 12), order)
        for phys, order, nr_blocks in tracker.blocks()
        for n in range(nr_blocks)
    ]


@pytest.mark.parametrize("release", NOTIFIERS)
def test_a_state_cannot_be_entered_twice(release):
    """0 before any finalize is -ENOENT, a second 1 is -EEXIST, and the file tells which it is."""
    _, kernel = boot(release)
    write = kernel.debugfs.write
    assert kernel.debugfs.read("out/finalize") == b"0\n"
    assert refused(write, "out/finalize", 0) == "ENOENT"
    write("out/finalize", 1)
    assert kernel.debugfs.read("out/finalize") == b"1\n"
    assert refused(write, "out/finalize", 1) == "EEXIST"
    assert refused(write, "out/finalize", 7) == "EEXIST"
    write("out/finalize", 0)
    assert refused(write, "out/finalize", 0) == "ENOENT"
    write("out/finalize", 1)


@pytest.mark.parametrize("release", NOTIFIERS)
def test_the_root_fdt_is_written_when_finalized(release):
    """Property by property, then the subtrees of the notifiers in the order of registration."""
    _, kernel = boot(release, "kho=on reserve_mem=1M:64K:log")
    assert "out/fdt" not in kernel.debugfs.files()
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    kernel.finalize()
    tree = root_of(kernel)
    assert kernel.debugfs.read("out/fdt") == tree
    # Header 40, reservations 16, one node with "kho-v1" and a map of 8 bytes, one subnode with an
    # address: 4+4 + 12+8 + 12+8 + (4+12 + 12+8 + 4) + 4 + 4 = 96; strings 11 + 21 + 4 = 36.
    assert fdt.fdt_totalsize(tree) == len(tree) == 40 + 16 + 8 + 96 + 36 - 0
    assert tree.endswith(b"fdt\0preserved-memory-map\0compatible\0")
    start, size = kernel.reserve_mem.find_by_name("log")
    assert size == 1 << 20
    assert (folio.phys, 2) in written_map(kernel)
    assert (start, 8) in written_map(kernel)
    assert (kernel.kho_out.fdt_phys, 0) in written_map(kernel)


@pytest.mark.parametrize("release", NOTIFIERS)
def test_finalized_is_closed(release):
    """Until it is aborted nothing more can be preserved: -EBUSY, for folios and ranges alike."""
    _, kernel = boot(release)
    kernel.finalize()
    folio = kernel.alloc_folio(0)
    assert refused(kernel.kho_preserve_folio, folio) == "EBUSY"
    if release == "6.18":
        assert refused(kernel.kho_preserve_pages, folio.pfn, 1) == "EBUSY"
    else:
        assert refused(kernel.kho_preserve_phys, folio.phys, 4096) == "EBUSY"
    kernel.debugfs.write("out/finalize", 0)
    kernel.kho_preserve_folio(folio)


@pytest.mark.parametrize("release", NOTIFIERS)
def test_an_abort_forgets_everything(release):
    """Also what was preserved before, by parties that are not asked."""
    machine, kernel = boot(release)
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    kernel.finalize()
    free = kernel.pages.nr_free_pages()
    kernel.debugfs.write("out/finalize", 0)
    assert kernel.pages.nr_free_pages() > free
    assert kernel.debugfs.files() == ["out/finalize", "out/scratch_len", "out/scratch_phys"]
    kernel.finalize()
    assert written_map(kernel) == [(kernel.kho_out.fdt_phys, 0)]
    successor = kernel.kexec()
    assert successor.is_kho_boot
    assert not machine.check()


@pytest.mark.parametrize("release", NOTIFIERS)
def test_a_notifier_that_refuses(release):
    """Its errno comes back, the abort is told to all, and the next try starts from nothing."""
    _, kernel = boot(release)
    heard = []

    def first(action):
        heard.append(action)
        return 0

    def second(action):
        return -errno.ENOSPC if action == "KEXEC_KHO_FINALIZE" and len(heard) < 2 else 0

    kernel.register_kho_notifier(first)
    kernel.register_kho_notifier(second)
    assert refused(kernel.debugfs.write, "out/finalize", 1) == "ENOSPC"
    assert heard == ["KEXEC_KHO_FINALIZE", "KEXEC_KHO_ABORT"]
    assert "KHO: Failed to convert KHO state tree: -28" in kernel.messages
    kernel.finalize()
    assert kernel.kho_out.finalized
    kernel.unregister_kho_notifier(second)
    assert refused(kernel.unregister_kho_notifier, second) == "ENOENT"


@pytest.mark.parametrize("release", NOTIFIERS)
def test_a_failed_finalize_leaves_its_files_behind(release):
    """Debugfs is tidied by a successful abort only: the second try finds its own old file."""
    _, kernel = boot(release, "kho=on reserve_mem=1M:64K:log")
    fail = [True]
    kernel.register_kho_notifier(lambda action: -errno.EIO if fail[0] else 0)
    assert refused(kernel.debugfs.write, "out/finalize", 1) == "EIO"
    assert "out/sub_fdts/memblock" in kernel.debugfs.files()
    fail[0] = False
    assert refused(kernel.debugfs.write, "out/finalize", 1) == "EEXIST"


@pytest.mark.parametrize("release", NOTIFIERS)
def test_subtrees_are_for_notifiers(release):
    """Nobody else has the serialization object; what no release has is said, not made up."""
    _, kernel = boot(release)
    with pytest.raises(KhoSimError, match=f"kho_add_subtree of Linux {release} can be called by"):
        kernel.kho_add_subtree("x", 0x1000, 64)


@pytest.mark.parametrize("release", REFRESH)
def test_finalizing_again_renews_the_map(release):
    """As often as one likes; the older list is freed, and preserving goes on in between."""
    machine, kernel = boot(release)
    assert kernel.debugfs.files()[:2] == ["out/fdt", "out/finalize"]
    assert written_map(kernel) == []
    kernel.finalize()
    assert written_map(kernel) == [(kernel.kho_out.fdt_phys, 0)]
    folio = kernel.alloc_folio(1)
    free = kernel.pages.nr_free_pages()
    kernel.kho_preserve_folio(folio)
    assert (folio.phys, 1) not in written_map(kernel)
    kernel.finalize()
    assert (folio.phys, 1) in written_map(kernel)
    assert kernel.pages.nr_free_pages() == free - 2  # one more bitmap, one more chunk
    assert refused(kernel.debugfs.write, "out/finalize", 0) == "EINVAL"
    assert kernel.kexec().is_kho_boot
    assert not machine.check()


@pytest.mark.parametrize("release", REFRESH)
def test_a_map_of_nothing_is_refused(release):
    """Loading does not wait for finalize, but the successor does not take an empty map."""
    machine, kernel = boot(release)
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec(finalize=False)
    assert not successor.is_kho_boot
    assert "KHO: disabling KHO revival: -2" in successor.messages
    assert not machine.check()


@pytest.mark.parametrize("release", ["6.17.4", "6.18"])
def test_loading_before_finalize_hands_nothing_over(release):
    """The image gets no FDT: the successor boots cold and says nothing of KHO."""
    machine, kernel = boot(release)
    kernel.kho_preserve_folio(kernel.alloc_folio(0))
    successor = kernel.kexec(finalize=False)
    assert not successor.is_kho_boot
    assert not any("KHO" in line for line in successor.messages)
    assert not machine.check()


@pytest.mark.parametrize("release", ["6.16", "6.17"])
def test_loading_before_finalize_hands_over_garbage(release):
    """f322a97aeb2a fixed it: the image gets the page where an FDT will be once."""
    machine, kernel = boot(release)
    kernel.kho_preserve_folio(kernel.alloc_folio(0))
    successor = kernel.kexec(finalize=False)
    assert not successor.is_kho_boot
    fdt_phys = kernel.kho_out.fdt_phys
    assert successor.messages[:2] == [
        f"KHO: setup: handover FDT ({fdt_phys:#x}) is invalid: -9",
        "KHO: disabling KHO revival: -22",
    ]
    spoke = {found.invariant for found in machine.check()}
    assert spoke == {"handover-wellformed", "metadata-preserved"}


@pytest.mark.parametrize("release", ["7.1", "7.2", "7.3"])
def test_later_releases_have_nothing_to_finalize(release):
    """No file, no call; the machine's own finalize is then nothing to do."""
    _, kernel = boot(release)
    assert "out/finalize" not in kernel.debugfs.files()
    with pytest.raises(KhoSimError, match=f"Linux {release} has no out/finalize"):
        kernel.debugfs.write("out/finalize", 1)
    kernel.finalize()


def test_kho_off_has_no_file():
    """With KHO off there is no debugfs to write to."""
    _, kernel = boot("6.18", "kho=off")
    assert refused(kernel.debugfs.write, "out/finalize", 1) == "ENOENT"
    assert refused(kernel.debugfs.write, "out/scratch_len", 1) == "EACCES"
    kernel.finalize()


def test_what_was_preserved_survives_an_abort_where_that_is_fixed():
    """99cd2ffac697 ("kho: don't unpreserve memory during abort") as a switch."""
    _, kernel = boot(find_release("6.18").evolve(abort_unpreserves=False))
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    kernel.finalize()
    kernel.debugfs.write("out/finalize", 0)
    kernel.finalize()
    assert (folio.phys, 0) in written_map(kernel)
