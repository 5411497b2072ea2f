"""Searching for what breaks: programs are lawful, runnable, repeatable and short."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from itertools import pairwise

import pytest

from khosim.cli.main import main
from khosim.errors import InputError, KhoSimError
from khosim.explore import agent_calls
from khosim.explore.campaign import Campaign, run_unit, tags
from khosim.explore.codec import decode_steps, encode_steps
from khosim.explore.exhaust import digest, exhaust, expand, keep_of, kinds_of
from khosim.explore.hazards import fixed
from khosim.explore.kit import Stage, audit, flipped, preserve_many, restore_many
from khosim.explore.program import tell
from khosim.explore.search import KINDS, SCENARIOS, random_run, replay
from khosim.explore.shrink import cause_of, shrink
from khosim.explore.world import Problem, Step, World

BOOT = Step("boot", ('"64M"', "kho=on liveupdate=on", "7.3"))


def _said(program: str) -> str:
    """What a printed program says: its output, or the error that ends it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(program, "program", "exec"), {})
        except (KhoSimError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return out.getvalue()


def test_equal_seeds_give_equal_runs() -> None:
    """A run is a function of its seed: steps and what spoke are the same again."""
    one, other = random_run("7:3", "all"), random_run("7:3", "all")
    assert one.steps == other.steps
    assert one.problems == other.problems
    assert random_run("7:4", "all").steps != one.steps


def test_units_of_work_travel() -> None:
    """Suspects can be sent to another process, and back."""
    runs = run_unit("0", "reserve-mem", "7.3", 0, 15)
    assert pickle.loads(pickle.dumps(runs)) == runs
    assert runs.suspects
    assert "boot" in runs.reached


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_drawn_programs_are_lawful(scenario: str) -> None:
    """What the search draws can be carried out again from its steps, to the same end."""
    for n in range(3):
        world = random_run(f"lawful:{n}", scenario)
        again = replay(world.steps)
        assert again is not None
        assert {cause_of(p) for p in world.problems} <= {cause_of(p) for p in again.problems}


def test_unlawful_programs_are_refused() -> None:
    """Freeing what nobody holds, or a second boot, is no program."""
    assert replay([BOOT, Step("free_folio", ("f0",))]) is None
    assert replay([BOOT, BOOT]) is None
    assert replay([Step("free_folio", ("f0",))]) is None


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "its steps are no program"),
        ([["boot", ["print()", "kho=on", "7.3"]]], "step 0: it boots no machine"),
        ([["fly", []]], "step 0: 'fly' is no kind of step"),
        ([["alloc_folio", ["print()", 0]]], "what it defines has no name"),
        ([["kexec", ["kho=on", "print()"]]], "hands over in a way that khosim explore has not"),
        ([["load_image", [7]]], "hands over in a way that khosim explore has not"),
    ],
)
def test_a_file_of_steps_is_no_code(steps: list[object], says: str) -> None:
    """What stands in a finding's file becomes text of a program only where a search has it."""
    with pytest.raises(InputError, match=says):
        decode_steps(steps, "7.3", "finding")
    lawful = [BOOT, Step("load_image", ("kho=on", "release=fixed('7.2')")), Step("jump")]
    assert decode_steps(encode_steps(lawful, "7.3"), "7.3", "finding") == lawful


def test_a_finding_is_short_and_runs() -> None:
    """A released region that stays preserved: two lines, and the printed text shows it."""
    word = "reserve_mem=8192:4096:b"
    steps = [
        Step("boot", ('"64M"', f"kho=on liveupdate=on {word}", "7.3")),
        Step("alloc_folio", ("f0", 1)),
        Step("preserve_folio", ("f0",)),
        Step("release_region", ("b",)),
        Step("unpreserve_folio", ("f0",)),
    ]
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "preserved-is-held")
    shrunk = shrink(steps, cause_of(problem), "7.3")
    assert shrunk is not None
    kinds = [step.kind for step in shrunk[0]]
    assert kinds == ["boot", "release_region"]
    program = tell(shrunk[0], shrunk[1], "7.3").program
    assert len(program.splitlines()) <= 6
    assert "preserved-is-held" in _said(program)


