"""The pytest plugin: two options and a few fixtures.

It loads nothing of the simulator until a fixture is used, and changes nothing for tests that use
none. ``-p no:khosim`` switches it off.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.simulator import Machine
    from khosim.testing.life import Life

__all__ = (
    "handover",
    "khosim_kernel",
    "khosim_machine",
    "khosim_release",
    "khosim_seed",
)

_LIFE: pytest.StashKey[Life] = pytest.StashKey()
_RAM, _CMDLINE = "64M", "kho=on liveupdate=on"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--khosim-seed`` and ``--khosim-release``."""
    group = parser.getgroup("khosim", "simulated kernel handovers")
    group.addoption(
        "--khosim-seed",
        metavar="N",
        help="seed of the machines in fixtures, and of state machines and deep lives (default 0)",
    )
    group.addoption(
        "--khosim-release",
        metavar="RELEASE",
        help="Linux release of all kernels: 7.2, 7.3+restore_order_cap=on, FILE.py (default 7.3)",
    )


def _seed(config: pytest.Config) -> int | None:
    text = config.getoption("--khosim-seed")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise pytest.UsageError(f"--khosim-seed: {text!r} is not a whole number from 0 on")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what the options cannot mean, in one line."""
    _seed(config)
    release = config.getoption("--khosim-release")
    if release is not None:
        from khosim.errors import InputError
        from khosim.kernel.release import find_release

        try:
            find_release(release)
        except InputError as wrong:
            raise pytest.UsageError(f"--khosim-release: {wrong}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Hand the options to the classes that ``handover_machine`` made."""
    seed, release = _seed(config), config.getoption("--khosim-release")
    if seed is None and release is None:
        return
    for cls in {getattr(item, "cls", None) for item in items}:
        take: Callable[..., None] | None = getattr(cls, "khosim_options", None)
        if take is not None:
            take(seed=seed, release=release)


@pytest.fixture
def khosim_seed(request: pytest.FixtureRequest) -> int:
    """What ``--khosim-seed`` says, or 0."""
    return _seed(request.config) or 0


@pytest.fixture
def khosim_release(request: pytest.FixtureRequest) -> str:
    """What ``--khosim-release`` says, or "7.3"."""
    return str(request.config.getoption("--khosim-release") or "7.3")


@pytest.fixture
def khosim_machine(khosim_seed: int) -> Machine:
    """A machine of 64 MiB that hands out pages as the seed will have it; nothing runs on it."""
    from khosim.simulator import Machine

    return Machine(_RAM, allocator="adversarial", seed=khosim_seed)


@pytest.fixture
def khosim_kernel(khosim_machine: Machine, khosim_release: str) -> Iterator[Kernel]:
    """A kernel with KHO and live updates on ``khosim_machine``; every invariant holds at the end.

    The kernel is the first one; ``khosim_machine.kernel`` is the one that runs.
    """
    from khosim.testing.asserts import assert_no_violations

    yield khosim_machine.boot(khosim_release, cmdline=_CMDLINE)
    assert_no_violations(khosim_machine)


@pytest.fixture
def handover(
    request: pytest.FixtureRequest, khosim_seed: int, khosim_release: str
) -> Iterator[Life]:
    """A :class:`~khosim.testing.Life`: what is done through it is printed when the test fails.

    It knows the kit's operations by name; ``handover.do(op, ...)`` takes your own as well.
    """
    from khosim.testing.life import Life
    from khosim.testing.ops_sessions import STANDARD
    from khosim.testing.plans import MachinePlan
    from khosim.testing.rules import Rules

    plan = MachinePlan(allocator="adversarial", seed=khosim_seed)
    life = Life(Rules(STANDARD), machine=plan, releases=(khosim_release, khosim_release))
    request.node.stash[_LIFE] = life
    yield life
    life.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the program to the report of a test that failed, unless its error tells it already."""
    report = yield
    if report.failed and call.excinfo is not None:
        life = item.stash.get(_LIFE, None)
        notes = getattr(call.excinfo.value, "__notes__", ())
        if life is not None and not any("khosim program" in note for note in notes):
            report.sections.append(("khosim program", life.program()))
        elif life is None:
            machine = getattr(item, "funcargs", {}).get("khosim_machine")
            if machine is not None:
                text = f"{machine!r}, seed {machine.seed}, kernel {machine.kernel!r}"
                report.sections.append(("khosim machine", text))
    return report
