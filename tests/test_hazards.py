"""Each written-up hazard of 7.3 shows itself in its program, and is gone with its switch."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from khosim.errors import KernelPanic, KhoSimError
from khosim.explore.hazards import SWITCHES, fixed
from khosim.explore.search import SCENARIOS, random_run
from khosim.kernel.release import find_release

HAZARDS = sorted((Path(__file__).resolve().parent.parent / "docs" / "hazards").glob("*.md"))
REFUSED = {
    "fix_luo_retrieve": "KernelError: memfd_luo_retrieve_folios: -ENOSPC",
    "fix_flb_reference": "KernelError: liveupdate_reboot: -EBUSY (a shared object is in use)",
    "fix_preserve_twice": "KernelError: kho_preserve_folio: -EEXIST",
    "fix_subtree_name": "KernelError: kho_add_subtree: -EINVAL",
    "fix_debugfs_in": "KernelError: debugfs: -ENOENT",
}
"""What a release with the switch says instead, where the program cannot go on."""
FACTS = re.compile(r"Switch: `(\w+)`\. Speaks: `([\w-]+)`")


def _facts(path: Path) -> tuple[str, str, str]:
    """The switch, the invariant and the program of a hazard's page."""
    text = path.read_text(encoding="utf-8")
    match = FACTS.search(text)
    assert match is not None
    return match[1], match[2], text.split("```python\n")[1].split("```")[0]


def _said(program: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(program, "program", "exec"), {})
        except KernelPanic as error:
            return f"kernel-panic: {error}"
        except KhoSimError as error:
            return f"errno-as-documented: {type(error).__name__}: {error}"
        except AssertionError:
            return "promise-kept"
    return out.getvalue().strip()


@pytest.mark.parametrize("path", HAZARDS, ids=lambda path: path.stem)
def test_the_program_shows_the_hazard(path: Path) -> None:
    """On 7.3 the invariant speaks that the page names."""
    _, invariant, program = _facts(path)
    said = _said(program)
    assert invariant in said


@pytest.mark.parametrize("path", HAZARDS, ids=lambda path: path.stem)
def test_the_switch_makes_it_go_away(path: Path) -> None:
    """The same program on a 7.3 with only this switch is silent."""
    switch, _, program = _facts(path)
    changed = program.replace("machine.boot(", f'machine.boot("7.3+{switch}=on", ', 1)
    assert changed != program
    said = _said(changed)
    assert REFUSED[switch] in said if switch in REFUSED else said == ""


def test_every_switch_is_written_up() -> None:
    """One page for each switch, one switch for each page."""
    assert sorted(_facts(path)[0] for path in HAZARDS) == sorted(SWITCHES)
    assert not any(getattr(find_release("7.3"), switch) for switch in SWITCHES)


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_the_fixed_protocol_is_silent(scenario: str) -> None:
    """With all switches on, random programs find nothing."""
    release = fixed("7.3")
    for n in range(6):
        assert random_run(f"quiet:{n}", scenario, release).problems == []
