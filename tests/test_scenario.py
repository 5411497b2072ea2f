"""Scenarios: reading them, carrying them out, and noticing what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.errors import InputError
from khosim.kernel.trace import Event
from khosim.machine.ram import Ram
from khosim.scenario.contents import content_pages, damaged_pages, first_keys, write_pages
from khosim.scenario.library import builtin_scenarios, builtin_text, load_scenario
from khosim.scenario.model import MAX_GENERATIONS
from khosim.scenario.parse import Overrides, parse_scenario
from khosim.scenario.play import Player, play
from khosim.scenario.result import Result
from khosim.scenario.steps import STEPS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "scenarios.md"
CAPTURES = Path(__file__).parent / "golden" / "captures"
ALLOC = '{ do = "folios", name = "a", count = 20, orders = { 0 = 3, 2 = 1 } }'
TAKE = '{ do = "restore", name = "*" }, { do = "check", name = "*" }'


def _text(*generations: str, machine: str = 'ram = "64M"', kernel: str = "", top: str = "") -> str:
    """A scenario of these lists of steps; a generation may end in ``| kexec table``."""
    tables = []
    for generation in generations:
        steps, _, kexec = generation.partition("|")
        table = f"[[generation]]\nsteps = [ {steps} ]\n"
        tables.append(table + (f"kexec = {kexec}\n" if kexec else ""))
    return f"{top}\n[machine]\n{machine}\n[kernel]\n{kernel}\n" + "\n".join(tables)


def _run(*generations: str, **parts: str) -> Result:
    return play(parse_scenario(_text(*generations, **parts), "test"))


def _broken(result: Result) -> set[str]:
    return {violation.invariant for violation in result.violations}


def _error(text: str | bytes, **overrides: Any) -> str:
    with pytest.raises(InputError) as error:
        parse_scenario(text, "cloud.toml", overrides=Overrides(**overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "place", "cause"),
    [
        ("3", "generation 0, step 1", "3 is not a table"),
        ("{}", "generation 0, step 1", "'do' is missing"),
        ('{ do = "folio" }', "generation 0, step 1", "did you mean 'folios'?"),
        ('{ do = "folios" }', "generation 0, step 1", "'name' is missing"),
        ('{ do = "folios", nmae = "a" }', "step 1", "unknown key 'nmae'; did you mean 'name'?"),
        ('{ do = "folios", name = "a", cuont = 1 }', "step 1", "did you mean 'count'?"),
        ('{ do = "folios", name = "a b" }', "step 1", "'a b' is not a name"),
        ('{ do = "folios", name = "" }', "step 1", "name: the name is empty"),
        ('{ do = "folios", name = "fdt" }', "step 1", "'fdt' names a place"),
        ('{ do = "folios", name = "a", order = 11 }', "step 1",
         "order 11 is above the largest order 10"),
        ('{ do = "folios", name = "a", orders = { 11 = 1 } }', "step 1: orders",
         "order 11 is above the largest order 10"),
        ('{ do = "folios", name = "a", orders = { 1 = 0 } }', "step 1", "no order has a weight"),
        ('{ do = "folios", name = "a", orders = { x = 1 } }', "step 1", "'x' is not an order"),
        ('{ do = "folios", name = "a", orders = 3 }', "step 1: orders", "3 is not a table"),
        ('{ do = "folios", name = "a", order = 1, orders = { 0 = 1 } }', "step 1", "not both"),
        ('{ do = "folios", name = "a", count = -1 }', "step 1", "count: -1 is negative"),
        ('{ do = "folios", name = "a", count = 0 }', "step 1", "count: 0 is below 1"),
        ('{ do = "folios", name = "a", count = 1000001 }', "step 1", "is above 1,000,000"),
        ('{ do = "folios", name = "a", count = 99999999999999999999999 }', "step 1", "is above"),
        ('{ do = "folios", name = "a", count = 1.0 }', "step 1", "1.0 is not a whole number"),
        ('{ do = "folios", name = "a", count = true }', "step 1", "true is not a whole number"),
        ('{ do = "folios", name = "a", count = 17, order = 10 }', "step 1", "do not fit into"),
        ('{ do = "folios", name = "a", fill = "half" }', "step 1", "known: none, ends, all"),
        ('{ do = "folios", name = "a", expect = "ENOME" }', "step 1", "did you mean 'ENOMEM'?"),
        ('{ do = "pages", name = "a" }', "step 1", "'count' is missing"),
        ('{ do = "blob", name = "a", size = "1X" }', "step 1", "is not a size"),
        ('{ do = "blob", name = "a" }', "step 1", "'size' is missing"),
        (f'{ALLOC}, {{ do = "restore", name = "b" }}', "step 2", "no step before this makes 'b'"),
        (f'{ALLOC}, {{ do = "free", name = "a", share = 0 }}', "step 2", "share: 0 is not a"),
        (f'{ALLOC}, {{ do = "free", name = "a", share = 1.5 }}', "step 2", "share: 1.5 is not a"),
        (f'{ALLOC}, {{ do = "check", name = "a", region = "b" }}', "step 2", "give 'name'"),
        ('{ do = "corrupt", at = "ftd", flip = 1 }', "step 1", "did you mean 'fdt'?"),
        ('{ do = "corrupt", flip = 1 }', "step 1", "at: a physical address"),
        ('{ do = "corrupt", at = -1, flip = 1 }', "step 1", "at: -1 is negative"),
        ('{ do = "corrupt", at = "fdt" }', "step 1", "give one of 'bytes'"),
        ('{ do = "corrupt", at = "fdt", flip = 0 }', "step 1", "flip: 0 is below 1"),
        ('{ do = "corrupt", at = "fdt", bytes = "abc" }', "step 1", "hexadecimal digits"),
        ('{ do = "corrupt", at = "fdt", bytes = "" }', "step 1", "there are none"),
        ('{ do = "corrupt", at = "fdt", zero = "1G" }', "step 1", "is above 16M"),
    ],
)  # fmt: skip
def test_a_wrong_step_is_named_with_its_place(steps: str, place: str, cause: str) -> None:
    """What is wrong with a step is said in one line that names generation and step."""
    message = _error(_text(steps))
    assert message.startswith(f"cloud.toml: {place}") or f", {place}" in message
    assert cause in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cloud.toml: there is no [[generation]]"),
        ("[machine]\nram = \n", "cloud.toml: line 2, column 7: Invalid value"),
        ("name = 'a", "cloud.toml: line 1: Expected \"'\", at the end of the file"),
        (b"name = '\xff'", "cloud.toml: line 1: not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00", "cloud.toml: line 1"),
        ("a = " + "[" * 9000, "cloud.toml: nested too deeply"),
        ("a = 1" + "0" * 9000, "cloud.toml: nested too deeply, or a number is too long"),
        ("#" * (1 << 20) + "#", "cloud.toml: larger than 1M"),
        ("generation = 1", "cloud.toml: generation: 1 is not a list"),
        ("generation = [1]", "cloud.toml: generation 0: 1 is not a table"),
        ("machin = 1\n[[generation]]", "unknown key 'machin'; did you mean 'machine'?"),
        ("machine = 1\n[[generation]]", "cloud.toml: machine: 1 is not a table"),
        ("seed = -1\n[[generation]]", "cloud.toml: seed: -1 is negative"),
        ("generations = 1001\n[[generation]]", "cloud.toml: generations: 1001 is above 1,000"),
        ("violations = ['x']\n[[generation]]", "violations, entry 1: 'x' is no invariant"),
        ("violations = ['page-bugdet']\n[[generation]]", "did you mean 'page-budget'?"),
        ("[machine]\nram = '1M'\n[[generation]]", "cloud.toml: machine: RAM size: 1M"),
        ("[machine]\nram = '99T'\n[[generation]]", "machine: ram: '99T' is above 16T"),
        ("[machine]\nram = -1\n[[generation]]", "machine: ram: -1 is negative"),
        ("[machine]\nnodes = 65\n[[generation]]", "machine: nodes: 65 is above 64"),
        ("[machine]\nnodes = ['1G', '2G']\n[[generation]]", "is not the size of RAM"),
        ("[machine]\narch = 'mips'\n[[generation]]", "arch: 'mips'; known: x86_64, arm64"),
        ("[machine]\npage_size = 8192\n[[generation]]", "page_size: 8192 is none of those"),
        ("[machine]\nholes = [[1]]\n[[generation]]", "holes, entry 1: not a pair"),
        ("[machine]\ncapture = 'x'\ndmesg = 'y'\n[[generation]]", "'dmesg' does not go together"),
        ("[machine]\ncapture = 'x'\nram = '1G'\n[[generation]]", "'ram' does not go together"),
        ("[machine]\ncapture = 'nowhere'\n[[generation]]", "nowhere: no such folder"),
        ("[machine]\ndmesg = '.'\n[[generation]]", "directory"),
        ("[machine]\nallocator = 'slab'\n[[generation]]", "known: linux, adversarial"),
        ("[kernel]\nrelease = '9.9'\n[[generation]]", "kernel: release: '9.9' is no release"),
        ("[kernel]\ncmdline = \"a\\tb\"\n[[generation]]", "only printable ASCII"),
        ("[kernel]\nkernel_size = '1K'\n[[generation]]", "kernel_size: '1K' is below 2M"),
        ("[[generation]]\nkexec = {}", "generation 0: kexec: there is no later generation"),
        ("[[generation]]\nkexec = { expect = 'no' }\n[[generation]]", "'no' is no outcome"),
        ("[[generation]]\nkexec = { crash = 1 }\n[[generation]]", "1 is neither true nor false"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(text: str | bytes, expected: str) -> None:
    """So is what is wrong with the file as a whole, with the line where TOML has one."""
    assert expected in _error(text)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"release": "5.4"}, "--release: '5.4' is no release khosim knows"),
        ({"ram": "99T"}, "--ram: RAM size"),
        ({"ram": "lots"}, "--ram: RAM size: 'lots' is not a size"),
        ({"capture": "nowhere"}, "nowhere: no such folder"),
        ({"capture": "nowhere", "ram": "1G"}, "--machine: does not go together with --ram"),
        ({"capture": "nowhere", "nodes": 2}, "--machine: does not go together with --nodes"),
        ({"ram": "16M", "generations": 2}, "generation 0, step 1: 20M do not fit into"),
    ],
)
def test_a_wrong_option_is_named(overrides: dict[str, Any], expected: str) -> None:
    """What stands in for the file's own values is checked as they are."""
    text = _text('{ do = "folios", name = "a", count = 5, order = 10 }', machine='ram = "1G"')
    assert expected in _error(text, **overrides)


