"""Devices between any two events of a live update: what is tried, what speaks, what is printed."""

from __future__ import annotations

import contextlib
import io
import json
from itertools import combinations

import pytest

from khosim import InputError, Machine
from khosim.cli.main import main
from khosim.drivers.core import PIECES
from khosim.drivers.kvm import VcpuFile
from khosim.drivers.kvm_luo import KvmVcpuHandler
from khosim.drivers.pci_core import PciCore
from khosim.drivers.vmm import Vmm, VmmPlan
from khosim.drivers.vtd import IntelIommu
from khosim.explore.hosts import HOSTS, Act, Host
from khosim.explore.interleave import (
    Batch,
    Model,
    Plan,
    carry_out,
    draw,
    every_plan,
    moments,
    nr_plans,
    run,
    shrink,
    tell,
)

SMALL, CLOUD = Model("guest-devices"), Model("cloud-host-devices")
NAMED = {
    "guest-memory": "dma-in-owner",
    "kvm": "interrupt-kept",
    "iommu": "translation-kept",
    "vfio": "device-not-reset",
    "pci": "device-identity",
    "snp": "rmp-owner",
}


def _no_tick(number: int) -> None:
    """Nobody waits."""


def _invariants(model: Model, plan: Plan) -> set[str]:
    return {said.invariant for said in run(model, plan)}


# -- which moments --------------------------------------------------------------------------------


def _counted_by_hand() -> list[str]:
    """The kernel functions behind every event of a live update, without anything of explore."""
    host = Host("guest-devices")
    parts = host.devices.parts
    host.close()
    machine = Machine("64M", devices=parts)
    events: list[str] = []
    machine.listen(lambda event: events.append(event.symbol))
    kernel = machine.boot(kernel_size=4 << 20, cmdline="kho=on liveupdate=on")
    vmm = Vmm.start(kernel, VmmPlan("vm"), kernel.memfd("vm", size="2M"))
    for name in ("0000:10:00.0", "0000:11:00.0"):
        vmm.assign(name, name)
    vmm.map_peer(1 << 45, vmm.devices["0000:11:00.0"])
    events.clear()
    names = list(vmm.files())
    session = kernel.liveupdate.create_session("vm")
    for token, file in enumerate(vmm.files().values()):
        session.preserve(file, token)
    successor = machine.kexec(kernel)
    session = successor.liveupdate.retrieve_session("vm")
    back = {name: session.retrieve(token) for token, name in enumerate(names)}
    Vmm.resume(successor, VmmPlan("vm"), back)
    session.finish()
    session.close()
    return events


def test_every_event_of_a_live_update_is_a_moment() -> None:
    """As many as a listener hears: of the freeze, inside the jump, in the early boot, behind it."""
    events = _counted_by_hand()
    assert moments(SMALL) == len(events)
    acts = [Act(moment, "nic", "read") for moment in range(len(events))]
    host = Host("guest-devices")
    assert host.play(acts) == []
    assert [done.event.symbol for done in host.done] == events
    phases = {done.event.phase for done in host.done}
    assert {"running", "machine_kexec", "setup_arch", "kho_memory_init", "initcalls"} <= phases
    relocated = [done for done in host.done if done.event.symbol == "relocate_kernel"]
    assert len(relocated) >= 3
    assert {done.outcome.split()[0] for done in host.done} == {"done"}


def test_every_single_act_and_every_pair_of_moments_is_a_plan() -> None:
    """Exact counts: 12 acts at each moment; all of them at both moments of each pair."""
    count, actions = moments(SMALL), HOSTS["guest-devices"].actions()
    assert len(actions) == 12
    assert nr_plans(SMALL, 1) == 12 * count
    assert nr_plans(SMALL, 2) == 12 * count + count * (count - 1) // 2
    single = [plan.acts for plan in every_plan(SMALL, 1)]
    assert set(single) == {(Act(m, *a),) for m in range(count) for a in actions}
    assert len(single) == len(set(single))
    pairs = [plan.acts for plan in every_plan(SMALL, 2)][len(single) :]
    assert len(pairs) == count * (count - 1) // 2
    assert {(acts[0].moment, acts[-1].moment) for acts in pairs} == set(
        combinations(range(count), 2)
    )
    assert {len(acts) for acts in pairs} == {24}


def test_batches_are_parts_of_the_whole() -> None:
    """Whoever carries out plans 95 to 99 carries out just those."""
    seen: list[int] = []
    assert carry_out(Batch(SMALL, "", 1, 95, 4), seen.append) == []
    assert seen == [95, 96, 97, 98]


# -- nothing speaks -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(7, 3300, 473))
def test_single_acts_are_silent(first: int) -> None:
    """Some of those that ``--exhaustive 1`` goes through."""
    assert carry_out(Batch(SMALL, "", 1, first, 1), _no_tick) == []


