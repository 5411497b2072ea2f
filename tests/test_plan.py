"""Predicting scratch: exact from real logs, by the model from less, and what it says of both.

What is expected is read from the captures' own files (``kho/out``) or from public reports; see
docs/plan.md for those.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import Machine
from khosim.errors import InputError, KernelError, KernelPanic
from khosim.kernel.image import KernelConfig
from khosim.kernel.memblock import MEMBLOCK_RSRV_HUGETLB, MEMBLOCK_RSRV_KERN, Memblock
from khosim.machine.memory_map import MemoryMap, Region
from khosim.plan.ledger import OTHER, Ledger, owner_of, owners_in
from khosim.plan.planner import make_plan
from khosim.plan.replayed import same_reservations
from khosim.plan.rules import release_by_name, release_of_uname
from khosim.plan.source import Source, read_source

ROOT = Path(__file__).parent
CAPTURES, LOGS = ROOT / "golden" / "captures", ROOT / "golden" / "logs"
DOC = ROOT.parent / "docs" / "plan.md"
NAMES = ("uma1g", "uma1g-7.2", "fixed2g", "numa4g", "arm64-16k")
COLD_LOGS = ("efi-movable-crash", "cma-6g", "mem-1g", "no-numa-7.2")
HANDOVER_LOGS = ("huge-3-nodes", "fake-4-nodes", "dimm-kaslr")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def real_areas(name):
    """[address, length] of the cold boot's areas, as debugfs showed them."""
    folder = CAPTURES / name / "gen0" / "kho" / "out"  # or an absolute path
    columns = [(folder / column).read_text().split() for column in ("scratch_phys", "scratch_len")]
    return [[int(phys, 0), int(size, 0)] for phys, size in zip(*columns, strict=True)]


def plan_of(text, cmdline=None, release=None, *, nodes=None, arch=None, page_size=None, **given):
    """The plan as JSON has it."""
    source = read_source(str(text), nodes=nodes, arch=arch, page_size=page_size)
    return make_plan(source, cmdline=cmdline, release=release, given=given).as_json()


# -- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["", "gen0", "gen0/dmesg"])
def test_a_trace_gives_the_real_areas(name, where):
    """Every address and length, from the folder, its first generation, or the log alone."""
    page_size = 16384 if name == "arm64-16k" and where.endswith("dmesg") else None
    found = plan_of(CAPTURES / name / where, page_size=page_size)
    assert found["method"] == "trace"
    assert found["scratch"] == real_areas(name)
    assert found["reserved_bytes"] == sum(size for _, size in real_areas(name))
    assert found["share"] == pytest.approx(found["reserved_bytes"] / found["ram_bytes"], abs=1e-6)
    assert found["findings"] == []


@pytest.mark.parametrize("name", COLD_LOGS)
def test_other_machines_too(name):
    """EFI, CMA, mem=, and a kernel without NUMA."""
    found = plan_of(LOGS / f"{name}.txt")
    assert found["method"] == "trace"
    assert found["scratch"] == json.loads((LOGS / "scratch.json").read_text())[name]


def test_the_rules_of_6_16():
    """The real 6.16 code on a 7.3 kernel: the capture says so, and other rules give other areas."""
    folder = ROOT / "golden" / "kho-v1" / "uma1g-v1"
    real = real_areas(folder)
    assert any(phys % (4 * MIB) or size % (4 * MIB) for phys, size in real)
    found = plan_of(folder)
    assert (found["method"], found["release"], found["scratch"]) == ("trace", "6.16", real)
    assert plan_of(folder, release="7.3")["scratch"] != real


