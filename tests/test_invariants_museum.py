"""Invariants that the museum of bugs asked for: each speaks when its own promise is broken."""

from __future__ import annotations

import pytest

from khosim import Machine
from khosim.kernel.buddy import Zone
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import find_release


def names(machine: Machine) -> set[str]:
    """Return which invariants speak."""
    return {violation.invariant for violation in machine.check()}


def test_a_table_page_in_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the radix tree that is taken from movable memory may lie in scratch."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    area, size = kernel.scratch_areas()[0]

    def alloc_nodes(kernel: Kernel, nr_nodes: int) -> list[int]:
        found: list[int] = []
        while len(found) < nr_nodes:
            folio = kernel.alloc_folio(owner="kho_radix_alloc_node", movable=True, zero=True)
            if area <= folio.phys < area + size:
                found.append(folio.phys)
        return found

    monkeypatch.setattr(Kernel, "kho_radix_alloc_nodes", alloc_nodes)
    # The first block of its order needs nodes of its own.
    folio = kernel.alloc_folio(5)
    assert names(machine) == set()
    kernel.kho_preserve_folio(folio)
    assert names(machine) == {"map-outside-scratch"}
    found = machine.check()[0]
    assert area <= found.phys < area + size
    assert "kho_radix_alloc_node" in str(found)


def test_a_handover_without_a_map_is_believed() -> None:
    """A kernel of 6.18 takes a root FDT over whose map nobody wrote: what it leads to is free."""
    machine = Machine("64M")
    kernel = machine.boot("6.19", cmdline="kho=on")
    fdt_phys = kernel.kho_out.fdt_phys
    machine.load_successor(kernel, "6.18", finalize=False)
    machine.resume()
    assert names(machine) == {"subtrees-reserved"}
    assert machine.check()[0].phys == fdt_phys
    sound = find_release("6.18").evolve(empty_map_accepted=False)
    machine = Machine("64M")
    machine.load_successor(machine.boot("6.19", cmdline="kho=on"), sound, finalize=False)
    machine.resume()
    assert not machine.check()


def test_a_page_on_a_list_of_another_zone() -> None:
    """A page of node 1 is freed to the zone of node 0: it is counted, and in the wrong place."""
    machine = Machine("256M", nodes=2)
    kernel = machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(nid=1)
    here, there = (kernel.pages.zone_of(pfn) for pfn in (0x1000, folio.pfn))
    assert isinstance(here, Zone)
    assert isinstance(there, Zone)
    assert (here.nid, there.nid) == (0, 1)
    there.managed_pages -= 1
    here.managed_pages += 1
    kernel.pages.pages.clear(folio.pfn, folio.pfn + 1)
    here.free_one_page(folio.pfn, 0, 1)
    assert names(machine) == {"free-in-own-zone"}
    assert machine.check()[0].phys == folio.phys