def test_everybody_at_every_moment_of_two_updates() -> None:
    """With a refused try before each of them, guests taken back in the other order."""
    layout = HOSTS["guest-devices"]
    acts = [Act(m, *action) for m in range(2 * moments(SMALL) + 20) for action in layout.actions()]
    host = Host("guest-devices", low=True, allocator="adversarial", seed=3)
    assert host.play(acts, updates=2, refused_by="disk", backwards=True) == []
    outcomes = {(done.act.what, done.outcome.split(" ")[0]) for done in host.done}
    assert {("read", "done"), ("write", "done"), ("work", "done"), ("peer", "peer")} <= outcomes
    assert {("stray", "fault"), ("interrupt", "posted"), ("run", "step")} <= outcomes


@pytest.mark.parametrize("model", [SMALL, CLOUD], ids=lambda model: model.host)
def test_random_interleavings_are_silent(model: Model) -> None:
    """Some of those that a search draws."""
    assert carry_out(Batch(model, "test", 0, 0, 4), _no_tick) == []


def test_a_plan_is_of_its_seed_and_number_alone() -> None:
    """Equal names give equal plans, others others."""
    plans = [draw(CLOUD, f"5:{n}") for n in range(40)]
    assert plans == [draw(CLOUD, f"5:{n}") for n in range(40)]
    assert len(set(plans)) == 40
    assert {plan.updates for plan in plans} == {1, 2}
    assert {bool(plan.refused_by) for plan in plans} == {False, True}
    assert {plan.allocator for plan in plans} == {"linux", "adversarial"}


# -- one speaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", PIECES)
def test_without_a_piece_the_invariant_that_names_it_is_found(piece: str) -> None:
    """And no other, in any plan; as a program that says it as well."""
    model = Model("cloud-host-devices", without=(piece,))
    spoken = carry_out(Batch(model, "1", 0, 0, 4), _no_tick)
    assert {said.invariant for one in spoken for said in one.said} == {NAMED[piece]}
    first = min(spoken, key=lambda one: len(one.plan.acts))
    plan = shrink(model, first.plan, first.said[0].cause)
    assert len(plan.acts) == (piece == "guest-memory")
    program, trace = tell(model, plan)
    assert len(program.splitlines()) <= 6
    assert len(trace) == len(plan.acts)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "<program>", "exec"), {})
    lines = out.getvalue().splitlines()
    assert {line.split(":")[0] for line in lines} == {NAMED[piece]}


def test_a_plan_is_shrunk_to_the_one_act_that_matters() -> None:
    """Everything else goes: other acts, a refused try, a second update, odd allocations."""
    model = Model("guest-devices", without=("guest-memory",))
    acts = tuple(Act(m, *a) for m in range(0, 280, 9) for a in HOSTS[model.host].actions())
    plan = Plan(tuple(act for act in acts if act.what != "stray"), 2, "disk", True, "adversarial")
    cause = next(said.cause for said in run(model, plan))
    least = shrink(model, plan, cause)
    assert len(least.acts) == 1
    assert least == Plan(least.acts)


# -- what the author of a host knows --------------------------------------------------------------


def test_a_write_that_is_undone_is_told() -> None:
    """Also where no invariant looks: memory is the guest's again, and not what was written."""
    host = Host("guest-devices")
    assert host.play([Act(100, "nic", "write")]) == []
    guest = host.guests[0]
    assert guest.vmm is not None
    assert guest.vmm.vm is not None
    (gpa, _), (base, phys, _) = next(iter(guest.wrote.items())), guest.vmm.vm.maps()[0]
    host.machine.hardware.ram.zero(phys + gpa - base, 8, (1, "test"))
    assert {found.invariant for found in host.verdict()} == {"write-arrives"}


def test_an_interrupt_that_no_guest_takes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM that wipes the descriptor before it looks."""
    whole = VcpuFile.sync_pir

    def wipes(self: VcpuFile) -> list[int]:
        self.kernel.ram.zero(self.pi_desc, 32, self.kernel.by("test"))
        return whole(self)

    monkeypatch.setattr(VcpuFile, "sync_pir", wipes)
    found = _invariants(SMALL, Plan((Act(120, "nic", "interrupt"),)))
    assert found == {"interrupt-arrives"}


def test_a_device_that_gets_no_answer_is_told() -> None:
    """Shut off from the bus after the update is over: nobody watches it any more."""
    host = Host("guest-devices")
    host.live_update()
    host.devices.write_config(host.names["nic"], 4, 2, 2)
    host.act(host.now, "nic", "read")
    host.kernel.alloc_folio(0)
    assert {found.invariant for found in host.verdict()} == {"device-answered"}


def test_a_guest_that_does_not_go_on_after_a_refused_freeze_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its vCPUs were stopped, and nobody lets them run again."""
    monkeypatch.setattr(KvmVcpuHandler, "unfreeze", lambda self, args: None)
    assert _invariants(CLOUD, Plan(refused_by="nvme-c")) == {"guest-goes-on"}


