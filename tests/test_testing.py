"""The kit for other people's tests: it finds planted bugs, and says how in a program that runs."""

from __future__ import annotations

import ast
import errno
import importlib
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from khosim import InputError, KernelError, KernelPanic, Machine, testing
from khosim.testing import (
    Fault,
    FaultPlan,
    Hooks,
    Life,
    MachinePlan,
    Rules,
    Witness,
    assert_no_violations,
    assert_not_preserved,
    assert_preserved,
    assert_survives,
    cmdlines,
    deep_lives,
    failing_allocation,
    fault_plans,
    folio_sets,
    handover_machine,
    machine_plans,
    memory_maps,
    mutated_cmdlines,
    operation,
    refusing,
    refusing_freeze,
    release_pairs,
    session_plans,
    violation_report,
)
from khosim.testing.faults import KINDS
from khosim.testing.ops_sessions import STANDARD

ROOT = Path(__file__).parent.parent
pytest_plugins = ["pytester"]
SUBSYSTEM = ROOT / "examples" / "subsystem_test.py"
ON = "kho=on liveupdate=on"


def _runs(program: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60
    )


def _program(error: BaseException) -> str:
    (note,) = (n for n in error.__notes__ if n.startswith("khosim program"))
    return str(note.split("\n\n", 1)[1])


@operation(weight=6)
def leak(kernel: Any, state: Any) -> None:
    """A driver that preserves, then frees and forgets to take it back."""
    folio = kernel.alloc_folio(0, owner="driver")
    kernel.kho_preserve_folio(folio)
    folio.put()


@operation(value=st.integers(3, 9))
def add(kernel: Any, state: Any, value: int) -> None:
    """Count up to what is too much."""
    state.sum = getattr(state, "sum", 0) + value


def not_too_much(kernel: Any, state: Any) -> None:
    """A promise that does not hold."""
    assert getattr(state, "sum", 0) < 12, "too much"


# -- planted bugs --------------------------------------------------------------------------------


def _found(case: Any, **options: Any) -> BaseException:
    with pytest.raises((AssertionError, KernelError)) as caught:
        deep_lives(case, **options)
    return caught.value


def test_a_forgotten_unpreserve_is_found_and_told(tmp_path: Path) -> None:
    """A page that is preserved and free: the program has the one step, and fails as a script."""
    case = handover_machine(ops=[leak])
    program = _program(_found(case, seed=1, lives=5, steps=40))
    steps = program.split("\n\n")[-1].splitlines()
    assert len(steps) <= 8
    assert "leak(kernel, state)" in program
    done = _runs(program, tmp_path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_a_bug_of_a_release_is_found_and_told(tmp_path: Path) -> None:
    """A13 of the museum, switched on, in a few lines; without the bug they run through."""
    release = "7.3+vmalloc_unpreserves_blocks=off"
    case = handover_machine(standard=("vmalloc",), release=release)
    program = _program(_found(case, seed=3, lives=20, steps=40))
    assert len(program.split("\n\n")[-1].splitlines()) <= 9
    assert f"machine.boot({release!r}" in program
    done = _runs(program, tmp_path)
    assert done.returncode == 1
    assert "preserved still" in done.stderr
    assert _runs(program.replace(release, "7.3"), tmp_path).returncode == 0


def test_hypothesis_finds_it_too() -> None:
    """The state machine fails, and its error has the program as well."""
    case: Any = handover_machine(ops=[add], invariants=[not_too_much], standard=())
    case.settings = settings(
        case.settings, database=None, derandomize=True, phases=(Phase.generate,)
    )
    with pytest.raises(AssertionError, match="too much") as caught:
        case("runTest").runTest()
    program = _program(caught.value)
    values = re.findall(r"^add\(kernel, state, value=(\d)\)", program, re.MULTILINE)
    assert sum(map(int, values)) >= 12
    assert program.splitlines()[-1] == "not_too_much(kernel, state)"


def test_equal_seeds_give_equal_programs() -> None:
    """And another seed another life; no life of a fixed protocol fails."""
    case = handover_machine(ops=[add], invariants=[not_too_much])
    programs = [_program(_found(case, seed=seed, lives=3, steps=40)) for seed in (5, 5, 6)]
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]


