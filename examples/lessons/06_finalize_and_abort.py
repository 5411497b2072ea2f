"""Lesson 6: finalize and abort in 6.16, stateless in 7.3.

In the first releases with KHO (6.16 to 6.18) preserving was not enough. User space had to
*finalize* the handover before the kexec, and could *abort* it. Since 7.1 there is no such step.
This lesson shows what the step cost.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim import KernelError, KhoSimError, Machine


def host(release):
    """A kernel of a release, and a page that a driver has preserved."""
    machine = Machine("64M")
    kernel = machine.boot(release, cmdline="kho=on")
    page = kernel.alloc_folio(owner="driver")
    page.write(0, b"precious")
    kernel.kho_preserve_folio(page)
    return machine, kernel, page


# %% [markdown]
# ## Forgotten
#
# Linux 6.16. The page is preserved, and the host is updated. Nobody wrote 1 to
# `/sys/kernel/debug/kho/out/finalize`.

# %%
title("Linux 6.16: forgotten")
machine, kernel, page = host("6.16")
successor = kernel.kexec(finalize=False)
say(f"The new kernel says: {successor.messages[0]}")
say(f"The page is {successor.page(page.pfn).kind}.")
ask(machine)

# %% [markdown]
# The new kernel was given the address of the notes (lesson 2), but nobody had written them: the
# page was empty. `handover-wellformed` sees it. The kernel does too, and starts without the
# handover. All that was preserved is lost.
#
# ## Too late
#
# Finalizing writes down all that is preserved *now*. So nothing can be preserved afterwards. But a
# host lives on, up to the kexec: drivers allocate, guests write.

# %%
title("Linux 6.16: too late")
machine, kernel, page = host("6.16")
kernel.debugfs.write("out/finalize", 1)
say("Finalized.")
try:
    kernel.kho_preserve_folio(kernel.alloc_folio(owner="driver"))
except KernelError as refused:
    say(f"One page more: {refused}")

# %% [markdown]
# ## Aborted
#
# So one aborts, preserves one page more, finalizes again. What does an abort take back?

# %%
title("Linux 6.16: aborted")
kernel.debugfs.write("out/finalize", 0)
say("Aborted.")
late = kernel.alloc_folio(owner="driver")
kernel.kho_preserve_folio(late)
kernel.debugfs.write("out/finalize", 1)
say("One page more is preserved; finalized again.")
successor = kernel.kexec()
say(f"The new kernel says: {successor.messages[0]}")
say(f"The page of before the abort is {successor.page(page.pfn).kind}.")
say(f"The page of after the abort is {successor.page(late.pfn).kind}.")
ask(machine)

# %% [markdown]
# The abort threw the whole list away: not only what finalizing had added. The driver was not told.
# It had preserved its page, and no call of its had failed. And no invariant speaks yet: what was
# handed over arrived. Only now the driver's new half asks for its page:

# %%
restored = successor.kho_restore_folio(page.phys)
say(f"Restored: {restored}, {restored.read(0, 8)!r}")
ask(machine)

# %% [markdown]
# Worse than an error: 6.16 *gives* it the page, for it does not look whether it was handed over.
# The page is free, too. Soon it has two owners. `one-owner-per-page` and `restored-once` say so.
# In 6.18 a mark in the page's description makes restoring fail:

# %%
title("Linux 6.18: at least an error")
machine, kernel, page = host("6.18")
for value in (1, 0, 1):
    kernel.debugfs.write("out/finalize", value)
successor = kernel.kexec()
say(f"Restored: {successor.kho_restore_folio(page.phys)}. {successor.messages[-1]}")

# %% [markdown]
# ## The repair
#
# The repair in 6.19 (99cd2ffac697) was: an abort takes back what finalizing did, and nothing else.
# khosim can put one repair into an older kernel. Every difference between releases has a name.

# %%
title("Linux 6.18 with the repair")
machine, kernel, page = host("6.18+abort_unpreserves=off")
for value in (1, 0, 1):
    kernel.debugfs.write("out/finalize", value)
successor = kernel.kexec()
say(f"Restored: {successor.kho_restore_folio(page.phys)}.")
ask(machine)

# %% [markdown]
# The better repair came with 7.1: the list is always valid. The tree of lesson 4 lies in memory in
# the form in which the next kernel reads it. There is nothing to finalize and nothing to abort,
# nothing to forget and nothing to be too late for. Such a design is called *stateless*.

# %%
title("Linux 7.3")
machine, kernel, page = host("7.3")
try:
    kernel.debugfs.write("out/finalize", 1)
except KhoSimError as refused:
    say(f"{refused}.")
late = kernel.alloc_folio(owner="driver")
kernel.kho_preserve_folio(late)
successor = kernel.kexec()
assert successor.kho_restore_folio(page.phys)
assert successor.kho_restore_folio(late.phys)
say("Both pages were restored.")
ask(machine)
