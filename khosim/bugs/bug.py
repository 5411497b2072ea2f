"""What an exhibit of the museum is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khosim.bugs.stage import Stage

__all__ = ("Bug", "bug_order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """One bug that was fixed upstream, and a scenario that shows its damage.

    ``scenario`` is played twice. With the fix off it runs on ``release`` with the behaviours of
    ``without_fix``, with the fix on on ``release`` with those of ``with_fix``; what is not named
    is as the release shipped it. The invariants of ``caught_by`` must all speak in the first, and
    no others; in the second none may speak.
    """

    id: str
    """The number in the catalogue, such as ``"A26"``."""
    name: str
    """A few words with hyphens, such as ``"numa-span"``."""
    subject: str
    """The subject of the upstream commit that fixed it."""
    commit: str
    """The first 12 digits of that commit, "" where it is not known."""
    broken: str
    """The releases that had it, in words."""
    fixed: str
    """The first release without it, in words."""
    story: str
    """Paragraphs for readers: what went wrong, why, and what it meant to a user."""
    release: str
    """The release on which it is shown."""
    caught_by: tuple[str, ...]
    scenario: Callable[[Stage], None]
    without_fix: Mapping[str, Any] = field(default_factory=dict)
    with_fix: Mapping[str, Any] = field(default_factory=dict)
    partly: str = ""
    """What of the bug is not shown, where only a part of it is."""

    def __str__(self) -> str:
        return f"{self.id} {self.name}"


def bug_order(bug_id: str) -> tuple[str, int]:
    """A key that sorts ``A9`` before ``A10``."""
    match = re.fullmatch(r"([A-Z]+)(\d+)", bug_id)
    assert match is not None, bug_id
    return match[1], int(match[2])