def test_no_table_can_make_a_run_that_does_not_end() -> None:
    """Folios and content are counted over all repetitions of the last table."""
    text = _text('{ do = "folios", name = "a", count = 2000 }', top="generations = 1000")
    assert "allocates more than 1,000,000 folios" in _error(text)
    text = _text(
        '{ do = "folios", name = "a", order = 10, count = 2, fill = "all" }',
        machine='ram = "1G"',
        top="generations = 1000",
    )
    assert 'writes more than 4G of content: use fill = "ends"' in _error(text)


def test_weights_become_counts_to_the_last_folio() -> None:
    """3000 folios by weights of 1, 1 and 1.0 parts in 7 and so on: counts add up and keep close."""
    text = _text(
        '{ do = "folios", name = "a", count = 1000, orders = { 0 = 3, 1 = 3, 3 = 1 } }',
    )
    (step,) = parse_scenario(text, "t").specs[0].steps
    assert step.counts == ((0, 429), (1, 428), (3, 143))  # type: ignore[attr-defined]


def test_every_key_is_documented() -> None:
    """docs/scenarios.md has a paragraph for every step and names every key that is read."""
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in STEPS if f"**`{name}`**" not in text] == []
    keys = set(re.findall(r'table\.\w+\(\s*"(\w+)"', "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "khosim" / "scenario").glob("*.py")
    )))  # fmt: skip
    assert len(keys) > 20
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


