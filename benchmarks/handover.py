"""What a whole handover costs, against starting a Python interpreter that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness import Context, Record, best_of, start_python
from khosim import Machine
from khosim.kernel.kernel import Folio

__all__ = ("handover",)

_SMALL_RAM = "64M"
_SMALL_CMDLINE = "kho=on"
_REGION_CMDLINE = "kho=on reserve_mem=64K:4096:oops"
_GOLDEN_CMDLINE = "kho=on log_buf_len=16M reserve_mem=2M:4096:oops"
_GROWTH = ("1G", "16G", "256G", "1T", "16T")


def handover(context: Context) -> Iterator[Record]:
    """Boot, preserve, kexec, boot, restore and every invariant, all in one figure.

    ``small`` is a 64 MiB machine with 16 folios, of orders 0 to 4, and ``region`` the same with a
    reserve_mem region beside them; ``uma1g`` has 1 GiB and 600 preserved blocks like the golden
    capture of that name; ``grow`` is the work of ``region`` on ever larger hosts.

    Handovers come in rows, as in a run of property tests, and a row's mean is what counts: a
    process that was started in between would leave the first one cold caches. Each machine is made
    anew and closed; the garbage collector is on, as users have it.
    """
    for name, cmdline, limit, note in (
        ("small", _SMALL_CMDLINE, 0.3, "64 MiB, 16 folios, all invariants"),
        ("region", _REGION_CMDLINE, None, "the same and a reserve_mem region"),
    ):
        yield context.ratio(
            f"handover.{name}",
            partial(_one_handover, _SMALL_RAM, cmdline, 16),
            start_python,
            baseline="python -c pass",
            limit=limit,
            rounds=40,
            in_a_row=10,
            note=note,
        )
    yield context.ratio(
        "handover.uma1g",
        lambda: _one_handover("1G", _GOLDEN_CMDLINE, 600),
        start_python,
        baseline="python -c pass",
        limit=1.5,
        rounds=20,
        in_a_row=3,
        note="1 GiB, 600 blocks, all invariants",
    )
    small = best_of(lambda: _one_handover("1G", _REGION_CMDLINE, 16), rounds=context.rounds(10))
    for ram in _GROWTH[1:]:
        seconds = best_of(_handover_of(ram), rounds=context.rounds(5))
        yield Record(
            name=f"handover.grow.{ram}",
            baseline="the same on 1G",
            measured=seconds,
            against=small,
        )


def _handover_of(ram: str) -> Callable[[], None]:
    return lambda: _one_handover(ram, _REGION_CMDLINE, 16)


def _one_handover(ram: str, cmdline: str, nr_folios: int) -> None:
    with Machine(ram) as machine:
        kernel = machine.boot(cmdline=cmdline)
        folios: list[Folio] = []
        for i in range(nr_folios):
            folio = kernel.alloc_folio(i % 5)
            folio.write(0, b"state of folio %d" % i)
            kernel.kho_preserve_folio(folio)
            folios.append(folio)
        successor = machine.kexec(kernel)
        for i, folio in enumerate(folios):
            restored = successor.kho_restore_folio(folio.phys)
            if restored is None or restored.read(0, 15) != (b"state of folio %d" % i)[:15]:
                raise AssertionError(f"{folio} was not handed over")
        if machine.check():
            raise AssertionError(f"a plain handover violates {machine.check()}")
