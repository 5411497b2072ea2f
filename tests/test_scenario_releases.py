"""Every built-in scenario on every release: it runs, or one line says which releases can."""

from __future__ import annotations

import json
from typing import Any

import pytest

from khosim import InputError
from khosim.cli.main import main
from khosim.kernel.release import MAINLINE, RELEASES
from khosim.scenario.library import builtin_scenarios
from khosim.scenario.parse import parse_scenario
from khosim.scenario.play import play

STABLE = tuple(name for name in RELEASES if name not in MAINLINE)
HOSTS = ("cloud-host", "cloud-host-4k", "kho-host")
"""Large ones: here with less memory, and without a third kernel."""
NEWER = "6.19, 7.0, 7.1, 7.2, 7.3"
DEVICES = {
    "cloud-host-devices": 16,
    "devices-amd": 9,
    "devices-misbehave": 8,
    "devices-no-driver": 5,
    "devices-refused-freeze": 6,
    "devices-worst-moment": 6,
}
"""The first step of each that needs live update with FLBs."""
NO_LUO = ("6.16", "6.17", "6.18", "6.16.4", "6.17.4", "6.17.9", "6.18.y")


def cases() -> list[tuple[str, str]]:
    """Scenario and release; the stable ones with the small scenarios only."""
    return [
        (scenario, release)
        for scenario in builtin_scenarios()
        for release in (MAINLINE if scenario in HOSTS else (*MAINLINE, *STABLE))
    ]


@pytest.mark.parametrize(("scenario", "release"), cases())
def test_it_runs_or_says_why_not(scenario: str, release: str, capsys: Any) -> None:
    """Exit status 0 and a handover as the scenario promises, or 2 and one clear line."""
    smaller = ("--ram", "2G", "--generations", "2") if scenario in HOSTS else ()
    status = main(["run", scenario, "--json", "--release", release, *smaller])
    told = capsys.readouterr()
    if scenario == "cloud-host-4k" and release in NO_LUO:
        assert status == 2
        assert told.out == ""
        assert told.err == (
            f"khosim: cloud-host-4k: generation 0, step 7 (session): Linux {release} has no "
            f"live update; {NEWER} have\n"
        )
        return
    if scenario in DEVICES and release in (*NO_LUO, "6.19"):
        assert (status, told.out) == (2, "")
        assert told.err == (
            f"khosim: {scenario}: generation 0, step {DEVICES[scenario]} (preserve_vm): Linux "
            f"{release} has no live update with file-lifecycle-bound data; "
            "7.0, 7.1, 7.2, 7.3 have\n"
        )
        return
    assert (status, told.err) == (0, "")
    facts = json.loads(told.out)
    assert facts["release"] == release
    assert facts["handovers"] == {
        "refused-handover": 1, "small": 1, "torn-tree": 0,
    }.get(scenario, facts["generations"] - 1)  # fmt: skip
    assert facts["preserved_bytes"] > 0 or scenario == "torn-tree"


@pytest.mark.parametrize("release", NO_LUO)
def test_what_a_release_has_no_call_for_is_left_out(release: str, capsys: Any) -> None:
    """``small`` takes a quarter of its folios back, where that can be done: not before 6.19."""
    assert main(["run", "small", "--release", release]) == 0
    line = f"  unpreserve   guest, left out: Linux {release} has no kho_unpreserve_folio\n"
    assert line in capsys.readouterr().out


_TEXT = """
[kernel]
cmdline = "kho=on liveupdate=on"
release = "{}"
[machine]
ram = "64M"
[[generation]]
steps = [ {{ do = "folios", name = "a", count = 8 }} ]
kexec = {{ release = "6.18" }}
[[generation]]
steps = [ {{ do = "restore", name = "a" }}, {{ do = "preserve", name = "a" }}, {} ]
"""


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (
            '{ do = "unpreserve", name = "a" }',
            f"step 3 (unpreserve): Linux 6.18 has no kho_unpreserve_folio; {NEWER} have",
        ),
        ('{ do = "unpreserve", name = "a", optional = true }', ""),
        (
            '{ do = "session", name = "s" }',
            f"step 3 (session): Linux 6.18 has no live update; {NEWER} have",
        ),
        ('{ do = "session", name = "s", expect = "ENOENT" }', ""),
        ('{ do = "session", name = "s", optional = true }', ""),
        ('{ do = "retrieve", session = "*", optional = true }', ""),
        ('{ do = "close", session = "*", optional = true }', ""),
    ],
)
def test_the_kernel_that_carries_a_step_out_decides(step: str, told: str) -> None:
    """The successor's release counts, and it counts before anything runs."""
    scenario = parse_scenario(_TEXT.format("7.0", step), "s")
    if told:
        with pytest.raises(InputError) as error:
            play(scenario)
        assert str(error.value) == f"s: generation 1, {told}"
        return
    result = play(scenario)
    assert result.failures == []
    assert result.violations == []
    left_out = result.kernels[1].steps[2].outcome == "left out"
    assert left_out is ("optional" in step)


def test_an_optional_step_is_done_where_it_can_be() -> None:
    """``optional`` excuses what a release lacks, and nothing else."""
    text = _TEXT.format("7.0", '{ do = "session", name = "", optional = true }')
    text = text.replace('"6.18"', '"7.0"')
    result = play(parse_scenario(text, "s"))
    assert result.kernels[1].steps[2].outcome == "ok"
    result = play(parse_scenario(text.replace('"7.0"', '"7.3"'), "s"))
    assert result.kernels[1].steps[2].outcome == "EINVAL"
    assert not result.ok


def test_subtrees_of_notifiers_are_told(capsys: Any) -> None:
    """Up to 6.18 they are added when KHO is finalized: the account counts them."""
    assert main(["run", "small", "--json", "--release", "6.16"]) == 0
    first = json.loads(capsys.readouterr().out)["kernels"][0]
    assert first["subtrees"] == ["buffer", "guest", "memblock", "state"]
