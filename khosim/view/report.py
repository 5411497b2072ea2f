"""One page of HTML that holds a whole recording: no network, no other file.

Facts are JSON in the page; the columns of all ranges are one block of bytes, deflated. Equal sheets
of ranges are held once, however many moments share them. The page's own script draws with d3,
which lies beside it with its licence (``assets/``).
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from khosim import __version__
from khosim.checks.invariants import INVARIANTS
from khosim.errors import InputError
from khosim.printable import printable
from khosim.view.moment import LAYERS
from khosim.view.touched import touched
from khosim.view.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from khosim.view.evidence import Evidence
    from khosim.view.moment import Layer
    from khosim.view.recording import Recording

__all__ = ("report_html", "write_report")

_TEXT_MAX = 160


def write_report(story: Recording, path: str | Path) -> int:
    """Write the page and return its size in bytes; the file takes its place when it is whole."""
    data = report_html(story).encode()
    with whole_file(path) as file:
        file.write(data)
    return len(data)


def report_html(story: Recording) -> str:
    """The page as text. The recording has to be one in depth, and to have a moment."""
    if not story.moments or not story.in_depth:
        raise InputError("report", "the recording has no moment, or was not made in depth")
    columns = _Columns()
    facts = _facts(story, columns)
    text = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(printable(story.title) or "khosim"),
        "CSS": _asset("report.css"),
        "FACTS": text,
        "COLUMNS": base64.b64encode(zlib.compress(columns.bytes(), 6)).decode(),
        "D3": _asset("d3.min.js"),
        "SCRIPT": _asset("report.js"),
    }
    first, *rest = _asset("report.html").split("@")
    page = [first]
    for name, between in zip(rest[::2], rest[1::2], strict=True):
        page += parts[name], between
    return "".join(page)


def _asset(name: str) -> str:
    return files("khosim.view").joinpath("assets", name).read_text(encoding="utf-8")


class _Columns:
    """Columns of numbers, one behind the other, each at a multiple of eight."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, column: NDArray[Any]) -> int:
        data = column.tobytes()
        at = self._length
        padded = data + bytes(-len(data) % 8)
        self._parts.append(padded)
        self._length += len(padded)
        return at

    def bytes(self) -> bytes:
        return b"".join(self._parts)


class _Strings:
    """Texts by number, each held once."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self.number.setdefault(printable(text), len(self.number))

    def of_all(self, texts: Iterable[str]) -> NDArray[np.int32]:
        return np.array([self.of(text) for text in texts], dtype=np.int32)


def _facts(story: Recording, columns: _Columns) -> dict[str, Any]:
    hardware = story.machine.hardware
    strings, sheets, trees = _Strings(), _Sheets(columns), _Trees()
    moments = [
        {
            "index": moment.index,
            "generation": moment.generation,
            "release": moment.release,
            "stage": moment.stage,
            "title": printable(moment.title),
            "event": moment.event,
            "layers": {
                name: sheets.number(layer, evidence.get(name), strings)
                for name, layer in moment.layers.items()
            },
            "tree": trees.number(tree),
        }
        for moment, evidence, tree in zip(story.moments, story.evidence, story.trees, strict=True)
    ]
    ram = story.moments[0].layers["ram"]
    places = [touched(event, hardware.page_shift) for event in story.events]
    events = {
        "generation": [event.generation for event in story.events],
        "phase": [strings.of(event.phase) for event in story.events],
        "symbol": [strings.of(event.symbol) for event in story.events],
        "text": [_event_text(event.args, event.result) for event in story.events],
    }
    return {
        "title": printable(story.title),
        "footer": f"khosim {__version__}. The drawing library is d3 (ISC licence).",
        "page_size": hardware.page_size,
        "low": int(ram.start.min()),
        "high": int(ram.end.max()),
        "layers": LAYERS,
        "events": events,
        "touched": {"start": [it[0] for it in places], "end": [it[1] for it in places]},
        "moments": moments,
        "sheets": sheets.listed,
        "trees": trees.listed,
        "invariants": _invariants(story),
        "findings": [
            {"phys": it.phys, "invariant": it.invariant, "message": printable(it.message)}
            for it in story.violations
        ],
        "strings": list(strings.number),
    }


class _Sheets:
    """Layers as sheets of columns; an equal layer is an equal number."""

    def __init__(self, columns: _Columns) -> None:
        self.listed: list[dict[str, int]] = []
        self._columns = columns
        self._known: dict[tuple[bytes, ...], int] = {}

    def number(self, layer: Layer, evidence: Evidence | None, strings: _Strings) -> int:
        owner = strings.of_all(layer.owners)[layer.owner] if len(layer) else layer.owner
        if evidence is None:
            writer = np.full(len(layer), -1, dtype=np.int32)
            content = np.zeros(len(layer), dtype=np.uint64)
        else:
            named = np.append(strings.of_all(evidence.writers), np.int32(-1))
            writer, content = named[evidence.writer], evidence.content
        made: dict[str, NDArray[Any]] = {
            "start": layer.start.astype(np.float64),
            "end": layer.end.astype(np.float64),
            "order": layer.order,
            "owner": owner.astype(np.int32),
            "writer": writer.astype(np.int32),
            "hash": content,
        }
        key = tuple(column.tobytes() for column in made.values())
        if key not in self._known:
            self._known[key] = len(self.listed)
            sheet = {name: self._columns.add(column) for name, column in made.items()}
            self.listed.append({"n": len(layer), **sheet})
        return self._known[key]


class _Trees:
    """Handovers as trees; an equal one is an equal number, none is -1."""

    def __init__(self) -> None:
        self.listed: list[dict[str, Any]] = []
        self._known: dict[str, int] = {}

    def number(self, tree: dict[str, Any]) -> int:
        if not tree:
            return -1
        text = json.dumps(tree)
        if text not in self._known:
            self._known[text] = len(self.listed)
            self.listed.append(tree)
        return self._known[text]


def _invariants(story: Recording) -> list[dict[str, Any]]:
    said: dict[str, list[dict[str, Any]]] = {it.name: [] for it in INVARIANTS}
    protects = {it.name: it.protects for it in INVARIANTS}
    for violation in story.violations:
        said.setdefault(violation.invariant, []).append(
            {
                "phys": violation.phys,
                "generation": violation.generation,
                "text": printable(str(violation)),
            }
        )
    return [
        {"name": name, "protects": protects.get(name, ""), "violations": found}
        for name, found in said.items()
    ]


def _event_text(args: dict[str, Any], result: Any) -> list[str]:
    listed = args.get("args") if set(args) == {"args"} else None
    if isinstance(listed, (list, tuple)):
        text = ", ".join(_plain(value) for value in listed)
    else:
        text = ", ".join(f"{name}={_plain(value)}" for name, value in args.items())
    short = text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}..."
    return [printable(short), "" if result is None else printable(_plain(result)[:_TEXT_MAX])]


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 4096:
        return hex(value)
    return str(value)