@pytest.mark.parametrize("name", HANDOVER_LOGS)
def test_a_handover_boot_is_no_exact_source(name):
    """Its scratch was its predecessor's: the map is used, and the plan says so."""
    found = plan_of(LOGS / f"{name}.txt")
    assert found["method"] == "model"
    assert any("handover boot" in note for note in found["notes"])


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(NAMES), scale=st.integers(1, 250))
def test_any_scale_on_a_real_boot(name, scale):
    """Sizes follow from what the owners have; areas are aligned, apart, and in RAM."""
    source = read_source(str(CAPTURES / name))
    found = make_plan(source, cmdline=f"{source.cmdline} kho_scratch={scale}%").as_json()
    assert found["method"] == "trace"
    if not found["enabled"]:
        assert found["scratch"] == []
        assert found["findings"][0].startswith("KHO turns itself off: KHO: Failed to reserve")
        return
    align = 32 * MIB if name == "arm64-16k" else 4 * MIB
    low = sum(owner["low_bytes"] for owner in found["owners"]) * scale // 100
    assert found["scratch"][0][1] == -(-low // align) * align
    whole = sum(owner["reserved_bytes"] for owner in found["owners"]) * scale // 100
    assert found["scratch"][1][1] == -(-(whole - low) // align) * align
    taken = sorted(area for area in found["scratch"] if area[1])
    assert all(phys % align == 0 and size % align == 0 for phys, size in taken)
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(taken))
    ram = source.memory_map.ram_ranges
    assert all(any(s <= phys and phys + size <= e for s, e in ram) for phys, size in taken)


def test_a_trace_of_a_kernel_with_kho_off():
    """The question before anyone reboots: what would it cost to switch it on?"""
    lines = (CAPTURES / "uma1g" / "gen0" / "dmesg").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "kho_memory_init" in line)
    last = next(i for i, line in enumerate(lines) if "SLUB: HWalign" in line)
    text = "".join(lines[:first] + lines[last:]).replace("kho=on", "kho=off")
    source = Source(**{**fields(read_source(str(CAPTURES / "uma1g"))), "log": text})
    off = make_plan(source, cmdline=source.cmdline.replace("kho=on", "kho=off"))
    assert (off.method, off.areas, off.findings) == ("trace", (), ())
    on = make_plan(source)
    assert on.method == "trace"
    assert on.as_json()["scratch"] == real_areas("uma1g")


def fields(source):
    """A source as a dictionary."""
    return {name: getattr(source, name) for name in Source.__slots__}


def test_another_command_line_needs_the_model():
    """A trace says nothing of a log buffer that it does not have."""
    source = read_source(str(CAPTURES / "uma1g"))
    plan = make_plan(source, cmdline="kho=on log_buf_len=4M")
    assert plan.method == "model"
    assert "the memblock trace is of another command line: not used" in plan.notes
    assert make_plan(source, given={"initrd_bytes": 0}).method == "model"


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("kho=on quiet", "kho=off kho_scratch=50%", True),
        ("log_buf_len=1M quiet", "log-buf-len=1M", True),
        ("log_buf_len=1M", "log_buf_len=2M", False),
        ("reserve_mem=1M:4K:a", "", False),
        ("a b", "b a", True),
        ("mem=1G -- log_buf_len=1M", "mem=1G", True),
    ],
)
def test_which_command_lines_reserve_the_same(left, right, same):
    """Options of KHO and the console do not matter, all others may."""
    assert same_reservations(left, right) == same


# -- the model and its error ----------------------------------------------------------------------


def without_trace(name):
    """The log of a capture's cold boot as it is without memblock=debug."""
    text = (CAPTURES / name / "gen0" / "dmesg").read_text()
    kept = [
        line
        for line in text.splitlines()
        if not re.search(r"memblock_|MEMBLOCK| (memory|reserved)(\[|\.cnt| size)", line)
    ]
    return "\n".join(kept)


