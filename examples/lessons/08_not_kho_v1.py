"""Lesson 8: the version that said `kho-v1` and was not.

Two kernels that hand over to each other speak a common language: the bytes in memory. It has a
name, `compatible` in the root of the notes (lesson 2). The new kernel compares the name with its
own before it believes anything else. In 6.18 the language changed. The name did not.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import Machine
from khosim.errors import KernelPanic

# %% [markdown]
# ## From 6.17 to 6.18
#
# Before the tree of lesson 4 there were *bitmaps*: for each stretch of memory a row of bits, one
# for a page. The list of bitmaps says where each one is, and at which address its memory begins.

# %%
title("From 6.17 to 6.18")
machine = Machine("256M")
ram = machine.hardware.ram
kernel = machine.boot("6.17", cmdline="kho=on")
kernel.alloc_folios(20000, owner="guest")
pages = [0x2000000, 0x4800000]
for phys in pages:
    kernel.kho_preserve_phys(phys, 4096)
say(f"6.17 preserves the pages at {pages[0]:#x} and {pages[1]:#x}.")
successor = kernel.kexec(release="6.18")
say(f"6.18 says: {successor.messages[0]}")
say(f"It keeps {successor.pages.nr_pages('incoming')} pages as preserved.")
ask(machine)

# %% [markdown]
# No complaint in the log, but hundreds of pages are kept that nobody preserved: they are lost until
# somebody restarts the machine. `map-agrees` speaks for each stretch of them.
#
# ## Why
#
# Read the list as it lies in memory. It begins with an address (0: there is no further part of it),
# an order, and how many bitmaps follow.

# %%
title("Why")
chunk = kernel.kho_out.tree.root
order, count = ram.read_u32(chunk + 8), ram.read_u32(chunk + 12)
say(f"The list at {chunk:#x}: order {order}, {count} bitmaps.")
for n in range(count):
    start, bitmap = ram.read_u64(chunk + 16 + 16 * n), ram.read_u64(chunk + 24 + 16 * n)
    say(f"From {start:#x} on: bitmap at {bitmap:#x}.")

# %% [markdown]
# How long is a bitmap? The list does not say. It is a constant in the source: 512 bytes in 6.17,
# 4096 bytes in 6.18 (a2fff99f92da). Each kernel takes its own for granted. The bitmaps of 6.17 lie
# 512 bytes apart from each other, and 6.18 reads 4096 bytes of each: its neighbours, and whatever
# else lies behind it, as if these were bits of the same row.
#
# On a machine of half the size some of these bits stand for memory that there is not:

# %%
title("The same on a smaller machine")
machine = Machine("128M")
kernel = machine.boot("6.17", cmdline="kho=on", kernel_size="4M")
kernel.alloc_folios(20000, owner="guest")
for phys in pages:
    kernel.kho_preserve_phys(phys, 4096)
try:
    kernel.kexec(release="6.18")
except KernelPanic as panic:
    say(f"6.18 dies: {panic}")

# %% [markdown]
# ## From 6.18 to 6.17
#
# A rollback: the new kernel has a bug, so one goes back. 6.17 reads the first eighth of each
# bitmap.

# %%
title("From 6.18 to 6.17")
machine = Machine("256M")
kernel = machine.boot("6.18", cmdline="kho=on")
kernel.alloc_folios(20000, owner="guest")
for phys in pages:
    kernel.kho_preserve_pages(phys >> 12, 1)
successor = kernel.kexec(release="6.17")
say(f"6.17 says: {successor.messages[0]}")
for phys in pages:
    say(f"The page at {phys:#x} is {successor.page(phys >> 12).kind}.")
ask(machine)

# %% [markdown]
# This time preserved memory is lost, again without a word.
#
# ## The repair
#
# The name is there for this very case. With another name 6.18 refuses what it does not understand.
# In Linux that came with 7.1 (`kho-v3`). Here we give 6.18 a name of its own:

# %%
title("The repair")
machine = Machine("256M")
kernel = machine.boot("6.17", cmdline="kho=on")
kernel.alloc_folios(20000, owner="guest")
for phys in pages:
    kernel.kho_preserve_phys(phys, 4096)
successor = kernel.kexec(release="6.18+kho_compatible=kho-v2")
for line in successor.messages[:2]:
    say(f"6.18 says: {line}")
say(f"It keeps {successor.pages.nr_pages('incoming')} pages as preserved.")
ask(machine)

# %% [markdown]
# The memory is lost as well, but everybody knows: the kernel says it, and who plans updates can
# test it. `khosim matrix` tries every pair of releases and tells which can hand over to which.
#
# **Whoever changes the bytes changes the name. A constant that both sides must know is part of the
# bytes.**
