"""``khosim.blackout``: counts against what a run plainly did, prices against a calculator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.blackout.blocks import Regions, count_blocks
from khosim.blackout.costs import Costs
from khosim.blackout.estimate import Counted, count_handovers, estimate
from khosim.blackout.published import comparisons
from khosim.blackout.sweep import Point, line, run_small
from khosim.blackout.tally import BLACKOUT, STAGES, Item, Tally
from khosim.kernel.trace import Event
from khosim.scenario.parse import parse_scenario
from khosim.scenario.play import Player
from khosim.scenario.result import Result

SCENARIO = """
[machine]
ram = "512M"
[kernel]
cmdline = "kho=on liveupdate=on"
[[generation]]
steps = [
  { do = "guest", name = "vm", size = "8M", pages = 3 },
  { do = "guest", name = "big", size = "64M", pages = 3, huge = "always" },
  { do = "device", name = "nic" },
  { do = "device", name = "disk", refuses = "EBUSY" },
  { do = "session", name = "one", files = ["vm", "nic", "disk"] },
  { do = "session", name = "two", files = ["big"] },
  { do = "reboot", expect = "EBUSY" },
  { do = "device", name = "disk" },
]
[[generation]]
steps = [
  { do = "retrieve", session = "*" },
  { do = "finish", session = "*" },
  { do = "write", guest = "vm" },
]
"""
ZERO = Costs(
    dict.fromkeys(Costs.defaults().plain, 0.0),
    {name: dict.fromkeys(of, 0.0) for name, of in Costs.defaults().by_handler.items()},
    Costs.defaults().host,
)
EVERY_COST = [*ZERO.plain, *ZERO.by_handler]


def played(text: str) -> tuple[Result, Tally, list[Event]]:
    """A scenario carried out, its tally, and every event of it."""
    scenario = parse_scenario(text, "test")
    events: list[Event] = []
    tally = Tally(scenario.page_size)
    player = Player(scenario, listener=events.append)
    player.machine.listen(tally)
    for _ in player.generations():
        pass
    assert player.result.ok, player.result.failures
    return player.result, tally, events


@pytest.fixture(scope="module")
def run() -> tuple[Result, Tally, list[Event]]:
    """The scenario above."""
    return played(SCENARIO)


@pytest.fixture(scope="module")
def counted(run: tuple[Result, Tally, list[Event]]) -> Counted:
    """Its only handover."""
    (one,) = count_handovers(run[0], run[1])
    return one


def number(counted: Counted, stage: str, cost: str) -> float:
    """How often a cost was met in a stage, whoever the handler is."""
    return sum(n for it, n in counted.counts.items() if (it.stage, it.cost) == (stage, cost))


# -- counts -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_scenario(counted: Counted) -> None:
    """Sessions, files and folios, as one counts them by hand."""
    assert number(counted, "preserve", "create_session_us") == 2
    assert number(counted, "preserve", "preserve_file_us") == 4
    assert number(counted, "preserve", "preserve_memfd_folio_ns") == 2048 + 32
    assert number(counted, "freeze", "serialize_session_us") == 2
    assert number(counted, "freeze", "freeze_file_us") == 4
    assert counted.counts[Item("freeze", "freeze_file_us", "memfd-v2")] == 2
    assert counted.counts[Item("boot", "probe_file_us", "khosim-device-v1")] == 2
    assert number(counted, "retrieve", "retrieve_file_us") == 4
    assert number(counted, "retrieve", "retrieve_memfd_folio_ns") == 2048 + 32
    assert number(counted, "resume", "resume_session_us") == 2


def test_blocks_are_those_that_the_tree_holds(
    counted: Counted, run: tuple[Result, Tally, list[Event]]
) -> None:
    """Marked, reserved and scanned: the blocks that a walk of the handed-over tree finds."""
    preserved = run[0].kernels[0].preserved
    assert number(counted, "preserve", "preserve_key_radix_ns") == preserved.blocks
    assert number(counted, "boot", "reserve_block_ns") == preserved.blocks
    assert number(counted, "boot", "scan_key_ns") == preserved.blocks
    assert number(counted, "boot", "walk_table_ns") == preserved.table_pages
    pages = preserved.len_bytes >> 12
    assert number(counted, "boot", "struct_page_ns") == pages
    ram = run[0].scenario.memory_map.ram_bytes >> 12
    assert number(counted, "boot", "deferred_struct_page_ns") == ram - pages


def test_guests_stop_behind_the_load_and_go_on_behind_the_last_file(
    counted: Counted, run: tuple[Result, Tally, list[Event]]
) -> None:
    """The events of the blackout are those of the trace between the two."""
    symbols = [(event.generation, event.symbol) for event in run[2]]
    stop = max(i for i, it in enumerate(symbols) if it == (0, "kexec_file_load"))
    resumption = max(i for i, it in enumerate(symbols) if it == (1, "luo_retrieve_file"))
    assert counted.events == resumption - stop


def test_a_refused_reboot_is_no_blackout(counted: Counted) -> None:
    """What was frozen and let go again is counted while guests run."""
    assert number(counted, "preserve", "freeze_file_us") == 0  # luo_file_freeze failed: no event
    assert counted.generation == 0


@pytest.mark.parametrize(
    ("release", "tracker", "finalized"),
    [("6.17", "xarray", "preserve"), ("7.0", "xarray", "freeze"), ("7.1", "radix", "")],
)
def test_releases_differ_where_they_do(release: str, tracker: str, finalized: str) -> None:
    """Which tracker marks, and whether it is listed before guests stop, behind that, or never."""
    luo = " liveupdate=on" if release == "7.0" else ""
    (found, tally, _) = played(
        f'[machine]\nram = "256M"\n[kernel]\nrelease = "{release}"\ncmdline = "kho=on{luo}"\n'
        '[[generation]]\nsteps = [ { do = "folios", name = "g", count = 100 } ]\n'
        '[[generation]]\nsteps = [ { do = "restore", name = "g" } ]\n'
    )
    (counted,) = count_handovers(found, tally)
    assert number(counted, "preserve", f"preserve_key_{tracker}_ns") >= 100
    assert {stage for stage in STAGES if number(counted, stage, "serialize_bitmap_ns")} <= {
        finalized,
        "preserve",
    }
    assert bool(number(counted, finalized, "serialize_bitmap_ns")) == bool(finalized)
    assert bool(number(counted, "boot", "deferred_struct_page_ns")) is False
    assert number(counted, "retrieve", "restore_block_ns") >= 100


def test_a_refused_handover_has_no_estimate() -> None:
    """A cold boot preserves nothing, and nothing is priced."""
    found, tally, _ = played(
        '[machine]\nram = "256M"\n[[generation]]\nsteps = []\n'
        'kexec = { release = "6.17", expect = "refused" }\n[[generation]]\nsteps = []\n'
    )
    assert count_handovers(found, tally) == []


def naive_blocks(pfn: int, nr_pages: int) -> Iterator[int]:
    """The orders of a range's blocks: try all of them, the largest first."""
    while nr_pages:
        order = next(o for o in range(40, -1, -1) if not pfn % (1 << o) and 1 << o <= nr_pages)
        yield order
        pfn, nr_pages = pfn + (1 << order), nr_pages - (1 << order)


