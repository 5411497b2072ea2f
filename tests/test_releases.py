"""Every release from 6.16 on: booted, handed over and held against every invariant."""

from __future__ import annotations

import json

import pytest

from khosim import InputError, KernelError, KhoSimError, Machine
from khosim.checks.decode import decode_handover
from khosim.checks.preserved import expand
from khosim.cli.main import main
from khosim.kernel.release import MAINLINE, RELEASES, Release, find_release
from khosim.scenario.library import builtin_text

V1 = ["6.16", "6.17", "6.18", "6.19", "7.0"]
WITH_PAGES = ["6.18", "6.19", "7.0", "7.1", "7.2", "7.3"]
MIB = 1 << 20
SCENARIO = """
generations = 3
[machine]
ram = "256M"
[kernel]
cmdline = "kho=on reserve_mem=1M:64K:log"
[[generation]]
steps = [
  { do = "write", region = "*" },
  { do = "folios", name = "guest", count = 300, orders = { 0 = 70, 2 = 20, 4 = 10 } },
  { do = "pages", name = "table", count = 30 },
  { do = "blob", name = "state", size = "20K" },
]
[[generation]]
steps = [
  { do = "restore", name = "*" },
  { do = "check", name = "*" },
  { do = "check", region = "*" },
  { do = "write", name = "guest" },
  { do = "preserve", name = "*" },
]
"""


def hand_over(release, successor=None, *, ram="256M", **options):
    """A machine, the folio its first kernel preserved, and the kernel that took over."""
    machine = Machine(ram, **options)
    kernel = machine.boot(release, cmdline="kho=on reserve_mem=1M:64K:log")
    folio = kernel.alloc_folio(3)
    folio.write(0, b"what shall remain")
    kernel.kho_preserve_folio(folio)
    start, _ = kernel.reserve_mem.find_by_name("log")
    kernel.ram.write(start, b"tail of a log", (0, "log"))
    return machine, folio, kernel.kexec(release=successor or release)


@pytest.mark.parametrize("release", RELEASES)
def test_three_generations(release):
    """A folio, a region and the next handover: nothing is lost, and no invariant speaks."""
    machine, folio, kernel = hand_over(release)
    for generation in (1, 2):
        assert kernel.is_kho_boot
        assert kernel.generation == generation
        restored = kernel.kho_restore_folio(folio.phys)
        assert (restored.pfn, restored.order) == (folio.pfn, 3)
        assert restored.read(0, 17) == b"what shall remain"
        start, _ = kernel.reserve_mem.find_by_name("log")
        assert kernel.ram.read(start, 13) == b"tail of a log"
        assert "Revived memory reservation 'log' from KHO" in kernel.messages
        kernel.kho_preserve_folio(restored)
        if generation == 1:
            kernel = kernel.kexec()
    assert machine.check() == []


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@pytest.mark.parametrize("release", MAINLINE)
def test_page_sizes_of_arm64(release, page_size):
    """The same with 4, 16 and 64 KiB pages."""
    machine, folio, kernel = hand_over(release, ram="3G", arch="arm64", page_size=page_size)
    assert kernel.is_kho_boot
    assert kernel.kho_restore_folio(folio.phys).read(0, 17) == b"what shall remain"
    assert machine.check() == []


@pytest.mark.parametrize(
    ("older", "newer"),
    [("6.16", "6.17"), ("6.18", "6.19"), ("6.19", "7.0"), ("7.0", "6.18"), ("7.2", "7.3")],
)
def test_releases_of_one_format_take_over_from_each_other(older, newer):
    """Where format and bitmaps are the same the next release is no different."""
    machine, folio, kernel = hand_over(older, newer)
    assert kernel.release.name == newer
    assert kernel.is_kho_boot
    assert kernel.kho_restore_folio(folio.phys).read(0, 17) == b"what shall remain"
    assert machine.check() == []


@pytest.mark.parametrize(
    ("old", "new", "their"),
    [("7.0", "7.1", "v3"), ("7.1", "7.2", "v4"), ("7.3", "6.18", "v1"), ("6.16", "7.3", "v4")],
)
def test_another_format_is_refused(old, new, their):
    """The successor says what it wants, boots cold, and no invariant speaks."""
    machine, _, kernel = hand_over(old, new)
    assert not kernel.is_kho_boot
    number = ": -22" if their == "v1" else ""
    assert any(f"is incompatible with 'kho-{their}': 1" in line for line in kernel.messages)
    assert f"KHO: disabling KHO revival{number}" in kernel.messages
    assert machine.check() == []