def model_bytes(name, way, tmp_path):
    """What the model predicts for a capture, told more or less."""
    arm = name == "arm64-16k"
    options = {"page_size": 16384} if arm else {}
    cmdline = (CAPTURES / name / "gen0" / "cmdline").read_text().strip()
    (tmp_path / "dmesg").write_text(without_trace(name))
    log = read_source(str(tmp_path / "dmesg"), page_size=options.get("page_size"))
    if way == "log":
        return make_plan(log).as_json()
    size = {"fixed2g": "2G", "arm64-16k": "2G", "numa4g": "4G"}.get(name, "1G")
    options |= {"arch": "arm64"} if arm else {}
    options |= {"nodes": 2} if name == "numa4g" else {}
    told = log.found if way == "size and dimensions" else {}
    return plan_of(size, cmdline, release_of_uname(log.uname), **options, **told)


def documented_errors():
    """The error table of docs/plan.md: name -> way -> text."""
    table = {}
    for line in DOC.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if cells[0] in NAMES:
            ways = ("real", "trace", "log", "size and dimensions", "size")
            table[cells[0]] = dict(zip(ways, cells[1:], strict=True))
    return table


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["log", "size and dimensions", "size"])
def test_the_models_error_is_as_documented(name, way, tmp_path):
    """Each figure in docs/plan.md; told the dimensions, the model is exact on all captures."""
    real = sum(size for _, size in real_areas(name))
    found = model_bytes(name, way, tmp_path)
    assert found["method"] == "model"
    error = (found["reserved_bytes"] - real) / real
    text = f"{error:+.0%}" if found["enabled"] else "off"
    said = documented_errors()[name]
    assert said["real"] == f"{real // MIB}M"
    assert said["trace"] == "0"
    assert said[way] == ("0" if error == 0 else text)
    if way == "log":
        assert found["scratch"] == real_areas(name)


ARM_UBUNTU = {"arch": "arm64", "release": "7.0", "initrd_bytes": 0, "nr_cpus": 1}


def test_the_model_admits_what_it_does_not_know():
    """Options that take memory away or ask for more at boot."""
    found = plan_of("4G", "kho=on memmap=256M$0x20000000 swiotlb=65536 quiet")
    assert found["notes"] == [
        "the model knows nothing of memmap=", "the model knows nothing of swiotlb=",
    ]  # fmt: skip


def test_the_800_mib_machine_that_lost_134():
    """Ubuntu 7.0 on arm64 without an initrd: 682,576K available with kho=off, 545,236K with it."""
    lost = (682_576 - 545_236) * KIB
    found = plan_of("800M", **ARM_UBUNTU)
    assert found["reserved_bytes"] == pytest.approx(lost, rel=0.01)


def test_the_1_gib_machine_that_lost_144():
    """The same kernel on a little more memory."""
    assert plan_of("1G", **ARM_UBUNTU)["reserved_bytes"] == pytest.approx(144 * MIB, rel=0.01)


def test_the_128_gb_machine_that_lost_9_gib():
    """Twenty CPUs, 4 KiB pages: struct pages, their linear map, and all of it twice and twice."""
    start, total = 0x9000_0000, 133_828_484 * KIB  # as the kernel counts it, wherever it begins
    below = 0xF000_0000 - start
    entries = (
        Region(start, start + below, "System RAM"),
        Region(4 * GIB, 4 * GIB + total - below, "System RAM"),
    )
    source = Source("spark", "size", MemoryMap(entries, arch="arm64"), 4096)
    found = make_plan(source, release="7.0", given={"nr_cpus": 20}).as_json()
    real = [0xC000000, 0x12BA00000, 0x11F800000]
    for (_, size), reported in zip(found["scratch"], real, strict=True):
        assert size == pytest.approx(reported, rel=0.01)
    first, second = found["owners"][:2]
    assert (first["name"], second["name"]) == ("struct pages", "page tables")
    assert first["scratch_bytes"] > 0.8 * found["reserved_bytes"]