# -- contents -------------------------------------------------------------------------------------


def test_contents_follow_from_their_keys() -> None:
    """Every page differs from every other in every word; one flipped bit is found."""
    ram = Ram(1 << 20)
    pfns = np.array([3, 9, 4, 200], dtype=np.int64)
    keys = first_keys(1, "a", 4)
    write_pages(ram, pfns, keys, (0, "test"))
    pages = np.stack([ram.view(pfn << 12, 4096).view(np.uint64) for pfn in pfns.tolist()])
    assert len(np.unique(pages)) == pages.size
    assert damaged_pages(ram, pfns, keys).tolist() == []
    ram.write((9 << 12) + 4095, bytes([ram.read((9 << 12) + 4095, 1)[0] ^ 128]), (0, "test"))
    assert damaged_pages(ram, pfns, keys).tolist() == [9]
    assert damaged_pages(ram, pfns[::-1], keys).tolist() == [200, 4, 9, 3]
    assert set(first_keys(2, "a", 4).tolist()).isdisjoint(keys.tolist())


def test_a_fill_says_which_pages_carry_content() -> None:
    """None, both ends (one page where there is only one), or every page of a block."""
    start = np.array([10, 20, 30, 40], dtype=np.int64)
    length = np.array([4, 1, 4, 3], dtype=np.int64)
    fill = np.array([1, 1, 0, 2], dtype=np.int64)
    pfns, keys = content_pages(start, length, first_keys(0, "x", 4), fill)
    assert pfns.tolist() == [10, 13, 20, 40, 41, 42]
    assert len(set(keys.tolist())) == 6