@pytest.mark.parametrize("release", ["6.18", "7.0", "7.2", "7.3"])
def test_no_alarm_where_nothing_is_wrong(release: str) -> None:
    """The kit's own operations with faults are silent."""
    case = handover_machine(
        standard=("memory", "vmalloc", "sessions"), faults=fault_plans(), release=release
    )
    assert deep_lives(case, seed=11, lives=2, steps=50) > 50


def test_damage_is_survived() -> None:
    """All kinds of faults: kernels end in outcomes of their own, others go on."""
    case = handover_machine(
        standard=("memory", "vmalloc", "sessions"),
        faults=fault_plans(kinds=KINDS, max_size=10),
    )
    assert deep_lives(case, seed=3, lives=4, steps=40) == 160


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_strikes(kind: str) -> None:
    """It is in the program, which runs by itself, and what it lets survive comes back."""
    is_at_jump = kind in ("freeze", "memory", "bytes")
    life = Life(Rules(STANDARD))
    life.do("create_session")
    life.do("memfd", nr_pages=2)
    life.do("alloc_folio", order=0, owner="a", content=b"x")
    life.do("preserve_folio", pick=0)
    fault = Fault(kind, 0, 1)
    life.do("preserve_file", pick=0, session=0, token=1, fault=None if is_at_jump else fault)
    life.do("load_image")
    life.check()
    life.do("kexec", fault=fault if is_at_jump else None)
    if kind == "freeze":
        life.do("kexec")
    survives = fault.survives.startswith(("everything", "all but"))
    came = [thing.state for thing in life.of("folio")]
    assert came == (["incoming"] if survives and kind != "memory" else [])
    life.do("restore_folio", pick=0)
    life.do("kexec", fault=Fault("crash", 0))
    life.check()
    program = life.program()
    word = {"allocation": "failing_allocation(", "bytes": "overwritten(", "device": "Dma("}
    word |= {"callback": "refusing(", "freeze": "refusing_freeze(", "memory": "lost_memory("}
    assert word.get(kind, "machine.boot" if kind == "crash" else f"{kind}(") in program
    exec(compile(program, "program", "exec"), {})


def test_memory_that_nobody_needs_is_no_loss() -> None:
    """Everything survives where nothing lay; after a reset there is another machine."""
    life = Life(Rules(STANDARD), machine=MachinePlan("96M", nodes=2))
    life.do("alloc_folio", order=0, owner="a", content=b"x")
    life.do("preserve_folio", pick=0)
    life.do("kexec", fault=Fault("memory", 0, 1))
    assert life.has_less
    assert life.do("restore_folio", pick=0)
    life.check()
    life.do("kexec", fault=Fault("crash", 0))
    assert not life.has_less
    assert life.program().count("machine = Machine('96M', nodes=2)") == 2


def test_what_a_device_wrote_is_looked_at() -> None:
    """Bytes that do not arrive as the device left them fail the restore."""
    life = Life(Rules(STANDARD))
    life.do("alloc_folio", order=0, owner="a", content=b"x")
    life.do("preserve_folio", pick=0)
    life.do("kexec", fault=Fault("device", 0, 1))
    life.check()
    life.vars["device0"].count += 1
    with pytest.raises(AssertionError) as failed:
        life.do("restore_folio", pick=0)
    assert "device0.count" in _program(failed.value).splitlines()[-1]


def test_faults_say_what_survives() -> None:
    """A plan is a promise: of damaged bytes nothing survives but the machine."""
    told = {kind: Fault(kind, 0).survives for kind in KINDS}
    assert told["freeze"] == told["callback"] == "everything"
    assert told["oops"] == "all but the step's things"
    assert told["bytes"] == told["crash"] == "the machine"


