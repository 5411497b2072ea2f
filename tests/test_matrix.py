"""Every release beside every other: what comes of it was worked out from the sources by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from khosim import KernelPanic, Machine
from khosim.cli.main import main
from khosim.cli.matrix import _told
from khosim.kernel.release import MAINLINE
from khosim.matrix.grid import Cell, cells, play, play_all, program

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "kho-v1"
R, REFUSED, MISREAD, PANIC = "right", "refused", "misread", "panic"

# Names: kho-v1 to 7.0, kho-v3 in 7.1, kho-v4 since: nothing else is accepted. Within kho-v1
# bitmaps have 512 bytes to 6.17 and a page since 6.18; that the longer are read as the shorter
# loses what is above 16 MiB (64 MiB with 16 KiB pages), and the shorter as the longer gives blocks
# beyond the end of RAM, as a bit of the 2 MiB region's bitmap is worth 8 GiB there. 7.0 wants a
# node of 6.19's LUO tree that only 7.0 writes.
LETTERS = """
        6.16 6.17 6.18 6.19 7.0 7.1 7.2 7.3
6.16    R    R    P    P    P   c   c   c
6.17    R    R    P    P    P   c   c   c
6.18    M    M    R    R    R   c   c   c
6.19    M    M    R    R    P   c   c   c
7.0     M    M    R    R    R   c   c   c
7.1     c    c    c    c    c   R   c   c
7.2     c    c    c    c    c   c   R   R
7.3     c    c    c    c    c   c   R   R
"""
# Without finalize: 6.16 and 6.17 hand on an FDT page that nobody wrote; 6.18 hands on nothing;
# 6.19 and 7.0 a tree with no map, which successors to 6.18 do not mind.
UNFINALIZED = """
        6.16 6.17 6.18 6.19 7.0 7.1 7.2 7.3