# -- carrying out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_scenarios())
def test_the_built_in_scenarios_hold(name: str) -> None:
    """Each does what it says, and only the invariants that it names speak."""
    result = play(load_scenario(name))
    assert result.failures == []
    assert _broken(result) == set(result.scenario.violations)
    assert result.scenario.name == name
    assert result.scenario.about


def test_the_cloud_host_is_what_it_promises() -> None:
    """16 GiB on two nodes, three generations, guests of several GiB in sessions, regions."""
    result = play(load_scenario("cloud-host"))
    ram = result.scenario.memory_map.ram_bytes
    assert (16 << 30) - (1 << 20) < ram <= 16 << 30
    assert result.scenario.memory_map.online_nodes == (0, 1)
    assert [kernel.outcome for kernel in result.kernels] == ["cold", "accepted", "accepted"]
    assert result.handovers == 2
    first = result.kernels[0].preserved
    assert first.blocks > 4000
    assert len(first.by_order) >= 8
    assert first.len_bytes == sum(4096 * n << int(order) for order, n in first.by_order.items())
    assert result.preserved_bytes == sum(k.preserved.len_bytes for k in result.kernels[:2])
    assert {"LUO", "iommu", "inventory", "memblock"} <= set(result.kernels[0].subtrees)
    for kernel in result.kernels:
        assert [(session.name, session.files) for session in kernel.sessions] == [
            ("tenant-a", {"0x1": "vm-a"}),
            ("tenant-b", {"0x1": "vm-b"}),
        ]
        a, b = [step for step in kernel.steps if step.do == "session"]
        assert min(a.len_bytes, b.len_bytes) > 2 << 30
        assert len(a.by_order) >= 8
        assert b.by_order == {"0": b.len_bytes // 4096}
    assert [kernel.liveupdate for kernel in result.kernels] == [0, 1, 2]
    scratch = [(area.name, area.len_bytes) for area in result.kernels[0].scratch]
    assert [name for name, _ in scratch] == ["lowmem", "global", "node 0", "node 1"]
    assert all(size and size % (4 << 20) == 0 for _, size in scratch)
    segments = result.kernels[0].segments
    assert {segment.area for segment in segments} == {"lowmem"}
    assert {segment.name for segment in segments} >= {"kernel", "initrd", "KHO scratch array"}


@pytest.mark.parametrize("name", ["uma1g", "numa4g", "arm64-16k"])
def test_a_capture_lends_its_machine(name: str) -> None:
    """Memory map, page size and command line are the capture's, the steps the scenario's."""
    folder = CAPTURES / name
    cmdline = (folder / "gen0" / "cmdline").read_text().strip()
    result = play(load_scenario("small", overrides=Overrides(capture=str(folder))))
    assert result.failures == []
    assert result.kernels[0].cmdline == cmdline
    assert [k.messages for k in result.kernels][1].count("KHO: found kexec handover data.") == 1
    assert result.scenario.page_size == (16384 if name == "arm64-16k" else 4096)
    own = _text(ALLOC, TAKE, machine=f"capture = {json.dumps(str(folder))}")
    again = play(parse_scenario(own, "test"))
    assert again.failures == []
    assert again.scenario.memory_map == result.scenario.memory_map
    assert again.kernels[0].cmdline == cmdline


def test_a_memory_map_comes_from_a_log_beside_the_file(tmp_path: Path) -> None:
    """``dmesg`` and ``iomem`` are read from the scenario file's own folder."""
    gen0 = CAPTURES / "numa4g" / "gen0"
    for name in ("dmesg", "iomem"):
        (tmp_path / name).write_bytes((gen0 / name).read_bytes())
        path = tmp_path / "own.toml"
        path.write_text(_text(ALLOC, TAKE, machine=f'{name} = "{name}"'))
        result = play(load_scenario(str(path)))
        assert result.failures == []
        assert result.scenario.memory_map.ram_bytes >> 20 == 4095
        assert result.kernels[0].cmdline == "kho=on"


@pytest.mark.parametrize("allocator", ["linux", "adversarial"])
def test_equal_scenarios_give_equal_results(allocator: str) -> None:
    """Twice the same is the same, event for event; another seed chooses other pages, or other
    contents only."""

    def run(seed: int) -> tuple[list[Event], str]:
        overrides = Overrides(seed=seed, allocator=allocator)
        events: list[Event] = []
        result = play(load_scenario("small", overrides=overrides), listener=events.append)
        return events, json.dumps(result.as_json())

    first = run(5)
    assert len(first[0]) > 100
    assert run(5) == first
    assert (run(6)[0] == first[0]) == (allocator == "linux")


def test_the_last_table_repeats() -> None:
    """More generations than tables: the last one is carried out again and again."""
    for name in ("small", "uma1g-like", "refused-handover"):
        result = play(load_scenario(name, overrides=Overrides(generations=5)))
        assert result.failures == []
        assert len(result.kernels) == 5
    with pytest.raises(InputError, match="generation 1, step 1 in generation 2: nothing of 'a'"):
        _run(ALLOC, '{ do = "restore", name = "a" }', top="generations = 3")
    assert MAX_GENERATIONS == 1000


def test_every_step_does_what_it_says() -> None:
    """Half is unpreserved and freed, the rest restored in two goes, written, and handed on."""
    result = _run(
        f'{ALLOC}, {{ do = "pages", name = "p", count = 21, fill = "all" }},'
        '{ do = "blob", name = "b", size = 5000 },'
        '{ do = "unpreserve", name = "a", share = 0.5 }, { do = "free", name = "a" },'
        '{ do = "folios", name = "k", preserve = false }',
        '{ do = "restore", name = "a", share = 0.5 }, { do = "check", name = "a" },'
        f'{TAKE}, {{ do = "write", name = "*" }}, {{ do = "check", name = "*" }},'
        '{ do = "preserve", name = "*" }, { do = "unpreserve", name = "b" },'
        '{ do = "free", name = "b" }',
        TAKE,
    )
    assert result.failures == []
    assert result.violations == []
    seen = [(s.do, s.name, s.blocks) for kernel in result.kernels for s in kernel.steps]
    assert seen == [
        ("folios", "a", 20), ("pages", "p", 1), ("blob", "b", 1), ("unpreserve", "a", 10),
        ("free", "a", 10), ("folios", "k", 1),
        ("restore", "a", 5), ("check", "a", 5), ("restore", "*", 7), ("check", "*", 12),
        ("write", "*", 12), ("check", "*", 12), ("preserve", "*", 12), ("unpreserve", "b", 1),
        ("free", "b", 1),
        ("restore", "*", 11), ("check", "*", 11),
    ]  # fmt: skip
    assert result.kernels[0].subtrees == ["a", "b", "kexec-metadata", "p"]
    assert result.kernels[1].subtrees == ["a", "kexec-metadata", "p"]


def test_a_write_changes_what_is_in_ram() -> None:
    """Other bytes in every page that carries content, and none elsewhere."""

    def ram_of(steps: str) -> bytes:
        player = Player(parse_scenario(_text(steps), "test"))
        assert len(list(player.generations())) == 1
        first = int(player.groups["p"].pfn[0]) << 12
        return player.kernel.ram.read(first, 4 << 12)

    alloc = '{ do = "pages", name = "p", count = 4 }'
    old, new = ram_of(alloc), ram_of(f'{alloc}, {{ do = "write", name = "p" }}')
    same = [old[at] == new[at] for at in range(4 << 12)]
    assert sum(same[:4096]) + sum(same[3 << 12 :]) < 100
    assert all(same[4096 : 3 << 12])


def test_nothing_leaks_when_all_is_restored_and_freed() -> None:
    """A kernel that frees what it was given, indexes too, has as many free pages as any other."""
    kept = '{ do = "pages", name = "p", count = 9 }, { do = "blob", name = "b", size = 5000 }'
    result = _run(f"{ALLOC}, {kept}", f'{TAKE}, {{ do = "free", name = "*" }}')
    nothing = _run("", "")
    assert result.failures == []
    assert result.kernels[1].free_pages == nothing.kernels[1].free_pages


def test_regions_keep_their_content() -> None:
    """What was written into a reserve_mem region is there in the successor; or it is missing."""
    write, check = '{ do = "write", region = "oops" }', '{ do = "check", region = "oops" }'
    kernel = 'cmdline = "kho=on reserve_mem=64K:4096:oops"'
    assert _run(write, check, check, kernel=kernel).failures == []
    result = _run(f"{write} | {{ cmdline = 'kho=on' }}", check, kernel=kernel)
    assert len(result.failures) == 1
    assert "generation 1 has no reserve_mem region 'oops'" in result.failures[0]
    with pytest.raises(InputError, match="no reserve_mem region 'oops' of a page or more"):
        _run(write)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "errno"),
    [
        ('{ do = "blob", name = "b", size = 0 }', "EINVAL"),
        ('{ do = "blob", name = "b", size = "64M" }', "E2BIG"),
        ('{ do = "blob", name = "kexec-metadata", size = 1 }', "EEXIST"),
        ('{ do = "pages", name = "p", count = 1025 }', "ENOMEM"),
        ('{ do = "folios", name = "a", order = 10, count = 15, fill = "none" }', "ENOMEM"),
    ],
)
def test_a_refusal_is_a_failure_unless_it_is_expected(step: str, errno: str) -> None:
    """The kernel's errno ends the run; with ``expect`` it is what has to happen."""
    result = _run(step, TAKE)
    assert len(result.failures) == 1
    assert result.failures[0].startswith("test: generation 0, step 1")
    assert f"-{errno}" in result.failures[0]
    assert len(result.kernels) == 1
    assert _run(step.replace(" }", f', expect = "{errno}" }}'), "").failures == []
    result = _run(f'{ALLOC[:-2]}, expect = "{errno}" }}')
    assert "went through, but" in result.failures[0]


