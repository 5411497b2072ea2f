"""A28: a full root FDT kept half a node."""

from __future__ import annotations

from khosim.abi import fdt
from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.errors import KernelError

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Subtrees are added until there is no room, with names of every length."""
    kernel = stage.boot("128M")
    blob = kernel.kho_alloc_preserve(64)
    blob.write(0, fdt.FDT_MAGIC.to_bytes(4, "big") + (64).to_bytes(4, "big"))
    nr_added = 0
    while True:
        name = f"subtree-{nr_added:03}"
        try:
            kernel.kho_add_subtree(name, blob.phys, 64)
        except KernelError as refused:
            stage.tell(f"{nr_added} subtrees fit; for the next one it says -{refused.name}")
            error = refused.name
            break
        nr_added += 1
    stage.expect(
        error == "ENOMEM",
        "errno-as-documented",
        f"kho_add_subtree with a full root FDT gave -{error} and not -ENOMEM",
    )
    kernel.finalize()


BUG = Bug(
    id="A28",
    name="add-subtree-error",
    subject="kho: fix error handling in kho_add_subtree() (subject not confirmed)",
    commit="",
    broken="6.16 to 7.0",
    fixed="7.1, 7.0.y",
    release="7.0",
    with_fix={"add_subtree_unwinds": True},
    caught_by=(
        "errno-as-documented",
        "handover-wellformed",
    ),
    story="""
The root FDT has one page. Adding a subtree makes a node, and then puts the address of the subtree
into it; near the end of the page there may be room for the first and none for the second.

The call then failed with libfdt's own number for "no space", 3, which to the caller is -ESRCH and
in a log is anybody's guess. The node without an address stayed where it was, and went to the
successor.

The fix takes the node out again and returns -ENOMEM.
""",
    scenario=scenario,
)
