"""Lesson 7: LUO and a guest's memory.

So far the kernel's own users preserved pages. The memory of a virtual machine belongs to a program.
In Linux it is often a *memfd*: a file that lies in memory only, and has a file descriptor. Programs
preserve files through LUO, the *Live Update Orchestrator*, by the device `/dev/liveupdate`.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import KernelError, Machine

OPTIONS = "kho=on liveupdate=on"


def guest(kernel):
    """8 MiB of memory with something in it."""
    memory = kernel.memfd("vm", size="8M")
    memory.write(0, b"the guest's kernel")
    memory.write(5 << 20, b"the guest's database")
    return memory


# %% [markdown]
# ## How it goes
#
# An *agent* (a program that looks after the update) opens a *session*, and puts the guest's memfd
# into it under a number, the *token*. After the kexec the new agent asks for the session by its
# name, and for the file by its token.

# %%
title("How it goes")
machine = Machine("64M")
kernel = machine.boot(cmdline=OPTIONS)
memory = guest(kernel)
session = kernel.liveupdate.create_session("vm")
session.preserve(memory, token=1)
memory.write(7 << 20, b"and still running")
try:
    memory.ftruncate("16M")
except KernelError as refused:
    say(f"The guest goes on, but its memory cannot grow now: {refused}")

successor = kernel.kexec()
say(f"The new kernel says: {next(one for one in successor.messages if one[:4] == 'luo:')}")
session = successor.liveupdate.retrieve_session("vm")
memory = session.retrieve(1)
for offset, data in memory.data():
    text = data.rstrip(b"\0")
    say(f"At {offset >> 20} MiB: {text.decode()}")
session.finish()
session.close()
ask(machine)

# %% [markdown]
# The pages are those of the old memfd, at their old addresses: nothing was copied. What LUO added
# is a note for each session and file, so that the new kernel can put a file around the pages
# again: its size, its seals, which page is at which offset.
#
# ## The agent dies
#
# A session is an open file of the agent. What if the agent crashes a second before the kexec?

# %%
title("The agent dies")
machine = Machine("64M")
kernel = machine.boot(cmdline=OPTIONS)
vmm, agent = kernel.process("vmm"), kernel.process("agent")
memory = guest(kernel)
vmm.install(memory)
agent.install(kernel.liveupdate.create_session("vm"))
next(iter(agent.files.values())).preserve(memory, token=1)
say(f"{agent} holds the session, {vmm} the guest.")
agent.kill()
successor = kernel.kexec()
try:
    successor.liveupdate.retrieve_session("vm")
except KernelError as refused:
    say(f"The new agent asks for its session: {refused}")
ask(machine)

# %% [markdown]
# When a process ends, the kernel closes its files, and a session that is closed is called off. Its
# pages are unpreserved. The kexec went through all the same: the kernel cannot know that somebody
# wanted to have a session. No invariant speaks. **LUO keeps what is in a session when the kernel
# jumps; that a session is there, the agent has to see to.**
#
# The repair is outside of the kernel: who starts the kexec must be the one who holds the sessions,
# or must ask. Here it is one process that does both.

# %%
title("One process does both")
machine = Machine("64M")
kernel = machine.boot(cmdline=OPTIONS)
agent = kernel.process("agent")
memory = guest(kernel)
agent.install(memory)
agent.install(kernel.liveupdate.create_session("vm"))
agent.files[4].preserve(memory, token=1)
assert not agent.exited
successor = kernel.kexec()
session = successor.liveupdate.retrieve_session("vm")
say(f"Tokens in the session: {session.tokens}.")

# %% [markdown]
# ## Retrieved, and the second kexec
#
# As in lesson 5, a promise is for one kexec. The session of the predecessor is not a session of
# this kernel.

# %%
title("The second kexec")
memory = session.retrieve(1)
session.finish()
session.close()
again = successor.liveupdate.create_session("vm")
again.preserve(memory, token=1)
third = successor.kexec()
session = third.liveupdate.retrieve_session("vm")
offset, data = next(iter(session.retrieve(1).data()))
text = data.rstrip(b"\0")
say(f"Generation 2 has the guest: {text.decode()}.")
session.finish()
session.close()
ask(machine)

# %% [markdown]
# *Finish* says: I have all that I want, free the notes, and what nobody retrieved. Without it the
# notes stay; with it too early, a guest is gone.
