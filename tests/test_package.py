"""The wheel: it is built, holds what it needs, and runs where nothing else of the project is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with what is installed: no network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("no hatchling: khosim[package]")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("khosim-*.whl")
    return path


def test_the_wheel_holds_what_is_no_python_too(wheel: Path) -> None:
    """Types marker, scenarios, the report's assets with d3's licence, and khosim's own."""
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "khosim/py.typed",
        "khosim/scenario/scenarios/small.toml",
        "khosim/view/assets/d3.min.js",
        "khosim/view/assets/d3.LICENSE.txt",
        "khosim/view/assets/report.js",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


def test_the_main_job_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked into an empty folder, khosim runs from there and from nowhere else."""
    folder = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    program = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import khosim; print(khosim.__file__); "
        "from khosim.cli.main import main; sys.exit(main(['run', 'small']))"
    )
    command = [sys.executable, "-P", "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    first, *_, last = ran.stdout.splitlines()
    assert first.startswith(str(folder))
    assert last.startswith("ok: 2 generations")
