"""What a guest costs per folio in a live update, against the same bookkeeping in a loop in C.

The guest has 4 KiB folios, all of them there, and next to no content. A file of 1 TiB is more than
Linux can preserve (the array of pointers to its folios would be above INT_MAX bytes), so a guest of
that size is two files, one for each node, as hosts have it; both are in one session. The records
of 16 bytes for each folio are written to RAM and read back: with the tree they are what a guest's
handover touches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Context, Record, best_of, in_child, resident_bytes

__all__ = ("luo",)

_GIB_FOLIOS = 1 << 18
_RECORD_BYTES = 16
_NATIVE_GIB = 16
_NEED_BYTES = 7 << 30
"""Free memory without which the guest of 1 TiB is left out: its records are 4 GiB."""


def luo(context: Context) -> Iterator[Record]:
    """Preserve, hand over and retrieve guests of 16 GiB to 1 TiB in 4 KiB folios."""
    native = context.native
    per_folio = None
    if native is not None:
        nr_folios = _NATIVE_GIB * _GIB_FOLIOS
        if native.hand_over_guest(nr_folios).nr_folios != nr_folios:
            raise AssertionError("the native loop lost folios")
        seconds = best_of(lambda: native.hand_over_guest(nr_folios), rounds=context.rounds(3))
        per_folio = seconds / nr_folios * 1e9
    sizes = (16,) if context.quick else (16, 128, 1024)
    for gib in sizes:
        name = f"luo.guest.{gib}G"
        if gib == sizes[-1] and not context.quick and _available_bytes() < _NEED_BYTES:
            yield Record(name=name, baseline="C, folio by folio", note="too little free memory")
            continue
        preserve, kexec, retrieve, resident = in_child(_hand_over, gib)
        nr_folios = gib * _GIB_FOLIOS
        note = ", ".join(
            f"{what} {seconds / nr_folios * 1e9:.3g} ns"
            for what, seconds in (("preserve", preserve), ("kexec", kexec), ("retrieve", retrieve))
        )
        yield Record(
            name=name,
            baseline="C, folio by folio",
            unit="ns/folio",
            measured=(preserve + kexec + retrieve) / nr_folios * 1e9,
            against=per_folio,
            note=note if native is not None else f"{note}; {context.why_no_native}",
        )
        yield Record(
            name=f"luo.memory.{gib}G",
            baseline="records and tree",
            unit="bytes",
            measured=resident,
            against=nr_folios * (_RECORD_BYTES + 1 / 8),
            limit=1.3,
            note="resident after the handover",
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _hand_over(gib: int) -> tuple[float, float, float, int]:
    """Seconds to preserve, to kexec and to retrieve, and the bytes that became resident."""
    from khosim import Machine
    def run(machine: Machine, mib_per_file: int) -> list[float]:
        kernel = machine.boot(cmdline="kho=on liveupdate=on")
        files = [kernel.memfd(f"vm{n}", size=f"{mib_per_file}M", nid=n) for n in range(2)]
        session = kernel.liveupdate.create_session("guest")
        for n, file in enumerate(files):
            file.fallocate(0, file.size)
            file.write(file.size - 9, b"content %d" % n)
        laps = [time.perf_counter()]
        for n, file in enumerate(files):
            session.preserve(file, token=n)
        laps.append(time.perf_counter())
        successor = machine.kexec(kernel)
        laps.append(time.perf_counter())
        session = successor.liveupdate.retrieve_session("guest")
        files = [session.retrieve(n) for n in range(2)]
        session.finish()
        laps.append(time.perf_counter())
        for n, file in enumerate(files):
            if file.read(file.size - 9, 9) != b"content %d" % n:
                raise AssertionError("the guest lost its content")
        return laps

    run(Machine("16G", nodes=2, checks=False), 64)  # what is loaded on first use is not counted
    before = resident_bytes()
    machine = Machine(f"{max(16, gib * 2)}G", nodes=2, checks=False)
    start, preserved, booted, done = run(machine, gib * 512)
    return preserved - start, booted - preserved, done - booted, resident_bytes() - before
