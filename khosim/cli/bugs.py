"""``khosim bugs [ID]``: the museum of bugs, listed, told or played.

Each exhibit is played with its fix off, where exactly the invariants that are named must speak, and
with its fix on, where none may.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from khosim.bugs.bug import Bug
    from khosim.bugs.exhibit import Exhibit
    from khosim.bugs.stage import Stage

__all__ = ("HELP", "NO_RELEASE", "configure", "run")

HELP = (
    "Bugs of Linux's handover that were fixed, replayed. Without ID: the list. With ID: the story "
    "of one, with the fix off and on. Exit status: 0 all is shown as it should be; 1 an exhibit "
    "does not show what it claims; 2 wrong input."
)
NO_RELEASE = "an exhibit has the release that had the bug; 'khosim explore' searches one of yours"
_WIDTH = 80


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("bug", metavar="ID", nargs="?", help="number (A26) or name (numa-span) of a bug")
    add("--all", action="store_true", help="play every exhibit, a line each")
    add("--program", action="store_true", help="print the program behind an exhibit")
    add("--json", action="store_true", help="play all exhibits, or the one named, as JSON")


def run(args: argparse.Namespace) -> int:
    """List, tell or play; 1 where an exhibit does not show what it claims."""
    from khosim.bugs.catalogue import all_bugs, find_bug
    from khosim.bugs.exhibit import show

    if args.bug is not None and args.all:
        raise InputError("bugs", "an ID and --all do not go together")
    if args.program:
        if args.bug is None or args.json:
            raise InputError("bugs --program", "it takes an ID, and no --json")
        print(_program(find_bug(args.bug)), end="")
        return 0
    if args.bug is None and not args.all and not args.json:
        _list(all_bugs())
        return 0
    bugs = all_bugs() if args.bug is None else [find_bug(args.bug)]
    if args.json:
        exhibits = [show(bug) for bug in bugs]
        print(json.dumps(_as_json(exhibits, whole=args.bug is None), indent=1))
    elif args.all:
        exhibits = _play_all(bugs)
    else:
        exhibits = [show(bugs[0])]
        _tell(exhibits[0])
    return 0 if all(exhibit.ok for exhibit in exhibits) else 1


def _as_json(exhibits: list[Exhibit], *, whole: bool) -> object:
    if not whole:
        return exhibits[0].as_json()
    from khosim.bugs.elsewhere import ELSEWHERE

    return {
        "bugs": [exhibit.as_json() for exhibit in exhibits],
        "reproduced": sum(exhibit.ok for exhibit in exhibits),
        "not_reproduced": [other._asdict() for other in ELSEWHERE],
    }


def _program(bug: Bug) -> str:
    import inspect
    import sys

    return inspect.getsource(sys.modules[bug.scenario.__module__])


def _list(bugs: Sequence[Bug]) -> None:
    from khosim.bugs.elsewhere import ELSEWHERE

    print(f"{'id':<4} {'name':<28} {'broken':<22} {'fixed':<16} caught by")
    for bug in bugs:
        print(
            f"{bug.id:<4} {bug.name:<28} {bug.broken:<22} {bug.fixed:<16} "
            f"{', '.join(bug.caught_by)}"
        )
    print(f"\n{len(bugs)} bugs are shown; these {len(ELSEWHERE)} cannot be:")
    for other in ELSEWHERE:
        print(_filled(f"{other.id:<4} {other.name}: {other.why}", later=5))
    print("\n'khosim bugs ID' tells one, 'khosim bugs --all' plays all of them.")


def _play_all(bugs: Sequence[Bug]) -> list[Exhibit]:
    from khosim.bugs.exhibit import show

    exhibits = []
    for bug in bugs:
        exhibit = show(bug)
        exhibits.append(exhibit)
        print(f"{'ok' if exhibit.ok else 'NO':<3} {bug!s:<32} {_verdict(exhibit)}", flush=True)
    nr_ok = sum(exhibit.ok for exhibit in exhibits)
    print(f"\n{nr_ok} of {len(exhibits)} bugs: shown with the fix off, gone with it on")
    return exhibits


def _verdict(exhibit: Exhibit) -> str:
    if exhibit.ok:
        return ", ".join(exhibit.without_fix.spoke)
    off = ", ".join(exhibit.without_fix.spoke) or "nobody"
    on = ", ".join(exhibit.with_fix.spoke) or "nobody"
    return f"expected {', '.join(exhibit.bug.caught_by)}; off: {off}; on: {on}"


def _tell(exhibit: Exhibit) -> None:
    bug = exhibit.bug
    print(f"{bug.id} {bug.name}")
    print(_filled(f"fixed by  {bug.subject}" + (f" ({bug.commit})" if bug.commit else ""), 10))
    print(f"broken in {bug.broken}; fixed in {bug.fixed}")
    for paragraph in bug.story.strip().split("\n\n"):
        print(f"\n{_filled(' '.join(paragraph.split()), 0)}")
    if bug.partly:
        print(f"\n{_filled(f'Not shown: {bug.partly}', 0)}")
    _act("off", bug, bug.without_fix, exhibit.without_fix)
    _act("on", bug, bug.with_fix, exhibit.with_fix)
    print()
    if exhibit.ok:
        print(f"ok: {', '.join(exhibit.without_fix.spoke)} with the fix off, silence with it on")
    else:
        print(f"NOT AS IT SHOULD BE: {_verdict(exhibit)}")


def _act(state: str, bug: Bug, changes: Mapping[str, object], stage: Stage) -> None:
    named = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
    print(f"\nLinux {bug.release}{f' with {named}' if named else ' as it is'}: the fix is {state}")
    for line in stage.account:
        print(_filled(f"  {line}", 4))
    for violation in stage.violations:
        print(_filled(f"  ! {violation}", 4))
    if not stage.violations:
        print("  no invariant speaks")


def _filled(text: str, later: int) -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=" " * later, break_long_words=False, break_on_hyphens=False
    )
