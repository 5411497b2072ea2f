"""Two guests of several GiB live through a live update of the kernel beneath them.

The memory of a guest is a memfd, which a session of the Live Update Orchestrator carries into the
next kernel. Nothing else gets there: each kernel is built from the bytes in RAM.
"""

from __future__ import annotations

from khosim import KernelError, Machine
from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import Memfd

machine = Machine(ram="16G", nodes=2)
kernel = machine.boot(cmdline="kho=on liveupdate=on")


def preserve(kernel: Kernel, guests: dict[str, Memfd]) -> None:
    """One session for each guest: what the agent does before an update."""
    for name, memory in guests.items():
        kernel.liveupdate.create_session(name).preserve(memory, token=1)


def retrieve(kernel: Kernel, names: list[str]) -> dict[str, Memfd]:
    """The guests' memory from the sessions: what the agent does after an update."""
    guests = {}
    for name in names:
        session = kernel.liveupdate.retrieve_session(name)
        guests[name] = session.retrieve(1)
        session.finish()
        session.close()
    return guests


guests = {"vm-a": kernel.memfd("vm-a", size="4G"), "vm-b": kernel.memfd("vm-b", size="2G", nid=1)}
guests["vm-a"].write(0, b"a's first page")
guests["vm-b"].write(1 << 30, b"b's second GiB")
preserve(kernel, guests)
try:
    guests["vm-a"].ftruncate("8G")
except KernelError as refused:
    print(f"while preserved: {refused}")

kernel = kernel.kexec()
print(next(line for line in kernel.messages if line.startswith("luo:")))
guests = retrieve(kernel, ["vm-a", "vm-b"])
for name, memory in guests.items():
    found = b"".join(data.strip(b"\0") for _, data in memory.data())
    print(f"{name}: {memory.size >> 30}G, {found.decode()}")
try:
    kernel.liveupdate.retrieve_session("vm-a")
except KernelError as refused:
    print(f"once only: {refused}")

print(f"violations: {machine.check()}")
