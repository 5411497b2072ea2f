"""Finding the exhibits: every file of :mod:`khosim.bugs.entries` is one."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from khosim.bugs import entries
from khosim.bugs.bug import Bug, bug_order
from khosim.bugs.elsewhere import ELSEWHERE
from khosim.errors import InputError

__all__ = ("all_bugs", "find_bug")


def all_bugs() -> list[Bug]:
    """Every exhibit, in the catalogue's order."""
    names = [module.name for module in pkgutil.iter_modules(entries.__path__)]
    bugs: list[Bug] = [import_module(f"khosim.bugs.entries.{name}").BUG for name in names]
    return sorted(bugs, key=lambda bug: bug_order(bug.id))


def find_bug(word: str) -> Bug:
    """The exhibit whose number or name is ``word``; :class:`InputError` tells why there is none."""
    wanted = word.lower()
    bugs = all_bugs()
    for bug in bugs:
        if wanted in (bug.id.lower(), bug.name):
            return bug
    for other in ELSEWHERE:
        if wanted in (other.id.lower(), other.name):
            raise InputError(
                f"bug {word}", f"{other.name} cannot be shown in a simulator: {other.why}"
            )
    from difflib import get_close_matches

    close = get_close_matches(wanted, [bug.name for bug in bugs], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else " ('khosim bugs' lists them)"
    raise InputError(f"bug {word}", f"there is no such entry{hint}")