def test_damage_is_noticed_by_who_reads_it() -> None:
    """A flipped bit in a folio: the check says where and by whom, and so does the invariant."""
    corrupt = '{ do = "corrupt", at = "a", offset = 77, flip = 4 }'
    result = _run(f"{ALLOC}, {corrupt}", TAKE.replace("*", "a"))
    assert _broken(result) == {"preserved-content"}
    assert "test: generation 1, step 2 (check): a: 1 page damaged" in result.failures[0]
    assert "scenario: corrupt" in result.failures[0]
    assert "the invariant preserved-content is violated" in result.failures
    expected = _run(
        f"{ALLOC}, {corrupt}",
        '{ do = "restore", name = "a" }, { do = "check", name = "a", expect = "damaged" }',
        top='violations = ["preserved-content"]',
    )
    assert expected.ok


@pytest.mark.parametrize(
    ("corrupt", "outcome", "broken"),
    [
        ('at = "fdt", bytes = "00000000"', "refused", {"handover-intact"}),
        ('at = "fdt", offset = 4, zero = 4', "refused", {"handover-intact"}),
        ('at = "tree root", offset = 16, bytes = "00000000ff0f0000"', "panic", {"handover-intact"}),
        ('at = "kernel", offset = 512, zero = 64', "panic", set()),
        ('at = "initrd", zero = 64', "accepted", set()),
        ('at = "scratch array", offset = 4096, flip = 1', "accepted", set()),
    ],
)
def test_what_a_torn_handover_comes_to(corrupt: str, outcome: str, broken: set[str]) -> None:
    """The outcome is the kernel's own, the damage is seen by the invariant that guards it."""
    steps = f'{ALLOC}, {{ do = "corrupt", {corrupt} }} | {{ expect = "{outcome}" }}'
    result = _run(steps, "", machine='ram = "128M"', top=f"violations = {sorted(broken)}")
    assert result.failures == []
    assert result.kernels[1].outcome == outcome
    assert _broken(result) == broken


