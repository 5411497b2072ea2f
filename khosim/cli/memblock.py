"""``khosim memblock FILE``: run sequences of memblock calls.

FILE holds one case per line, as :mod:`khosim.kernel.memblock_vectors` describes them, gzipped or
not. What it says about expected results is not looked at. Cases are answered as they are read.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.kernel.memblock_vectors import Outcome

__all__ = ("HELP", "NO_RELEASE", "configure", "run")

HELP = "run sequences of memblock calls and show what they return and leave behind"
NO_RELEASE = "memblock is the same in all releases; calls are made as the file says"

_LINE_LIMIT_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "file", metavar="FILE", help="cases, one JSON object a line, .gz or not; - for stdin"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a case")


def run(args: argparse.Namespace) -> int:
    """Answer every case: 0, or 1 if one panicked the kernel; :class:`InputError` for bad input."""
    from khosim.kernel.memblock_vectors import parse_case, run_case

    nr_cases = nr_ops = nr_panics = 0
    for place, line in _lines(args.file):
        case = parse_case(line, place)
        outcome = run_case(case)
        if args.json:
            print(json.dumps(outcome.as_json(), separators=(",", ":")))
        else:
            if not nr_cases:
                print(
                    f"{'case':<20} {'ops':>5} {'memory':>7} {'reserved':>9} {'reserved bytes':>20}"
                )
            print(_row(outcome, len(case.ops)))
        nr_cases += 1
        nr_ops += len(case.ops)
        nr_panics += bool(outcome.panic)
    if not nr_cases:
        raise InputError(_name(args.file), "holds no case")
    if not args.json:
        panics = f", {nr_panics} ended in a panic" if nr_panics else ""
        print(f"{nr_cases} cases, {nr_ops} calls{panics}")
    return 1 if nr_panics else 0


def _row(outcome: Outcome, nr_ops: int) -> str:
    name = str(outcome.id)
    if not (name.isascii() and name.isprintable()):
        name = json.dumps(name)
    reserved_bytes = sum(size for _base, size, _flags, _nid in outcome.reserved)
    row = (
        f"{name:<20} {nr_ops:>5} {len(outcome.memory):>7} {len(outcome.reserved):>9}"
        f" {reserved_bytes:>20}"
    )
    return f"{row}  panic: {outcome.panic}" if outcome.panic else row


def _name(file: str) -> str:
    return "<stdin>" if file == "-" else file


def _lines(file: str) -> Iterator[tuple[str, str]]:
    # The lines that are not blank, each with its place; every trouble is an InputError.
    name = _name(file)
    number = 0
    with ExitStack() as stack:
        try:
            stream = _open(file, stack)
            while True:
                number += 1
                raw = stream.readline(_LINE_LIMIT_BYTES + 1)
                if not raw:
                    return
                place = f"{name}: line {number}"
                if len(raw) > _LINE_LIMIT_BYTES:
                    raise InputError(place, f"longer than {_LINE_LIMIT_BYTES} bytes")
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(place, f"not UTF-8 (byte {error.start + 1})") from None
                if line.strip():
                    yield place, line
        except EOFError:
            raise InputError(f"{name}: line {number}", "the gzip data is cut short") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{name}: line {number}", f"bad gzip data: {error}") from None
        except OSError as error:
            place = f"{name}: line {number}" if number else name
            raise InputError(place, error.strerror or str(error)) from None


def _open(file: str, stack: ExitStack) -> IO[bytes]:
    raw: io.BufferedReader
    if file == "-":
        if sys.stdin is None:
            raise InputError(_name(file), "it is closed")
        buffer = sys.stdin.buffer
        raw = cast("io.BufferedReader", buffer)
        if not hasattr(buffer, "peek"):
            raw = io.BufferedReader(cast("io.RawIOBase", buffer))
    else:
        raw = stack.enter_context(Path(file).open("rb"))  # noqa: SIM115
    if raw.peek(2)[:2] == _GZIP_MAGIC:
        return cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=raw)))
    return raw
