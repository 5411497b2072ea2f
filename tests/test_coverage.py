"""Coverage of the modelled kernel: what there is, what a run reached, and sets put together."""

from __future__ import annotations

import json
import sys

import pytest

from khosim import InputError, Machine
from khosim.cli.main import main
from khosim.explore.campaign import Campaign
from khosim.explore.coverage import Account, Reached, watching
from khosim.explore.crew import Inline
from khosim.explore.hazards import fixed
from khosim.explore.kernel_source import Module, Site, modules, package_path
from khosim.explore.work import Spec, Task, do, run_unit
from khosim.kernel.trace import Event


def _module(path: str) -> Module:
    return next(module for module in modules() if module.path == path)


def _boot(cmdline: str) -> Reached:
    with watching() as watch:
        Machine("64M").boot(cmdline=cmdline)
    return watch.reached


@pytest.fixture(scope="module")
def with_kho() -> Reached:
    """What a boot with KHO reaches."""
    return _boot("kho=on")


@pytest.fixture(scope="module")
def without_kho() -> Reached:
    """What a boot without it reaches."""
    return _boot("kho=off")


def test_symbols_are_found() -> None:
    """Functions model the symbol that their docstring begins with, or the one they are named by."""
    symbols = {f.name: f.symbol for f in _module("kernel/kho.py").functions}
    assert symbols["kho_init"] == "kho_init"
    assert symbols["_scratch_nodes"] == ""
    symbols = {f.name: f.symbol for f in _module("kernel/kho_out.py").functions}
    assert symbols["KhoOut.add_subtree"] == "kho_add_subtree"
    assert symbols["KhoOut.__init__"] == ""


def test_lines_are_those_of_the_function() -> None:
    """A function begins behind its heading and ends with its last statement."""
    lines = (package_path() / "kernel/module.py").read_text(encoding="utf-8").splitlines()
    for function in _module("kernel/module.py").functions:
        heading = lines[function.lines.start - 2]
        assert f"def {function.name.split('.')[-1]}(" in heading


def test_what_speaks_is_found() -> None:
    """Refusals, panics, warnings and lines of the log are told apart, with their words."""
    sites = [site[:3] for site in _module("kernel/kho.py").sites]
    assert ("log", "kho_memory_init", "KHO: disabled in the kdump kernel") in sites
    assert ("refusal", "kho_locate_mem_hole", "-EADDRNOTAVAIL") in sites
    assert any(kind == "panic" and "kho_scratch is gone" in what for kind, _, what in sites)
    kinds = [site.kind for site in _module("kernel/early_ioremap.py").sites]
    assert kinds.count("warning") == 2


def test_nobody_watches_for_nothing() -> None:
    """Switched off, nothing is measured."""
    with watching(on=False) as watch:
        Machine("64M").boot(cmdline="kho=on")
    assert watch.reached == Reached()
    assert sys.gettrace() is None or "coverage" in repr(sys.gettrace())


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package ``coverage`` one line says what to install."""
    monkeypatch.setitem(sys.modules, "coverage", None)
    with pytest.raises(InputError, match=r"--coverage: .*khosim\[coverage\]"), watching():
        pass


def test_scratch_is_for_kho(with_kho: Reached, without_kho: Reached) -> None:
    """A boot with KHO reserves scratch, one without does not: symbols and branches tell."""
    on = Account(with_kho, "kernel/kho_scratch.py")
    off = Account(without_kho, "kernel/kho_scratch.py")
    assert "kho_reserve_scratch" in {missed.name for missed in off.missed}
    assert "kho_reserve_scratch" not in {missed.name for missed in on.missed}
    (on_row,), (off_row,) = on.rows, off.rows
    assert (on_row.symbols, on_row.branches) == (off_row.symbols, off_row.branches)
    assert off_row.symbols_reached < on_row.symbols_reached <= on_row.symbols
    assert off_row.branches_reached < on_row.branches_reached < on_row.branches


def test_what_the_log_said_was_reached() -> None:
    """A line stands under ``said`` when it is in the log, and under ``unsaid`` when not."""
    text = "KHO: disabled in the kdump kernel"
    with watching() as watch:
        kernel = Machine("256M").boot(cmdline="kho=on elfcorehdr=64M")
    for reached in (watch.reached, _boot("kho=on")):
        account = Account(reached, "kernel/kho.py").as_json()
        is_said = reached is watch.reached
        assert (f"kho_memory_init: {text}" in account["said"]["log"]) == is_said
        assert (f"kho_memory_init: {text}" in account["unsaid"]["log"]) != is_said
    assert text in kernel.messages


def test_events_come_from_reached_symbols() -> None:
    """Whatever a kernel's trace names is among the symbols that were reached."""
    events: list[Event] = []
    machine = Machine("64M")
    machine.listen(events.append)
    with watching() as watch:
        kernel = machine.boot(cmdline="kho=on")
        kernel.kho_preserve_folio(kernel.alloc_folio(1))
        kernel.kexec()
    told = {event.symbol for event in events}
    lines = {
        (path, line) for path, arcs in watch.reached.arcs.items() for arc in arcs for line in arc
    }
    names = {
        function.symbol
        for module in modules()
        for function in module.functions
        if any((module.path, line) in lines for line in function.lines)
    }
    known = {function.symbol for module in modules() for function in module.functions}
    assert len(told & known) > 20
    # Whole arrays of blocks are marked at once, and told of one by one.
    assert told & known - names <= {"memblock_reserved_mark_noinit"}


