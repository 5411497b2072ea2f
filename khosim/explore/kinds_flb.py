"""Steps with tokens, files of the search's own, and with what they share: a ledger, or nothing.

A kernel may know tokens with a ledger or without one, whatever its predecessor knew; a token may
refuse to be preserved, to be frozen, to be made again, or once to be finished; a ledger may refuse
to be found again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.explore.kinds import NEW, Args, Kind, nothing
from khosim.explore.kinds_memfd import FILES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.explore.world import World

__all__ = ("KINDS",)


def _token_choices(world: World) -> list[Args]:
    if not world.has_luo or not world.of("ledger") or len(world.of("file")) >= FILES_MAX:
        return []
    return [(NEW, refuses) for refuses in ("", "preserve", "freeze", "finish", "retrieve")]


def _token_done(world: World, args: Args) -> None:
    world.add("file", args[0], type="token", session="", was="", refuses=args[1])


def _ledger_choices(world: World) -> list[Args]:
    if not world.has_luo or world.of("ledger"):
        return []
    # What came and cannot be found again is the plainest way to lose it.
    return [(NEW,), (NEW, "retrieve")] if "ledger" in world.came else [(NEW,)]


def _tokens_choices(world: World) -> list[Args]:
    # A ledger that came needs somebody who knows it.
    if not world.has_luo or world.of("ledger") or "ledger" in world.came:
        return []
    return [(NEW,)]


def _ledger_done(world: World, args: Args) -> None:
    world.add("ledger", args[0], gets=0, flb=True, asked=False, refuses="".join(args[1:]))


def _tokens_done(world: World, args: Args) -> None:
    world.add("ledger", args[0], gets=0, flb=False, asked=False, refuses="")


def _lost_choices(world: World) -> list[Args]:
    return [
        (item["was"], item.name, item["token"])
        for item in world.of("file", "incoming")
        if item["type"] == "token"
        and item["refuses"] == "retrieve"
        and world.has(item["was"], "session", "arrived")
        and world.of("ledger")
    ]


def _token_lost(world: World, args: Args) -> None:
    world.items[args[1]].state = "lost"


def _late_choices(world: World) -> list[Args]:
    # The module with the ledger comes after the one with the tokens.
    if not world.has_luo:
        return []
    return [(item.name,) for item in world.of("ledger") if not item["flb"]]


def _late_done(world: World, args: Args) -> None:
    world.items[args[0]].facts["flb"] = True


def _reload_choices(world: World) -> list[Args]:
    # Where one came and its files are done with, for else somebody uses it. Not one that refuses:
    # its successor would be told so, of what it never asked for.
    if "ledger" not in world.came or any(
        item["type"] == "token" for item in world.of("file", "incoming", "arrived")
    ):
        return []
    ledgers = [item for item in world.of("ledger", "held") if item["flb"] and not item["gets"]]
    found = [(NEW, i.name) for i in ledgers if not i["refuses"] and not i.facts.get("again")]
    return found if world.has_luo else []


def _reloaded(world: World, args: Args) -> None:
    world.drop(args[1])
    world.add("ledger", args[0], gets=0, flb=True, asked=False, refuses="", again=True)


def _not_reloaded(world: World, args: Args) -> None:
    world.items[args[1]].facts["again"] = True


def _ledger_get(world: World) -> list[Args]:
    needed = any(item["type"] == "token" for item in world.of("file", "preserved"))
    ledgers = [item for item in world.of("ledger", "held") if item["flb"]]
    return [(item.name,) for item in ledgers if needed and not item["gets"]]


def _incoming_get(world: World) -> list[Args]:
    # The ledger came over if a token's session did and is not finished yet.
    came = any(
        item["type"] == "token" and item["was"] for item in world.of("file", "incoming", "arrived")
    )
    if not came or "ledger" not in world.came:
        return []
    ledgers = world.of("ledger", "held")
    return [(item.name,) for item in ledgers if item["flb"] and not item["gets"]]


def _gotten(count: int) -> Callable[[World], list[Args]]:
    # Who died while getting or putting has left a count that nobody knows.
    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of("ledger", "held") if item["gets"] == count]

    return choices


def _gets(count: int) -> Callable[[World, Args], None]:
    def done(world: World, args: Args) -> None:
        world.items[args[0]].facts["gets"] = count

    return done

KINDS = (
    Kind(
        "ledger",
        "flb",
        _ledger_choices,
        lambda w, g, refuses="": f"{g} = ledger(kernel{f', {refuses!r}' if refuses else ''})",
        _ledger_done,
        letter="g",
        can_fail=False,
        weight=10,
    ),
    Kind(
        "tokens",
        "flb",
        _tokens_choices,
        lambda w, g: f"{g} = tokens(kernel)",
        _tokens_done,
        letter="g",
        can_fail=False,
        weight=4,
    ),
    Kind(
        "late_ledger",
        "flb",
        _late_choices,
        lambda w, g: f"{g} = late_ledger(kernel, {g})",
        _late_done,
        errnos=frozenset(("EBUSY",)),
        can_fail=False,
        weight=4,
    ),
    Kind(
        "token",
        "flb",
        _token_choices,
        lambda w, k, refuses: f"{k} = Token(kernel, 7{f', {refuses!r}' if refuses else ''})",
        _token_done,
        letter="k",
        can_fail=False,
        weight=6,
    ),
    Kind(
        "retrieve_lost",
        "flb",
        _lost_choices,
        lambda w, s, k, token: f"{s}.retrieve({token:#x})",
        _token_lost,
        _token_lost,
        errnos=frozenset(("EIO",)),
        can_fail=False,
        weight=8,
        locks=True,
    ),
    Kind(
        "reload",
        "flb",
        _reload_choices,
        lambda w, g, old: f"{g} = reload(kernel, {old})",
        _reloaded,
        _not_reloaded,
        errnos=frozenset(("EAGAIN",)),
        letter="g",
        can_fail=False,
        weight=30,
    ),
    Kind(
        "second_ledger",
        "flb",
        lambda w: [()] if w.of("ledger") and w.has_luo else [],
        lambda w: "second_ledger(kernel)",
        nothing,
        errnos=frozenset(("EINVAL",)),
        can_fail=False,
        weight=0.05,
    ),
    Kind(
        "get_outgoing",
        "flb",
        _ledger_get,
        lambda w, g: f"kernel.liveupdate.flb_get_outgoing({g})",
        _gets(1),
        can_fail=False,
    ),
    Kind(
        "get_incoming",
        "flb",
        _incoming_get,
        lambda w, g: f"kernel.liveupdate.flb_get_incoming({g})",
        _gets(2),
        errnos=frozenset(("EIO",)),
        can_fail=False,
    ),
    Kind(
        "put_incoming",
        "flb",
        _gotten(2),
        lambda w, g: f"kernel.liveupdate.flb_put_incoming({g})",
        _gets(0),
        can_fail=False,
    ),
    Kind(
        "put_outgoing",
        "flb",
        _gotten(1),
        lambda w, g: f"kernel.liveupdate.flb_put_outgoing({g})",
        _gets(0),
        can_fail=False,
    ),
)
