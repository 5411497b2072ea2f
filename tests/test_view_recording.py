"""Recordings: events in order, moments at the stages, layers that tell what memory holds."""

from __future__ import annotations

import numpy as np
import pytest

from khosim import Machine
from khosim.scenario.library import load_scenario
from khosim.view.moment import LAYERS, Layer
from khosim.view.recording import Recording, record, recording

PAGE = 4096


@pytest.fixture(scope="module")
def story() -> Recording:
    """A folio of 4 pages is preserved, crosses, and is restored."""
    machine = Machine("64M")
    with recording(machine, "one folio") as story:
        kernel = machine.boot(cmdline="kho=on")
        folio = kernel.alloc_folio(2, owner="guest")
        story.mark("allocated")
        kernel.kho_preserve_folio(folio)
        story.mark("preserved")
        successor = kernel.kexec()
        successor.kho_restore_folio(folio.phys)
        story.mark("restored")
    return story


def _of(layer: Layer, owner: str) -> list[tuple[int, int, int]]:
    chosen = [name == owner for name in layer.owner_names()]
    columns = (layer.start[chosen], layer.end[chosen], layer.order[chosen])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_moments_come_at_each_stage_and_where_asked(story: Recording) -> None:
    """Both kernels' stages are there in order, and the marks between them."""
    assert [(moment.generation, moment.title) for moment in story.moments] == [
        (0, "memory is known, nothing is taken over"),
        (0, "booted"),
        (0, "allocated"),
        (0, "preserved"),
        (0, "about to jump"),
        (1, "what was preserved is reserved"),
        (1, "booted"),
        (1, "restored"),
    ]
    assert [moment.index for moment in story.moments] == list(range(8))
    counts = [moment.event for moment in story.moments]
    assert counts == sorted(counts)
    assert 0 < counts[0] <= counts[-1] == len(story.events)
    assert story.violations == []


def test_a_folio_is_held_then_preserved_then_incoming_then_held(story: Recording) -> None:
    """Its four pages move from layer to layer at one address."""
    allocated, preserved = story.moments[2], story.moments[3]
    ((start, end, order),) = _of(allocated.layers["held"], "guest")
    assert (end - start, order) == (4 * PAGE, 2)
    assert _of(allocated.layers["preserved"], "guest") == []
    assert _of(preserved.layers["preserved"], "guest") == [(start, end, 2)]
    booted, restored = story.moments[6], story.moments[7]
    assert booted.layers["incoming"].at(start) != []
    assert booted.layers["held"].at(start) == []
    assert restored.layers["incoming"].at(start) == []
    assert restored.layers["held"].at(end - 1) != []
    assert restored.layers["held"].at(end) != restored.layers["held"].at(end - 1)


def test_the_image_lies_in_scratch_and_is_there_only_at_the_jump(story: Recording) -> None:
    """Segments of the next kernel are shown with their names."""
    jump = story.moments[4]
    image, scratch = jump.layers["image"], jump.layers["scratch"]
    assert {"kernel", "initrd", "KHO scratch array"} <= set(image.owners)
    assert all(scratch.at(start) for start in image.start.tolist())
    assert [len(moment.layers["image"]) > 0 for moment in story.moments].count(True) == 1


def test_layers_are_sorted_whole_and_inside_of_ram(story: Recording) -> None:
    """Each moment has every layer; ranges ascend and are not empty."""
    for moment in story.moments:
        assert list(moment.layers) == list(LAYERS)
        for layer in moment.layers.values():
            assert np.all(layer.start < layer.end)
            assert np.all(layer.start[1:] >= layer.start[:-1])
            assert len(layer) == len(layer.end) == len(layer.order) == len(layer.owner_names())
        assert moment.layers["ram"].total_bytes <= 64 << 20
        assert moment.layers["preserved"].same_as(moment.layers["preserved"])


def test_the_handover_is_shown_as_it_lies_in_ram(story: Recording) -> None:
    """Root FDT and map are a layer of pages, and the decoded handover is kept."""
    moment = story.moments[3]
    assert moment.handover is not None
    assert _of(moment.layers["handover"], "root FDT") == [
        (moment.handover.fdt_phys, moment.handover.fdt_phys + PAGE, -1)
    ]
    pages = _of(moment.layers["handover"], "preserved-memory map")
    assert [start for start, _, _ in pages] == sorted(moment.handover.table_pages)


def test_phases_part_the_events(story: Recording) -> None:
    """Phases are in order without a gap, and change where the kernel or its phase does."""
    phases = story.phases()
    assert [phase.first for phase in phases] == [0, *(phase.end for phase in phases[:-1])]
    assert phases[-1].end == len(story.events)
    assert {phase.generation for phase in phases} == {0, 1}
    for phase in phases:
        kinds = {(e.generation, e.phase) for e in story.events[phase.first : phase.end]}
        assert kinds == {(phase.generation, phase.name)}


def test_the_moment_of_an_event(story: Recording) -> None:
    """It is the last one that was taken before; the first for what came before any."""
    first, second = story.moments[0], story.moments[1]
    assert story.moment_at(0) is first
    assert story.moment_at(second.event - 1) is first
    assert story.moment_at(len(story.events)) is story.moments[-1]


def test_a_scenario_is_recorded_step_by_step() -> None:
    """Every step of a built-in scenario leaves a moment with its name."""
    story, result = record(load_scenario("small"))
    assert result.ok
    titles = [moment.title for moment in story.moments]
    assert "folios guest" in titles
    assert titles.count("about to jump") == 1
    assert story.title.startswith("small: ")


def test_a_recording_ends_with_its_block() -> None:
    """What the machine does later is not in it, and violations are those at its end."""
    machine = Machine("64M")
    with recording(machine) as story:
        kernel = machine.boot(cmdline="kho=on")
    events, moments = len(story.events), len(story.moments)
    kernel.kexec()
    assert (len(story.events), len(story.moments)) == (events, moments)


def test_a_violation_is_in_the_recording() -> None:
    """A byte that changes on the way is told at the end."""
    machine = Machine("64M")
    with recording(machine) as story:
        kernel = machine.boot(cmdline="kho=on")
        folio = kernel.alloc_folio(0, owner="guest")
        kernel.kho_preserve_folio(folio)
        machine.load_successor(kernel)
        machine.hardware.ram.write(folio.phys, b"\xff", by=(0, "device"))
        machine.resume()
    assert [violation.invariant for violation in story.violations] == ["preserved-content"]