@pytest.mark.parametrize("model", [CLOUD, Model("cloud-host-amd")], ids=lambda model: model.host)
def test_a_guest_that_nobody_preserves_reaches_nothing_from_the_jump_on(model: Model) -> None:
    """Its devices are shut off, those of the others are not; an encrypted one leaves no page."""
    layout = HOSTS[model.host]
    acts = tuple(Act(m, *a) for m in range(0, moments(model), 3) for a in layout.actions())
    for name in ("vm-a", "vm-s"):
        host = Host(model.host, low=True)
        assert host.play(acts, forgets=name, updates=2) == []
    assert _invariants(model, Plan(acts, forgets="vm-c", allocator="adversarial", seed=9)) == set()


def test_a_device_of_a_forgotten_guest_refuses_nothing() -> None:
    """Nobody asks it to be frozen: the first try is the one that goes through."""
    assert _invariants(CLOUD, Plan(refused_by="nic-b", forgets="vm-b", updates=2)) == set()


def test_a_simulator_that_falls_over_is_told_with_its_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The program is printed all the same."""

    def breaks(self: Host, guest: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Host, "_resume", breaks)
    (said,) = run(SMALL, Plan())
    assert said == ("simulator-crash", "RuntimeError: broken")
    assert "host.live_update()" in tell(SMALL, Plan())[0]


def test_a_device_that_nobody_carries_and_nobody_stops_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bus mastering and translation left on: it writes to memory that is free by now."""
    monkeypatch.setattr(PciCore, "shutdown", lambda self: None)
    monkeypatch.setattr(IntelIommu, "shutdown", lambda self, preserved, buses: None)
    plan = Plan((Act(260, "nic-b", "write"),), forgets="vm-b")
    found = {said for said in run(CLOUD, plan) if said.invariant == "dma-in-owner"}
    assert [said.message.endswith("carried by none") for said in found] == [True]


def test_an_interrupt_table_in_memory_that_is_free_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody preserved it, and nothing was written over it yet."""
    monkeypatch.setattr(IntelIommu, "unit_tables", lambda self: [(self.root, 0)])
    assert _invariants(SMALL, Plan()) == {"interrupt-kept"}


def test_a_kernel_that_dies_is_told() -> None:
    """A panic is one more thing that speaks, where nothing else does."""
    host = Host("guest-devices")
    host.live_update()
    host.machine.watch(lambda kernel, stage: _clear(kernel, stage))
    assert {found.invariant for found in host.play(())} == {"kernel-panic"}


def _clear(kernel: object, stage: str) -> None:
    if stage == "takeover":
        from khosim.errors import KernelPanic

        raise KernelPanic("test", 2)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """Silent with everything preserved; equal arguments print equal bytes."""
    arguments = ["explore", "guest-devices", "--seed", "2", "--runs", "5", "--json"]
    said = []
    for _ in range(2):
        assert main(arguments) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    told = json.loads(said[0])
    assert (told["explored"], told["findings"]) == (5, [])
    assert told["moments"] == moments(SMALL)


def test_the_command_finds_what_a_piece_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, the invariant, a program."""
    arguments = ["explore", "guest-devices", "--without", "vfio", "--runs", "2"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "device-not-reset spoke" in out
    assert "    host = Host('guest-devices', without=('vfio',))" in out


@pytest.mark.slow  # two processes are started, which import everything anew
def test_the_number_of_jobs_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Workers may end in any order."""
    said = []
    for jobs in ("1", "2"):
        arguments = ["explore", "guest-devices", "--without", "guest-memory", "--runs", "45"]
        assert main([*arguments, "--jobs", jobs]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["guest-devices", "--without", "gpu"], "'gpu' is none of"),
        (["guest-devices", "--without", "snp"], "encrypted"),
        (["guest-devices", "--release", "6.18"], "no live update of devices"),
        (["guest-devices", "--release", "9.9"], "9.9"),
        (["guest-devices", "--exhaustive", "3"], "more than 2"),
        (["guest-devices", "--exhaustive", "1", "--runs", "3"], "not together"),
        (["guest-devices", "--seconds", "3"], "not for"),
        (["guest-devices", "--corpus", "x"], "not for"),
        (["guest-devices", "--fixed"], "not for"),
        (["guest-devices", "--engine", "hypothesis"], "not for"),
        (["guest-devices", "--runs", "0"], "whole number"),
        (["sessions", "--without", "iommu"], "only for"),
        (["guest-device"], "guest-devices"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exit status 2."""
    assert main(["explore", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert cause in said


def test_acts_that_there_are_not() -> None:
    """Names are looked at when they are given."""
    host = Host("guest-devices")
    for who, what in (("gpu", "read"), ("nic", "run"), ("disk", "peer"), ("vm/1", "run")):
        with pytest.raises(InputError, match="does no"):
            host.act(0, who, what)
    with pytest.raises(InputError, match="none of"):
        Host("laptop")
