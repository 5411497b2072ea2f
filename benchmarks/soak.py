"""``python -m benchmarks.soak``: boot spoiled handovers by the ten thousand.

Each mutation of :mod:`benchmarks.mutation` is booted on a snapshot of a machine that has just
jumped, and rolled back. Every boot must end as a kernel's would: with the handover refused,
accepted with or without warnings, or with a panic, soon and in little memory. A sample of those
that boot goes on to use its kernel: restore, allocate, preserve, hand over once more. Times are CPU
times, so that other work on the machine does not count.

Exit status: 0 every boot did, 1 one did not (its recipe is printed), 2 the call is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from benchmarks.harness import peak_resident_bytes, resident_bytes
from benchmarks.mutation import TARGETS, Target, build_target, mutate
from khosim import KernelError, KernelPanic
from khosim.kernel.kernel import Kernel

__all__ = ("Finding", "Soak", "main")

TIMEOUT_SECONDS = 2.0
GROWTH_BYTES = 64 << 20
"""Memory that no single boot may take beyond what was resident before it."""
USE_EVERY = 8
_NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+")


class _TooSlow(Exception):
    """A boot ran into the timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What must not happen, and how to see it again."""

    target: str
    seed: int
    index: int
    recipe: list[str]
    what: str

    def __str__(self) -> str:
        lines = [f"target {self.target!r}, seed {self.seed}, index {self.index}:"]
        return "\n".join(lines + [f"  {line}" for line in self.recipe] + [self.what])


@dataclass(slots=True, kw_only=True)
class Soak:
    """Mutations of one target, counted; ``findings`` stay empty if all is well."""

    target: Target
    seed: int
    use_every: int = USE_EVERY
    checks: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    """Panics, and messages that a sound handover does not bring, with their numbers taken out."""
    findings: list[Finding] = field(default_factory=list)
    slowest_seconds: float = 0.0
    slowest: str = ""
    seconds: float = 0.0
    _token: int = field(init=False)
    _usual: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._token = self.target.machine.hardware.snapshot()
        self._usual = set(self._boot().messages)
        self._rewind()

    def _boot(self) -> Kernel:
        self.target.machine.generation = 0
        return self.target.machine.resume()

    def _rewind(self) -> None:
        hardware = self.target.machine.hardware
        hardware.rollback(self._token)
        hardware.registers = dict(self.target.registers)

    def run(self, index: int) -> str:
        """Spoil, boot, count and undo mutation ``index``; returns the outcome."""
        start = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        recipe = mutate(self.target, self.seed, index)
        outcome = what = ""
        booted = 0.0
        from_here = time.process_time()
        try:
            with _time_limit():
                try:
                    kernel = self._boot()
                except KernelPanic as panic:
                    outcome = "panic"
                    self.causes[_NUMBER.sub("N", f"panic: {panic.message}")] += 1
                else:
                    booted = time.process_time() - from_here
                    outcome = self._classify(kernel)
                    if self.checks:
                        self.target.machine.check()
                    if self.use_every and index // len(TARGETS) % self.use_every == 0:
                        use(kernel, self.target)
        except _TooSlow:
            outcome, what = "timeout", f"no outcome in {TIMEOUT_SECONDS} s"
        except Exception:
            outcome, what = "foreign exception", traceback.format_exc()
        booted = booted or time.process_time() - from_here
        self._rewind()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown << 10 > GROWTH_BYTES:
            outcome, what = "memory", f"one boot took {grown >> 10} MiB"
        self.outcomes[outcome] += 1
        if what:
            self.findings.append(
                Finding(
                    target=self.target.name,
                    seed=self.seed,
                    index=index,
                    recipe=recipe,
                    what=what,
                )
            )
        if booted > self.slowest_seconds:
            self.slowest_seconds = booted
            self.slowest = f"{self.target.name}, index {index}: {'; '.join(recipe)}"
        self.seconds += time.process_time() - start
        return outcome

    def _classify(self, kernel: Kernel) -> str:
        strange = [line for line in kernel.messages if line not in self._usual]
        for line in strange:
            self.causes[_NUMBER.sub("N", line)] += 1
        if kernel.is_kho_boot:
            return "accepted, with complaints" if strange else "accepted"
        if "KHO: disabling KHO revival" in strange:
            return "refused"
        return "cold boot, with complaints" if strange else "cold boot"


def use(kernel: Kernel, target: Target) -> None:
    """Do with a kernel what its users would; the kernel may refuse or panic."""
    for step in (_restore, _read_debugfs, _hand_over):
        try:
            step(kernel, target)
        except KernelError:
            continue
        except KernelPanic:
            return


def _restore(kernel: Kernel, target: Target) -> None:
    for phys in target.blocks:
        folio = kernel.kho_restore_folio(phys)
        if folio is not None:
            folio.put()
    kernel.kho_restore_pages(*target.pages)
    for name in ("guests", "memblock"):
        kernel.kho_retrieve_subtree(name)


def _read_debugfs(kernel: Kernel, target: Target) -> None:
    for path in kernel.debugfs.files():
        kernel.debugfs.read(path, 1 << 20)
    kernel.reserve_mem.release_by_name("oops")


def _hand_over(kernel: Kernel, target: Target) -> None:
    for order in (0, 3, 1):
        folio = kernel.alloc_folio(order, movable=order == 3)
        kernel.kho_preserve_folio(folio)
    blob = kernel.kho_alloc_preserve(100)
    kernel.kho_add_subtree("more", blob.phys, 100)
    target.machine.kexec(kernel)


@contextmanager
def _time_limit() -> Iterator[None]:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak that ``argv`` asks for and return the exit status."""
    args = _parser().parse_args(argv)
    if args.index is not None and args.target is None:
        print("soak: --index needs --target", file=sys.stderr)
        return 2
    names = [args.target] if args.target else list(TARGETS)
    soaks = [
        Soak(
            target=build_target(name, checks=args.checks),
            seed=args.seed,
            use_every=args.use_every,
            checks=args.checks,
        )
        for name in names
    ]
    for soak in soaks:
        for index in range(50):  # so that caches are filled before memory is measured
            soak.run(-1 - index)
        soak.outcomes.clear()
        soak.causes.clear()
        soak.slowest_seconds = soak.seconds = 0.0
    resident = resident_bytes()
    indexes = range(args.count) if args.index is None else range(args.index, args.index + 1)
    _run(soaks, indexes, progress=sys.stderr.isatty() and not args.json)
    findings = [finding for soak in soaks for finding in soak.findings]
    report = _report(soaks, max(0, peak_resident_bytes() - resident))
    if args.json:
        report["findings"] = [str(finding) for finding in findings]
        print(json.dumps(report, indent=2))
    else:
        _print(report, findings)
    return 1 if findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other mutations")
    parser.add_argument("--target", choices=list(TARGETS), help="this machine only")
    parser.add_argument("--index", type=int, help="this mutation only; needs --target")
    parser.add_argument("--use-every", type=int, default=USE_EVERY, help="of those that boot")
    parser.add_argument("--checks", action="store_true", help="let the invariants look on")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _run(soaks: Sequence[Soak], indexes: range, *, progress: bool) -> None:
    for index in indexes:
        soaks[index % len(soaks)].run(index)
        if progress and index % 500 == 0:
            print(f"\r{index} of {indexes.stop}", end="", file=sys.stderr, flush=True)
    if progress:
        print("\r", end="", file=sys.stderr)