def test_an_expected_violation_that_does_not_come_is_a_failure() -> None:
    """``violations`` names exactly what must speak."""
    result = _run(ALLOC, TAKE, top='violations = ["page-budget"]')
    assert result.failures == ["the invariant page-budget was to be violated, and holds"]


def test_an_outcome_that_was_not_expected_ends_the_run() -> None:
    """A handover that is refused, or never offered, where it was to be accepted."""
    corrupt = '{ do = "corrupt", at = "fdt", zero = 4 }'
    result = _run(f"{ALLOC}, {corrupt}", TAKE, TAKE)
    assert [kernel.outcome for kernel in result.kernels] == ["cold", "refused"]
    assert result.failures[0] == (
        "test: generation 0: kexec: the handover was to be accepted, but it was refused"
    )
    result = _run("", "", kernel='cmdline = "kho=off"')
    (failure,) = result.failures
    assert failure.endswith("was to be accepted, but none was offered (KHO is off)")
    result = _run(f'{ALLOC} | {{ expect = "panic" }}', "")
    assert "was to be panic, but it was accepted" in result.failures[0]


def test_a_panic_is_a_failure_unless_it_is_expected() -> None:
    """The first kernel, a successor: the account names who died of what."""
    corrupt = '{ do = "corrupt", at = "kernel", offset = 512, zero = 64 }'
    result = _run(f"{ALLOC}, {corrupt}", TAKE)
    assert len(result.kernels) == 2
    assert result.kernels[1].outcome == "panic"
    assert "generation 0: kexec: the successor panicked: " in result.failures[0]