def test_a_log_tells_dimensions(tmp_path):
    """Sizes of image, initrd, per-cpu areas and CMA; the number of CPUs; the built-in log."""
    log = tmp_path / "dmesg"
    log.write_text(
        "Booting Linux on physical CPU 0x0000000000 [0x410fd4f0]\n"
        "Linux version 7.0.0-30-generic (buildd) #30-Ubuntu\n"
        "Zone ranges:\n"
        "  DMA      [mem 0x0000000040000000-0x0000000071ffffff]\n"
        "  DMA32    empty\n"
        "  Normal   empty\n"
        "  node   0: [mem 0x0000000040000000-0x0000000071ffffff]\n"
        "percpu: Embedded 34 pages/cpu s99496 r8192 d31576 u139264\n"
        "Kernel command line: root=PARTUUID=1 ro\n"
        "printk: log_buf_len min size: 262144 bytes\n"
        "Dentry cache hash table entries: 131072 (order: 8, 1048576 bytes, linear)\n"
        "Memory: 545236K/819200K available (27136K kernel code, 6266K rwdata, 20296K rodata, "
        "15232K init, 1301K bss, 233864K reserved, 32768K cma-reserved)\n"
        "rcu: Adjusting geometry for rcu_fanout_leaf=16, nr_cpu_ids=2\n"
    )
    source = read_source(str(log))
    assert source.found == {
        "kernel_bytes": (27136 + 6266 + 20352 + 15232 + 1301) * KIB,  # rodata to whole 64 KiB
        "cma_bytes": 32 * MIB,
        "initrd_bytes": 0,
        "nr_cpus": 2,
        "percpu_bytes": 99496 + 8192 + 31576,
        "log_buf_bytes": 256 * KIB,
        "zone_dma": 1,
    }
    plan = make_plan(source)
    assert plan.release.name == "7.0"
    assert plan.scratch_bytes == pytest.approx(134.1 * MIB, rel=0.02)


def test_proc_iomem_tells_the_image(tmp_path):
    """Its size, beside the map; the rest is assumed."""
    iomem = tmp_path / "iomem"
    iomem.write_text((CAPTURES / "uma1g" / "gen0" / "iomem").read_text())
    source = read_source(str(iomem))
    assert (source.kind, list(source.found)) == ("iomem", ["kernel_bytes"])
    assert 4 * MIB < source.found["kernel_bytes"] < 16 * MIB
    cmdline = (CAPTURES / "uma1g" / "gen0" / "cmdline").read_text()
    given = {"initrd_bytes": 12980224, "nr_cpus": 2, "percpu_bytes": 37 << 12}
    found = make_plan(source, cmdline=cmdline.strip(), given=given).as_json()
    assert found["scratch"] == real_areas("uma1g")


# -- what drives it -------------------------------------------------------------------------------


def driver(found, what):
    """One driver of a plan."""
    return next(one for one in found["drivers"] if one["what"].startswith(what))


def test_the_log_buffer_counts_four_times():
    """16M of text, 12M of descriptors, 44M of records: twice in lowmem and twice on the node."""
    found = plan_of(CAPTURES / "uma1g")
    assert found["owners"][0] == {
        "name": "log buffer",
        "reserved_bytes": 72 * MIB,
        "low_bytes": 72 * MIB,
        "node_bytes": 72 * MIB,
        "scratch_bytes": 288 * MIB,
    }
    told = driver(found, "log_buf_len=16M")
    assert told["reserved_bytes"] == pytest.approx(72 * MIB, abs=64)  # and its own few letters
    assert told["scratch_bytes"] - told["scratch_without_bytes"] == 288 * MIB
    lowmem = found["scratch"][0][1] - plan_of(CAPTURES / "uma1g", "kho=on")["scratch"][0][1]
    assert lowmem == pytest.approx(144 * MIB, abs=8 * MIB)  # reserve_mem is gone as well


