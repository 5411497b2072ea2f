"""``khosim explain FINDING``: run a finding again and tell the life of the page it is about.

A finding is a file of a corpus of ``khosim explore --corpus``, or the corpus and the beginning of
the finding's id.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from khosim.errors import InputError
from khosim.printable import printable

__all__ = ("HELP", "configure", "run")

HELP = (
    "Run a finding of a corpus again, and tell the life of the page that it is about: who wrote it "
    "and when, through which call, and who owned it. Exit status: 0 it is silent now; 1 it speaks; "
    "2 wrong input."
)
_SIZE_MAX = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("finding", metavar="FINDING", type=Path, help="a file of a corpus, or the corpus itself")
    add("id", metavar="ID", nargs="?", help="with a corpus: the id of a finding, or its beginning")


def run(args: argparse.Namespace) -> int:
    """Tell: 1 where what spoke speaks again, else 0."""
    from khosim.explore.corpus import load_json, unique
    from khosim.explore.record import to_finding
    from khosim.explore.story import explain

    path: Path = args.finding
    if path.is_dir():
        path = unique(path, args.id or "")
    elif args.id is not None:
        raise InputError(str(path), "not a corpus, so there is no finding to choose")
    with path.open("rb") as file:
        text = file.read(_SIZE_MAX + 1)
    if len(text) > _SIZE_MAX:
        raise InputError(str(path), "too large for a finding")
    line = load_json(text, str(path))
    release, steps, problem = to_finding(line, str(path))
    story = explain(steps, problem, release)
    name = getattr(release, "name", release)
    said = [f"{problem.invariant}: {problem.message}"]
    if story.spoke is None:
        said.append(f"silent: Linux {name} does not show it to this khosim")
    else:
        said = [f"{problem.invariant}: {story.spoke.message}"]
        said.append(f"shown by {len(steps)} steps on Linux {name}")
    behind = line.get("behind")
    if isinstance(behind, list) and behind:
        said.append(f"it shows once {' and '.join(map(str, behind))} is fixed")
    hazards = line.get("hazards")
    if isinstance(hazards, list) and hazards:
        said.append(f"known hazard: docs/hazards/{hazards[0]}.md")
    print(printable("\n".join([*said, "", *story.lines]) + "\n"), end="")
    return 0 if story.spoke is None else 1
