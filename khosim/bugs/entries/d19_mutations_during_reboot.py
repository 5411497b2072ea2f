"""D19: a session was closed after it had been written down for the successor."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest, sleeps
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelImage
from khosim.kernel.kexec import machine_kexec

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """One thread reboots, another one closes its session between serialization and jump."""
    kernel = boot(stage)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    image = kernel.kexec_file_load(KernelImage.build(stage.release, size="4M"))
    stage.tell("thread 1 calls reboot: session 'vm' and its memfd are written down")
    kernel.liveupdate.reboot()
    sleeps(stage, "thread 2 closes session 'vm'", session.close)
    stage.tell("thread 1 jumps")
    machine_kexec(kernel, image)
    stage.last_machine.resume()


BUG = Bug(
    id="D19",
    name="mutations-during-reboot",
    subject="liveupdate: block session mutations during reboot",
    commit="bb1328be35bf",
    broken="6.19 to 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_blocks_mutations": False},
    caught_by=("luo-preserved", "luo-serialized-live"),
    partly="two threads at once: here the second one is told when to come",
    story="""
On its way into the new kernel the reboot system call has all sessions written down. From there to
the jump it is a long way: devices are shut down, CPUs are stopped one by one, and user space on
them is still running.

Whoever closed a session in that time had its files unpreserved and the blocks freed that it had
been written to. The root for the successor still pointed there. Memory that is not preserved is
anybody's in the new kernel, so what it takes for sessions and files is what happens to lie there by
then.

The fix takes a lock for writing when the serialization begins and, where it succeeds, never gives
it back: who wants to change a session waits, and the kernel is gone before that ends.
""",
    scenario=scenario,
)