def test_bytes_wait_for_a_kexec() -> None:
    """Damage strikes at the first jump from its step on, a dying task never at a jump."""
    plan = FaultPlan((Fault("bytes", 2, 1),))
    assert plan.strike(3, is_kexec=False) is None
    assert plan.strike(3, is_kexec=True) == Fault("bytes", 2, 1)
    assert FaultPlan((Fault("oops", 3),)).strike(3, is_kexec=True) is None


TestQuiet: Any = handover_machine(faults=fault_plans(), releases=release_pairs())
TestQuiet.settings = settings(TestQuiet.settings, max_examples=6, derandomize=True, database=None)


# -- what is handed in ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: handover_machine(standard=("disk",)), "standard: 'disk' is none of memory"),
        (lambda: handover_machine(ops=[not_too_much]), "not_too_much: no operation"),
        (lambda: handover_machine(ops=[add, add]), "two operations named 'add'"),
        (lambda: handover_machine(invariants=[lambda kernel, state: None]), "could not import"),
        (lambda: handover_machine(hooks=Hooks(on_boot=len)), "two arguments"),
        (lambda: handover_machine(release="9.9"), "release: '9.9' is no release"),
        (lambda: operation()(lambda kernel, state: None), "could not import it"),
        (lambda: deep_lives(TestQuiet, lives=0), "lives: 0 is not"),
        (lambda: deep_lives(int), "does not come from handover_machine"),
        (lambda: fault_plans(kinds=("meteor",)), "'meteor' is none of allocation"),
        (lambda: release_pairs(releases=("2.6",)), "'2.6' is none of"),
        (lambda: Life(Rules(STANDARD)).do("fly"), "'fly' is none of alloc_folio"),
        (lambda: assert_survives(Machine("64M").boot(cmdline=ON), 7), "neither a folio"),
        (lambda: Life(Rules(STANDARD)).do("alloc_folio"), "takes order, owner, content, not none"),
        (lambda: Life(Rules(STANDARD)).do("kexec", speed=3), "takes no arguments, not speed"),
        (lambda: Life(Rules(STANDARD)).do("kexec", fault=Fault("x", 0)), "'x' is none of alloc"),
        (lambda: operation(value=3)(not_too_much), "not_too_much: value: 3 is no strategy"),
        (lambda: operation(may_refuse=("EX",))(not_too_much), "may_refuse: 'EX' is no errno"),
        (lambda: operation(weight=-1)(not_too_much), "its weight -1 is less than 0"),
        (lambda: handover_machine(faults=FaultPlan()), "faults: FaultPlan(faults=()) is no strat"),
        (lambda: handover_machine(releases=("7.2", "7.3")), "releases: ('7.2', '7.3') is no strat"),
        (lambda: handover_machine(hooks={}), "hooks: {} is no Hooks"),
        (lambda: fault_plans(kinds=()), "fault_plans: kinds: there is none"),
        (lambda: fault_plans(n_max=0), "fault_plans: n_max: 0 is less than 1"),
        (lambda: find(machine_plans(arches=("mips",)), bool), "arches: 'mips' is none of"),
        (lambda: find(machine_plans(nodes_max=0), bool), "machine_plans: 0 nodes and 1 holes"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Any, says: str) -> None:
    """Bad input is an InputError that names place and cause."""
    with pytest.raises(InputError, match=re.escape(says)) as wrong:
        call()
    assert "\n" not in str(wrong.value)


def test_names_are_stable() -> None:
    """What the package promises is there."""
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError):
        _ = testing.no_such_name


# -- assertions and faults -----------------------------------------------------------------------