def test_on_arm64_it_counts_twice():
    """There it is allocated after memory got its nodes."""
    owner = plan_of(CAPTURES / "arm64-16k")["owners"][0]
    assert (owner["name"], owner["node_bytes"], owner["scratch_bytes"]) == (
        "log buffer", 0, 144 * MIB,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_model_and_trace_agree_on_the_owners(name, tmp_path):
    """What the simulated boot says of each owner the real log says as well, within 1 MiB."""
    exact = {one["name"]: one for one in plan_of(CAPTURES / name)["owners"]}
    model = {one["name"]: one for one in model_bytes(name, "log", tmp_path)["owners"]}
    for owner in set(exact) | set(model):
        for column in ("reserved_bytes", "low_bytes", "node_bytes"):
            left, right = (part.get(owner, {}).get(column, 0) for part in (exact, model))
            assert abs(left - right) < MIB, (owner, column)


def test_a_crash_kernel_is_dear():
    """Half a gigabyte for crashes makes a whole one of scratch."""
    with_it = plan_of("16G", "kho=on crashkernel=512M")
    without = plan_of("16G", "kho=on")
    assert with_it["reserved_bytes"] - without["reserved_bytes"] == GIB
    told = driver(with_it, "crashkernel=512M")
    assert told["scratch_without_bytes"] == without["reserved_bytes"]


def test_huge_pages_count_up_to_7_2():
    """Four of 1 GiB: nothing at all since 7.3, four times their size before."""
    cmdline = "kho=on hugepagesz=1G hugepages=4"
    newer, older = (plan_of("64G", cmdline, release) for release in ("7.3", "7.2"))
    assert older["reserved_bytes"] - newer["reserved_bytes"] == 16 * GIB
    assert driver(older, "hugepagesz=1G hugepages=4")["reserved_bytes"] >= 4 * GIB
    assert all(one["what"] != "hugepagesz=1G hugepages=4" for one in newer["drivers"])


def test_the_ledger_against_a_dumb_one():
    """A byte has the owner that took it last, or none; compared byte by byte."""
    calls = st.lists(
        st.tuples(st.sampled_from("abc-"), st.integers(0, 40), st.integers(0, 12)), max_size=30
    )

    @given(calls)
    def check(calls):
        ledger, dumb = Ledger(), [OTHER] * 60
        for owner, start, size in calls:
            if owner == "-":
                ledger.free(start, start + size)
            else:
                ledger.take(start, start + size, owner)
            dumb[start : start + size] = [OTHER if owner == "-" else owner] * size
        shown = [None] * 60
        for low, high, owner in ledger.within(0, 60):
            assert low < high
            shown[low:high] = [owner] * (high - low)
        assert shown == dumb
        pieces = ledger.within(10, 20)
        assert [owner for low, high, owner in pieces for _ in range(low, high)] == dumb[10:20]

    check()


def test_owners_by_hand():
    """Only the kernel's own counts; below a limit, and on a node where there is one."""
    memblock = Memblock(page_size=4096)
    memblock.memblock_add(0, 8 * GIB)
    memblock.memblock_reserve(0, MIB)  # the firmware's
    memblock.memblock_reserve_node(GIB, MIB, 0, MEMBLOCK_RSRV_KERN)
    memblock.memblock_reserve_node(4 * GIB - MIB, 3 * MIB, -1, MEMBLOCK_RSRV_KERN)
    huge = MEMBLOCK_RSRV_KERN | MEMBLOCK_RSRV_HUGETLB
    memblock.memblock_reserve_node(6 * GIB, GIB, 0, huge)
    ledger = Ledger()
    ledger.take(4 * GIB - MIB, 4 * GIB + 2 * MIB, owner_of("setup_log_buf"))
    ledger.take(6 * GIB, 7 * GIB, owner_of("hugetlb_bootmem_alloc"))
    found = owners_in(memblock, ledger, 4 * GIB, excludes_hugetlb=True)
    rows = [(one.name, one.reserved_bytes, one.low_bytes, one.node_bytes) for one in found]
    assert rows == [("log buffer", 3 * MIB, MIB, 0), (OTHER, MIB, MIB, MIB)]
    assert [one.scratch_bytes(200) for one in found] == [6 * MIB, 4 * MIB]
    counted = owners_in(memblock, ledger, 4 * GIB, excludes_hugetlb=False)
    assert (counted[0].name, counted[0].low_bytes) == ("huge pages", 0)


# -- what would not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ram", "cmdline", "release", "given", "finding"),
    [
        ("1G", "kho=on log_buf_len=16M", "7.3", {}, "KHO turns itself off: KHO: Failed to reserve"),
        ("8G", "kho=on hugepagesz=1G hugepages=4", "7.0", {}, "KHO turns itself off: "),
        ("4G", "kho=on kho_scratch=5G,0,0", "7.3", {}, "KHO turns itself off: "),
        (
            "4G", "kho=on kho_scratch=16M,16M,16M", "7.3", {},
            "the same kernel cannot be loaded by kexec: kho_locate_mem_hole: -EADDRNOTAVAIL",
        ),
        ("4G", "kho=on reserve_mem=8G:1M:big", "7.3", {}, "reserve_mem: memblock allocation"),
        ("4G", "kho=on reserve_mem=1M:big", "7.3", {}, "reserve_mem: empty or malformed"),
        ("4G", "kho=on hugepagesz=1G hugepages=9", "7.3", {}, "HugeTLB: allocating 9 of page size"),
        ("4G", "kho=on crashkernel=3G", "7.3", {}, "cannot allocate crashkernel"),
        ("4G", "kho=on kho_scratch=lots", "7.3", {}, "Malformed early option 'kho_scratch'"),
        ("4G", "kho=on cma=64G", "7.3", {"cma_bytes": 0}, "cma: Failed to reserve"),
        ("128M", "kho=on", "7.3", {"initrd_bytes": 8 * MIB}, "KHO turns itself off: "),
    ],
)  # fmt: skip
def test_what_would_go_wrong(ram, cmdline, release, given, finding):
    """In the kernel's words."""
    found = plan_of(ram, cmdline, release, **given)
    assert any(line.startswith(finding) for line in found["findings"]), found["findings"]


