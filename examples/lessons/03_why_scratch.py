"""Lesson 3: why scratch.

The new kernel must not touch preserved memory. To know what is preserved, it has to read a list. To
read the list, it has to run. To run, it needs memory. Which memory may it take, as long as it has
not read the list? *Scratch* is the answer.
"""

# %%
from __future__ import annotations

from collections import Counter

from telling import ask, draw, say, title

from khosim import KernelError, Machine
from khosim.kernel.image import KernelConfig
from khosim.kernel.release import find_release
from khosim.view.recording import Recording

# %% [markdown]
# ## What a kernel does before it knows
#
# khosim can tell every step of a kernel. `machine.listen` collects them.

# %%
title("What a kernel does before it knows")
machine = Machine("64M")
kernel = machine.boot(cmdline="kho=on")
page = kernel.alloc_folio(owner="guest")
kernel.kho_preserve_folio(page)

steps = []
machine.listen(steps.append)
successor = kernel.kexec()
names = [step.symbol for step in steps]
known = names.index("kho_preserved_memory_reserve")
taken = [step for step in steps[:known] if step.symbol.startswith("memblock")]
taken = [step for step in taken if "alloc" in step.symbol and step.result]
say(f"Generation 1 reserves the first preserved page in its step {known}.")
say(f"Before that it has allocated memory {len(taken)} times.")

# %% [markdown]
# None of these may hit a preserved page, and nobody can ask which pages these are. So the first
# kernel, at a cold boot, sets areas aside in which *nothing will ever be preserved*. That is
# scratch. Their addresses go to the new kernel with the jump. Until it has read the list, it lives
# in scratch and touches nothing else. The new kernel itself and its initrd are copied there too.

# %%
areas = [(start, start + size) for start, size in kernel.scratch_areas() if size]
for start, end in areas:
    say(f"Scratch: {start:#x} to {end:#x}, {(end - start) >> 20} MiB.")
inside = [step.result for step in taken if any(s <= step.result < e for s, e in areas)]
low = [step.result for step in taken if step.result < 1 << 20]
assert len(inside) + len(low) == len(taken)
say(f"Of the {len(taken)} allocations {len(inside)} lie in scratch.")
assert len(low) == 1
say("The other one is below 1 MiB, where nothing is preserved either.")
kimage = kernel.kexec_image
for segment in kimage.segments:
    assert any(s <= segment.mem < e for s, e in areas)
say(f"All {len(kimage.segments)} pieces of the new kernel lie in scratch.")

# %% [markdown]
# ## What if a preserved page lies in scratch?
#
# Is scratch wasted, then, while a kernel runs? No: it is lent to those whose pages can be thrown
# out again, such as the cache of files. Such pages are called *movable*. Now a driver makes a
# mistake: it asks for movable memory, 40 MiB of it, and preserves that.

# %%
title("What if a preserved page lies in scratch?")
machine = Machine("64M")
story = Recording(machine)
ram = machine.hardware.ram
kernel = machine.boot(cmdline="kho=on")
blocks = [kernel.alloc_folio(order=9, owner="driver", movable=True) for _ in range(20)]
pfns = [block.pfn + n for block in blocks for n in range(block.nr_pages)]
for pfn in pfns:
    ram.write_u64(pfn << 12, pfn, kernel.by("driver"))
for block in blocks:
    kernel.kho_preserve_folio(block)
say(f"The driver preserves {len(pfns):,} pages. In each it has written the page's number.")
say("All works, and nobody notices. khosim's invariants look at where the pages are:")
ask(machine)

# %% [markdown]
# An invariant speaks *before* anything is lost. Now see what it warns of.

# %%
successor = kernel.kexec()
lost = [pfn for pfn in pfns if ram.read_u64(pfn << 12) != pfn]
say(f"After the kexec {len(lost)} pages hold something else.")
for writer, count in Counter(ram.last_writer(pfn << 12) for pfn in lost).items():
    say(f"{count} of them were written by {writer.symbol} in generation {writer.generation}.")
for segment in kernel.kexec_image.segments:
    if segment.mem <= lost[0] << 12 < segment.mem + segment.memsz:
        say(f"A piece of the new kernel's image goes to {segment.mem:#x}: the initrd.")
ask(machine, most=1)

# %% [markdown]
# A picture of all of memory, just before the jump. X is where the new kernel's image goes. P is
# what is preserved: it fills most of scratch, and where it ends, the first X lie over it.

# %%
title("Memory before the jump")
draw(next(moment for moment in story.moments if moment.stage == "jump"))

# %% [markdown]
# Three invariants, three harms:
#
# * `preserved-content`: the new kernel's initrd was copied over the driver's pages. It was to go to
#   scratch, and scratch is never asked whether it is free.
# * `one-owner-per-page`: the new kernel freed its initrd after boot, as always. Now the same pages
#   are preserved *and* free: they will be given to somebody else.
# * And `preserved-outside-scratch`, which had known it.
#
# With a few more early allocations other pages would be hit, or the kernel itself: what is lost
# depends on sizes that nobody thinks of. So it can go well for months.
#
# ## The repair
#
# Memory that shall be preserved must not be movable: such memory never comes from scratch.

# %%
title("The repair")
machine = Machine("64M")
story = Recording(machine)
kernel = machine.boot(cmdline="kho=on")
blocks = [kernel.alloc_folio(order=9, owner="driver") for _ in range(8)]
assert not any(kernel.kho_scratch_overlap(block.phys, block.len_bytes) for block in blocks)
for block in blocks:
    kernel.kho_preserve_folio(block)
say(f"{len(blocks)} blocks that are not movable: none lies in scratch.")
successor = kernel.kexec()
assert all(successor.kho_restore_folio(block.phys) for block in blocks)
say("All were restored.")
ask(machine)
draw(next(moment for moment in story.moments if moment.stage == "jump"))

# %% [markdown]
# P and S, scratch, are apart from each other, and X is in scratch only.
#
# A kernel that is built for finding bugs (CONFIG_KEXEC_HANDOVER_DEBUG) refuses the mistake:

# %%
config = KernelConfig(release=find_release("7.3"), debug=True)
kernel = Machine("64M").boot(config=config, cmdline="kho=on", kernel_size="4M")
try:
    kernel.kho_preserve_folio(kernel.alloc_folio(owner="driver", movable=True))
except KernelError as refused:
    say(f"{refused}")

# %% [markdown]
# ## Scratch stays where it is
#
# Could each kernel choose its own scratch? Only at a cold boot, when nothing is preserved. A kernel
# that took a handover over finds preserved memory anywhere, and cannot know whether it will go. So
# it takes the areas of its predecessor, and hands them on.

# %%
title("Scratch stays where it is")
kernel = Machine("64M").boot(cmdline="kho=on")
first = kernel.scratch_areas()
for _ in range(3):
    kernel = kernel.kexec()
    assert kernel.scratch_areas() == first
say("Three more generations later, scratch is where the first kernel put it.")

# %% [markdown]
# What you know now:
#
# * Scratch is where a new kernel lives until it knows what is preserved. Nothing may be preserved
#   there.
# * If a page is preserved there all the same, the new kernel is copied over it, or allocates there
#   before it knows.
# * Scratch is chosen once, by the kernel of the cold boot. `khosim plan` says how large it will be.
