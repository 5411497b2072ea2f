"""The benchmark that seeds defects: flips of behaviours, and code put into live functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from subprocess import run

import pytest

from benchmarks.mutants import reasons, sample, switches
from benchmarks.mutants.__main__ import main
from benchmarks.mutants.sample import Mutant, draw, install
from benchmarks.mutants.switches import Flip, Noticed, flips, judge, pair
from khosim import units
from khosim.explore.coverage import clear_caches
from khosim.explore.hazards import SWITCHES, fixed
from khosim.kernel.behaviours import Release

BASE = fixed("7.3")


def test_each_behaviour_is_flipped() -> None:
    """Every fix is turned off, and every behaviour gets a value that it does not have."""
    found = flips(BASE)
    assert {(name, False) for name in SWITCHES} <= {(flip.name, flip.value) for flip in found}
    assert len(set(found)) == len(found)
    assert all(getattr(BASE, flip.name) != flip.value for flip in found)
    assert {"unpreserve_missing=loop", "unpreserve_missing=return"} <= set(map(str, found))
    assert "restore_order_cap=on" in map(str, found)


def test_a_handover_of_everything_is_silent() -> None:
    """Where nothing was flipped, nothing speaks."""
    assert pair(BASE, BASE) == ""


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("fill_kimage", "finalized", "handover-refused"),
        ("subtree_phys_prop", "fdt", "handover-wellformed"),
        ("memfd", "memfd-v1", "refused: luo_open: -EIO"),
    ],
)
def test_a_flip_is_noticed_in_a_pair(name: str, value: str, what: str) -> None:
    """A handover is not taken over, or not well formed, by a kernel that differs."""
    assert pair(BASE, BASE.evolve(**{name: value})).startswith(what)


def test_a_search_that_found_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What speaks without the flip too does not count, and the museum shows what no search can."""
    monkeypatch.setattr(switches, "_run", lambda release, n, seed: {"all-given-back"})
    noticed = judge(Flip("restore_order_cap", True), BASE, 5, 0)
    assert noticed.runs == 5
    assert list(noticed.spoke) == ["museum"]
    assert noticed.spoke["museum"].startswith("A25 ")


def test_reasons_are_for_flips() -> None:
    """A reason names a behaviour that is flipped, and tells it in a sentence."""
    names = {name for flip in flips(BASE) for name in (flip.name, str(flip))}
    assert set(reasons.REASONS) <= names
    assert all(reason.endswith(".") for reason in reasons.REASONS.values())


@pytest.fixture
def source() -> Iterator[str]:
    """The source of :mod:`khosim.units`, whose functions are put back afterwards."""
    found = [unwrap(thing) for thing in vars(units).values() if callable(thing)]
    functions = [function for function in found if hasattr(function, "__code__")]
    codes = [function.__code__ for function in functions]
    yield Path(units.__file__).read_text(encoding="utf-8")
    for function, code in zip(functions, codes, strict=True):
        function.__code__ = code
    clear_caches()


def test_a_mutant_is_put_into_the_function_that_is_there(source: str) -> None:
    """Whoever imported the function by name calls the changed one; others stay as they are."""
    from khosim.units import memparse

    assert memparse("2K") == (2048, 2)
    changed = source.replace("value <<= shift", "value <<= shift + 1")
    assert changed != source
    install(Mutant("khosim.units", "memparse", 1, 1, "", "", changed))
    assert memparse("2K") == (4096, 2)
    assert units.parse_size("2K") == 4096


def test_mutants_are_drawn_from_a_seed() -> None:
    """Equal seeds give equal mutants, each of which changes one function."""
    pytest.importorskip("cosmic_ray")
    found = draw(["khosim.units"], 5, 1)
    assert found == draw(["khosim.units"], 5, 1) != draw(["khosim.units"], 5, 2)
    for mutant in found:
        assert mutant.was != mutant.now
        assert sample._path("khosim.units").read_text(encoding="utf-8") != mutant.source


def test_more_runs_are_for_what_nobody_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flip that few runs do not show is searched on; one with a reason, or noticed, is not."""
    asked: list[tuple[str, int]] = []

    def fake(flip: Flip, base: Release, runs: int, seed: int) -> Noticed:
        asked.append((flip.name, runs))
        is_seen = flip.name == "fix_kho_off" or (flip.name.startswith("fix_") and runs > 9)
        return Noticed(flip, {"search": "a rule"} if is_seen else {}, runs)

    monkeypatch.setattr("benchmarks.mutants.__main__.judge", fake)
    argv = ["switches", "--runs", "9", "--only"]
    for name, more, status, runs in (
        ("scratch_alignmen?", 20, 0, [9]),
        ("fix_kho_off", 20, 0, [9]),
        ("fix_mem_limit", 20, 0, [9, 20]),
        ("fix_mem_limit", 0, 1, [9]),
    ):
        asked.clear()
        assert main([*argv, name, "--more-runs", str(more)]) == status
        assert [made for _, made in asked] == runs
        assert ("UNEXPLAINED" in capsys.readouterr().out) == bool(status)
    asked.clear()
    main([*argv, "fix_*", "--json"])
    assert [name for name, _ in asked] == list(SWITCHES)


@pytest.mark.slow
def test_tests_are_collected_beside_the_plugin() -> None:
    """pytest warns of khosim's plugin, which is imported already: that must not end the run."""
    code = (
        "from benchmarks.mutants.runner import with_tests;"
        f"with_tests([{str(Path(__file__).with_name('test_units.py'))!r}], lambda session: None)"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
