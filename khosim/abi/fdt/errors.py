"""The error numbers of libfdt.

Models ``scripts/dtc/libfdt/libfdt.h:FDT_ERR_*`` and ``fdt_strerror.c:fdt_strerror`` @ 7.3. The
functions of this package return these numbers negated, as the C ones do; no blob makes one raise.

Left out: nothing. Overlay and phandle codes are listed although nothing here produces them.
"""

from __future__ import annotations

__all__ = (
    "FDT_ERR_ALIGNMENT",
    "FDT_ERR_BADFLAGS",
    "FDT_ERR_BADLAYOUT",
    "FDT_ERR_BADMAGIC",
    "FDT_ERR_BADNCELLS",
    "FDT_ERR_BADOFFSET",
    "FDT_ERR_BADOVERLAY",
    "FDT_ERR_BADPATH",
    "FDT_ERR_BADPHANDLE",
    "FDT_ERR_BADSTATE",
    "FDT_ERR_BADSTRUCTURE",
    "FDT_ERR_BADVALUE",
    "FDT_ERR_BADVERSION",
    "FDT_ERR_EXISTS",
    "FDT_ERR_INTERNAL",
    "FDT_ERR_NAMES",
    "FDT_ERR_NOPHANDLES",
    "FDT_ERR_NOSPACE",
    "FDT_ERR_NOTFOUND",
    "FDT_ERR_TRUNCATED",
    "fdt_strerror",
)

FDT_ERR_NOTFOUND = 1
FDT_ERR_EXISTS = 2
FDT_ERR_NOSPACE = 3
FDT_ERR_BADOFFSET = 4
FDT_ERR_BADPATH = 5
FDT_ERR_BADPHANDLE = 6
FDT_ERR_BADSTATE = 7
FDT_ERR_TRUNCATED = 8
FDT_ERR_BADMAGIC = 9
FDT_ERR_BADVERSION = 10
FDT_ERR_BADSTRUCTURE = 11
FDT_ERR_BADLAYOUT = 12
FDT_ERR_INTERNAL = 13
FDT_ERR_BADNCELLS = 14
FDT_ERR_BADVALUE = 15
FDT_ERR_BADOVERLAY = 16
FDT_ERR_NOPHANDLES = 17
FDT_ERR_BADFLAGS = 18
FDT_ERR_ALIGNMENT = 19

#: Name of each error number, the number positive.
FDT_ERR_NAMES: dict[int, str] = {
    FDT_ERR_NOTFOUND: "FDT_ERR_NOTFOUND",
    FDT_ERR_EXISTS: "FDT_ERR_EXISTS",
    FDT_ERR_NOSPACE: "FDT_ERR_NOSPACE",
    FDT_ERR_BADOFFSET: "FDT_ERR_BADOFFSET",
    FDT_ERR_BADPATH: "FDT_ERR_BADPATH",
    FDT_ERR_BADPHANDLE: "FDT_ERR_BADPHANDLE",
    FDT_ERR_BADSTATE: "FDT_ERR_BADSTATE",
    FDT_ERR_TRUNCATED: "FDT_ERR_TRUNCATED",
    FDT_ERR_BADMAGIC: "FDT_ERR_BADMAGIC",
    FDT_ERR_BADVERSION: "FDT_ERR_BADVERSION",
    FDT_ERR_BADSTRUCTURE: "FDT_ERR_BADSTRUCTURE",
    FDT_ERR_BADLAYOUT: "FDT_ERR_BADLAYOUT",
    FDT_ERR_INTERNAL: "FDT_ERR_INTERNAL",
    FDT_ERR_BADNCELLS: "FDT_ERR_BADNCELLS",
    FDT_ERR_BADVALUE: "FDT_ERR_BADVALUE",
    FDT_ERR_BADOVERLAY: "FDT_ERR_BADOVERLAY",
    FDT_ERR_NOPHANDLES: "FDT_ERR_NOPHANDLES",
    FDT_ERR_BADFLAGS: "FDT_ERR_BADFLAGS",
    FDT_ERR_ALIGNMENT: "FDT_ERR_ALIGNMENT",
}


def fdt_strerror(errval: int) -> str:
    """The text libfdt has for a return value: ``-9`` gives ``"FDT_ERR_BADMAGIC"``.

    Positive values and zero get libfdt's two placeholders, unknown codes a third.
    """
    if errval > 0:
        return "<valid offset/length>"
    if errval == 0:
        return "<no error>"
    return FDT_ERR_NAMES.get(-errval, "<unknown error>")
