"""Which answers are tested: those of this folder, or with ``--solutions`` the teacher's."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

SOLUTIONS = Path(__file__).parent / "solutions"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--solutions``."""
    parser.addoption("--solutions", action="store_true", help="test the teacher's solutions")


def pytest_configure(config: pytest.Config) -> None:
    """Load the solutions first: tests then get them instead of the exercises of the same name."""
    if config.getoption("--solutions"):
        sys.path.insert(0, str(SOLUTIONS))
        for solution in sorted(SOLUTIONS.glob("*.py")):
            import_module(solution.stem)