def test_violations_are_told_by_page_owner_and_writer() -> None:
    """Memory that is written between two kernels."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline=ON)
    folio = kernel.alloc_folio(0, owner="guest")
    folio.write(0, b"precious")
    kernel.kho_preserve_folio(folio)
    machine.load_successor(kernel)
    machine.hardware.ram.write(folio.phys, b"stray dma", (-1, "a device"))
    machine.resume()
    with pytest.raises(AssertionError) as told:
        assert_no_violations(machine)
    text = str(told.value)
    assert f"{folio.phys:#x}" in text
    assert "owner guest" in text
    assert "last written by a device before any kernel" in text
    assert violation_report([]) == "0 violations"


def test_what_survives_is_compared() -> None:
    """Folios and sessions come back; what was not preserved is said before the jump."""
    kernel = Machine("64M").boot(cmdline=ON)
    folio, other = kernel.alloc_folio(1), kernel.alloc_folio(0)
    folio.write(5000, b"far behind")
    kernel.kho_preserve_folio(folio)
    session = kernel.liveupdate.create_session("vm")
    memory = kernel.memfd("ram", size=9000)
    memory.write(8000, b"guest")
    session.preserve(memory, 7)
    with pytest.raises(AssertionError, match="1 of 1 pages are not preserved"):
        assert_survives(kernel, other)
    assert_preserved(kernel, folio.pfn, 2)
    assert_not_preserved(kernel, other.pfn)
    _, (back, files) = assert_survives(kernel, folio, session)
    assert back.read(5000, 10) == b"far behind"
    assert files[7].read(8000, 5) == b"guest"


def test_a_freeze_refuses_and_the_handlers_are_as_before() -> None:
    """The second file's freeze is refused; there is no third."""
    kernel = Machine("64M").boot(cmdline=ON)
    session = kernel.liveupdate.create_session("vm")
    for token in (1, 2):
        session.preserve(kernel.memfd(f"m{token}", size=4096), token)
    (handler,) = kernel.liveupdate.handlers.values()
    freeze = handler.ops.freeze
    with pytest.raises(KernelError) as refused, refusing_freeze(kernel, nth=2):
        kernel.kexec()
    assert refused.value.errno == errno.EBUSY
    assert kernel.alive
    assert handler.ops.freeze is freeze
    with refusing_freeze(kernel, nth=3):
        kernel.kexec()
    with pytest.raises(InputError), failing_allocation(kernel, 0):
        pass
    with pytest.raises(InputError, match="'retrieve' is none of preserve, freeze, can_finish"):
        refusing(kernel, callbacks=("retrieve",)).__enter__()


def test_a_callback_refuses() -> None:
    """The n-th one that may say no: a file's preserve, its freeze, and that it can be finished."""
    kernel = Machine("64M").boot(cmdline=ON)
    session = kernel.liveupdate.create_session("vm")
    ram = kernel.memfd("ram", size=4096)
    with refusing(kernel, 2):
        session.preserve(ram, 1)
        with pytest.raises(KernelError, match="EBUSY"):
            session.preserve(kernel.memfd("more", size=4096), 2)
    with pytest.raises(KernelError, match="EBUSY"), refusing(kernel):
        kernel.kexec()
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    with pytest.raises(KernelError, match="EBUSY"), refusing(successor):
        session.finish()
    session.finish()
    session.close()


def test_faults_strike_when_due() -> None:
    """Allocations and crashes at their step, a freeze at the first kexec from its step on."""
    memory, freeze = Fault("allocation", 2, 3), Fault("freeze", 1)
    plan = FaultPlan((memory, freeze))
    assert plan.strike(2, is_kexec=False) == memory
    assert plan.strike(1, is_kexec=False) is None
    assert plan.strike(3, is_kexec=True) == freeze
    assert plan.without(freeze).strike(3, is_kexec=True) is None


