"""Lesson 2: reserve_mem.

You want to see the last words of a kernel that died, after the reboot. So you need memory that both
kernels can find. `reserve_mem=` on the kernel's command line sets such memory aside, under a name:

    reserve_mem=64K:4096:oops      64 KiB, at a multiple of 4096, called "oops"

The kernel chooses the address. Will the next kernel choose the same?
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import Machine
from khosim.abi.fdt.text import blob_to_dts

LAST_WORDS = b"BUG: unable to handle page fault"


def region(kernel):
    """Address and size of the region "oops", in bytes."""
    return next((start, size) for name, start, size in kernel.reserve_mem.regions if name == "oops")


# %% [markdown]
# ## Without KHO
#
# The kernel reserves the region early in its boot, near the end of memory, as far up as there is
# room. The next kernel does the same: it is the same kernel, with the same command line.

# %%
title("Without KHO")
machine = Machine("64M")
ram = machine.hardware.ram
kernel = machine.boot(cmdline="reserve_mem=64K:4096:oops")
old, _ = region(kernel)
ram.write(old, LAST_WORDS, kernel.by("pstore"))
say(f"Generation 0 puts oops at {old:#x} and writes its last words there.")

successor = kernel.kexec()
new, _ = region(successor)
say(f"Generation 1 puts oops at {new:#x}, and finds {ram.read(new, 8)!r}.")
writer = ram.last_writer(old)
assert writer is not None
say(f"At the old place is {ram.read(old, 8)!r}.")
say(f"It was written last by {writer.symbol}, in generation {writer.generation}.")
ask(machine)

# %% [markdown]
# Two things went wrong. The region is somewhere else: a boot loader had put the initrd (the
# archive with the first programs) at the end of memory, kexec puts it elsewhere, and so the end of
# memory is free this time. And the old place was written over: `relocate_kernel` is the last thing
# that an old kernel does, it copies the new kernel to where it shall be. Nobody had told it that
# this memory matters.
#
# No invariant speaks, again: without KHO nothing was promised.
#
# ## With KHO

# %%
title("With KHO")
machine = Machine("64M")
ram = machine.hardware.ram
kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
old, size = region(kernel)
ram.write(old, LAST_WORDS, kernel.by("pstore"))
say(f"Generation 0 puts oops at {old:#x} and writes its last words there.")

successor = kernel.kexec()
say(f"Generation 1 says: {next(line for line in successor.messages if 'oops' in line)}")
new, _ = region(successor)
say(f"It has oops at {new:#x}, and finds {ram.read(new, len(LAST_WORDS))!r}.")
assert new == old
ask(machine)

# %% [markdown]
# ## How did it know?
#
# Generation 0 preserved the pages of the region. And it left a note, for the successor can only
# restore what it knows the address of. The note is a *device tree*: a small tree of names and
# values in one piece of memory, a format that kernels know from hardware descriptions. Generation 1
# gets one address from the jump, that of the root of all notes:

# %%
title("How did it know?")
say(f"The root is at {successor.kho_in.fdt_phys:#x}:")
print(blob_to_dts(successor.debugfs.read("in/fdt")))

# %% [markdown]
# `compatible` says which format the notes have. `preserved-memory-map` is the address of the list
# of all preserved pages; lesson 4 reads it bit by bit. Below are the users of KHO, each with the
# address and size of a note of its own. Numbers are 8 bytes, lowest byte first.
#
# `memblock` is the part of the kernel that reserved our region. Its note:

# %%
print(blob_to_dts(successor.debugfs.read("in/sub_fdts/memblock")))
say(f"start is {old:#x} and size is {size:#x}, lowest byte first.")

# %% [markdown]
# So the chain is: jump -> root -> the user's note -> the user's pages. All of it lies in memory,
# all of it is preserved, and nothing else crosses.
#
# ## A trap
#
# Somebody thinks that 64 KiB are not enough, and changes the command line for the next kernel.

# %%
title("A trap")
successor = successor.kexec(cmdline="kho=on reserve_mem=128K:4096:oops")
for line in successor.messages:
    if "oops" in line:
        say(f"Generation 2 says: {line}")
new, _ = region(successor)
say(f"It has oops at {new:#x}, and finds {ram.read(new, 8)!r}.")
ask(machine)

# %% [markdown]
# The note says one size, the command line another. The kernel takes a new region and says so in its
# log. The last words are lost. That much is documented.
#
# But an invariant speaks as well: the new region lies in *scratch*, and is preserved. That is a bug
# of Linux 7.3, which khosim found (docs/hazards/region-in-scratch.md). What scratch is, and why
# nothing in it can be preserved, is the next lesson. The way out for a user: never change the size
# of a region by kexec. Take a new size with a real reboot.

# %%
title("The way out")
machine = Machine("64M")
kernel = machine.boot(cmdline="kho=on reserve_mem=128K:4096:oops")
successor = kernel.kexec()
assert region(successor) == region(kernel)
say(f"After a real reboot with 128K, oops is at {region(successor)[0]:#x} in both generations.")
ask(machine)