@given(pfn=st.integers(0, 1 << 20), nr_pages=st.integers(0, 1 << 12))
@settings(max_examples=100)
def test_ranges_fall_into_aligned_blocks(pfn: int, nr_pages: int) -> None:
    """As a search for the largest block that fits finds them."""
    assert count_blocks(pfn, nr_pages) == sum(1 for _ in naive_blocks(pfn, nr_pages))


@given(st.permutations(range(12)), st.integers(0, 12))
def test_regions_merge_as_a_set_of_pages_does(order: list[int], number: int) -> None:
    """The count is the number of gaps in a set of units."""
    regions, units = Regions(), set(order[:number])
    for unit in order[:number]:
        regions.add(unit * 4096, (unit + 1) * 4096)
    assert regions.count == sum(1 for unit in units if unit - 1 not in units)


# -- prices -------------------------------------------------------------------------------------


def test_nothing_costs_nothing(counted: Counted) -> None:
    """With every cost zero, every stage is."""
    priced = estimate(counted, ZERO)
    assert (priced.blackout_seconds, priced.running_seconds) == (0, 0)


@pytest.mark.parametrize("name", EVERY_COST)
def test_one_cost_changes_its_part_and_no_other(counted: Counted, name: str) -> None:
    """Priced alone, a cost gives count times cost; doubled, just its own parts double."""
    alone = estimate(counted, ZERO.replace(name, 7.0))
    unit = {"ns": 1e-9, "us": 1e-6}[name.rpartition("_")[2]]
    handlers = {"", "khosim-device-v1"}
    mine = counted.counts.items()
    wanted = {it: n for it, n in mine if it.cost == name and it.handler in handlers}
    once = {"shutdown_us": "jump", "kernel_start_us": "boot", "userspace_start_us": "boot"}
    if name in once:
        wanted[Item(once[name], name)] = 1
    if name == "cpu_bringup_us":
        wanted[Item("boot", name)] = ZERO.host.cpus
    threads = ZERO.host.deferred_threads_max if name == "deferred_struct_page_ns" else 1
    total = sum(wanted.values()) * 7 * unit / threads
    assert alone.blackout_seconds + alone.running_seconds == pytest.approx(total)
    costs = Costs.defaults()
    before = {part.item: part.seconds for part in estimate(counted, costs).parts}
    after = {
        part.item: part.seconds
        for part in estimate(counted, costs.replace(name, 2 * costs.ns(name) * 1e-9 / unit)).parts
    }
    changed = {item for item in before if before[item] != after[item]}
    assert changed == {it for it in wanted if wanted[it]}
    assert all(after[item] == pytest.approx(2 * before[item]) for item in changed)