def test_a_refused_load_ends_the_run() -> None:
    """An image that fits into no scratch area, wanted or not."""
    steps = f'{ALLOC} | {{ kernel_size = "600M", expect = "EADDRNOTAVAIL" }}'
    result = _run(steps, TAKE, machine='ram = "1G"')
    assert result.failures == []
    assert len(result.kernels) == 1
    assert "-EADDRNOTAVAIL" in result.kernels[0].end
    result = _run(steps.replace("EADDRNOTAVAIL", "ENOMEM"), TAKE, machine='ram = "1G"')
    assert "-EADDRNOTAVAIL" in result.failures[0]


def test_a_crash_kernel_gets_no_handover() -> None:
    """It boots cold in its own region, and what was preserved is out of its reach."""
    result = _run(
        f'{ALLOC} | {{ crash = true, cmdline = "kho=on", kernel_size = "4M", initrd = "1M" }}',
        '{ do = "restore", name = "a", expect = "ENOENT" }',
        machine='ram = "1G"',
        kernel='cmdline = "kho=on crashkernel=128M"',
    )
    assert result.failures == []
    assert [kernel.outcome for kernel in result.kernels] == ["cold", "cold"]
    assert result.kernels[0].end == "crash"
    assert result.handovers == 0
    assert result.preserved_bytes == 0


def test_preserving_scratch_is_refused_or_seen() -> None:
    """With DEBUG the kernel refuses, without it the invariant speaks."""
    step = '{ do = "preserve_at", at = "scratch", pages = 3 }'
    refused = step.replace(" }", ', expect = "EINVAL" }')
    assert _run(refused, "", kernel="debug = true").failures == []
    result = _run(step, "")
    assert _broken(result) == {"preserved-outside-scratch"}
    with pytest.raises(InputError, match="are not all RAM"):
        _run('{ do = "preserve_at", at = "1T" }')


