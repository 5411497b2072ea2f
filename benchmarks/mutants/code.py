"""Areas of khosim's own code, and the tests that are to notice what is changed in them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.mutants.runner import Session, Verdict, with_tests
from benchmarks.mutants.sample import Mutant, draw

__all__ = ("AREAS", "Area", "Judged", "run_area")


class Area(NamedTuple):
    """Modules below :mod:`khosim`, and patterns of test files."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


_CHECKS = ("test_checks_*.py", "test_auditor.py", "test_invariants*.py")

AREAS: dict[str, Area] = {
    "invariants": Area(
        (
            *(f"checks.invariants.{n}" for n in ("content", "incoming", "liveupdate", "outgoing")),
            *(f"checks.{n}" for n in ("auditor", "census", "history", "look", "preserved")),
            *("checks.invariants.pages", "checks.ranges", "checks.keepsake", "checks.unpreserved"),
        ),
        _CHECKS,
    ),
    "decoders": Area(
        tuple(
            f"checks.{n}"
            for n in (
                *("decode", "decode_block", "decode_chunks", "decode_fdt", "decode_luo"),
                *("decode_luo_v1", "decode_memfd", "decode_radix", "decode_root"),
                *("decode_vmalloc", "decode_walk", "digest", "reader", "strict_root"),
            )
        ),
        _CHECKS,
    ),
    "trackers": Area(
        tuple(f"kernel.{n}" for n in ("kho_radix", "kho_radix_bits", "kho_chunks", "kho_tracker")),
        (
            *("test_kho_radix*.py", "test_kho_chunks.py", "test_kho_in.py", "test_own_release.py"),
            *("test_release_rules.py", "test_trackers_edges.py"),
        ),
    ),
    "incoming": Area(
        tuple(f"kernel.{n}" for n in ("kho_in", "kho", "kho_reserve")),
        (
            *("test_kho_in.py", "test_kho_out.py", "test_kho_scratch.py", "test_hostile.py"),
            *("test_releases*.py", "test_bugs.py", "test_hazards.py", "test_jump.py"),
            "test_incoming_edges.py",
        ),
    ),
    "memory": Area(
        (
            *(f"kernel.memblock{n}" for n in ("", "_core", "_regions", "_iter", "_free")),
            *("kernel.memblock_alloc", "kernel.memblock_bulk", "kernel.buddy"),
        ),
        ("test_memblock*.py", "test_buddy.py", "test_page_alloc.py"),
    ),
}
"""What is looked at, by name."""


class Judged(NamedTuple):
    """A mutant and what the tests said."""

    mutant: Mutant
    verdict: Verdict


def run_area(
    name: str,
    count: int,
    seed: int,
    *,
    seconds: float | None = None,
    budget: float = float("inf"),
    progress: Callable[[Judged], None] = lambda judged: None,
) -> list[Judged]:
    """Judge ``count`` mutants of an area, or as many as ``seconds`` allow.

    ``budget`` are the CPU seconds that the tests of one mutant may take.
    """
    area = AREAS[name]
    modules = [f"khosim.{module}" for module in area.modules]
    folder = Path(__file__).resolve().parents[2] / "tests"
    tests = sorted(str(file) for pattern in area.tests for file in folder.glob(pattern))
    found: list[Judged] = []

    def work(session: Session) -> None:
        paths = {module: Path(str(import_module(module).__file__)) for module in modules}
        baseline = session.baseline(list(paths.values()))
        if baseline.failed:
            raise RuntimeError(f"{baseline.failed} fails without a mutant")
        end = None if seconds is None else time.monotonic() + seconds
        for mutant in draw(modules, count, seed):
            if end is not None and time.monotonic() > end:
                break
            verdict = session.judge(mutant, paths[mutant.module], baseline, budget)
            judged = Judged(mutant, verdict)
            found.append(judged)
            progress(judged)

    with_tests(tests, work)
    return found


def as_json(judged: list[Judged]) -> dict[str, Any]:
    """The counts, and the mutants that no test noticed."""
    counts = Counter(one.verdict.outcome for one in judged)
    left = [one for one in judged if one.verdict.outcome in ("survived", "unreached")]
    return {
        "mutants": len(judged),
        "outcomes": dict(sorted(counts.items())),
        "survivors": [
            {**one.mutant._replace(source="")._asdict(), "outcome": one.verdict.outcome}
            for one in left
        ],
    }