def test_command_lines_become_simple() -> None:
    """A region that need not be large is a page, in the first kernel and in its successor."""
    line = "kho=on reserve_mem=2097152:64:a"
    steps = [Step("boot", ('"64M"', line, "7.3")), Step("kexec", (line,))]
    steps.append(Step("release_region", ("a",)))
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "preserved-is-held")
    shrunk = shrink(steps, cause_of(problem), "7.3")
    assert shrunk is not None
    assert shrunk[0][0].args[1] == "kho=on reserve_mem=4096:4096:a"
    assert [step.kind for step in shrunk[0]] == ["boot", "release_region"]


def test_a_faulted_program_runs() -> None:
    """The allocation that fails is part of the printed program."""
    steps = [BOOT, Step("kexec", ("kho=on liveupdate=on",), fault=1, boot=True)]
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "kernel-warned")
    told = tell(steps, problem, "7.3")
    assert "with failing_boot(machine, 1):" in told.program
    assert "kernel-warned: BUG: Bad page state" in _said(told.program)
    assert told.trace


def test_a_program_of_the_fixed_protocol_runs() -> None:
    """It names the release with all fixes, and an older one with them, and is silent."""
    release = fixed("7.3")
    steps = [
        BOOT._replace(args=(*BOOT.args[:2], release)),
        Step("reset"),
        Step("kexec", ("kho=on liveupdate=on", "release=fixed('7.2')")),
    ]
    told = tell(steps, Problem("preserved-is-held", "", 2), release)
    assert told.program.count("machine.boot(fixed('7.3'), cmdline=") == 2
    assert _said(told.program) == "\n"


def test_what_is_refused_memory_is_tried_on() -> None:
    """A call is refused each of its allocations in turn, and works in the end."""
    swept = 0
    for n in range(60):
        steps = random_run(f"sweep:{n}", "vmalloc", fixed("7.3")).steps
        for one, other in pairwise(steps):
            is_next = other.fault == one.fault + 1 and one.fault
            swept += is_next and (one.kind, one.args) == (other.kind, other.args)
    assert swept > 3


def test_many_pages_come_back_one_by_one() -> None:
    """More of them than memblock has room for at first; what is not what it was is told."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    many = preserve_many(kernel, 200)
    kernel = kernel.kexec()
    restore_many(kernel, many)
    assert audit(machine, drained=True) == []
    with pytest.raises(AssertionError, match="one of many"):
        restore_many(kernel, many)


def test_refused_steps_are_told() -> None:
    """A refusal in a printed program is suppressed, and its errno stands beside it."""
    steps = [
        BOOT,
        Step("create_sessions", ("c0", 51)),
        Step("create_twice", ("c0_0",)),
        Step("kexec", ("kho=on liveupdate=on",)),
    ]
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "kernel-panic")
    program = tell(steps, problem, "7.3").program
    assert "# -EEXIST" in program
    assert _said(program).startswith("KernelPanic: The incoming tree failed")


def test_a_quiet_program_is_quiet() -> None:
    """What goes right is no finding: all is preserved, restored, freed, and nothing is left."""
    steps = [
        BOOT,
        Step("alloc_folio", ("f0", 1)),
        Step("preserve_folio", ("f0",)),
        Step("memfd", ("m0", 4096, 2)),
        Step("create_session", ("s0", "vm")),
        Step("preserve_file", ("s0", "m0", 0)),
        Step("kexec", ("kho=on liveupdate=on",)),
        Step("restore_folio", ("f0",)),
        Step("free_folio", ("f0",)),
        Step("retrieve_session", ("s0", "vm")),
        Step("retrieve_file", ("s0", "m0", 0, "memfd")),
        Step("finish", ("s0",)),
        Step("close_session", ("s0",)),
        Step("close_file", ("m0",)),
    ]
    world = replay(steps)
    assert world is not None
    assert not world.items
    assert world.problems == []


def test_a_leak_is_no_secret() -> None:
    """The audit at a drained end does notice a page that the program forgot."""
    steps = [BOOT, Step("alloc_folio", ("f0", 0))]
    world = replay(steps)
    assert world is not None
    world.items.clear()
    assert [p.invariant for p in world.judge(drained=True)] == ["all-given-back"]


def test_what_cannot_be_otherwise_is_no_finding() -> None:
    """No room for a huge folio; damage upon damage; a device beside a dead kernel; dead agents."""
    line = "kho=on liveupdate=on hugepages=16"
    huge = [
        Step("create_session", ("s0", "vm")),
        Step("load_image", (line,)),
        Step("memfd_huge", ("m0", 2097153)),
        Step("preserve_file", ("s0", "m0", 0)),
    ]
    struck = [
        Step("overwritten", ("kexec-metadata", 0, "ffffffffffffffff")),
        Step("stray_device", ("d0", "'scratch array'")),
        Step("kexec", ("kho=on",)),
    ]
    beside = [
        Step("create_session", ("s0", "vm")),
        Step("alloc_folio", ("f0", 0)),
        Step("preserve_folio", ("f0",)),
        Step("device", ("d0", "f0")),
        Step("kexec", ("kho=on liveupdate=on",), 1, True),
    ]
    programs = ((line, huge), ("kho=on", struck), ("kho=on liveupdate=on", beside))
    for first, steps in programs:
        program = [Step("boot", ('"64M"', first, fixed("7.3"))), *steps]
        world = replay(program, fixed("7.3"))
        assert world is not None
        assert len(world.steps) == len(program)
        assert world.problems == []
    deaths = [random_run(f"dead:{n}", "oops", fixed("7.3")).steps for n in range(60)]
    dead = {step.kind for steps in deaths for step in steps if step.dies}
    assert dead
    assert not dead & set(agent_calls.__all__)


def test_an_audit_survives_pages_beyond_ram() -> None:
    """A bit of the tree flips, and a page that there is not waits to be restored: it is told."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    machine.next_boot(flipped("table", 32767))
    kernel.kexec()
    assert any("0x7fff000" in v.message for v in audit(machine, drained=True))


