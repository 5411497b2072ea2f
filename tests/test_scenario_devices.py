"""Scenarios of hosts of guests with devices: what is read, and what each step does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from khosim import InputError
from khosim.cli.main import main
from khosim.drivers.core import PIECES
from khosim.scenario.library import load_scenario
from khosim.scenario.parse import Overrides, parse_scenario
from khosim.scenario.play import Player, play
from khosim.scenario.result import Result

MACHINE = """
[machine]
ram = "256M"
devices = [{ name = "nic" }, { name = "gpu", bar = "64K", count = 2 }]
[kernel]
cmdline = "kho=on liveupdate=on"
"""
START = """
  { do = "guest", name = "memory", size = "8M", pages = 5 },
  { do = "vm", name = "vm", memory = "memory" },
  { do = "assign", vm = "vm", device = "nic" },
"""


def _text(first: str, second: str = "", machine: str = MACHINE) -> str:
    later = f"[[generation]]\nsteps = [{second}]" if second else ""
    return f"{machine}[[generation]]\nsteps = [{START}{first}]\n{later}"


def _play(first: str, second: str = "", without: tuple[str, ...] = ()) -> Result:
    overrides = Overrides(without=without)
    return play(parse_scenario(_text(first, second), "t", overrides=overrides))


def _outcomes(player: Player) -> set[str]:
    devices = player.machine.hardware.devices
    assert devices is not None
    return {event.detail["dma"].outcome for event in devices.events if event.kind == "dma"}


def test_names_stand_for_functions_behind_ports_of_their_own() -> None:
    """Three devices, three root ports, a remapping unit; a count numbers the names."""
    scenario = parse_scenario(_text(""), "t")
    assert scenario.devices == {
        "nic": "0000:10:00.0",
        "gpu0": "0000:11:00.0",
        "gpu1": "0000:12:00.0",
    }
    assert len(scenario.parts) == 7
    assert scenario.parts[6].bars == (64 << 10,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("machine", "steps", "cause"),
    [
        ('devices = [{ name = "a" }, { name = "a" }]', "", "two of 'a'"),
        ('devices = [{ name = "a", bar = 20000 }]', "", "not a power of two"),
        ('devices = [{ name = "a", kind = "tpu" }]', "", "kind: 'tpu'"),
        ('devices = [{ name = "a", count = 300 }]', "", "above 200"),
        ("", '{ do = "vm", name = "vm", memory = "memory" }', "choose another"),
        ("", '{ do = "assign", vm = "vn", device = "nic" }', "known: vm"),
        ("", '{ do = "assign", vm = "vm", device = "nik" }', "did you mean 'nic'"),
        ("", '{ do = "misbehave", device = "nic", refuses = "NO" }', "not the name of an errno"),
        ("", '{ do = "clock", every = 3, chance = 0.5 }', "does not go together"),
        ("", '{ do = "clock", every = 0 }', "below 1"),
        ('arch = "arm64"\niommu = true', "", "iommu: none stands in a machine of arm64"),
        ('arch = "arm64"\nsnp = true', "", "snp: none stands"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(machine: str, steps: str, cause: str) -> None:
    """An error names the place and the cause."""
    text = f'[machine]\nram = "256M"\n{machine}\n' if machine else MACHINE
    with pytest.raises(InputError, match=cause):
        parse_scenario(_text(steps, machine=text), "t")


@pytest.mark.parametrize("where", ["[kernel]", "[[generation]]"])
def test_pieces_are_known_by_name(where: str) -> None:
    """In the kernel, at a kexec, in the table, on the command line."""
    for text in (
        '[kernel]\nwithout = ["iomu"]\n[[generation]]',
        '[[generation]]\nkexec = { without = ["iomu"] }\n[[generation]]',
        "[without]\niomu = []\n[[generation]]",
    ):
        with pytest.raises(InputError, match="did you mean 'iommu'"):
            parse_scenario(text, "t")


def test_the_command_names_the_piece_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit status 2."""
    assert main(["run", "cloud-host-devices", "--without", "gpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_goes_on_and_nothing_else_is_touched() -> None:
    """DMA at every event, peer-to-peer too; content of the guest is compared."""
    text = _text(
        '{ do = "assign", vm = "vm", device = "gpu0" },'
        '{ do = "peer", device = "nic", to = "gpu0" },'
        '{ do = "clock", every = 1 }, { do = "preserve_vm", vm = "vm" }',
        '{ do = "resume_vm", vm = "vm" }, { do = "check", guest = "memory" },'
        '{ do = "tick", count = 3, interrupt = "nic" }',
    )
    player = Player(parse_scenario(text, "t"))
    facts = list(player.generations())
    assert player.result.ok, player.result.failures
    assert _outcomes(player) == {"done", "peer"}
    assert facts[1].steps[0].note == "all as it was"
    assert facts[1].steps[2].note == "nic interrupts: posted"


@pytest.mark.parametrize(
    ("piece", "note"),
    [
        ("guest-memory", "memory is gone"),
        ("kvm", "vCPUs start over"),
        ("iommu", "nic is blocked"),
        ("vfio", ""),
        ("pci", ""),
    ],
)
def test_what_a_guest_loses_is_told(piece: str, note: str) -> None:
    """With a piece left out the steps go through and say what is not as it was."""
    result = _play(
        '{ do = "preserve_vm", vm = "vm" }',
        '{ do = "resume_vm", vm = "vm" }, { do = "preserve_vm", vm = "vm" }',
        (piece,),
    )
    assert note in result.kernels[1].steps[0].note
    assert not [text for text in result.failures if "invariant" not in text]


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_that_is_left_out_makes_one_invariant_speak(piece: str) -> None:
    """The one that the scenario names for it, and no other."""
    scenario = load_scenario("cloud-host-devices", overrides=Overrides(without=(piece,)))
    assert len(scenario.violations) == 1
    result = play(scenario)
    assert {violation.invariant for violation in result.violations} == scenario.violations
    assert result.ok, result.failures


def test_the_table_of_the_readme_is_the_scenarios() -> None:
    """Each row is a command that runs, beside what speaks then: as the scenario promises it."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `khosim run (\S+) --without (\S+)` \| `(\S+)` \|", text)
    assert {piece for _, piece, _ in rows} == set(PIECES)
    for name, piece, speaks in rows:
        scenario = load_scenario(name, overrides=Overrides(without=(piece,)))
        assert scenario.violations == {speaks}


@pytest.mark.parametrize("seed", range(3))
def test_with_all_pieces_nothing_speaks_whenever_devices_act(seed: int) -> None:
    """Other moments, other pages: all invariants hold."""
    overrides = Overrides(seed=seed, allocator="adversarial")
    assert play(load_scenario("devices-worst-moment", overrides=overrides)).ok


def test_a_clock_at_moments_counts_from_its_step() -> None:
    """Three events after the step, and at no other."""
    text = _text('{ do = "clock", at = [3] }, { do = "preserve_vm", vm = "vm" }')
    player = Player(parse_scenario(text, "t"))
    list(player.generations())
    devices = player.machine.hardware.devices
    assert devices is not None
    assert len([event for event in devices.events if event.kind == "dma"]) == 1


def test_steps_that_cannot_be_carried_out() -> None:
    """A device of nobody, a machine that does not run, a machine without devices."""
    for steps, cause in (
        ('{ do = "peer", device = "nic", to = "gpu0" }', "is nobody's here"),
        ('{ do = "resume_vm", vm = "vm" }', "is in no session"),
    ):
        with pytest.raises(InputError, match=cause):
            _play(steps)
    small = _text('{ do = "assign", vm = "vm", device = "gpu0", buffers = 8 }')
    with pytest.raises(InputError, match="no page left that nobody writes to"):
        play(parse_scenario(small.replace('size = "8M"', 'size = "64K"'), "t"))
    bare = '[machine]\nram = "64M"\n[[generation]]\nsteps = [{ do = "tick" }]'
    with pytest.raises(InputError, match="no devices"):
        play(parse_scenario(bare, "t"))


def test_equal_seeds_give_equal_runs() -> None:
    """Also with devices that act by chance."""
    results = [
        json.dumps(play(load_scenario("devices-misbehave")).as_json()) for _ in range(2)
    ]
    assert results[0] == results[1]
