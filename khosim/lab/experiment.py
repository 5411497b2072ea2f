"""One call of ``khosim lab``, from the user's words to a capture folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from khosim import __version__
from khosim.errors import InputError
from khosim.lab.bzimage import BzImage, read_bzimage
from khosim.lab.folder import check_target, write_capture
from khosim.lab.initramfs import build_initramfs, compile_init
from khosim.lab.machine import DEFAULT_CMDLINE, GuestMachine, find_qemu
from khosim.lab.predecessor import Predecessor
from khosim.lab.qemu import Qemu
from khosim.lab.run import Generation, Lab
from khosim.lab.stand_in import StandIn
from khosim.lab.verdict import Item, verdict
from khosim.units import parse_size

__all__ = ("Experiment", "Outcome", "run_experiment")

_MAX_HANDOVERS = 100


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is to be done. ``timeout`` in seconds, for each generation."""

    kernel: BzImage
    machine: GuestMachine
    out: Path
    handovers: int
    initrd_bytes: int
    timeout: float
    predecessor: str

    @classmethod
    def of(
        cls,
        *,
        kernel: str,
        out: str,
        handovers: int,
        memory: str,
        numa: str | None,
        cmdline: str | None,
        append: str,
        initrd_size: str,
        timeout: float,
        predecessor: str,
    ) -> Experiment:
        """From the user's words; :class:`InputError` for the first that is wrong."""
        if not (predecessor == "khosim") <= handovers <= _MAX_HANDOVERS:
            raise InputError("--generations", f"{handovers} is not from 1 to {_MAX_HANDOVERS}")
        machine = GuestMachine.of(
            memory, numa, DEFAULT_CMDLINE if cmdline is None else cmdline, append
        )
        initrd_bytes = parse_size(initrd_size, what="--initrd-size")
        if initrd_bytes > sum(machine.node_bytes) // 4:
            raise InputError("--initrd-size", "more than a quarter of the machine's RAM")
        check_target(Path(out))
        image = read_bzimage(kernel)
        return cls(image, machine, Path(out), handovers, initrd_bytes, timeout, predecessor)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it; the capture is written."""

    release: str
    names: list[str]
    items: list[Item]
    notes: list[str]


def run_experiment(experiment: Experiment, progress: Callable[[str], None]) -> Outcome:
    """Boot, hand over, write the capture.

    Raises :class:`InputError` without QEMU or a C compiler, and
    :class:`~khosim.lab.run.GuestTrouble` where the guest fails.
    """
    command = find_qemu()
    machine, kernel = experiment.machine, experiment.kernel
    predecessor = None
    if experiment.predecessor == "khosim":
        predecessor = Predecessor(machine.node_bytes, machine.cmdline)
        machine = GuestMachine(machine.node_bytes, predecessor.cmdline)
    initramfs = build_initramfs(
        compile_init(),
        kernel.data,
        generations=experiment.handovers,
        cmdline=machine.cmdline,
        size_bytes=experiment.initrd_bytes,
    )
    progress(f"{kernel.path}: {kernel.version or 'a bzImage'}")
    first_cmdline = predecessor.first_cmdline if predecessor else machine.cmdline
    with Qemu(command, machine, kernel.path, initramfs, first_cmdline) as qemu:
        stand_in = StandIn(predecessor, qemu.ram, progress) if predecessor else None
        lab = Lab(qemu, kernel, timeout=experiment.timeout, progress=progress, observer=stand_in)
        generations = lab.run(experiment.handovers)
        console = qemu.console.text.encode()
    items = (stand_in.items if stand_in else []) + verdict(generations)
    write_capture(
        experiment.out,
        _facts(experiment, generations[0]),
        [generation.files for generation in generations],
        {"console": console},
    )
    notes = [f"{one.name}: {note}" for one in generations for note in one.notes]
    return Outcome(generations[0].release, [one.name for one in generations], items, notes)


def _facts(experiment: Experiment, first: Generation) -> dict[str, object]:
    return {
        "release": first.release,
        "page_size": first.page_size,
        "arch": first.arch,
        "made_by": f"khosim lab {__version__}",
        "note": "handover.json was decoded by khosim from QEMU's memory at machine_kexec",
        "nodes": list(experiment.machine.node_bytes),
        "predecessor": experiment.predecessor,
    }