def test_tags_tell_causes_apart() -> None:
    """A region at boot, a region that only the successor has: two things."""
    at_boot = [BOOT._replace(args=('"64M"', "kho=on reserve_mem=1M:4096:a", "7.3"))]
    later = [BOOT, Step("kexec", ("kho=on reserve_mem=1M:4096:a",))]
    assert tags(at_boot) == {"boot+reserve_mem"}
    assert tags(later) == {"kexec+reserve_mem", "kexec-liveupdate"}
    assert "token:freeze" in tags([Step("token", ("k0", "freeze"))])


def test_a_campaign_finds_hazards_unaided() -> None:
    """A few programs of one scenario: hazards of regions, each by its own program."""
    campaign = Campaign("0", "reserve-mem", "7.3")
    campaign.run(runs=20)
    found = [finding.switches for finding in campaign.findings]
    assert len({switches[0] for switches in found if switches}) >= 3
    assert len(found) == len(set(found))
    assert sorted(len(finding.steps) for finding in campaign.findings)[len(found) // 2] <= 3
    assert campaign.explored == 20


def test_json_is_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints equal bytes for equal arguments, and exits with 1 for findings."""
    texts = []
    for _ in range(2):
        assert main(["explore", "reserve-mem", "--runs", "3", "--seed", "5", "--json"]) == 1
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    result = json.loads(texts[0])
    assert result["explored"] == 3
    assert {"invariant", "program", "seed"} <= set(result["findings"][0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "'nonsense' is not one of all, "),
        (["--runs", "0"], "--runs: '0' is not a whole number"),
        (["--seconds", "x"], "--seconds: 'x' is not a whole number"),
        (["--runs", "1", "--seconds", "1"], "not together with --runs"),
        (["--seed", "-1"], "--seed"),
        (["--release", "9.9"], "release"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nonsense is one line on stderr and status 2."""
    assert main(["explore", *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1


def test_every_kind_belongs_somewhere() -> None:
    """Each kind of step is in a scenario, and prints as Python."""
    known = {group for groups in SCENARIOS.values() for group in groups}
    assert {kind.group for kind in KINDS.values() if kind.group} <= known


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """``--list`` names the scenarios."""
    assert main(["explore", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("all ")


def _dumb_states(depth: int) -> int:
    """How many books there are after up to ``depth`` steps with at most four single folios."""
    seen = {()}
    level: set[tuple[tuple[int, str], ...]] = {()}
    for _ in range(depth):
        following = set()
        for state in level:
            held = dict(state)
            moves = []
            if len(held) < 4:
                new = next(n for n in range(5) if n not in held)
                moves.append({**held, new: "held"})
            for n, how in held.items():
                moves.append({**held, n: "preserved" if how == "held" else "held"})
                if how == "held":
                    moves.append({m: other for m, other in held.items() if m != n})
            following |= {tuple(sorted(move.items())) for move in moves}
        level = following - seen
        seen |= following
    return len(seen)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_exhaustive_search_counts_every_state(depth: int) -> None:
    """Folios of one page: as many books as a dumb model has, each visited once, all silent."""
    names = ("alloc_folio", "preserve_folio", "unpreserve_folio", "free_folio")
    done = exhaust(
        [KINDS[name] for name in names],
        depth,
        keep=lambda world, kind, args: kind.name != "alloc_folio" or args[1] == 0,
        key=World.books,
    )
    assert done.states == _dumb_states(depth)
    assert done.is_complete
    assert done.suspects == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_copied_state_is_the_one_that_is_reached_again() -> None:
    """From a fork of the process each next step leads to the state that running it all leads to."""
    line = "kho=on liveupdate=on"
    told = (("alloc_folio", "f0", 0), ("preserve_folio", "f0"), ("kexec", line))
    program = [BOOT, *(Step(kind, tuple(args)) for kind, *args in told)]
    kinds, keep = kinds_of("pages"), keep_of("pages")
    children = [child for child in expand(program, kinds, "7.3", keep) if child.state]
    assert len(children) > 15
    parent = World(KINDS)
    for step in program:
        parent.run(step)
    for child in children:
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                parent.run(child.step)
                os.write(writes, digest(parent.state()).encode())
            finally:
                os._exit(0)
        os.close(writes)
        os.waitpid(pid, 0)
        assert os.read(reads, 99).decode() == child.state
        os.close(reads)


def test_exhaustive_search_finds_the_shortest() -> None:
    """Breadth first: the first program that shows a released region is a release away."""
    done = exhaust([KINDS["kexec"], KINDS["release_region"]], 1, states_max=400)
    spoken = {problem.invariant for _, problems in done.suspects for problem in problems}
    assert {"preserved-outside-scratch", "map-agrees", "off-means-off"} <= spoken
    assert all(len(steps) == 2 for steps, _ in done.suspects)


def test_exhaustive_search_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """``--exhaustive 1`` of pages on 7.3 is silent, and says how much it tried."""
    assert main(["explore", "pages", "--exhaustive", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["explored"] > told["states"] > 5
    assert (told["exhaustive"], told["is_complete"]) == (1, True)


def test_an_exhaustive_search_says_what_it_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of states ends it, nobody is to think that all programs were tried."""
    arguments = ["explore", "pages", "--exhaustive", "1"]
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("every program of up to 1 steps after the boot; ")
    monkeypatch.setattr(Campaign.exhaust, "__kwdefaults__", {"states_max": 3})
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "not every program of up to 1 steps: it ended at 3 different states"


@pytest.mark.parametrize(
    "option", [["--runs", "3"], ["--seconds", "3"], ["--engine", "hypothesis"]]
)
def test_nothing_is_drawn_in_an_exhaustive_search(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What it would have no use for is refused, not passed over."""
    assert main(["explore", "pages", "--exhaustive", "1", *option]) == 2
    assert capsys.readouterr().err.startswith(f"khosim: {option[0]}: ")


def test_a_number_that_is_too_large_is_called_that(capsys: pytest.CaptureFixture[str]) -> None:
    """Thirteen digits are a whole number as well."""
    assert main(["explore", "--seed", "9" * 13]) == 2
    assert capsys.readouterr().err == f"khosim: --seed: {'9' * 13} is more than 999999999999\n"