def test_unknown_handlers_cost_the_default(counted: Counted) -> None:
    """A handler that no cost names is priced as ``default``, and as its own once it has one."""
    costs = ZERO.replace("freeze_file_us", 5.0)
    assert estimate(counted, costs).stage_seconds("freeze") == pytest.approx(10e-6)
    own = costs.replace("freeze_file_us", 100.0, "khosim-device-v1")
    assert estimate(counted, own).stage_seconds("freeze") == pytest.approx(200e-6)


def test_the_blackout_is_the_sum_of_its_stages(counted: Counted) -> None:
    """Preserving and loading are not in it."""
    priced = estimate(counted, Costs.defaults())
    assert priced.blackout_seconds == sum(map(priced.stage_seconds, BLACKOUT))
    assert priced.running_seconds == priced.stage_seconds("preserve") + priced.stage_seconds("load")
    assert set(priced.as_json()["stages"]) == set(STAGES)


def test_cpus_share_deferred_pages_up_to_the_limit(counted: Counted) -> None:
    """Threads of a node divide the work; bringing CPUs up costs each of them."""
    costs = ZERO.replace("deferred_struct_page_ns", 10.0)
    times = [estimate(counted, costs.with_cpus(n)).blackout_seconds for n in (1, 2, 11, 64)]
    assert times == pytest.approx([times[0], times[0] / 2, times[0] / 11, times[0] / 11])


# -- large hosts --------------------------------------------------------------------------------

NEARLY = (
    "preserve_key_radix_ns",
    "reserve_block_ns",
    "scan_key_ns",
    "struct_page_ns",
    "restore_block_ns",
    "restore_page_ns",
)
EXACT = (
    *NEARLY,
    "preserve_memfd_folio_ns",
    "retrieve_memfd_folio_ns",
    "retrieve_file_us",
    "freeze_file_us",
)


@pytest.mark.parametrize(
    ("point", "len_bytes"),
    [
        (Point(order=9, sessions=2, devices=3), 1 << 39),
        (Point(order=0, sessions=2, devices=0), 1 << 29),
        (Point(order=18, sessions=2, devices=1), 8 << 30),
        (Point(order=0, sessions=1, devices=0, release="7.1"), 1 << 30),
    ],
)
def test_the_line_meets_real_runs(point: Point, len_bytes: int) -> None:
    """What two small runs foretell of a large host is what a run of that host does."""
    drawn, real = line(point).at(len_bytes), run_small(point, len_bytes)
    # Off by a chunk page for each session and 511 pages of 256 records: that is all.
    folios = real.by_order[str(point.order)]
    chunks = point.sessions + folios // (511 * 256)
    assert drawn.by_order[str(point.order)] == pytest.approx(folios, abs=chunks)
    for item in drawn.counts.keys() | real.counts.keys():
        if item.cost in EXACT:
            off = abs(drawn.counts[item] - real.counts[item])
            assert off <= (chunks if item.cost in NEARLY else 0), item
    costs = Costs.defaults()
    ours, theirs = (estimate(it, costs).blackout_seconds for it in (drawn, real))
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.slow
def test_figures_that_are_inputs_come_out_again() -> None:
    """Where a default was set from a published figure, the model gives that figure back.

    Slow, as it runs seven hosts: nothing else notices a default that lost its source.
    """
    rows = {row.what: row for row in comparisons(Costs.defaults())}
    assert rows["48 GiB marked, table"].seconds == pytest.approx(0.469, rel=0.01)
    assert rows["48 GiB marked and listed"].seconds == pytest.approx(0.577, rel=0.01)
    assert rows["25 MB image copied"].seconds == pytest.approx(0.022158, rel=0.01)
    assert rows["96 CPUs started"].seconds == pytest.approx(0.1, rel=0.01)
    first = rows["deferred init, 384 GiB a node, 1 thread"]
    assert first.is_input
    assert first.seconds == pytest.approx(1.7857, rel=0.01)


