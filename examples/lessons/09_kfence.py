"""Lesson 9: a KFENCE page in scratch.

Linux 6.16 to 6.18-rc5 had a bug that showed itself once in a while, on some machines, after the
second update. You know all its parts by now: the map of preserved pages, scratch, and generations.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import Machine
from khosim.kernel.image import KernelConfig
from khosim.kernel.release import find_release


def first_kernel(release):
    """A kernel with KFENCE."""
    config = KernelConfig(release=find_release(release), kfence_objects=63)
    machine = Machine("128M")
    return machine, machine.boot(config=config, cmdline="kho=on", kernel_size="4M", initrd="1M")


def preserve(kernel):
    """Preserve one page."""
    page = kernel.alloc_folio(owner="guest")
    page.write(0, b"precious")
    kernel.kho_preserve_folio(page)
    return page


# %% [markdown]
# ## The first update goes well
#
# KFENCE is a debugger that runs in production. Now and then `kmalloc`, the function with which the
# kernel gets small pieces of memory, takes a piece from KFENCE's own pool. There, who writes too
# far is caught. The pool is a stretch of memory that is set aside early in boot.

# %%
title("The first update goes well")
machine, kernel = first_kernel("6.17")
page = preserve(kernel)
successor = kernel.kexec()
say(f"Restored: {successor.kho_restore_folio(page.phys).read(0, 8)!r}.")
ask(machine)

# %% [markdown]
# ## The second one does not
#
# Generation 1 preserves a page, and is replaced by a kernel that is half a MiB larger.

# %%
title("The second one does not")
page = preserve(successor)
successor.finalize()
say("Before the jump:")
ask(machine)
third = successor.kexec(kernel_size="4608K")
say(f"After it generation 2 says: {third.messages[0]}")
say(f"But the preserved page is {third.page(page.pfn).kind}. The invariants:")
ask(machine)

# %% [markdown]
# `map-outside-scratch` had spoken before the jump. Then `relocate_kernel` copied the new kernel to
# scratch, over a page of the map (`handover-intact`), and the new kernel read parts of itself as
# the list of preserved pages.
#
# ## Why
#
# How does a page of the map get into scratch? Scratch belongs to the early boot and to movable
# memory (lesson 3), and `kmalloc` gives neither. Where is the page?

# %%
title("Why")
pool = successor.kfence.phys
for start, size in successor.scratch_areas():
    if start <= pool < start + size:
        say(f"KFENCE's pool begins at {pool:#x}, in scratch: {start:#x} to {start + size:#x}.")
pool = kernel.kfence.phys
say(f"In generation 0 it began at {pool:#x}.")
say(f"In scratch: {kernel.kho_scratch_overlap(pool, 4096)}.")

# %% [markdown]
# Generation 1 took a handover over, so its early boot lived in scratch, and so did what it set
# aside there: the pool. In generation 0 the pool was elsewhere; that is why the first update goes
# well. The bitmaps came from `kmalloc`. One of them happened to come from the pool. Nobody did
# anything forbidden. Two rules, each right, did not fit together.
#
# ## The repair
#
# Take whole pages from the page allocator, which never gives unmovable memory from scratch
# (fa759cd75bce). In khosim it is one switch:

# %%
title("The repair")
machine, kernel = first_kernel("6.17+metadata_from_slab=off")
successor = kernel.kexec()
page = preserve(successor)
third = successor.kexec(kernel_size="4608K")
say(f"Restored: {third.kho_restore_folio(page.phys).read(0, 8)!r}.")
ask(machine)

# %% [markdown]
# `khosim bugs A9` tells the same story, and `khosim bugs` lists the others.