def _report(soaks: Sequence[Soak], grown_bytes: int) -> dict[str, object]:
    outcomes: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for soak in soaks:
        outcomes.update(soak.outcomes)
        causes.update(soak.causes)
    seconds = sum(soak.seconds for soak in soaks)
    slowest = max(soaks, key=lambda soak: soak.slowest_seconds)
    return {
        "seed": soaks[0].seed,
        "mutations": outcomes.total(),
        "outcomes": dict(outcomes.most_common()),
        "causes": dict(causes.most_common()),
        "seconds": seconds,
        "runs_per_second": {
            soak.target.name: soak.outcomes.total() / soak.seconds for soak in soaks if soak.seconds
        },
        "slowest_seconds": slowest.slowest_seconds,
        "slowest": slowest.slowest,
        "peak_growth_bytes": grown_bytes,
    }


def _print(report: dict[str, object], findings: Sequence[Finding]) -> None:
    for name in ("outcomes", "causes", "runs_per_second"):
        part = report[name]
        assert isinstance(part, dict)
        print(f"{name.replace('_', ' ')}:")
        for what, number in part.items():
            print(f"  {number:>8,.0f}  {what}")
    print(f"mutations {report['mutations']}, seed {report['seed']}, {report['seconds']:.1f} s")
    print(f"slowest boot {report['slowest_seconds']:.3f} s ({report['slowest']})")
    grown = report["peak_growth_bytes"]
    assert isinstance(grown, int)
    print(f"peak memory growth {grown / 2**20:.1f} MiB")
    for finding in findings:
        print(f"\nFOUND {finding}")
    print(f"\n{len(findings)} findings" if findings else "no findings")


if __name__ == "__main__":
    sys.exit(main())