def test_a_life_writes_what_it_does(tmp_path: Path) -> None:
    """The program of a life with faults and a crash runs by itself."""
    life = Life(Rules(STANDARD), machine=MachinePlan("96M", nodes=2, seed=3))
    life.do("create_session")
    life.do("memfd", nr_pages=2)
    life.do("preserve_file", pick=0, session=0, token=1, fault=Fault("allocation", 0, 2))
    life.do("preserve_file", pick=0, session=0, token=1)
    life.do("kexec", fault=Fault("freeze", 0))
    life.do("kexec")
    life.do("retrieve_session", pick=0)
    life.do("retrieve_file", pick=0)
    assert not life.do("restore_folio", pick=0)
    life.do("alloc_folio", order=0, owner="a", content=b"x", fault=Fault("crash", 0))
    life.check()
    program = life.program()
    assert program.count("with suppress(KernelError):") == 2
    done = _runs(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_witness_tells_who_wrote_last() -> None:
    """A page's life through a kexec, with the stranger who wrote to it in between."""
    machine = Machine("64M")
    witness = Witness(machine)
    kernel = machine.boot(cmdline=ON)
    folio = kernel.alloc_folio(1, owner="guest")
    kernel.kho_preserve_folio(folio)
    folio.write(0, b"precious")
    machine.load_successor(kernel)
    machine.hardware.ram.write(folio.phys, b"stray dma", (-1, "a device"))
    machine.resume()
    told = witness.explain(machine.check()[0]).splitlines()
    pages = f"with pfn [{folio.pfn:#x}-{folio.pfn + 2:#x})"
    reserved = "reserved, as the predecessor preserved it"
    assert told[1:] == [
        f"the life of page {folio.phys:#x} (pfn {folio.pfn:#x})",
        f"  generation 0: alloc_pages: given to guest, {pages}",
        f"  generation 0: kho_preserve_folio: preserved, {pages}",
        f"  generation 1: kho_preserved_memory_reserve: {reserved}, {pages}",
        "  now, in generation 1: incoming, owner predecessor",
        "  last written by a device, by no kernel",
    ]
    assert "nobody was given it" in witness.story(48 << 20)


def test_the_books_are_held_against_the_map() -> None:
    """What somebody else preserves or takes back of the life's own memory is noticed."""
    life = Life(Rules(STANDARD))
    life.do("alloc_folio", order=1, owner="a", content=b"x")
    life.do("alloc_pages", nr_pages=3, owner="a")
    life.check()
    life.kernel.kho_preserve_folio(life.vars["folio0"])
    with pytest.raises(AssertionError, match="2 of 2 pages are preserved still"):
        life.check()
    life.kernel.kho_unpreserve_folio(life.vars["folio0"])
    life.do("preserve_pages", pick=0)
    life.check()
    life.kernel.kho_unpreserve_pages(life.vars["pfn0"], 3)
    with pytest.raises(AssertionError, match="3 of 3 pages are not preserved"):
        life.check()


# -- strategies ----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(plan=machine_plans(), cmdline=cmdlines(), folios=folio_sets(max_size=3))
def test_machines_boot_with_kho_on(plan: MachinePlan, cmdline: str, folios: list[Any]) -> None:
    """What is drawn boots and hands over; its source builds the same machine."""
    machine = plan.build()
    again = eval(plan.source, {"Machine": Machine})
    assert again.hardware.memory_map == machine.hardware.memory_map
    kernel = machine.boot(cmdline=cmdline)
    assert kernel.kho_enable, kernel.messages
    for folio in folios:
        kernel.kho_preserve_folio(kernel.alloc_folio(folio.order, owner=folio.owner))
    kernel.kexec()
    assert_no_violations(machine)


@settings(max_examples=25)
@given(cmdline=mutated_cmdlines(), memory_map=memory_maps(arches=("x86_64", "arm64")))
def test_mutated_cmdlines_are_survived(cmdline: str, memory_map: Any) -> None:
    """No mistake in a command line is a crash of the simulator."""
    assert memory_map.ram_bytes >= 32 << 20
    with suppress(KernelPanic):
        assert Machine("64M").boot(cmdline=cmdline).alive


@settings(max_examples=25)
@given(sessions=session_plans(), pair=release_pairs())
def test_sessions_and_pairs_are_lawful(sessions: list[Any], pair: tuple[str, str]) -> None:
    """Names and tokens are distinct, content lies within, pairs speak one format."""
    assert len({session.name for session in sessions}) == len(sessions)
    for session in sessions:
        assert len({token for token, _ in session.files}) == len(session.files)
        assert all(file.at + len(file.content) <= file.size for _, file in session.files)
    assert ("7.0" in pair) <= (set(pair) == {"7.0"})


# -- the plugin ----------------------------------------------------------------------------------


def _pytester_run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *args)