FIRMWARE = """\
Linux version 7.0.0-29-generic (buildd) #29-Ubuntu SMP
Command line: ro crashkernel=2G-4G:320M,4G-32G:512M,32G-64G:1024M,64G-:2048M
BIOS-e820: [mem 0x0000000000000000-0x000000000009efff] System RAM
BIOS-e820: [mem 0x0000000000100000-0x0000000009afefff] System RAM
BIOS-e820: [mem 0x0000000009aff000-0x0000000009dfffff] device reserved
BIOS-e820: [mem 0x0000000009e00000-0x000000005b77bfff] System RAM
BIOS-e820: [mem 0x000000006affe000-0x000000006affefff] ACPI data
BIOS-e820: [mem 0x000000006afff000-0x000000006affffff] System RAM
BIOS-e820: [mem 0x0000000100000000-0x000000107e2fffff] System RAM
"""


def test_a_crash_kernel_that_pushes_scratch_over_the_edge(tmp_path):
    """64 GiB, but only 1.4 below 4: 1 GiB for crashes there, twice that for lowmem scratch."""
    log = tmp_path / "dmesg"
    log.write_text(FIRMWARE)
    found = plan_of(log)
    assert found["findings"] == [
        "KHO turns itself off: KHO: Failed to reserve scratch area, disabling kexec handover"
    ]
    (only,) = found["drivers"]
    assert only["what"].startswith("crashkernel=")
    assert only["scratch_without_bytes"] > GIB
    assert found["suggestion"] is None
    assert "no kho_scratch= of 50% to 200% helps: a driver has to go" in found["notes"]


def test_nothing_is_wrong_with_kho_off():
    """No scratch, no finding, a word on why."""
    found = plan_of("1G", "kho=off log_buf_len=16M")
    assert (found["scratch"], found["reserved_bytes"], found["share"]) == ([], 0, 0)
    assert (found["findings"], found["drivers"], found["suggestion"]) == ([], [], None)
    assert any(note.startswith("KHO is off") for note in found["notes"])