6.16    c    c    c    c    c   c   c   c
6.17    c    c    c    c    c   c   c   c
6.18    c    c    c    c    c   c   c   c
6.19    M    M    M    c    c   c   c   c
7.0     M    M    M    c    c   c   c   c
"""
TRIPS = {
    "6.17": [R, R],
    "6.18": [MISREAD, PANIC],
    "6.19": [R, R],
    "7.0": [R, PANIC],
    "7.1": [REFUSED, REFUSED],
    "7.2": [REFUSED, REFUSED],
    "7.3": [R, R],
}


def outcomes(text):
    """``{(from, to): outcome}`` of a table of letters."""
    words = {"R": R, "c": REFUSED, "M": MISREAD, "P": PANIC}
    head, *rows = text.split("\n")[1:-1]
    return {
        (row.split()[0], to): words[letter]
        for row in rows
        for to, letter in zip(head.split(), row.split()[1:], strict=True)
    }


@pytest.fixture(scope="module")
def small_pages():
    """All runs with 4 KiB pages."""
    return play_all(list(cells(page_sizes=(4096,))), lambda number, cell: None)


def pairs(runs, *, finalized):
    """``{(from, to): run}`` of those that are no round trips."""
    return {
        run.cell.releases: run
        for run in runs
        if len(run.cell.releases) == 2 and (run.cell.finalized is not False) is finalized
    }


@pytest.mark.parametrize(("table", "finalized"), [(LETTERS, True), (UNFINALIZED, False)])
def test_every_pair(small_pages, table, finalized):
    """Eight by eight, as the sources have it."""
    found = pairs(small_pages, finalized=finalized)
    assert {pair: run.outcome for pair, run in found.items()} == outcomes(table)


def test_round_trips(small_pages):
    """N to N-1 and back."""
    trips = [run for run in small_pages if len(run.cell.releases) == 3]
    assert {run.cell.releases[0]: [leg.outcome for leg in run.legs] for run in trips} == TRIPS
    missing = {run.cell.releases[0]: run.missing for run in trips if run.outcome == R}
    assert missing == {"6.17": [], "6.19": ["vm-a", "vm-b"], "7.3": []}


def test_the_ways_to_judge_agree(small_pages):
    """Where content or map is damaged an invariant speaks, and nowhere else."""
    for run in small_pages:
        assert run.contradiction == ""
        for leg in run.legs:
            if leg.outcome == R:
                assert leg.violations == {}
                assert set(leg.fates.values()) == {"intact"}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("6.16", "6.18"), ["512 bytes are read as 4096", "phantom", "deserialize_bitmap"]),
        (("7.0", "6.17"), ["4096 bytes are read as 512", "blocks not reserved", "pages: "]),
        (("6.19", "7.0"), ["luo: Unable to get FLB node [luo-flb]", "The incoming tree failed"]),
        (("7.0", "7.1"), ["incompatible with 'kho-v3': 1", "lost: pages", "vm-a, vm-b, oops"]),
        (("7.2", "6.16"), ["incompatible with 'kho-v1': 1", "disabling KHO revival: -22"]),
        (("6.19", "6.18"), ["all content intact", "6.18 has no calls for: vm-a, vm-b"]),
    ],
)
def test_whys(small_pages, pair, words):
    """What is said of a cell names what happened."""
    why = pairs(small_pages, finalized=True)[pair].why
    assert [word for word in words if word not in why] == []


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        (("6.17", "7.0"), "is invalid: -9"),
        (("6.18", "6.19"), "nothing was handed over"),
        (("6.19", "7.0"), "disabling KHO revival: -2"),
        (("7.0", "6.17"), "pages: 40 of 40 overwritten and still restored"),
        (("7.0", "6.18"), "pages: 40 of 40 refused"),
    ],
)
def test_whys_without_finalize(small_pages, pair, word):
    """-9 is FDT_ERR_BADMAGIC, -2 is -ENOENT for a map that is 0."""
    assert word in pairs(small_pages, finalized=False)[pair].why


def test_blocks_of_a_lost_map(small_pages):
    """Every block of order 0 above 16 MiB, and of order 2 above 64 MiB, is lost to 6.17."""
    leg = pairs(small_pages, finalized=True)["6.18", "6.17"].legs[0]
    assert leg.fates["pages"] == "40 of 40 overwritten and still restored"
    assert leg.fates["tables"] == "6 of 12 intact, 6 of 12 come back with order 0"
    assert leg.fates["buffers"] == leg.fates["arena"] == leg.fates["oops"] == "intact"
    assert {"map-agrees", "restored-once"} <= set(leg.violations)


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("6.17", "6.18", PANIC),
        ("7.0", "6.17", MISREAD),
        ("6.18", "7.0", R),
        ("6.19", "7.0", PANIC),
        ("7.1", "7.1", R),
        ("7.1", "7.2", REFUSED),
    ],
)
def test_larger_pages(old, new, outcome):
    """16 KiB on arm64."""
    run = play(Cell((old, new), 16384))
    assert run.outcome == outcome
    assert run.contradiction == ""


def test_depth_of_a_tree_of_larger_pages():
    """A32: the merge window's 7.1 loses its order-0 keys with 16 KiB pages, and not with 4 KiB."""
    broken = "7.1+tree_depth_ignores_order_bit=on"
    assert play(Cell((broken, broken), 4096)).outcome == R
    assert play(Cell((broken, broken), 16384)).outcome in (MISREAD, PANIC)


def test_phantoms_that_do_not_kill():
    """With order-0 pages only the bits behind stay within RAM: reserved for nobody, for ever."""
    run = play(Cell(("6.17", "6.18"), only=("pages",)))
    assert run.outcome == MISREAD
    leg = run.legs[0]
    assert leg.phantom > 0
    assert leg.lost == 0
    assert leg.fates == {"pages": "intact"}
    assert set(leg.violations) == {"map-agrees"}


