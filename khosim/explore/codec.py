"""Programs as plain JSON values, and back.

A step is ``[kind, args]``, with a dict of what else it has where that is not the default. The
campaign's release stands once in the file; in a boot's arguments it is a marker.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.explore.hazards import fixed
from khosim.explore.search import KINDS
from khosim.explore.world import LOADS, Problem, Step, World
from khosim.kernel.behaviours import Release
from khosim.kernel.release import find_release

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "decode_problem",
    "decode_steps",
    "encode_steps",
    "find_campaign_release",
    "release_text",
)

_FIXED = " fixed"
_RELEASE = {"release": "of the campaign"}
_OPTION = re.compile(r"""(kernel_size|initrd|release)=("[\w.+=]+"|fixed\('[\w.]+'\))""")
"""What a program may say of its next kernel beside its command line."""
_REST = Step._fields[2:]


def release_text(release: str | Release) -> str:
    """A release by its name; one with all hazards off is ``"7.3 fixed"``.

    Raises :class:`InputError` for one that no name leads to.
    """
    if isinstance(release, str):
        return release
    if _found(release.name) != release:
        raise InputError("release", f"{release.name!r} cannot be found again by its name")
    return release.name


def find_campaign_release(text: str) -> str | Release:
    """The release of :func:`release_text`; raises :class:`InputError`."""
    if text.endswith(_FIXED):
        return fixed(text.removesuffix(_FIXED))
    find_release(text)
    return text


def _found(text: str) -> Release | None:
    """The same as an object, None where there is none."""
    try:
        return find_release(find_campaign_release(text))
    except InputError:
        return None


def encode_steps(steps: Sequence[Step], release: str | Release) -> list[Any]:
    """``steps`` of a program on ``release``, ready for JSON."""
    return [_encode_step(step, release) for step in steps]


def _encode_step(step: Step, release: str | Release) -> list[Any]:
    defaults = Step._field_defaults
    rest = {name: value for name in _REST if (value := getattr(step, name)) != defaults[name]}
    args = [_RELEASE if arg is release or arg == release else arg for arg in step.args]
    return [step.kind, args, rest] if rest else [step.kind, args]


def decode_steps(values: Any, release: str | Release, place: str) -> list[Step]:
    """The way back; raises :class:`InputError` that names ``place`` for any other value."""
    if not isinstance(values, list) or not values:
        raise InputError(place, "its steps are no program")
    return [_decode_step(value, release, f"{place}: step {n}") for n, value in enumerate(values)]


def _decode_step(value: Any, release: str | Release, place: str) -> Step:
    if not isinstance(value, list) or len(value) not in (2, 3) or not isinstance(value[1], list):
        raise InputError(place, "not a kind, arguments and options")
    kind, args = value[:2]
    rest = value[2] if len(value) == 3 else {}
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(place, f"{kind!r} is no kind of step")
    if not isinstance(rest, dict) or not set(rest) <= set(_REST):
        raise InputError(place, "it has options that no step has")
    told = tuple(release if arg == _RELEASE else _tuples(arg) for arg in args)
    _look_at_words(kind, told, place)
    return Step(kind, told, **{name: _tuples(option) for name, option in rest.items()})


def _look_at_words(kind: str, args: tuple[Any, ...], place: str) -> None:
    # Names and machines become part of a program's text, so that no others may come in.
    if kind == "boot":
        specs = {choice[0] for choice in KINDS["boot"].choices(World(KINDS))}
        if len(args) < 2 or args[0] not in specs or not isinstance(args[1], str):
            raise InputError(place, "it boots no machine that khosim explore has")
    elif kind in LOADS:
        more = args[1:] if args and isinstance(args[0], str) else (None,)
        if not all(isinstance(word, str) and _OPTION.fullmatch(word) for word in more):
            raise InputError(place, "it hands over in a way that khosim explore has not")
    elif KINDS[kind].letter and not (args and isinstance(args[0], str) and args[0].isidentifier()):
        raise InputError(place, "what it defines has no name")


def _tuples(value: Any) -> Any:
    # Arguments are compared with the choices of their kind, which are tuples.
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def decode_problem(value: Any, place: str) -> Problem:
    """What spoke, from the list of its four parts."""
    kinds = (str, str, int, str)
    if not isinstance(value, list) or len(value) != len(kinds):
        raise InputError(place, "not what an invariant said")
    if not all(isinstance(part, kind) for part, kind in zip(value, kinds, strict=True)):
        raise InputError(place, "not what an invariant said")
    return Problem(*value)