def test_the_plugin_prints_programs_and_takes_options(pytester: pytest.Pytester) -> None:
    """A failing test with the fixture has the program in its report; options reach the fixtures."""
    pytester.makepyfile(
        """
        def test_fails(handover, khosim_seed, khosim_release):
            assert (khosim_seed, khosim_release) == (5, "7.2")
            handover.do("alloc_folio", order=0, owner="a", content=b"x")
            assert False

        def test_holds(khosim_kernel, khosim_machine):
            assert khosim_kernel.release.name == "7.2"
            assert khosim_machine.seed == 5
        """
    )
    result = _pytester_run(pytester, "--khosim-seed=5", "--khosim-release=7.2")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*khosim program*", "machine = Machine('64M', allocator='adversarial', seed=5)"]
    )


def test_the_plugin_leaves_others_alone(pytester: pytest.Pytester) -> None:
    """A project that does not use it loads neither numpy nor a layer of khosim."""
    pytester.makepyfile(
        """
        import sys

        def test_light():
            assert "numpy" not in sys.modules and "khosim.simulator" not in sys.modules
            assert "hypothesis.stateful" not in sys.modules
        """
    )
    _pytester_run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--khosim-seed=x", "--khosim-seed: 'x' is not a whole number from 0 on"),
        ("--khosim-release=9.9", "--khosim-release: release: '9.9' is no release khosim knows*"),
    ],
)
def test_a_wrong_option_is_one_line(pytester: pytest.Pytester, option: str, says: str) -> None:
    """pytest's own usage error, exit status 4."""
    result = _pytester_run(pytester, option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {says}"])


def _blocks() -> list[str]:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_every_name_is_shown_at_work() -> None:
    """What the kit promises is in an example of the document, not only in its words."""
    tree = ast.parse("\n".join(_blocks()))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(testing.__all__) <= used


def test_the_document_and_the_example_run(pytester: pytest.Pytester) -> None:
    """All blocks of docs/testing.md are one file of tests; so is the example to copy."""
    blocks = _blocks()
    assert len(blocks) == 13
    few = "\n{0}.settings = settings({0}.settings, max_examples=4)\n"
    document = "\n".join(blocks) + few.format("TestBlobs")
    example = SUBSYSTEM.read_text("utf-8") + "\nfrom hypothesis import settings"
    pytester.makepyfile(test_document=document, test_example=example + few.format("TestCounters"))
    result = _pytester_run(pytester, "--hypothesis-seed=1")
    result.assert_outcomes(passed=23)


def test_the_example_finds_a_planted_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The counter whose handler forgets to unpreserve leaves a page behind that is preserved."""
    source = SUBSYSTEM.read_text("utf-8")
    broken = source.replace("kernel.kho_unpreserve_free(args.private_data)", "private_data.put()")
    assert broken != source
    (tmp_path / "broken_counters.py").write_text(broken, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken_counters = importlib.import_module("broken_counters")
    error = _found(broken_counters.TestCounters, seed=0, lives=10, steps=60)
    program = _program(error)
    assert "call_off(kernel, state)" in program
    assert "folio_put: freed with its last reference" in error.__notes__[-1]
    assert len(program.split("\n\n")[-1].splitlines()) <= 10
    done = _runs(program, tmp_path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
