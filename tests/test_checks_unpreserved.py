"""Whether a handover preserves what it is made of: real ones do; with a block taken away, not."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.checks.decode import Handover, decode_handover
from khosim.checks.decode_luo import Luo, decode_luo
from khosim.checks.preserved import Preserved, block_orders, expand, orders_of
from khosim.checks.reader import PageImage, Problem
from khosim.checks.unpreserved import unpreserved

CAPTURES = Path(__file__).parent / "golden" / "captures"
CASES = (("uma1g", "gen1"), ("arm64-16k", "gen1"))


@cache
def golden(name: str, generation: str) -> tuple[Handover, Luo, dict[str, Any]]:
    """A handover, decoded, and what an independent program says of it."""
    folder = CAPTURES / name / generation
    known = json.loads((folder / "handover.json").read_text())
    with np.load(folder / "ram.npz") as ram:
        pages = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
        page_size = ram["data"].shape[1]
    image = PageImage(pages, page_size)
    handover = decode_handover(image, known["fdt_phys"], page_size)
    blob = handover.subtrees["LUO"]
    luo = decode_luo(image, blob, page_size, handover.preserved, content=False)
    return handover, luo, known


def preserved(page_size: int, blocks: list[tuple[int, int]]) -> Preserved:
    """A map of blocks, given as (page frame, order)."""
    pfn, order = np.array(blocks, dtype=np.int64).reshape(-1, 2).T
    return Preserved(page_size, order.copy(), pfn.copy(), np.ones(len(blocks), np.int64), (), ())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_block_is_missed_by_its_owner(case: tuple[str, str]) -> None:
    """Without any one block, exactly what lies in it is named."""
    handover, luo, known = golden(*case)
    size = handover.page_size
    assert unpreserved(handover, luo) == ()
    owners: dict[int, str] = {known["fdt_phys"]: "/"}
    owners |= {blob["phys"]: f"/{name}" for name, blob in known["subtrees"].items()}
    for number, session in enumerate(known["luo"]["sessions"]):
        for index, file in enumerate(session["files"]):
            owners[file["data"]] = f"/LUO/sessions[{number}]/files[{index}]"
    (region,) = handover.reserve_mem.values()
    blocks = [(phys // size, order) for phys, order in expand(handover.preserved)]
    folios = {
        pfn for s in known["luo"]["sessions"] for f in s["files"] for pfn, _, _ in f["folios"]
    }
    nr_owned = 0
    for at, (pfn, _) in enumerate(blocks):
        spoilt = preserved(size, blocks[:at] + blocks[at + 1 :])
        found = unpreserved(replace(handover, preserved=spoilt), luo)
        phys = pfn * size
        if phys in owners:
            assert owners[phys] in [problem.path for problem in found]
            nr_owned += 1
        elif region.start <= phys < region.start + (region.size & -size):
            assert [(p.path, p.phys) for p in found] == [("/memblock/oops", phys)]
            nr_owned += 1
        elif pfn in folios:
            assert found == ()
    assert nr_owned >= len(owners) + 1


def test_a_map_with_problems_accuses_nobody() -> None:
    """Blocks that could not be read may well be those that are missed."""
    handover, luo, _ = golden("uma1g", "gen1")
    empty = preserved(4096, [(1, 0)])
    assert len(unpreserved(replace(handover, preserved=empty), luo)) > 10
    torn = replace(empty, problems=(Problem("radix-unreadable", 0, ""),))
    assert unpreserved(replace(handover, preserved=torn), luo) == ()


def test_orders_are_those_of_blocks_that_begin_there() -> None:
    """Against a dictionary: the middle of a block begins none, the larger of two counts."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        blocks = []
        for _ in range(rng.integers(0, 12)):
            order = int(rng.integers(0, 4))
            blocks.append((int(rng.integers(0, 8)) << order, order))
        begins: dict[int, int] = {}
        for pfn, order in blocks:
            begins[pfn] = max(order, begins.get(pfn, -1))
        found = block_orders(preserved(4096, blocks), np.arange(80))
        assert found.tolist() == [begins.get(pfn, -1) for pfn in range(80)]
        assert orders_of(preserved(4096, blocks)) == sorted({order for _, order in blocks})


def test_runs_of_blocks_begin_at_each_block() -> None:
    """Neighbours of one order are one run, and each of them begins somewhere."""
    one = np.array([1])
    run = Preserved(4096, one * 2, one * 8, one * 3, (), ())
    assert block_orders(run, np.arange(7, 22)).tolist() == [
        2 if pfn in (8, 12, 16) else -1 for pfn in range(7, 22)
    ]