def test_short_bitmaps_misread_as_pages():
    """6.17 to 6.18, under one name: the objects behind each bitmap become a part of it.

    Orders 0, 1 and 2 have a bitmap each, one behind the other in the slab, and behind these are
    free objects, each with the address of the next in its middle. Bit n of the object that is k
    objects further is bit 4096 * k + n to the reader.
    """
    machine = Machine("2G", nodes=2)
    kernel = machine.boot("6.17", cmdline="kho=on")
    pfns = []
    for order in (0, 1, 2):
        folio = kernel.alloc_folio(order, nid=0)
        kernel.kho_preserve_folio(folio)
        pfns.append(folio.pfn)
    reserved = set()

    def listen(event):
        if event.symbol == "deserialize_bitmap":
            phys, order, count = (event.args[name] for name in ("phys", "order", "nr_blocks"))
            reserved.update((phys + (n << order + 12), order) for n in range(count))

    machine.listen(listen)
    successor = kernel.kexec(release="6.18")
    assert successor.is_kho_boot
    ram = machine.hardware.ram
    told = decode_handover(ram, kernel.kexec_image.kho_fdt, 4096, preserve_bits=4096).preserved
    elements = [chunk.elements[0] for chunk in told.chunks]
    slab = elements[0].bitmap
    assert [element.bitmap - slab for element in elements] == [0, 512, 1024]
    phantoms = set()
    for order in (0, 1, 2):
        for behind in range(1, 8):
            n = order + behind
            if n < 3:
                bits = [(pfns[n] >> n) % 4096]
            else:
                pointer = 0xFFFF888000000000 + slab + 512 * (n + 1)
                bits = [2048 + bit for bit in range(64) if pointer >> bit & 1]
            start = elements[order].phys_start + (4096 * behind << order + 12)
            phantoms.update((start + (bit << order + 12), order) for bit in bits)
    assert reserved - set(expand(told)) == phantoms
    assert set(expand(told)) <= reserved
    spoke = [v for v in machine.check() if v.invariant == "map-agrees"]
    assert spoke
    assert all("is reserved but was not preserved" in v.message for v in spoke)


def test_page_bitmaps_misread_as_short_ones():
    """6.18 to 6.17: what lies above 16 MiB is not seen, and is handed out as free memory."""
    machine = Machine("256M")
    kernel = machine.boot("6.18", cmdline="kho=on")
    high = kernel.alloc_folio(0, nid=0)
    while high.phys < 16 * MIB:
        high = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(high)
    successor = kernel.kexec(release="6.17")
    assert successor.is_kho_boot
    assert successor.page(high.pfn).kind == "free"
    found = machine.check()
    assert any(
        v.invariant == "map-agrees" and "was preserved but is not reserved" in v.message
        for v in found
    )


# -- restoring --------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["6.16", "6.17"])
def test_without_magic_any_page_is_restored(release):
    """Twice, and a page that nobody preserved; restored-once speaks of both."""
    machine, folio, kernel = hand_over(release)
    assert kernel.kho_restore_folio(folio.phys).order == 3
    assert kernel.kho_restore_folio(folio.phys).order == 3
    mine = kernel.alloc_folio(0)
    assert kernel.kho_restore_folio(mine.phys) is not None
    spoke = [v.message for v in machine.check() if v.invariant == "restored-once"]
    assert any("more than once" in text for text in spoke)
    assert any("no such block was handed over" in text for text in spoke)


@pytest.mark.parametrize("release", WITH_PAGES)
def test_with_magic_only_what_was_preserved(release):
    """A second time is NULL with a warning, and so is any other page."""
    _, folio, kernel = hand_over(release)
    assert kernel.kho_restore_folio(folio.phys + 4096) is None
    assert kernel.kho_restore_folio(folio.phys) is not None
    assert kernel.kho_restore_folio(folio.phys) is None
    assert kernel.kho_restore_folio(kernel.alloc_folio(0).phys) is None


@pytest.mark.parametrize(
    ("release", "restorable"), [("6.19", False), ("7.0", False), ("7.1", True)]
)
def test_the_cap_on_orders(release, restorable):
    """22bdab8e98b7: a range of 8 MiB is one block of order 11, which only 7.1 gives back."""
    machine = Machine("256M")
    kernel = machine.boot(release, cmdline="kho=on reserve_mem=8M:8M:big")
    start, _ = kernel.reserve_mem.find_by_name("big")
    successor = kernel.kexec(cmdline="kho=on")
    assert successor.page(start >> 12).order == 11
    assert (successor.kho_restore_pages(start, 2048) is not None) is restorable


# -- what a release does not have -------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "function"),
    [
        ("6.16", "kho_preserve_pages"),
        ("6.17", "kho_restore_pages"),
        ("6.18", "kho_preserve_phys"),
        ("6.18", "kho_unpreserve_folio"),
        ("6.18", "kho_alloc_preserve"),
        ("6.18", "kho_remove_subtree"),
        ("6.19", "register_kho_notifier"),
        ("7.3", "kho_preserve_phys"),
    ],
)
def test_a_missing_function_is_named(release, function):
    """The call says which release has no such function."""
    kernel = Machine("64M").boot(release, cmdline="kho=on")
    arguments = {
        "kho_unpreserve_folio": (kernel.alloc_folio(0),),
        "kho_alloc_preserve": (4096,),
        "kho_remove_subtree": (4096,),
        "register_kho_notifier": (len,),
    }
    with pytest.raises(KhoSimError, match=f"Linux {release} has no {function}"):
        getattr(kernel, function)(*arguments.get(function, (0x100000, 4096)))


