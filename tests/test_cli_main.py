"""The khosim command itself: finding subcommands, one-line errors, exit statuses.

Subcommands are stood in for by small modules of this file's own, so that nothing here depends on
what the real ones do.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import khosim
from khosim.cli import main as cli
from khosim.errors import InputError, KernelError, KernelPanic, KhoSimError, RamFault

Run = Callable[[argparse.Namespace], int]
Install = Callable[[Run], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make ``khosim memblock FILE [--count N]`` run a function of the test's own."""

    def install_command(run: Run) -> None:
        def configure(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("file")
            parser.add_argument("--count", type=int, default=1)

        module = ModuleType("fake_memblock")
        vars(module).update(HELP="Stand in for a command.", configure=configure, run=run)
        monkeypatch.setitem(sys.modules, "fake_memblock", module)
        monkeypatch.setattr(
            cli,
            "COMMANDS",
            {"run": ("no_such_module", "never loaded"), "memblock": ("fake_memblock", "fake")},
        )

    return install_command


def _raising(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_gets_its_arguments_and_gives_the_status(install: Install, status: int) -> None:
    """The subcommand's parser is its own, and what run() returns is the exit status."""
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return status

    install(run)
    assert cli.main(["memblock", "cases.jsonl", "--count", "3"]) == status
    assert [vars(args) for args in seen] == [{"file": "cases.jsonl", "count": 3}]


def test_other_commands_are_not_loaded(install: Install) -> None:
    """Calling one subcommand does not import another one's module."""
    install(lambda args: 0)
    assert cli.main(["memblock", "-"]) == 0  # "run" names a module that does not exist


def test_help_lists_every_command_without_loading_it(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table alone makes the help text."""
    install(lambda args: 0)
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  run       never loaded\n" in out
    assert "  memblock  fake\n" in out


def test_help_of_a_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    """``khosim COMMAND --help`` shows the module's own words and arguments."""
    install(lambda args: 0)
    assert cli.main(["memblock", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: khosim memblock ")
    assert "Stand in for a command." in out
    assert "--count" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is the package's."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"khosim {khosim.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            InputError("scenario.toml: run.generations", "'many' is not a number"),
            "khosim: scenario.toml: run.generations: 'many' is not a number\n",
        ),
        (InputError("a.jsonl: line 3", "torn\r\nline"), "khosim: a.jsonl: line 3: torn line\n"),
        (
            KernelError(errno.EADDRNOTAVAIL, "kho_load", "no room"),
            "khosim: kho_load: -EADDRNOTAVAIL (no room)\n",
        ),
        (KernelPanic("no memory for scratch", 2), "khosim: no memory for scratch\n"),
        (RamFault(0x1000, 0x10, "hole"), "khosim: RAM access [0x1000-0x1010): hole\n"),
        (KhoSimError("plain"), "khosim: plain\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.jsonl"),
            "khosim: a.jsonl: No such file or directory\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "khosim: No space left on device\n"),
    ],
)
def test_errors_become_one_line(
    install: Install, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    """What is wrong with the input is said in one line on stderr, with exit status 2."""
    install(_raising(error))
    assert cli.main(["memblock", "-"]) == 2
    assert capsys.readouterr() == ("", line)


def test_a_bug_is_not_hidden(install: Install) -> None:
    """Any other exception is khosim's own fault and keeps its traceback."""
    install(_raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["memblock", "-"])


def test_interruption_is_quiet(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends with the shell's customary status and no traceback."""
    install(_raising(KeyboardInterrupt()))
    assert cli.main(["memblock", "-"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (1, 1), (7, 7)])
def test_a_command_may_exit_by_itself(install: Install, code: int | None, status: int) -> None:
    """sys.exit() inside a command keeps its meaning."""
    install(_raising(SystemExit(code)))
    assert cli.main(["memblock", "-"]) == status


def test_a_command_may_exit_with_a_message(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """sys.exit("message") is a complaint, never a success."""
    install(_raising(SystemExit("cannot go on")))
    assert cli.main(["memblock", "-"]) == 2
    assert capsys.readouterr() == ("", "khosim: cannot go on\n")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "khosim: name a command: run, memblock (try 'khosim --help')\n"),
        (["rnu"], "khosim: 'rnu' is not a command; did you mean 'run'? (try 'khosim --help')\n"),
        (
            ["memblok", "x"],
            "khosim: 'memblok' is not a command; did you mean 'memblock'? (try 'khosim --help')\n",
        ),
        (
            ["zzz"],
            "khosim: 'zzz' is not a command: it is one of run, memblock (try 'khosim --help')\n",
        ),
        (["--bogus"], "khosim: unrecognized arguments: --bogus (try 'khosim --help')\n"),
        (["--vers"], "khosim: unrecognized arguments: --vers (try 'khosim --help')\n"),
        (
            ["memblock"],
            (
                "khosim memblock: the following arguments are required: file "
                "(try 'khosim memblock --help')\n"
            ),
        ),
        (
            ["memblock", "-", "--count", "x"],
            (
                "khosim memblock: argument --count: invalid int value: 'x' "
                "(try 'khosim memblock --help')\n"
            ),
        ),
        (
            ["memblock", "-", "--co", "1"],
            "khosim memblock: unrecognized arguments: --co 1 (try 'khosim memblock --help')\n",
        ),
    ],
)
def test_wrong_calls_are_said_in_one_line(
    install: Install, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    """A wrong call ends in one line with a hint, and exit status 2."""
    install(lambda args: 0)
    assert cli.main(argv) == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_closed_pipe_is_quiet(flags: list[str]) -> None:
    """Where the reader of the output has gone, khosim stops without a word."""
    code = """
import sys, types
from khosim.cli import main as cli
module = types.ModuleType("talk")
vars(module).update(HELP="", configure=lambda parser: None, run=lambda args: print("x") or 0)
sys.modules["talk"] = module
cli.COMMANDS = {"talk": ("talk", "")}
sys.exit(cli.main(["talk"]))
"""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stdout:
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_python_dash_m() -> None:
    """``python -m khosim`` is the command, exit status included."""
    done = _python("-m", "khosim", "rnu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("khosim: 'rnu' is not a command")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_keeps_its_promises(name: str) -> None:
    """A module in the table has HELP, configure and run, and its --help works."""
    module_name, help_line = cli.COMMANDS[name]
    assert help_line
    assert len(help_line) < 70
    if importlib.util.find_spec(module_name) is None:
        pytest.skip(f"{module_name} is not part of this checkout")
    module = importlib.import_module(module_name)
    assert isinstance(module.HELP, str)
    assert module.HELP
    assert callable(module.run)
    module.configure(argparse.ArgumentParser())
    assert cli.main([name, "--help"]) == 0
