"""Lesson 1: what kexec forgets.

A running Linux can start another Linux without the firmware: `kexec` copies a new kernel into
memory and jumps to it. Memory is not cleared on the way. So is nothing lost? Let us see.

khosim simulates the machine and its kernels. A kernel here is a *generation*: the first one is
generation 0, the one it jumps to is generation 1. The machine survives, the kernels don't.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import Machine

# %% [markdown]
# ## A plain kexec
#
# A machine of 64 MiB boots. Somebody takes a page: 4096 bytes of memory at a physical address.
# Let it be a page of a virtual machine, a *guest*. Then the kernel is replaced.

# %%
title("A plain kexec")
machine = Machine("64M")
ram = machine.hardware.ram

kernel = machine.boot()
page = kernel.alloc_folio(owner="guest")
page.write(0, b"a guest's memory")
say(f"Generation 0 gives the page at {page.phys:#x} to a guest, which writes to it.")

successor = kernel.kexec()
say(f"Kexec. The bytes are still there: {ram.read(page.phys, 16)!r}.")

# %% [markdown]
# The bytes were left alone. But what does the new kernel know about that page?

# %%
say(f"But for generation 1 the page is {successor.page(page.pfn).kind}.")
fresh = successor.alloc_folio(owner="page cache", zero=True)
say(f"Somebody asks generation 1 for memory, and gets the page at {fresh.phys:#x}.")
writer = ram.last_writer(page.phys)
assert writer is not None
say(f"What is there now: {ram.read(page.phys, 16)!r}.")
say(f"Who wrote it last: {writer.symbol}, in generation {writer.generation}.")

# %% [markdown]
# **Kexec does not forget the bytes. It forgets who owns them.** Which page belongs to whom was
# written in the old kernel's own books, and the new kernel does not read those: it starts with
# empty books, in which all memory is free.
#
# khosim checks some thirty *invariants*: sentences that must be true of every handover. Ask them.

# %%
ask(machine)

# %% [markdown]
# None speaks, and rightly: nobody had promised to keep that page.
#
# ## The same with KHO
#
# KHO, *Kexec HandOver*, is that promise. With `kho=on` a kernel can *preserve* a page: it writes
# down, in memory, at which address the page is. The next kernel reads the note before it gives any
# page away.

# %%
title("The same with KHO")
machine = Machine("64M")
kernel = machine.boot(cmdline="kho=on")
page = kernel.alloc_folio(owner="guest")
page.write(0, b"a guest's memory")
kernel.kho_preserve_folio(page)
say(f"Generation 0 preserves the page at {page.phys:#x}.")

successor = kernel.kexec()
say(f"Generation 1 says: {successor.messages[0]}")
say(f"For generation 1 the page is {successor.page(page.pfn).kind}: kept, and nobody's yet.")
others = [successor.alloc_folio(owner="page cache") for _ in range(5000)]
assert page.pfn not in [other.pfn for other in others]
say(f"{len(others)} pages are given away. The guest's is not one of them.")

# %% [markdown]
# The memory is safe, but nobody can use it yet. The new owner has to ask for it, by its address:
# it *restores* the page. From then on it is a page like any other.

# %%
restored = successor.kho_restore_folio(page.phys)
assert restored is not None
say(f"Restored at {restored.phys:#x}: {restored.read(0, 16)!r}.")
ask(machine)

# %% [markdown]
# ## Why at the same address?
#
# One could also copy what is worth keeping: save it to a disk, load it again, anywhere. Here is why
# KHO does not. Memory is full of addresses. A guest's page tables hold the addresses of its pages;
# a network card was told to which address it shall write, and goes on writing while the kernels
# change. Two pages are enough to see it: the first holds the address of the second.

# %%
title("Why at the same address?")
machine = Machine("64M")
ram = machine.hardware.ram
kernel = machine.boot(cmdline="kho=on")
table, data = kernel.alloc_folio(owner="guest"), kernel.alloc_folio(owner="guest")
data.write(0, b"found")
table.write(0, data.phys.to_bytes(8, "little"))
say(f"The page at {table.phys:#x} says: my data is at {data.phys:#x}.")
kernel.kho_preserve_folio(table)
saved = table.read(0, 4096), data.read(0, 4096)  # as if on a disk

successor = kernel.kexec()

# %% [markdown]
# First the copy: both pages are loaded from the disk, into whatever pages are free.

# %%
copies = [successor.alloc_folio(owner="guest") for _ in saved]
for copy, content in zip(copies, saved, strict=True):
    copy.write(0, content)
where = int.from_bytes(copies[0].read(0, 8), "little")
say(f"The copies are at {copies[0].phys:#x} and {copies[1].phys:#x}.")
say(f"But the first one still says {where:#x}. That page is {successor.page(where >> 12).kind}.")

# %% [markdown]
# Somebody would have to find every address in every page, and change it. And a device cannot wait
# for that. Besides, a host with 2 TiB of guests would copy for many minutes, in which they stand
# still. Now the preserved page. Oh: we preserved the first page only. Preserving one page does not
# preserve what it points at. So once more, with both.

# %%
machine = Machine("64M")
kernel = machine.boot(cmdline="kho=on")
table, data = kernel.alloc_folio(owner="guest"), kernel.alloc_folio(owner="guest")
data.write(0, b"found")
table.write(0, data.phys.to_bytes(8, "little"))
for folio in (table, data):
    kernel.kho_preserve_folio(folio)
successor = kernel.kexec()
first = successor.kho_restore_folio(table.phys)
assert first is not None
where = int.from_bytes(first.read(0, 8), "little")
second = successor.kho_restore_folio(where)
assert second is not None
say(f"Both preserved. The page at {first.phys:#x} says {where:#x}; there is {second.read(0, 5)!r}.")
ask(machine)

# %% [markdown]
# What you know now:
#
# * Kexec leaves the bytes alone and forgets who owns them.
# * A preserved page keeps its bytes, and nobody else gets it.
# * It keeps its address, because other memory and devices know it by that address.
#
# How does anybody know, after the kexec, what to restore? The next lesson has the simplest answer.
