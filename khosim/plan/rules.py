"""By which release's rules scratch is sized: that of the log, or one that is asked for."""

from __future__ import annotations

from khosim.errors import InputError
from khosim.kernel.release import MAINLINE, RELEASES, Release, find_release

__all__ = ("newest", "release_by_name", "release_of_uname")


def newest() -> Release:
    """The newest release that khosim has."""
    return RELEASES[MAINLINE[-1]]


def release_by_name(name: str | Release) -> Release:
    """The release called ``name``, such as "7.0"; :class:`InputError` for an unknown one."""
    try:
        return find_release(name)
    except InputError as error:
        cause = error.cause if error.place == "release" else str(error)
        raise InputError("--release", cause) from None


def release_of_uname(uname: str) -> Release | None:
    """The release of a kernel that calls itself ``uname``; None where khosim knows no such."""
    name = ".".join(uname.split("-")[0].split(".")[:2])
    return RELEASES.get(name)