def test_an_index_that_was_changed_is_noticed() -> None:
    """The successor compares what it is told with what was written."""
    corrupt = '{ do = "corrupt", at = "index a", offset = 1, flip = 16 }'
    result = _run(f"{ALLOC}, {corrupt}", '{ do = "restore", name = "a", expect = "damaged" }')
    assert _broken(result) >= {"handover-intact"}
    assert not [failure for failure in result.failures if "step" in failure]


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        ('{ do = "corrupt", at = "64T", flip = 1, when = "now" }', "are not in RAM"),
        ('{ do = "corrupt", at = "region x", flip = 1, when = "now" }', "there is no 'region x'"),
        ('{ do = "corrupt", at = "device tree", flip = 1 }', "there is no 'device tree'"),
        (f'{ALLOC}, {{ do = "preserve", name = "a" }}', "nothing of 'a' is there to preserve"),
        (f'{ALLOC}, {{ do = "free", name = "*" }}', "nothing of any group is there to free"),
        (f'{ALLOC}, {{ do = "pages", name = "a", count = 1 }}', "'a' holds folios already"),
    ],
)
def test_a_step_that_makes_no_sense_is_wrong_input(steps: str, cause: str) -> None:
    """What only a run can tell is an InputError with the same kind of place."""
    with pytest.raises(InputError, match=r"test: generation 0, step \d.*" + re.escape(cause)):
        _run(steps, "")


@pytest.mark.parametrize("seed", range(40))
def test_any_corruption_ends_in_an_outcome(seed: int) -> None:
    """Bytes flipped anywhere in the handover never end in an exception."""
    rng = np.random.default_rng(seed)
    places = ("fdt", "tree root", "tree leaf", "scratch array", "index a", "a", "kernel")
    at, when = places[seed % len(places)], ("jump", "now")[seed % 7 == 0]
    offset, mask = int(rng.integers(0, 256)), int(rng.integers(1, 256))
    corrupt = f'at = "{at}", offset = {offset}, flip = {mask}, when = "{when}"'
    if at == "index a":
        corrupt = corrupt.replace('"now"', '"jump"')
    again = f'{TAKE}, {{ do = "preserve", name = "a" }}'
    result = _run(f"{ALLOC}, {{ do = 'corrupt', {corrupt} }}", again, TAKE)
    assert 1 <= len(result.kernels) <= 3
    assert result.invariants
    json.dumps(result.as_json())


# -- the library and the docs ---------------------------------------------------------------------


def test_the_library_finds_what_there_is(tmp_path: Path) -> None:
    """Built-in names, files, and a hint for a name that is nearly right."""
    names = builtin_scenarios()
    assert next(iter(names)) == "cloud-host"
    assert set(names) >= {"small", "uma1g-like", "arm64-16k", "refused-handover", "torn-tree"}
    path = tmp_path / "small.toml"
    path.write_text(builtin_text("small"))
    assert load_scenario(str(path)).name == "small"
    for source, cause in [
        ("smal", "neither a file nor a built-in scenario; did you mean 'small'?"),
        ("smal.toml", "no such file"),
        (str(tmp_path), "directory"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(InputError, match=re.escape(cause)):
            load_scenario(source)


def test_the_documented_example_runs() -> None:
    """The scenarios in docs/scenarios.md hold, and the Python beside them says what is so."""
    text = DOCS.read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    results = [play(parse_scenario(example, "guest.toml")) for example in examples]
    handovers = [(result.failures, result.handovers) for result in results]
    assert handovers == [([], 2), ([], 1), ([], 1)]
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(program, "docs/scenarios.md", "exec"), {})


def test_a_player_yields_each_generation_as_it_ends() -> None:
    """The facts come one by one, and the verdict after the last."""
    player = Player(load_scenario("small"))
    for number, facts in enumerate(player.generations()):
        assert facts.generation == number
        assert len(player.result.kernels) == number + 1
        assert player.result.invariants == []
    assert all(verdict.ok and verdict.sentence for verdict in player.result.invariants)
