"""C2: KHO's own test left its memory preserved."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.test_kho import kho_test_init

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """The test module is loaded, and its name is taken already."""
    kernel = stage.boot("128M")
    squatter = kernel.kho_alloc_preserve(64)
    kernel.kho_add_subtree("kho_test", squatter.phys, 64)
    before = stage.preserved_pages(kernel)
    error = kho_test_init(kernel)
    after = stage.preserved_pages(kernel)
    stage.tell(f"loading the module failed with {error}")
    stage.tell(f"{after - before} pages more than before are preserved")
    stage.expect(
        after == before,
        "undo-restores-state",
        f"the module gave up and left {after - before} pages preserved",
    )


BUG = Bug(
    id="C2",
    name="test-kho-unwind",
    subject="test_kho: unpreserve memory in case of error",
    commit="ce405ed51020",
    broken="6.16 to 6.18",
    fixed="6.19",
    release="7.3",
    without_fix={"test_kho_unwinds": False},
    caught_by=("undo-restores-state",),
    story="""
KHO comes with a module that tests it: it preserves random folios, a list of their addresses and a
small device tree, and compares all of it in the next kernel. It is also what people copy who write
a user of their own.

When anything failed half way, here because its name is taken, it freed its memory and left it
preserved. The successor reserved pages for an owner that never was; meanwhile in this kernel they
were used by others, whose memory then travelled along.

The fix unpreserves before it frees.
""",
    scenario=scenario,
)
