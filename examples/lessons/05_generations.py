"""Lesson 5: a second and a third generation.

A host is updated more than once. What was preserved for generation 1 is in generation 2 only if
generation 1 preserves it too. In between pages are restored, used, freed: time for mistakes.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim.explore.kit import Stage

# %% [markdown]
# ## Nothing is preserved for ever
#
# Three pages are preserved. Generation 1 restores the first and preserves it again. It restores the
# second and only uses it. Nobody asks for the third.
#
# (A `Stage` is a machine of `khosim explore`, lesson 10. It asks some questions more.)

# %%
title("Nothing is preserved for ever")
machine = Stage("64M")
kernel = machine.boot(cmdline="kho=on")
pages = [kernel.alloc_folio(owner="guest") for _ in range(3)]
for name, page in zip((b"first", b"second", b"third"), pages, strict=True):
    page.write(0, name)
    kernel.kho_preserve_folio(page)

kernel = kernel.kexec()
first = kernel.kho_restore_folio(pages[0].phys)
second = kernel.kho_restore_folio(pages[1].phys)
kernel.kho_preserve_folio(first)
for name, page in zip(("first", "second", "third"), pages, strict=True):
    say(f"Generation 1: the {name} page is {kernel.page(page.pfn).kind}.")

kernel = kernel.kexec()
for name, page in zip(("first", "second", "third"), pages, strict=True):
    say(f"Generation 2: the {name} page is {kernel.page(page.pfn).kind}.")
ask(machine)

# %% [markdown]
# Each kernel begins with an empty tree. What it does not preserve itself is lost at the next jump,
# also what it never restored. No invariant speaks: each promise was for one kexec.
#
# See the third page in generation 1: *incoming*. It is nobody's and cannot be used, not even freed,
# until somebody restores it. A user of KHO that no longer exists in the new kernel leaves such
# memory behind. The log tells which kexec this is:

# %%
say(next(line for line in kernel.messages if "exec from" in line))

# %% [markdown]
# ## Freed, and still preserved
#
# Now a mistake. Generation 1 restores a page and preserves it again. Later the guest ends, and the
# page is freed. Somebody forgets to take back the promise. The page is given to the page cache.

# %%
title("Freed, and still preserved")


def until(kernel, pfn):
    """Allocate until the page ``pfn`` comes, and free the others."""
    taken = [kernel.alloc_folio(owner="page cache")]
    while taken[-1].pfn != pfn:
        taken.append(kernel.alloc_folio(owner="page cache"))
    page = taken.pop()
    for other in taken:
        other.put()
    return page


machine = Stage("64M")
kernel = machine.boot(cmdline="kho=on")
page = kernel.alloc_folio(owner="guest")
page.write(0, b"a guest's secret")
kernel.kho_preserve_folio(page)

kernel = kernel.kexec()
restored = kernel.kho_restore_folio(page.phys)
kernel.kho_preserve_folio(restored)
restored.put()
say(f"Generation 1 frees the page at {page.phys:#x}, which is still preserved.")
ask(machine)
cached = until(kernel, page.pfn)
cached.write(0, b"a file's content", by="page cache")
say(f"It gives the page at {cached.phys:#x} to the page cache.")

kernel = kernel.kexec()
restored = kernel.kho_restore_folio(page.phys)
say(f"Generation 2 restores it for the guest's owner: {restored.read(0, 16)!r}.")

# %% [markdown]
# `preserved-is-held` speaks at once. If nobody listens, generation 2 restores a page that holds
# somebody else's data. No kernel can notice: KHO keeps a page, whoever wrote to it.
#
# ## The repair
#
# First take the promise back (*unpreserve*), then free.

# %%
title("The repair")
machine = Stage("64M")
kernel = machine.boot(cmdline="kho=on")
page = kernel.alloc_folio(owner="guest")
kernel.kho_preserve_folio(page)
kernel = kernel.kexec()
restored = kernel.kho_restore_folio(page.phys)
kernel.kho_preserve_folio(restored)
kernel.kho_unpreserve_folio(restored)
restored.put()
ask(machine)
kernel = kernel.kexec()
say(f"Generation 2: the page is {kernel.page(page.pfn).kind}, as it should be.")

# %% [markdown]
# ## Many generations
#
# A user of KHO who does it right does the same in each generation: restore, use, preserve.

# %%
title("Many generations")
machine = Stage("64M")
kernel = machine.boot(cmdline="kho=on")
page = kernel.alloc_folio(owner="counter")
for _ in range(5):
    page.write(0, bytes([page.read(0, 1)[0] + 1]))
    kernel.kho_preserve_folio(page)
    kernel = kernel.kexec()
    page = kernel.kho_restore_folio(page.phys)
say(f"After {machine.generation} kexecs the page at {page.phys:#x} says {page.read(0, 1)[0]}.")
ask(machine)
