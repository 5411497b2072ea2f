"""The ``khosim`` command: finds the subcommand, loads its module and turns errors into one line.

A subcommand is one line in :data:`COMMANDS` and one module beside this one, loaded only when it
is called, so that ``khosim --help`` stays as quick as starting Python allows.

Exit status: 0 all holds; 1 something was found; 2 the input or the call is wrong; 130 interrupted;
141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from khosim import __version__
from khosim.errors import InputError, KhoSimError

TYPE_CHECKING = False  # typing's own constant, without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn, Protocol

    class CommandModule(Protocol):
        """What the module of a subcommand offers."""

        HELP: str
        """What the command does, for ``khosim COMMAND --help``."""

        NO_RELEASE: str
        """Why there is no ``--release``, where users would look for one; may be missing."""

        def configure(self, parser: argparse.ArgumentParser) -> None:
            """Add the command's arguments to ``parser``."""

        def run(self, args: argparse.Namespace) -> int:
            """Do the work and return the exit status: 0 all holds, 1 something was found."""


__all__ = ("COMMANDS", "main")

COMMANDS: Mapping[str, tuple[str, str]] = {
    "explore": ("khosim.cli.explore", "search for what breaks a release, and show it in a program"),
    "explain": ("khosim.cli.explain", "tell the life of the page that a finding is about"),
    "run": ("khosim.cli.run", "hand over from kernel to kernel and check every invariant"),
    "view": ("khosim.cli.view", "see memory at each moment of a handover"),
    "report": ("khosim.cli.report", "write a whole handover as one page of HTML"),
    "memblock": ("khosim.cli.memblock", "run memblock call sequences from a file"),
    "replay": ("khosim.cli.replay", "make a real boot's memblock calls again and compare"),
    "plan": ("khosim.cli.plan", "predict scratch areas, their cost and what drives it"),
    "blackout": ("khosim.cli.blackout", "estimate how long guests stand still in a live update"),
    "inspect": ("khosim.cli.inspect", "decode a real handover and say what is torn"),
    "matrix": ("khosim.cli.matrix", "hand over between every pair of releases"),
    "bugs": ("khosim.cli.bugs", "the museum: bugs that were fixed, replayed"),
    "conform": ("khosim.cli.conform", "hold khosim against a real capture, item by item"),
    "lab": ("khosim.cli.lab", "boot a real kernel in QEMU and capture its handovers"),
    "completion": ("khosim.cli.completion", "print what makes a shell complete all this"),
}
"""Name of each subcommand: its module, and what it does in one line."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {_one_line(message)} (try '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit status."""
    _show_everything()
    try:
        status = _dispatch(sys.argv[1:] if argv is None else list(argv))
        _flush()
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except KhoSimError as error:
        return _complain(str(error))
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        return _complain(f"{place}{error.strerror or error}")
    except Exception as error:
        plugins = sys.modules.get("khosim.plugins")
        blamed = None if plugins is None else plugins.blame_plugin(error)
        if blamed is None:
            raise
        return _complain(str(blamed))
    return status


def _dispatch(argv: list[str]) -> int:
    """Run the subcommand that ``argv`` names; argparse's own exits become a status."""
    try:
        if argv and not argv[0].startswith("-"):
            return _run_command(argv[0], argv[1:])
        parser = _top_parser()
        parser.parse_args(argv)
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            return _complain(stop.code)
        return stop.code or 0


def _run_command(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        _top_parser().error(f"{name!r} is not a command{_suggestion(name)}")
    module: CommandModule = import_module(COMMANDS[name][0])
    why = getattr(module, "NO_RELEASE", "")
    if why and any(arg.partition("=")[0] == "--release" for arg in argv):
        raise InputError("--release", why)
    parser = _Parser(prog=f"khosim {name}", description=module.HELP, allow_abbrev=False)
    module.configure(parser)
    return module.run(parser.parse_args(argv))


def _top_parser() -> _Parser:
    width = max(map(len, COMMANDS))
    parser = _Parser(
        prog="khosim",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="A simulator of Linux Kexec HandOver: the machine survives, the kernels don't.",
        epilog="commands:\n"
        + "".join(f"  {name:<{width}}  {help_}\n" for name, (_, help_) in COMMANDS.items())
        + "\n'khosim COMMAND --help' tells more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"khosim {__version__}")
    return parser


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": it is one of {', '.join(COMMANDS)}"


def _complain(message: str) -> int:
    from khosim.printable import printable

    print(f"khosim: {printable(_one_line(message))}", file=sys.stderr)
    return EXIT_USAGE


def _one_line(message: str) -> str:
    return " ".join(message.splitlines())


def _show_everything() -> None:
    """Spell out what a stdout of a small character set cannot show, as stderr does anyway."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _discard_output() -> None:
    """Point stdout at nothing, so that flushing what is left at exit cannot fail again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
