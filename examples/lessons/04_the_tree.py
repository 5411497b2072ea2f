"""Lesson 4: the tree of preserved pages, bit by bit.

The next kernel gets one number that leads to all preserved memory: `preserved-memory-map`, the
address of a tree (lesson 2). A host preserves millions of pages, so the tree must be small and
quick. In this lesson you read it by hand, from the bytes in memory.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import Machine

# %% [markdown]
# ## One block, one number
#
# Pages are preserved in *blocks* of 1, 2, 4, 8, ... pages. A block of 2 to the power of `order`
# pages begins at a multiple of its own size. So an address and an order tell all about a block. KHO
# makes one number of the two, the *key*:
#
# * the address divided by the block's size,
# * and above it a single 1, at a place that tells the order.
#
# With pages of 4096 bytes (2 to the power of 12) the 1 is at bit 52 for order 0, at bit 51 for
# order 1, and so on.


# %%
def key_of(phys, order):
    """The key of the block at an address."""
    return 1 << (52 - order) | phys >> (12 + order)


def block_of(key):
    """Address and order of a key: the highest 1 tells the order."""
    order = 52 - (key.bit_length() - 1)
    return (key ^ 1 << (52 - order)) << (12 + order), order


title("One block, one number")
machine = Machine("64M")
ram = machine.hardware.ram
kernel = machine.boot(cmdline="kho=on")
block = kernel.alloc_folio(order=3, owner="guest")
block.write(0, b"eight pages")
kernel.kho_preserve_folio(block)
key = key_of(block.phys, 3)
say(f"The block of 8 pages at {block.phys:#x} has the key {key:#x}.")
say(f"The key {key:#x} is the block at {block_of(key)[0]:#x} of order {block_of(key)[1]}.")

# %% [markdown]
# ## The way down
#
# A key has 53 bits. The tree has six levels. The five upper ones are *tables*: a page of 512
# addresses, each of a table one level down, or 0 for none. Nine bits of the key choose the entry.
# The lowest level are *leaves*: a page of 32768 bits, one for each block. The last fifteen bits of
# the key choose the bit. It is 1 if the block is preserved.
#
# It is built like the page tables of a CPU, with bits at the end. We go down with the key:

# %%
title("The way down")
node = kernel.kho_out.tree.root
say(f"The root table is at {node:#x}.")
for level, shift in ((5, 51), (4, 42), (3, 33), (2, 24), (1, 15)):
    entry = key >> shift & 511
    below = ram.read_u64(node + 8 * entry)
    say(f"level {level}: entry {entry:3} of the table at {node:#x} says {below:#x}")
    node = below
leaf, bit = node, key & 0x7FFF
word = ram.read_u64(leaf + 8 * (bit // 64))
say(f"leaf: bit {bit} of the bits at {leaf:#x} is {word >> bit % 64 & 1}")

# %% [markdown]
# The new kernel does the opposite: it goes through all tables and leaves, and finds every bit that
# is 1. Where a bit is, tells its key, and the key tells the block. Let us do that too.


# %%
def keys_in(node, level, prefix=0):
    """All keys of the tree below a node, in order."""
    if level:
        for entry in range(512):
            below = ram.read_u64(node + 8 * entry)
            if below:
                yield from keys_in(below, level - 1, prefix << 9 | entry)
    else:
        bits = int.from_bytes(ram.read(node, 4096), "little")
        while bits:
            lowest = bits & -bits
            yield prefix << 15 | lowest.bit_length() - 1
            bits ^= lowest


title("All that is preserved")
for one in keys_in(kernel.kho_out.tree.root, 5):
    phys, order = block_of(one)
    say(f"key {one:#15x}: {1 << order} pages at {phys:#x}")

# %% [markdown]
# Our block, and single pages: the root of the notes and a note of the kernel itself, as in lesson
# 2. They have to survive too.
#
# **Why the same address, again:** there is one bit for a block, and its place *is* the address. The
# format cannot say "this page is now elsewhere", and need not.
#
# Large blocks have small keys: they come first. A leaf has 32768 bits: that is 128 MiB of single
# pages, or 64 GiB of blocks of 2 MiB. So the tree stays small, also on hosts with terabytes.
#
# ## One wrong bit
#
# The tree's own pages are not in the tree. They needn't be: the new kernel reads them first of all,
# and until then it touches nothing but scratch (lesson 3). So the tree must not lie in scratch
# either. And nobody must write to it on the way. What if somebody does? We stop the machine after
# the old kernel's jump, before the new kernel's first instruction, and move one bit by one place.

# %%
title("One wrong bit")
machine.load_successor(kernel)
at = leaf + 8 * (bit // 64)
word = ram.read_u64(at)
ram.write_u64(at, word ^ 1 << bit % 64 ^ 1 << (bit + 1) % 64, (0, "a stray write"))
successor = machine.resume()
say(f"The new kernel says: {successor.messages[0]} It has noticed nothing.")
say(f"The page at {block.phys:#x} is {successor.page(block.pfn).kind}.")
wrong = block.phys + block.len_bytes
say(f"The page at {wrong:#x} is {successor.page(wrong >> 12).kind}. Nobody had preserved it.")
ask(machine)

# %% [markdown]
# `handover-intact` says which page was changed and by whom; `map-agrees` says what came of it.
# Eight pages are kept that nobody wanted, and the guest's pages are free to be overwritten. The
# kernel itself has no way to notice: there is no checksum.
#
# ## Without the stray write

# %%
title("Without the stray write")
machine = Machine("64M")
kernel = machine.boot(cmdline="kho=on")
block = kernel.alloc_folio(order=3, owner="guest")
block.write(0, b"eight pages")
kernel.kho_preserve_folio(block)
successor = kernel.kexec()
restored = successor.kho_restore_folio(block.phys)
assert restored is not None
say(f"Restored: {restored.nr_pages} pages at {restored.phys:#x}, {restored.read(0, 11)!r}.")
again = successor.kho_restore_folio(block.phys)
say(f"A second time: {again}. {successor.messages[-1]}")
ask(machine)

# %% [markdown]
# Restoring tells the order, so the owner needs to remember the address only. And it goes once: a
# second owner gets nothing, and the kernel warns.
#
# Can you answer these now? What is scratch for? What breaks if a preserved page lies there? Why
# does a page keep its address? If not: lessons 3, 3 and 1.