def test_a_release_of_ones_own():
    """A designer's file takes part, and is refused by the name of its format."""
    own = str(ROOT / "examples" / "own_release.py")
    assert play(Cell((own, own))).outcome == R
    assert play(Cell((own, "7.3"))).outcome == REFUSED
    assert play(Cell(("7.3", own))).outcome == REFUSED


def test_the_same_again():
    """Equal cells, equal rows."""
    cell = Cell(("7.0", "6.17"))
    assert play(cell).as_json() == play(cell).as_json()


@pytest.mark.parametrize("cell", [Cell(("6.17", "7.0")), Cell(("6.18", "6.17"), 16384, False)])
def test_programs_run(cell):
    """What is printed is a program that says what the cell says."""
    done = subprocess.run(
        [sys.executable, "-"], input=program(cell), text=True, capture_output=True, check=True
    )
    assert done.stdout == "".join(f"{leg}\n" for leg in play(cell).legs)


def test_command(capsys):
    """Rows and round trips as JSON, for the releases that are asked for."""
    args = ["matrix", "--from", "7.0,6.19", "--to", "7.0,6.19", "--page-size", "4K", "--json"]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)
    assert {(row["from"], row["to"]): row["outcome"] for row in told["rows"][:4]} == {
        ("7.0", "7.0"): R,
        ("7.0", "6.19"): R,
        ("6.19", "7.0"): PANIC,
        ("6.19", "6.19"): R,
    }
    assert [row["finalized"] for row in told["rows"]] == [True] * 4 + [False] * 4
    assert {"why", "page_size", "lost", "lost_blocks", "phantom_blocks", "violations"} <= set(
        told["rows"][0]
    )
    lost = {(row["from"], row["to"]): row["lost"] for row in told["rows"][:4]}
    assert lost["7.0", "6.19"] == []
    assert lost["6.19", "7.0"] == sorted(
        ["pages", "tables", "buffers", "arena", "range", "vmalloc", "vm-a", "vm-b", "oops"]
    )
    (trip,) = told["round_trips"]
    assert (trip["from"], trip["via"], trip["to"]) == ("7.0", ["6.19"], "7.0")
    assert trip["outcome"] == PANIC


def test_command_prints_programs(capsys):
    """``--program`` takes a pair or a round trip."""
    assert main(["matrix", "--program", "6.18", "6.17", "6.18", "--page-size", "16K"]) == 0
    text = capsys.readouterr().out
    assert "hand_over(('6.18', '6.17', '6.18'), page_size=16384):" in text
    assert main(["matrix", "--program", "7.0", "6.17", "--unfinalized", "--only", "range"]) == 0
    text = capsys.readouterr().out
    assert "page_size=4096, finalize=False, only=('range',)):" in text


