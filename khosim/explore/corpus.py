"""A campaign on disk: what was done, and what was found.

* ``corpus.json``: which campaign it is;
* ``journal.jsonl``: a line for each finished piece of work, written when it is finished. A line
  that was cut by the end of the process is dropped, and its work done again. When a campaign is
  complete, the lines are put in order, so that equal campaigns leave equal bytes;
* ``findings/ID.json``: a file for each finding, which follows from the journal.

Files but the journal are written beside their place and then renamed: they are whole or not there.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ("Corpus", "Line", "finding_id", "fingerprint", "load_json", "unique")

Line = dict[str, Any]
_FORMAT = "khosim corpus 1"
_PARTS = re.compile(r"corpus\.json|journal\.jsonl|findings")
_ID = re.compile(r"[0-9a-f]{12}\.json")
_CUT = ".cut"
"""Ends the name of a file that is being written."""


def fingerprint() -> str:
    """Short words for the source of khosim: equal seeds give equal findings by equal code."""
    total = blake2b(digest_size=8)
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def finding_id(invariant: str, shape: str, seed: str) -> str:
    """The name of a finding: 12 hexadecimal digits."""
    return blake2b(f"{invariant}\n{shape}\n{seed}".encode(), digest_size=6).hexdigest()


def load_json(text: bytes, place: str) -> Line:
    """An object; raises :class:`InputError` that names ``place``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(place, "it is torn or no JSON") from None
    if not isinstance(value, dict):
        raise InputError(place, "not an object of JSON")
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


class Corpus:
    """The corpus in folder ``path``, made if there is none. ``about`` says which campaign it is.

    Raises :class:`InputError` for a folder of something else, of another campaign, with torn files,
    or in use by another process.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._findings = path / "findings"
        self._told: dict[str, bytes] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(str(path), "a corpus is a folder, and this is none") from None
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock()
            self._sweep()
            self._begin({"format": _FORMAT, **about})
            self._findings.mkdir(exist_ok=True)
            for file in self._findings.iterdir():
                text = file.read_bytes()
                load_json(text, str(file))
                self._told[file.stem] = text
            self._file = path / "journal.jsonl"
            self._journal = self._file.open("ab")
        except BaseException:
            os.close(self._folder)
            raise
        self._journal.truncate(_whole_bytes(self._file))

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(str(self.path), "another campaign is writing to it") from None

    def _sweep(self) -> None:
        # What a killed campaign was writing goes; what is not ours is left alone, and refused.
        for folder, known in ((self.path, _PARTS), (self._findings, _ID)):
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if file.name.endswith(_CUT):
                    file.unlink()
                elif not known.fullmatch(file.name):
                    raise InputError(str(file), "it does not belong into a corpus")

    def _begin(self, about: Line) -> None:
        file = self.path / "corpus.json"
        if not file.exists():
            if any(self.path.iterdir()):
                raise InputError(str(self.path), "it has files, but no corpus.json")
            self._replace(file, json.dumps(about, indent=1) + "\n")
            return
        before = load_json(file.read_bytes(), str(file))
        if before.get("format") != _FORMAT:
            raise InputError(str(file), f"its format is not {_FORMAT!r}")
        for name, value in about.items():
            if before.get(name) != value:
                cause = f"its {name} is {before.get(name)!r}, not {value!r}"
                if name == "khosim":
                    cause = "it was made by another version of khosim"
                raise InputError(str(self.path), f"a corpus of another campaign: {cause}")

    def _replace(self, file: Path, text: str) -> None:
        cut = file.with_name(file.name + _CUT)
        with cut.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        cut.replace(file)

    def lines(self) -> Iterator[tuple[str, Line]]:
        """What is done already: the place of each line, for errors, and the line."""
        for number, line in enumerate(self._file.read_bytes().splitlines(), 1):
            place = f"{self._file}: line {number}"
            yield place, load_json(line, place)

    def done(self, line: Line) -> None:
        """Something is finished. When this returns, no end of the process can lose it."""
        self._journal.write(_dump(line).encode() + b"\n")
        self._journal.flush()

    def tell(self, findings: Mapping[str, Line]) -> None:
        """The findings as they are now, by their ids."""
        texts = {name: json.dumps(value, indent=1) + "\n" for name, value in findings.items()}
        for name, text in texts.items():
            if self._told.get(name) != text.encode():
                self._replace(self._findings / f"{name}.json", text)
                self._told[name] = text.encode()
        for name in set(self._told) - set(texts):
            (self._findings / f"{name}.json").unlink()
            del self._told[name]

    def complete(self) -> None:
        """All is done: put the journal in order."""
        lines = sorted(_dump(line) for _, line in self.lines())
        self._journal.close()
        self._replace(self._file, "".join(f"{line}\n" for line in sorted(lines, key=_order)))
        self._journal = self._file.open("ab")

    def close(self) -> None:
        """Let others have it."""
        self._journal.close()
        os.close(self._folder)


def _order(line: str) -> tuple[Any, ...]:
    value = json.loads(line)
    what = next(name for name in ("runs", "expand", "shrunk") if name in value)
    return what, value[what] if what != "shrunk" else line


def _whole_bytes(journal: Path) -> int:
    text = journal.read_bytes()
    return text.rfind(b"\n") + 1


def unique(path: Path, prefix: str) -> Path:
    """The one finding of a corpus whose id begins so; raises :class:`InputError`."""
    folder = path / "findings"
    if not folder.is_dir():
        raise InputError(str(path), "not a corpus: it has no folder of findings")
    found = sorted(file for file in folder.iterdir() if file.name.startswith(prefix))
    if not found:
        raise InputError(str(path), f"it has no finding {prefix!r}")
    if len(found) > 1:
        names = ", ".join(file.stem for file in found[:4])
        raise InputError(str(path), f"{prefix!r} can be any of {names}")
    return found[0]
