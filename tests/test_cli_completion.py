"""Shell completion: the script is fed to a real bash, which then completes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from khosim.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write bash's script to a file, once."""
    from shtab import complete

    from khosim.cli.completion import whole_parser

    path = tmp_path_factory.mktemp("completion") / "khosim.bash"
    path.write_text(complete(whole_parser(), "bash"))
    return path


def _completed(script: Path, *words: str) -> list[str]:
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_khosim'
    ran = subprocess.run(
        ["bash", "-c", ask + '; printf "%s\\n" "${COMPREPLY[@]}"', "bash", str(script), *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=script.parent,
    )
    return ran.stdout.split()


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
def test_bash_completes_commands(script: Path) -> None:
    """The first word is completed to a command."""
    assert _completed(script, "khosim", "mat") == ["matrix"]
    assert set(COMMANDS) <= set(_completed(script, "khosim", ""))


@needs_bash
def test_bash_completes_the_arguments_of_a_command(script: Path) -> None:
    """After a command, its own options are completed and no other's."""
    assert _completed(script, "khosim", "run", "--rel") == ["--release"]
    assert _completed(script, "khosim", "memblock", "--rel") == []


@needs_bash
def test_bash_completes_files_where_a_file_is_wanted(script: Path) -> None:
    """A capture is a file, so file names are offered."""
    assert _completed(script, "khosim", "inspect", "khosim.b") == ["khosim.bash"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_each_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each script names every command."""
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in printed] == []


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell that is not known ends with status 2 and names those that are."""
    assert main(["completion", "ksh"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'ksh'" in message
    assert "bash" in message