# -- devices ------------------------------------------------------------------------------------

DEVICES = """
[machine]
ram = "256M"
snp = true
devices = [{ name = "nic", kind = "nic" }, { name = "disk", kind = "nvme" }]
[kernel]
cmdline = "kho=on liveupdate=on"
[[generation]]
steps = [
  { do = "guest", name = "memory", size = "8M", pages = 3 },
  { do = "guest", name = "secret", size = "4M", pages = 3 },
  { do = "vm", name = "vm", memory = "memory", vcpus = 2 },
  { do = "vm", name = "hidden", memory = "secret", encrypted = true },
  { do = "assign", vm = "vm", device = "nic" },
  { do = "assign", vm = "vm", device = "disk" },
  { do = "preserve_vm", vm = "vm" },
  { do = "preserve_vm", vm = "hidden" },
]
[[generation]]
steps = [{ do = "resume_vm", vm = "vm" }, { do = "resume_vm", vm = "hidden" }]
"""


def _device_counts(text: str = DEVICES, without: str = "") -> tuple[Counted, list[Event]]:
    result, tally, events = played(text.replace('on"\n', f'on"\n{without}\n', 1))
    (found,) = count_handovers(result, tally)
    return found, events


def test_what_is_asked_of_devices_is_counted_while_guests_stand() -> None:
    """Functions found, registers written, firmware asked: from the stop on, and not before."""
    counted, events = _device_counts()
    stop = max(i for i, e in enumerate(events) if e.symbol == "kexec_file_load")
    boot = next(i for i, e in enumerate(events) if e.generation == 1)
    end = max(i for i, e in enumerate(events) if e.symbol == "luo_retrieve_file")
    writes = {"dmar_writeq", "pci_write_config", "pci_write_msg_msix"}
    asked = [i for i, e in enumerate(events) if e.symbol in writes]
    assert number(counted, "boot", "scan_function_us") == 4  # two ports, two devices
    assert number(counted, "freeze", "device_register_us") == sum(stop < i < boot for i in asked)
    assert number(counted, "boot", "device_register_us") == sum(boot < i < end for i in asked) > 8
    commands = [i for i, e in enumerate(events) if e.symbol == "sev_do_cmd"]
    after = sum(i > boot for i in commands)
    assert number(counted, "retrieve", "firmware_command_us") == after == 1
    assert number(counted, "preserve", "shared_object_us") == 3  # PCI, IOMMU, SEV-SNP
    assert number(counted, "boot", "shared_object_us") == 3
    for cost in ("scan_function_us", "device_register_us", "firmware_command_us"):
        assert not number(counted, "preserve", cost)


def test_each_kind_of_file_has_its_own_cost() -> None:
    """By the compatible strings that the handlers here have; no virtual machine is probed."""
    counted, _ = _device_counts()
    frozen = {it.handler: n for it, n in counted.counts.items() if it.cost == "freeze_file_us"}
    assert frozen == {
        "memfd-v2": 2,
        "iommufd-v1": 1,
        "vfio-pci-v1-running": 2,
        "kvm_vm_luo_v1": 2,
        "kvm_vcpu_luo_v1": 3,
    }
    costs = Costs.defaults()
    for name in costs.by_handler:
        assert frozen.keys() <= costs.by_handler[name].keys()
    probed = [part for part in estimate(counted, costs).parts if part.item.cost == "probe_file_us"]
    assert {part.item.handler for part in probed if part.seconds} == {"vfio-pci-v1-running"}


def test_a_device_that_is_reset_costs_two_resets() -> None:
    """The published first phase: 100 ms when it is frozen and 100 ms when it is opened anew."""
    stages = {}
    for without in ("", 'without = ["vfio"]'):
        text = f'violations = ["device-not-reset"]\n{DEVICES}' if without else DEVICES
        priced = estimate(_device_counts(text, without)[0], Costs.defaults())
        stages[without] = priced.stage_seconds("freeze"), priced.stage_seconds("retrieve")
    more = [b - a for a, b in zip(*stages.values(), strict=True)]
    assert more == pytest.approx([0.2, 0.2], rel=0.01)
