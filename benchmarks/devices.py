"""A host of 2 TiB of guests with assigned devices through a kexec, against one without devices.

64 guests of 32 GiB in folios of 2 MiB, two devices each: page tables in memory, a DMA of every
device and a write of every vCPU after each thousandth event. The yardstick carries the same memory
in as many sessions' files, and nothing else. ``interleave`` is a run of ``khosim explore
guest-devices`` against a handover with nothing to hand over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.harness import Context, Record, in_child, resident_bytes

__all__ = ("devices",)

_DEVICES_EACH = 2
_FIRST_BUS = 0x10


def devices(context: Context) -> Iterator[Record]:
    """Preserve, hand over, retrieve and finish; and what that keeps resident."""
    yield _interleave(context)
    guests = 8 if context.quick else 64
    name = f"{guests * 32 >> 10}T" if guests == 64 else f"{guests * 32}G"
    seconds, memory = in_child(_hand_over, guests, _DEVICES_EACH)
    bare_seconds, bare_memory = in_child(_hand_over, guests, 0)
    note = f"{guests} guests, {guests * _DEVICES_EACH} devices"
    yield Record(
        name=f"devices.host.{name}",
        baseline="memory alone",
        measured=seconds,
        against=bare_seconds,
        limit=15.0,
        note=note,
    )
    yield Record(
        name=f"devices.memory.{name}",
        baseline="memory alone",
        unit="bytes",
        measured=memory,
        against=bare_memory,
        limit=3.0,
        note=f"{note}, resident after the handover",
    )


def _interleave(context: Context) -> Record:
    """A random interleaving: a host, its guest, two devices, a live update, all invariants."""
    from itertools import count

    from khosim import Machine
    from khosim.explore.interleave import Model, draw, run

    model, numbers = Model("guest-devices"), count()

    def interleaved() -> None:
        if run(model, draw(model, f"0:{next(numbers)}")):
            raise AssertionError("something spoke")

    def bare() -> None:
        with Machine("64M") as machine:
            machine.kexec(machine.boot(cmdline="kho=on liveupdate=on"))

    return context.ratio(
        "devices.interleave",
        interleaved,
        bare,
        baseline="a bare handover",
        limit=15,
        rounds=10,
        in_a_row=10,
        note="one guest, two devices",
    )


def _hand_over(guests: int, each: int) -> tuple[float, int]:
    """CPU seconds from the first preserve to the last finish; bytes that became resident."""
    from khosim import Machine
    from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan
    from khosim.kernel.file import File
    from khosim.kernel.gup import memfd_pin_folios, unpin_folios
    from khosim.machine.devices import Bridge, Endpoint, Part, Transfer, Vtd, every

    before = resident_bytes()
    parts: list[Part] = [Vtd()]
    names = []
    for n in range(guests * each):
        names.append(f"0000:{_FIRST_BUS + n:02x}:00.0")
        port = f"0000:00:{1 + n // 8:02x}.{n % 8}"
        parts += [Bridge(port, secondary=_FIRST_BUS + n), Endpoint(names[-1])]
    machine = Machine(
        f"{guests * 36}G", nodes=2, devices=parts if each else (), checks=False
    )
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    started: list[dict[str, File]] = []
    for n in range(guests):
        memfd = kernel.memfd(f"vm{n}", size="32G", huge="always", nid=n % 2)
        if not each:
            pinned = memfd_pin_folios(memfd, 0, memfd.size - 1, (1 << 32) - 1)
            unpin_folios(memfd.inode, pinned)  # all folios are there, as the devices' are
            started.append({"memory": memfd})
            continue
        plan = VmmPlan(f"vm{n}", programmes=(((GUEST_BASE, 4096, n),),))
        vmm = Vmm.start(kernel, plan, memfd)
        for name in names[n * each : (n + 1) * each]:
            vmm.assign(name, name)
            engine = machine.hardware.devices.pci.named(name).engine  # type: ignore[union-attr]
            engine.program([Transfer(GUEST_BASE + 4096, 4096, True)])  # type: ignore[union-attr]
        started.append(vmm.files())
    if each:
        machine.hardware.devices.clock.schedule = every(1000)  # type: ignore[union-attr]
    begin = time.process_time()
    for n, files in enumerate(started):
        session = kernel.liveupdate.create_session(f"vm{n}")
        for token, file in enumerate(files.values()):
            session.preserve(file, token)
    successor = machine.kexec(kernel)
    for n, files in enumerate(started):
        session = successor.liveupdate.retrieve_session(f"vm{n}")
        back = {name: session.retrieve(token) for token, name in enumerate(files)}
        if each:
            Vmm.resume(successor, VmmPlan(f"vm{n}"), back)
        session.finish()
    return time.process_time() - begin, resident_bytes() - before