def test_a_driver_may_turn_kho_off():
    """Without it KHO stays on, and the plan knows what scratch would be then."""
    found = plan_of("8G", "kho=on hugepagesz=1G hugepages=4", "7.0")
    assert not found["enabled"]
    told = driver(found, "hugepagesz=1G hugepages=4")
    assert told["scratch_without_bytes"] == plan_of("8G", "kho=on", "7.0")["reserved_bytes"] > 0


def hands_over(ram, option):
    """Whether a kernel of the model's dimensions boots in nothing but its predecessor's scratch."""
    config = KernelConfig(
        release=release_by_name("7.3").evolve(scratch_extension=False),
        kernel_bytes=64 * MIB, init_size_bytes=80 * MIB, init_offset_bytes=48 * MIB,
        init_bytes=8 * MIB, nr_cpus=4, percpu_bytes=63 << 12, log_buf_shift=18,
    )  # fmt: skip
    machine = Machine(ram)
    kernel = machine.boot(cmdline=f"kho=on {option}", config=config, initrd="64M")
    try:
        successor = kernel.kexec()
    except (KernelError, KernelPanic):
        return False
    assert machine.check() == []
    return not any("ailed" in line for line in successor.messages)


@pytest.mark.parametrize("ram", ["1G", "16G"])
def test_a_suggestion_works(ram):
    """Applied, scratch is what was said and nothing is found.

    It is one step above the smallest scale with which a real handover comes through.
    """
    first = plan_of(ram, "kho=on")
    option = first["suggestion"]["option"]
    second = plan_of(ram, f"kho=on {option}")
    assert second["reserved_bytes"] == first["suggestion"]["reserved_bytes"]
    assert second["reserved_bytes"] < first["reserved_bytes"]
    assert second["findings"] == []
    options = [f"kho_scratch={scale}%" for scale in (50, 75, 100, 125, 150, 175, 200)]
    step = options.index(option)
    assert step >= 1
    works = [hands_over(ram, one) for one in options[: step + 1]]
    assert works == [False] * (step - 1) + [True, True]


def test_areas_that_are_too_small_are_answered_with_a_scale_that_does():
    """And a malformed reserve_mem= with no advice on scratch at all."""
    found = plan_of("4G", "kho=on kho_scratch=16M,16M,16M")
    assert found["suggestion"]["reserved_bytes"] > 3 * 16 * MIB
    fixed = plan_of("4G", f"kho=on {found['suggestion']['option']}")
    assert fixed["findings"] == []
    other = plan_of("4G", "kho=on kho_scratch=300M,300M,300M reserve-mem=1M:big")
    assert (len(other["findings"]), other["suggestion"]) == (1, None)


def test_dashes_are_underscores():
    """As the kernel reads option names."""
    told = driver(plan_of("4G", "kho=on log-buf-len=16M"), "log_buf_len=16M")
    assert told["reserved_bytes"] == pytest.approx(72 * MIB, rel=0.01)


def test_no_suggestion_where_little_is_lost():
    """Scratch of a few per cent, or sizes that the user chose and that do."""
    assert plan_of("256G", "kho=on kho_scratch=100%", initrd_bytes=MIB)["suggestion"] is None
    assert plan_of("4G", "kho=on kho_scratch=300M,300M,300M")["suggestion"] is None


def test_rules_of_releases():
    """Names, point releases as logs have them, and those that do not exist."""
    assert release_of_uname("7.0.0-30-generic").name == "7.0"
    assert release_of_uname("6.18.3+deb14-amd64").scratch_alignment == "pageblock"
    assert not release_of_uname("7.2.13").scratch_excludes_hugetlb
    assert release_of_uname("6.12.1") is None
    with pytest.raises(InputError, match=r"'5\.4' is no release khosim knows; it knows 6\.16, "):
        release_by_name("5.4")