def test_command_names_own_releases_shortly(capsys):
    """The table shows a release's name, not the file that it comes from."""
    own = str(ROOT / "examples" / "own_release.py")
    assert main(["matrix", "--from", own, "--to", f"7.3,{own}", "--page-size", "4K"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[2:4] == ["from \\ to  7.3 7.3-list", "7.3-list     c        R"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--from", "7.4"], "'7.4' is no release khosim knows"),
        (["--to", "7.2,,7.3"], "--to: '7.2,,7.3' names no release between two commas"),
        (["--page-size", "8K"], "--page-size: 8K is neither 4K nor 16K"),
        (["--page-size", "x"], "--page-size"),
        (["--program", "7.3"], "--program: it takes two releases or three, not 1"),
        (["--program", "7.3", "7.2", "--json"], "--program: it takes releases itself"),
        (["--program", "7.3", "7.2", "--unfinalized"], "Linux 7.3 has nothing to finalize"),
        (["--unfinalized"], "--unfinalized: it goes with --program only"),
        (["--only", "tea"], "--only: 'tea' is not one of pages"),
        (["--from", "missing.py"], "missing.py"),
    ],
)
def test_wrong_input(args, said, capsys):
    """One line that names place and cause, and status 2."""
    assert main(["matrix", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_page_in_docs(small_pages):
    """``docs/matrix.md`` shows what the command prints with 4 KiB pages."""
    text = (ROOT / "docs" / "matrix.md").read_text()
    shown = re.search(r"```\n\$ khosim matrix --page-size 4K\n(.*?)\n```", text, re.DOTALL)
    assert shown is not None
    printed = "\n".join(_told(small_pages))
    assert max(map(len, printed.split("\n"))) <= 80
    assert shown[1] == printed


# -- real kernels' bytes, read by kernels of the other bitmap size ---------------------------------


def dumb_reader(name, bitmap_bytes, is_ram):
    """What deserialize_bitmap does with a capture, word for word: blocks, and whether it died."""
    with np.load(GOLDEN / name / "gen0" / "ram.npz") as ram:
        pages = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
    known = json.loads((GOLDEN / name / "gen0" / "handover.json").read_text())

    def read(phys, size):
        first = pages.get(phys >> 12, bytes(4096)) + pages.get((phys >> 12) + 1, bytes(4096))
        return first[phys & 4095 :][:size]

    blocks = []
    for chunk in known["chunks"]:
        for element in chunk["elms"]:
            bitmap = np.frombuffer(read(element["bitmap"], bitmap_bytes), np.uint8)
            for bit in np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).tolist():
                phys = element["phys_start"] + (bit << chunk["order"] + 12)
                blocks.append([phys, chunk["order"]])
                if not is_ram(phys):
                    return blocks, True
    return blocks, False


@pytest.mark.parametrize(
    ("name", "release", "bitmap_bytes", "dies"),
    [
        ("uma1g-v1", "6.16", 512, False),
        ("uma1g-v1", "6.18", 4096, True),
        ("uma1g-v1", "7.0", 4096, True),
        ("uma1g-v1page", "6.17", 512, False),
        ("uma1g-v1page", "6.19", 4096, False),
        ("numa6g-v1", "6.18", 4096, True),
        ("numa6g-v1", "6.17", 512, False),
    ],
)
def test_real_maps_read_with_either_bitmap(name, release, bitmap_bytes, dies):
    """Each block in order, to the last one before a fault, on what real kernels left in RAM.

    Sections of memory have 128 MiB: those with RAM have struct pages. ``uma1g`` has 1 GiB from 0;
    ``numa6g`` 3 GiB from 0 and 4 GiB on.
    """
    machine = Machine.from_capture(GOLDEN / name, generation=0)
    seen = []

    def listen(event):
        if event.symbol == "deserialize_bitmap":
            phys, order, count = (event.args[word] for word in ("phys", "order", "nr_blocks"))
            seen.extend([phys + (n << order + 12), order] for n in range(count))

    machine.listen(listen)
    ram = [range(start >> 27, (end + (1 << 27) - 1) >> 27) for start, end in RAM[name]]

    def is_ram(phys):
        return any(phys >> 27 in sections for sections in ram)

    blocks, is_dead = dumb_reader(name, bitmap_bytes, is_ram)
    assert is_dead is dies
    if not dies:
        machine.boot(release)
    else:
        with pytest.raises(KernelPanic) as caught:
            machine.boot(release)
        fault = 0xFFFFEA0000000000 + (blocks[-1][0] >> 12) * 64 + 40
        assert f"page fault for address: {fault:x}," in str(caught.value)
    assert seen == blocks


GIB = 1 << 30
RAM = {
    "uma1g-v1": [(0, GIB)],
    "uma1g-v1page": [(0, GIB)],
    "numa6g-v1": [(0, 3 * GIB), (4 * GIB, 7 * GIB)],
}


def test_all_eight_take_part():
    """The matrix is of the tagged releases, and of both page sizes."""
    wanted = list(cells())
    assert {cell.releases[0] for cell in wanted} == set(MAINLINE)
    assert len(wanted) == 2 * (64 + 5 * 8 + 7)
