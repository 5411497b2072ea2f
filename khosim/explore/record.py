"""Lines of a corpus: pieces of a campaign's work as JSON values, and back.

What comes from a file is looked at part by part; whatever is not as it was written raises
:class:`khosim.errors.InputError` with the place of the line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from khosim.errors import InputError
from khosim.explore.codec import (
    decode_problem,
    decode_steps,
    encode_steps,
    find_campaign_release,
)
from khosim.explore.corpus import finding_id
from khosim.explore.exhaust import Child
from khosim.explore.hazards import EARLIER, SWITCHES, hazard_of
from khosim.explore.keeper import Asked
from khosim.explore.work import Runs, Shrunk, Suspect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.explore.corpus import Line
    from khosim.explore.program import Told
    from khosim.explore.shrink import Finding
    from khosim.explore.work import Spec
    from khosim.explore.world import Problem, Step
    from khosim.kernel.behaviours import Release

__all__ = (
    "of_answer",
    "of_children",
    "of_finding",
    "of_runs",
    "to_answer",
    "to_children",
    "to_finding",
    "to_runs",
)


def of_runs(first: int, count: int, runs: Runs, release: str | Release) -> Line:
    """Some runs in a row."""
    suspects = [
        [
            int(s.seed.rpartition(":")[2]),
            [[*cause, *switches] for cause, switches in s.told],
            encode_steps(s.steps, release),
            *([list(s.off)] if s.off else []),
        ]
        for s in runs.suspects
    ]
    line: Line = {"runs": [first, count], "suspects": suspects, "reached": sorted(runs.reached)}
    if runs.lost:
        line["lost"] = list(runs.lost)
    if runs.given_up:
        line["given_up"] = runs.given_up
    return line


def to_runs(line: Line, spec: Spec, place: str) -> tuple[int, int, Runs]:
    """The way back: first run, number of runs, what they came to."""
    first, count = _numbers(line.get("runs"), 2, place)
    reached, lost = line.get("reached"), line.get("lost", [])
    suspects = line.get("suspects")
    if not isinstance(suspects, list) or not _are_texts(reached):
        raise InputError(place, "not what a campaign has written")
    found = []
    for suspect in suspects:
        if not _is_suspect(suspect):
            raise InputError(place, "not what a campaign has written")
        number, causes, steps, *off = suspect
        if not all(_are_texts(cause) and len(cause) > 1 for cause in causes):
            raise InputError(place, "not what a campaign has written")
        told = tuple((cause[0], cause[1]) for cause in causes)
        switches = tuple(tuple(cause[2:]) for cause in causes)
        program = tuple(decode_steps(steps, spec.release, place))
        name = f"{spec.seed}:{_numbers([number], 1, place)[0]}"
        found.append(Suspect(name, program, told, switches, *map(tuple, off)))
    (given_up,) = _numbers([line.get("given_up", 0)], 1, place)
    if not isinstance(lost, list):
        raise InputError(place, "not what a campaign has written")
    left_out = tuple(_numbers(lost, len(lost), place))
    return first, count, Runs(found, set(reached), left_out, given_up=given_up)


def of_answer(asked: Asked, answer: Any, release: str | Release) -> Line:
    """What shrinking came to."""
    line: Line = {"shrunk": [asked.seed, *asked.cause]}
    if answer is not None:
        line |= {"steps": encode_steps(answer.steps, release), "problem": list(answer.problem)}
        line["switches"] = list(answer.switches)
        if answer.behind:
            line["behind"] = list(answer.behind)
    return line


def to_answer(line: Line, release: str | Release, place: str) -> tuple[Asked, Any]:
    """The way back."""
    asked = line["shrunk"]
    if not _are_texts(asked) or len(asked) != 3:
        raise InputError(place, "not what a campaign has written")
    key = Asked(asked[0], (asked[1], asked[2]))
    if "steps" not in line:
        return key, None
    switches, behind = line.get("switches"), line.get("behind", [])
    if not _are_texts(switches) or not _are_switches(behind):
        raise InputError(place, "not what a campaign has written")
    problem = decode_problem(line.get("problem"), place)
    steps = decode_steps(line["steps"], release, place)
    return key, Shrunk(steps, problem, tuple(switches), tuple(behind))


def of_children(
    key: tuple[int, int], found: Sequence[Sequence[Child]], release: str | Release
) -> Line:
    """What some programs of an exhaustive search lead to."""
    children = [
        [
            [encode_steps([child.step], release)[0], child.state, list(map(list, child.problems))]
            for child in of_one
        ]
        for of_one in found
    ]
    return {"expand": list(key), "children": children}


def to_children(
    line: Line, release: str | Release, place: str
) -> tuple[tuple[int, int], list[list[Child]]]:
    """The way back."""
    level, first = _numbers(line["expand"], 2, place)
    try:
        found = [[_child(child, release, place) for child in one] for one in line["children"]]
    except (KeyError, TypeError, ValueError):
        raise InputError(place, "not what a campaign has written") from None
    return (level, first), found


def _child(value: Any, release: str | Release, place: str) -> Child:
    step, state, problems = value
    if not isinstance(state, str):
        raise TypeError
    told: list[Problem] = [decode_problem(problem, place) for problem in problems]
    return Child(decode_steps([step], release, place)[0], state, told)


def of_finding(finding: Finding, told: Told) -> Line:
    """A finding, as it is printed and kept in a file of its own."""
    hazards = list(dict.fromkeys(hazard_of(switch) for switch in finding.switches))
    return {
        "id": finding_id(finding.invariant, finding.shape, finding.seed),
        "invariant": finding.invariant,
        "message": finding.problem.message,
        "also": list(finding.also),
        "count": finding.count,
        "seed": finding.seed,
        "hazards": hazards,
        "behind": [hazard_of(switch) for switch in finding.behind],
        "release": str(getattr(finding.release, "name", finding.release)),
        "program": told.program,
        "trace": told.trace,
        "steps": encode_steps(finding.steps, finding.release),
        "problem": list(finding.problem),
    }


def to_finding(line: Line, place: str) -> tuple[str | Release, list[Step], Problem]:
    """A file of a finding: on which release, which program, what spoke."""
    text = line.get("release")
    if not isinstance(text, str):
        raise InputError(place, "not a finding: it names no release")
    release = find_campaign_release(text)
    steps = decode_steps(line.get("steps"), release, place)
    if steps[0].kind != "boot":
        raise InputError(place, "its program does not begin with a boot")
    return release, steps, decode_problem(line.get("problem"), place)


def _is_suspect(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (3, 4)
        and isinstance(value[1], list)
        and all(map(_are_switches, value[3:]))
    )


def _are_switches(value: Any) -> bool:
    return _are_texts(value) and {*value} <= {*SWITCHES, *EARLIER}


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _numbers(value: Any, count: int, place: str) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise InputError(place, "not what a campaign has written")
    if not all(type(part) is int and 0 <= part < 1 << 40 for part in value):
        raise InputError(place, "not what a campaign has written")
    return value
