"""Each written-up hazard shows itself in its program, and is gone with its switch."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from khosim.errors import KernelPanic, KhoSimError
from khosim.explore.hazards import EARLIER, SWITCHES, fixed
from khosim.explore.search import SCENARIOS, random_run
from khosim.explore.shrink import shape
from khosim.kernel.release import find_release

DOCS = Path(__file__).resolve().parent.parent / "docs"
HAZARDS = sorted((DOCS / "hazards").glob("*.md"))
RELEASES = ("6.16", "6.17", "6.18", "6.19", "7.0", "7.1", "7.2", "7.3")
REFUSED = {
    "fix_luo_retrieve": "KernelError: memfd_luo_retrieve_folios: -ENOSPC",
    "fix_flb_reference": "KernelError: liveupdate_reboot: -EBUSY (a shared object is in use)",
    "fix_preserve_twice": "KernelError: kho_preserve_folio: -EEXIST",
    "fix_preserve_overlap": "KernelError: kho_preserve_pages: -EEXIST",
    "fix_subtree_name": "KernelError: kho_add_subtree: -EINVAL",
    "fix_subtree_empty": "KernelError: kho_add_subtree: -EINVAL",
    "fix_debugfs_in": "KernelError: debugfs: -ENOENT",
    "fix_preserve_in_scratch": "KernelError: kho_preserve_folio: -EINVAL",
    "fix_preserve_fault": "KernelError: copy_to_user: -EFAULT",
    "fix_flb_late": "KernelError: liveupdate_register_flb: -EBUSY",
    "fix_flb_handler": "KernelError: liveupdate_register_flb: -EINVAL",
    "fix_ioctl_number": "KernelError: luo_ioctl: -ENOTTY",
    "fix_memfd_reader": "KernelError: memfd_luo_preserve: -ENOTSUP",
    "fix_memfd_poison": "KernelError: memfd_luo_freeze: -EBUSY",
    "fix_memfd_holes": "KernelError: memfd_pin_folios: -ENOMEM",
}
"""What a release with the switch says instead, where the program cannot go on."""
FACTS = re.compile(r"In ([\d., and]+)\. Switch: `([\w=+]+)`\. Speaks: `([\w-]+)`")
BOOT = re.compile(r"machine\.boot\((?:'[^']*', )?")


def _facts(path: Path) -> tuple[list[str], str, str, str]:
    """The releases, the switch, the invariant and the program of a hazard's page."""
    text = path.read_text(encoding="utf-8")
    match = FACTS.search(text)
    assert match is not None
    program = text.split("```python\n")[1].split("```")[0]
    return re.findall(r"\d\.\d+", match[1]), match[2], match[3], program


def _on(program: str, release: str) -> str:
    changed = BOOT.sub(f"machine.boot('{release}', ", program, count=1)
    assert changed != program or f"'{release}'" in program
    return changed


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


def _shows(said: str, invariant: str, newest: str) -> bool:
    """Whether it is the same hazard: an errno has to be the same one."""
    is_errno = invariant == "errno-as-documented"
    return invariant in said and (not is_errno or shape(said) == shape(newest))


@pytest.mark.parametrize("path", HAZARDS, ids=lambda path: path.stem)
def test_the_program_shows_the_hazard(path: Path) -> None:
    """The invariant that the page names speaks on 7.2 and 7.3 if the page says so."""
    releases, switch, invariant, program = _facts(path)
    newest = _said(program)
    assert invariant in newest
    assert releases[-1] == ("7.3" if switch in SWITCHES else "7.2")
    for release in ("7.2", "7.3"):
        said = _said(_on(program, release))
        assert _shows(said, invariant, newest) == (release in releases)
        assert release in releases or not said


@pytest.mark.slow  # some hundred boots
def test_the_table_is_what_the_programs_say() -> None:
    """Which releases have which hazard: in the page, and in the table of the search's own page."""
    lines = (DOCS / "explore.md").read_text(encoding="utf-8").splitlines()
    for path in HAZARDS:
        releases, _, invariant, program = _facts(path)
        newest = _said(program)
        shown = [r for r in RELEASES if _shows(_said(_on(program, r)), invariant, newest)]
        assert shown == releases, path.stem
        cells = " | ".join("yes" if r in releases else "" for r in RELEASES)
        row = f"| [{path.stem}](hazards/{path.name}) | {cells} |"
        assert row in lines


@pytest.mark.parametrize("path", HAZARDS, ids=lambda path: path.stem)
def test_the_switch_makes_it_go_away(path: Path) -> None:
    """The same program on its newest release with only this switch is silent."""
    releases, switch, _, program = _facts(path)
    said = _said(_on(program, f"{releases[-1]}+{switch}=on"))
    assert REFUSED[switch] in said if switch in REFUSED else said == ""


def test_every_switch_is_written_up() -> None:
    """One page for each switch, one switch for each page."""
    switches = [name for path in HAZARDS for name in _facts(path)[1].split("=on+")]
    assert sorted(switches) == sorted([*SWITCHES, *EARLIER])
    assert not any(getattr(find_release("7.3"), switch) for switch in SWITCHES)
    assert not any(getattr(find_release("7.2"), switch) for switch in EARLIER)


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_the_fixed_protocol_is_silent(scenario: str) -> None:
    """With all switches on, random programs find nothing."""
    release = fixed("7.3")
    for n in range(6):
        assert random_run(f"quiet:{n}", scenario, release).problems == []
