"""``khosim completion SHELL``: what makes a shell complete khosim's commands and arguments.

The script is made by shtab from the same parsers that read the command line, so that it knows what
they know; nothing of khosim runs while a shell completes.
"""

from __future__ import annotations

import argparse
from importlib import import_module

__all__ = ("HELP", "configure", "run")

HELP = (
    "Print a script that makes a shell complete khosim's commands, arguments and files. For bash: "
    'eval "$(khosim completion bash)" in ~/.bashrc. For zsh: write it to a file _khosim in a '
    "folder of $fpath. For tcsh: khosim completion tcsh | source /dev/stdin."
)

SHELLS = ("bash", "zsh", "tcsh")

PATHS = ("FILE", "PATH", "DIR", "CAPTURE", "BZIMAGE", "SCENARIO", "RELEASE.py", "MEMORY-MAP")
"""Metavars of arguments that can be the name of a file."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script; 0."""
    import shtab

    print(shtab.complete(whole_parser(), args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser for ``khosim`` with all its commands, each loaded for the purpose."""
    import shtab

    from khosim import __version__
    from khosim.cli.main import COMMANDS

    parser = argparse.ArgumentParser(prog="khosim", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (module_name, help_) in COMMANDS.items():
        module = import_module(module_name)
        command = commands.add_parser(name, help=help_, description=module.HELP)
        module.configure(command)
        for action in command._actions:
            if str(action.metavar) in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own way
    return parser