def test_sets_are_put_together(with_kho: Reached, without_kho: Reached) -> None:
    """Put together, in any order, two pieces of work reach what one of both reaches."""
    with watching() as watch:
        Machine("64M").boot(cmdline="kho=on")
        Machine("64M").boot(cmdline="kho=off")
    both = with_kho | without_kho
    assert both == without_kho | with_kho == watch.reached
    assert both | with_kho == both
    assert both != with_kho
    assert both != without_kho
    assert Reached() | both == both


def test_sets_are_plain_data(with_kho: Reached) -> None:
    """A set goes through JSON, and equal work gives equal bytes."""
    text = json.dumps(with_kho.as_json())
    assert Reached.from_json(json.loads(text)) == with_kho
    assert json.dumps(_boot("kho=on").as_json()) == text


def test_the_table(without_kho: Reached) -> None:
    """The table has a line for each module, their sum, and what was missed, largest first."""
    account = Account(without_kho, "kernel/kho_s")
    lines = account.lines()
    assert [line.split()[0] for line in lines[:3]] == ["reached", "kernel/kho_scratch.py", "all"]
    sizes = [missed.lines for missed in account.missed]
    assert sizes == sorted(sizes, reverse=True)
    assert any("kho_reserve_scratch (kernel/kho_scratch.py)" in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_nothing_was_reached() -> None:
    """Of an empty set everything is missed."""
    account = Account(Reached(), "kernel/kho")
    assert account.said == []
    mine = [module for module in modules() if module.path.startswith("kernel/kho")]
    assert len(account.unsaid) == sum(len(module.sites) for module in mine)
    assert len(account.missed) == sum(len(module.functions) for module in mine)
    total = account.total()
    assert (total.symbols_reached, total.branches_reached) == (0, 0)
    assert total.symbols > 50
    assert total.branches > 800


def test_a_site_says_where_it_is() -> None:
    """A site's lines lie in its function's."""
    module = _module("kernel/kho.py")
    site: Site
    for site in module.sites:
        homes = [f for f in module.functions if site.where in (f.symbol, f.name)]
        assert any(site.lines.start in f.lines for f in homes)


def test_pieces_of_a_search_make_the_whole() -> None:
    """Runs reach the same in pieces as in a row, and after whatever else ran in the process."""
    spec = Spec("memfd", "7.3", "5", watches=True)
    whole = do(spec, Task("runs", (0, 6, (), ()))).covered
    last = do(spec, Task("runs", (3, 3, (), ()))).covered
    first = do(spec, Task("runs", (0, 3, (), ()))).covered
    assert first | last == whole
    assert whole not in (first, last)
    assert do(spec._replace(watches=False), Task("runs", (0, 1, (), ()))).covered == Reached()


@pytest.mark.slow  # every module of the kernel is gone through
def test_explore_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    """``khosim explore --coverage`` ends with the table, ``--json`` has it under a key."""
    arguments = ["explore", "pages", "--runs", "2", "--fixed", "--coverage"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["coverage"]
    total = data["total"]
    line = next(line for line in told.splitlines() if line.startswith("all "))
    assert line.split()[1] == f"{total['symbols_reached']}/{total['symbols']}"
    assert line.split()[2] == f"{total['branches_reached']}/{total['branches']}"
    assert set(data["said"]) == {"refusal", "panic", "warning", "log"}


def test_every_program_is_watched() -> None:
    """What an exhaustive search reached is what its programs did; a deeper one has reached more."""
    arcs = []
    for depth in (1, 2):
        campaign = Campaign("0", "subtrees", fixed("7.3"))
        campaign.crew = Inline(campaign.spec._replace(watches=True))
        campaign.exhaust(depth)
        arcs.append(campaign.covered.arcs["kernel/kho_out.py"])
    assert arcs[0] < arcs[1]


def test_what_explains_a_program_is_not_watched() -> None:
    """A suspect is carried out again on kernels with fixes, which reaches nothing of this one's."""
    spec = Spec("reserve-mem", "7.3", "0", watches=True)
    runs = do(spec, Task("runs", (0, 3, (), ())))
    assert any(suspect.explained for suspect in runs.suspects)
    with watching() as watch:
        run_unit("0", "reserve-mem", "7.3", 0, 3)
    assert runs.covered == watch.reached
