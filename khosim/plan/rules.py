"""By which release's rules scratch is sized.

A release that khosim has is taken as it is. Of older ones the rules of sizing are enough for a plan
(``kernel/kexec_handover.c`` @ 6.16, ``kernel/liveupdate/kexec_handover.c`` @ 7.2): they are 7.3
with those behaviours changed.
"""

from __future__ import annotations

from khosim.errors import InputError
from khosim.kernel.release import RELEASES, Release

__all__ = ("newest", "release_by_name", "release_of_uname")

_BEFORE_7_3 = {
    "scratch_excludes_hugetlb": False,
    "hugetlb_outside_scratch": False,
    "scratch_extension": False,
    "kdump_guard": False,
}
_BEFORE_7_2 = _BEFORE_7_3 | {
    "scratch_alignment": "pageblock",
    "scratch_rounds_first": True,
    "scratch_explicit_rounded": False,
}
_OLDER: dict[str, dict[str, object]] = {
    "6.16": dict(_BEFORE_7_2),
    "6.17": dict(_BEFORE_7_2),
    "6.18": dict(_BEFORE_7_2),
    "6.19": dict(_BEFORE_7_2),
    "7.0": dict(_BEFORE_7_2),
    "7.1": dict(_BEFORE_7_2),
    "7.2": dict(_BEFORE_7_3),
}


def newest() -> Release:
    """The newest release that khosim has."""
    return RELEASES[max(RELEASES, key=_order)]


def _order(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def release_by_name(name: str | Release) -> Release:
    """The release called ``name``, such as "7.0"; :class:`InputError` for an unknown one."""
    if isinstance(name, Release):
        return name
    if name in RELEASES:
        return RELEASES[name]
    if name in _OLDER:
        return newest().evolve(name=name, uname=f"{name}.0", **_OLDER[name])
    known = sorted({*RELEASES, *_OLDER}, key=_order)
    raise InputError("--release", f"{name!r} is not one of {', '.join(known)}")


def release_of_uname(uname: str) -> Release | None:
    """The release of a kernel that calls itself ``uname``; None where khosim knows no such."""
    name = ".".join(uname.split("-")[0].split(".")[:2])
    return release_by_name(name) if name in RELEASES or name in _OLDER else None
