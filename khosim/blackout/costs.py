"""What each step of a live update costs: named numbers, each with its source, that a file replaces.

A name ends with its unit: ``_ns`` and ``_us`` are nanoseconds and microseconds for each of what the
name says. A source is a published measurement, a figure derived from one, or an assumption, and
says which. Costs by handler are for each file whose handler has that ``compatible`` string;
``default`` is for all others.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from khosim.blackout.defaults import BY_HANDLER, COSTS, HOST, Default
from khosim.errors import InputError

__all__ = ("DEFAULT", "Costs", "Host", "costs_text", "read_costs")

DEFAULT = "default"
_MAX_FILE_BYTES = 1 << 20
_MAX_VALUE = 1e12
_MAX_SHOWN_CHARS = 40
_NS = {"ns": 1.0, "us": 1e3}
_HOST_MOST = {"cpus": 8192, "deferred_threads_max": 8192}


class Host(NamedTuple):
    """What is not a cost: how many CPUs, and how many threads still speed deferred init up."""

    cpus: int
    deferred_threads_max: int


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """A value for every cost: :attr:`plain` by name, :attr:`by_handler` by name and handler."""

    plain: dict[str, float]
    by_handler: dict[str, dict[str, float]]
    host: Host

    @classmethod
    def defaults(cls) -> Costs:
        """The documented ones."""
        return cls(
            {name: default.value for name, default in COSTS.items()},
            {name: {who: it.value for who, it in of.items()} for name, of in BY_HANDLER.items()},
            Host(**{name: int(default.value) for name, default in HOST.items()}),
        )

    def ns(self, name: str, handler: str = "") -> float:
        """Nanoseconds for one of what ``name`` says; ``handler`` where it is a cost by handler."""
        of = self.by_handler.get(name)
        value = self.plain[name] if of is None else of.get(handler, of[DEFAULT])
        return value * _NS[name.rpartition("_")[2]]

    def replace(self, name: str, value: float, handler: str = DEFAULT) -> Costs:
        """The same with one cost replaced."""
        if name in self.by_handler:
            of = {**self.by_handler[name], handler: value}
            return dataclasses.replace(self, by_handler={**self.by_handler, name: of})
        return dataclasses.replace(self, plain={**self.plain, name: value})

    def with_cpus(self, cpus: int | None) -> Costs:
        """The same on a host with so many CPUs (None: as it is)."""
        host = self.host if cpus is None else self.host._replace(cpus=cpus)
        return dataclasses.replace(self, host=host)


# -- reading ------------------------------------------------------------------------------------


def read_costs(path: str) -> Costs:
    """The costs in a TOML file; what it does not name keeps its default.

    Raises :class:`InputError` that names the file and the key.
    """
    document = _read(path)
    costs = Costs.defaults()
    tables = {"host": HOST, "costs": COSTS, **BY_HANDLER}
    _known(path, document, tables, "table")
    for name, table in document.items():
        if not isinstance(table, dict):
            raise InputError(path, f"{name}: a table is wanted, [{name}]")
        if name not in BY_HANDLER:
            _known(f"{path}: [{name}]", table, tables[name], "cost" if name == "costs" else "key")
    plain = {**costs.plain, **_numbers(path, "costs", document)}
    given = document.get("host", {}).items()
    host = costs.host._replace(**{key: _count(path, key, value) for key, value in given})
    by_handler = {
        name: {**of, **_numbers(path, name, document)} for name, of in costs.by_handler.items()
    }
    return Costs(plain, by_handler, host)


def _read(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise InputError(path, "larger than 1M: no file of costs")
        return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except UnicodeDecodeError:
        raise InputError(path, "not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(path, f"not TOML: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, getattr(error, "strerror", None) or str(error)) from None


def _known(place: str, found: dict[str, Any], known: dict[str, Any], what: str) -> None:
    from difflib import get_close_matches

    for key in found:
        if key not in known:
            shown = key if len(key) <= _MAX_SHOWN_CHARS else f"{key[:_MAX_SHOWN_CHARS]}..."
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see khosim blackout --print-costs"
            raise InputError(place, f"no {what} {shown!r}; {hint}")


def _numbers(path: str, table: str, document: dict[str, Any]) -> dict[str, float]:
    return {key: _number(path, table, key, it) for key, it in document.get(table, {}).items()}


def _number(path: str, table: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        shown = repr(value) if len(repr(value)) <= _MAX_SHOWN_CHARS else "what stands there"
        raise InputError(path, f"[{table}] {key}: {shown} is not a number")
    if value < 0:
        raise InputError(path, f"[{table}] {key}: {value:g} is negative")
    if value > _MAX_VALUE:
        raise InputError(path, f"[{table}] {key}: more than {_MAX_VALUE:g}")
    return float(value)


def _count(path: str, key: str, value: Any) -> int:
    most = _HOST_MOST[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(path, f"[host] {key}: not a whole number from 1 to {most}")
    return value


# -- writing ------------------------------------------------------------------------------------


def costs_text(costs: Costs) -> str:
    """The costs as a file that :func:`read_costs` reads, each under its source."""
    lines = [
        "# What each step of a live update costs: khosim blackout --costs FILE",
        "# A name ends with its unit. What a file leaves out keeps its default.",
        "",
        "[host]",
    ]
    for name, default in HOST.items():
        lines += _entry(name, getattr(costs.host, name), default)
    lines += ["", "[costs]"]
    for name, default in COSTS.items():
        lines += _entry(name, costs.plain[name], default)
    for name, of in costs.by_handler.items():
        lines += ["", f"[{name}]"]
        known = BY_HANDLER[name]
        for handler, value in of.items():
            key = handler if handler == DEFAULT else _quoted(handler)
            lines += _entry(key, value, known.get(handler, Default(value, "", "as given")))
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _entry(key: str, value: float, default: Default) -> list[str]:
    from textwrap import wrap

    text = f"{default.each}: {default.source}" if default.each else default.source
    comment = wrap(text, 78, initial_indent="# ", subsequent_indent="# ")
    return [*comment, f"{key} = {value:g}" if value < 1e6 else f"{key} = {value!r}"]