def test_kho_preserve_phys_takes_whole_pages():
    """-EINVAL for an odd address or size, in 6.16 and 6.17."""
    kernel = Machine("64M").boot("6.16", cmdline="kho=on")
    for phys, size in ((0x100001, 4096), (0x100000, 100)):
        with pytest.raises(KernelError, match="kho_preserve_phys: -EINVAL"):
            kernel.kho_preserve_phys(phys, size)
    kernel.kho_preserve_phys(0x100000, 0)
    kernel.kho_preserve_phys(0x100000, 3 * 4096)
    assert list(kernel.kho_out.tree.marked()) == [(0x102000, 0, 1), (0x100000, 1, 1)]


@pytest.mark.parametrize("release", ["6.16", "6.17", "6.18"])
def test_an_odd_region_spoils_6_16(release):
    """A reserve_mem size that is no whole page makes every finalize fail, until 6.18."""
    kernel = Machine("128M").boot(release, cmdline="kho=on reserve_mem=5000:64:odd")
    if release == "6.18":
        kernel.finalize()
        return
    with pytest.raises(KernelError, match="-EINVAL"):
        kernel.finalize()


# -- one argument -----------------------------------------------------------------------------


def test_a_bug_back_or_a_fix_in():
    """A behaviour or several after a plus sign; the name tells."""
    release = find_release("7.3+restore_order_cap=on+bitmap_bytes=512+functions=a,b")
    assert release.name == "7.3+restore_order_cap=on+bitmap_bytes=512+functions=a,b"
    assert (release.restore_order_cap, release.bitmap_bytes) == (True, 512)
    assert release.functions == ("a", "b")
    assert find_release("6.18+finalize=refresh").finalize == "refresh"
    assert find_release(release) is release


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("6.8", "'6.8' is no release khosim knows; did you mean 6.18?"),
        ("9", "'9' is no release khosim knows; it knows 6.16,"),
        ("7.3+page_magik=on", "no behaviour named 'page_magik'; did you mean page_magic"),
        ("7.3+page_magic", "page_magic needs a value"),
        ("7.3+page_magic=maybe", "page_magic=maybe: neither on nor off"),
        ("7.3+bitmap_bytes=many", "bitmap_bytes=many: not a whole number"),
        ("7.3+bitmap_bytes=513", "bitmap_bytes: not whole words of 8 bytes"),
        ("7.3+finalize=refresh", "only tracker=chunks has something to finalize"),
        ("7.3+decoder=nope", "decoder=nope: not FILE.py:FUNCTION"),
        ("7.3+finalize=now", 'finalize=now: not one of "", notifiers, refresh'),
        ("7.3+tracker=list", "tracker=list: not one of radix, chunks, nor FILE.py:CLASS"),
        ("nowhere.py", "nowhere.py: there is no such file"),
    ],
)
def test_a_wrong_release_is_named(text, cause):
    """One line with what is wrong and what would be right."""
    with pytest.raises(InputError) as info:
        find_release(text)
    assert cause in str(info.value)
    assert "\n" not in str(info.value)


def test_evolve_wants_the_right_kind():
    """A number is no flag and a flag no number."""
    with pytest.raises(InputError, match="page_magic=1: not a bool"):
        find_release("7.3").evolve(page_magic=1)
    with pytest.raises(InputError, match="no behaviour named 'speed'"):
        find_release("7.3").evolve(speed=1)


def test_behaviours_travel_in_the_image():
    """The successor is what its image says: all of a release goes through RAM."""
    machine = Machine("64M")
    release = find_release("6.16+skip_init_told=off")
    kernel = machine.boot(release, cmdline="kho=on")
    assert kernel.release == release
    assert isinstance(kernel.release, Release)
    assert "KHO: found kexec handover data." in kernel.kexec().messages


@pytest.mark.parametrize("release", MAINLINE)
def test_run_with_each_release(release, tmp_path, capsys):
    """``khosim run --release R``: folios, ranges and blobs cross whatever the release."""
    scenario = tmp_path / "all.toml"
    scenario.write_text(SCENARIO)
    assert main(["run", str(scenario), "--release", release, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["violations"] == []
    assert told["handovers"] == told["generations"] - 1 == 2
    assert told["preserved_bytes"] > 1 << 20


def test_a_step_that_a_release_has_no_call_for(capsys, tmp_path):
    """One line with the step, the release and the function."""
    file = tmp_path / "mine.toml"
    file.write_text(builtin_text("small").replace(", optional = true", ""))
    assert main(["run", str(file), "--release", "6.18"]) == 2
    told = capsys.readouterr().err
    assert "Linux 6.18 has no kho_unpreserve_" in told
    assert "step" in told
