"""Lesson 11: design your own format.

Is the tree of lesson 4 the best one can do? Try something simpler: a row of bytes, one for each
page of the machine. khosim runs a kernel with your format, and judges it as it judges Linux.
"""

# %%
from __future__ import annotations

from own_format import FLAGS, NAMELESS, RELEASE
from telling import ask, say, title

from khosim import Machine
from khosim.errors import KernelPanic
from khosim.explore.campaign import Campaign
from khosim.explore.hazards import fixed

# %% [markdown]
# A format is a class with four methods (mark a block, unmark it, read the map, free it), and a
# function that reads the map for the invariants. Both are in `own_format.py`, beside this file:
# open it, it is short. The two readers share no code on purpose: else a mistake would be made
# twice, and nobody would see it.
#
# ## First idea: a 1 for each preserved page


# %%
def hand_over(release):
    """Preserve a block of 4 pages, jump, restore."""
    machine = Machine("64M")
    kernel = machine.boot(release, cmdline="kho=on")
    block = kernel.alloc_folio(order=2, owner="guest")
    block.write(3 * 4096, b"the fourth page")
    kernel.kho_preserve_folio(block)
    ask(machine)
    successor = kernel.kexec()
    restored = successor.kho_restore_folio(block.phys)
    assert restored is not None
    say(f"Preserved: a block of {block.nr_pages} pages. Restored: {restored.nr_pages}.")
    for pfn in range(block.pfn, block.pfn + 4):
        say(f"  page {pfn << 12:#x} is {successor.page(pfn).kind}")
    ask(machine)


title("A 1 for each preserved page")
hand_over(FLAGS)

# %% [markdown]
# No invariant speaks: what the map says is what the new kernel does. But we preserved one block of
# four pages, and the map says four blocks of one. The owner asks for its block and gets a page.
# Three pages stay behind: nobody will ever ask for them.
#
# **The invariants hold the kernel to the bytes. What the bytes shall mean, only you know.** So
# write down what you expect, too: `restored.nr_pages == block.nr_pages`.
#
# ## Second idea: the order of each block
#
# A byte has room for the order. It stands where the block begins.

# %%
title("The order of each block")
hand_over(RELEASE)

# %% [markdown]
# The block is whole.
#
# ## The name
#
# Your kernel takes over from itself. What if a plain Linux 7.3 comes after it, say, in a rollback?
# `NAMELESS` is the same format, but its notes still bear the name of Linux's own format, `kho-v4`.

# %%
title("The name")


def roll_back(release):
    """Hand over to Linux 7.3."""
    machine = Machine("64M")
    kernel = machine.boot(release, cmdline="kho=on")
    kernel.kho_preserve_folio(kernel.alloc_folio(order=2, owner="guest"))
    try:
        successor = kernel.kexec(release="7.3")
    except KernelPanic as panic:
        say(f"Linux 7.3 dies: {panic}")
    else:
        say(f"Linux 7.3 says: {successor.messages[0]}")
        ask(machine)


roll_back(NAMELESS)

# %% [markdown]
# Linux read the row as a tree: its first bytes as addresses of tables. This is lesson 8. The repair
# is a name of one's own. With it Linux refuses, says so, and lives:

# %%
roll_back(RELEASE)

# %% [markdown]
# ## Is it good?
#
# Let the search of lesson 10 have a go at it. `fixed` switches the known bugs of 7.3 off, as far as
# they are not the format's.

# %%
title("Is it good?")
campaign = Campaign("2", "pages", fixed(RELEASE))
campaign.run(runs=12)
say(f"{campaign.explored} random programs: {len(campaign.findings)} findings.")
for finding in campaign.findings:
    say(" ".join(step.kind for step in finding.steps))

# %% [markdown]
# Two findings, both as in Linux 7.3 itself: a page can be preserved as part of two blocks
# (`docs/hazards/preserve-overlap.md`), and who preserves a folio twice and takes it back once has
# lost it (`docs/hazards/preserve-twice.md`). The switches make Linux's tree look first; a row of
# your own would have to look as well.
#
# And what does it cost? The tree of Linux takes six pages for one block, and not many more for a
# thousand. The row takes a byte for each page of the machine, whatever is preserved:

# %%
for ram in ("64M", "1G", "1T"):
    size = int(ram[:-1]) << {"M": 20, "G": 30, "T": 40}[ram[-1]]
    say(f"{ram:>4} of RAM: {size >> 22:,} KiB in one piece")

# %% [markdown]
# One piece of 256 MiB is more than the page allocator ever gives (4 MiB). So a real machine cannot
# even start with it. That is what the levels of the tree are for.
#
# `khosim matrix --from own_format.py,7.3 --to own_format.py,7.3` hands over between your kernel and
# Linux: each must refuse the other, and say so.
