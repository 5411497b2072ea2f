"""Lesson 10: find a bug yourself.

Nobody knows all orders in which things can happen. `khosim explore` tries them: it makes up
programs, runs them, and has every invariant judge. In this lesson it finds a real bug of Linux 7.3
in a second. You then read what it found, as you would read a bug report.
"""

# %%
from __future__ import annotations

from telling import ask, say, title

from khosim.errors import KernelPanic
from khosim.explore.campaign import Campaign
from khosim.explore.kit import Stage

# %% [markdown]
# ## A test by hand
#
# You want to test `reserve_mem=` (lesson 2). So you write what it is for: a region, a kexec, a
# look.

# %%
title("A test by hand")
machine = Stage("64M")
kernel = machine.boot(cmdline="kho=on reserve_mem=4096:4096:a")
kernel = kernel.kexec()
ask(machine)

# %% [markdown]
# All is well. That is the trouble with tests by hand: they try what the author has thought of.
#
# ## The search
#
# The scenario `reserve-mem` has regions, and successors whose command line is a little different.
# On the command line this is `khosim explore reserve-mem --seed 48 --runs 1`.

# %%
title("The search")


def search(invariant, word):
    """Search until an invariant speaks of a program with that word in it: the finding."""
    for seed in range(48, 200):
        campaign = Campaign(str(seed), "reserve-mem", "7.3")
        campaign.run(runs=1)
        for finding in campaign.as_json()["findings"]:
            if finding["invariant"] == invariant and word in finding["program"]:
                return finding
    raise AssertionError(f"{invariant} never spoke")


finding = search("kernel-panic", " mem=")
say(f"{finding['invariant']}: {finding['message']}.")
say("The shortest program that shows it:")
print()
print(finding["program"])

# %% [markdown]
# The program that was run first was longer. Whatever could be left out was left out, as long as the
# same was said. What is left is what matters.
#
# ## Reading it
#
# It is a program like those of the lessons before. `mem=` tells a kernel to use only so much
# memory, as if there were no more. Run it, and look where scratch and the notes were:

# %%
title("Reading it")
names = {}
try:
    exec(finding["program"], names)
except KernelPanic as panic:
    say(f"{panic}")
limit = int(finding["program"].split("mem=")[1].split("'")[0])
say(f"The new kernel was told to use memory up to {limit:#x}.")
kernel = names["kernel"]
for start, size in kernel.scratch_areas():
    if size:
        say(f"Scratch is {start:#x} to {start + size:#x}.")

# %% [markdown]
# The table of the scratch areas came with the image, in scratch, above the limit. The new kernel
# cuts off its memory first. Then it reads the table, where there is no memory any more, and dies.
# With it all that was preserved is gone. A `mem=` that did no harm for years is enough.
#
# ## Is it this?
#
# When you believe to know the cause, change it, and see whether all is well. For the bugs that
# khosim has found, there is a switch for each. This one makes a kernel with a handover ignore
# `mem=`.

# %%
title("Is it this?")
say(f"Known as: {', '.join(finding['hazards'])}.")
machine = Stage("64M")
kernel = machine.boot("7.3+fix_mem_limit=on", cmdline="kho=on")
kernel = kernel.kexec(cmdline=f"kho=on mem={limit}")
say(f"The new kernel says: {kernel.messages[0]}")
ask(machine)

# %% [markdown]
# ## Now you
#
# * `khosim explore --list` names the scenarios.
# * `khosim explore --seed 7` searches in all of them.
# * `khosim explore --release 6.18` searches an older kernel; `--fixed` a kernel without the known
#   bugs: what speaks there is new.
# * Each known bug of 7.3 has a page in `docs/hazards`, with a program of this kind.
