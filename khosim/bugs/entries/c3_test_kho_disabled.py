"""C3: the test module used a KHO that was switched off."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.test_kho import kho_test_init

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """The test module is built into a kernel that boots without KHO."""
    kernel = stage.boot("128M", cmdline="kho=off")
    stage.tell("kho=off")
    error = kho_test_init(kernel)
    stage.tell(f"the module has loaded and says {error}")


BUG = Bug(
    id="C3",
    name="test-kho-disabled",
    subject="lib/test_kho: check if KHO is enabled",
    commit="a26ec8f3d4e5",
    broken="6.16, 6.17",
    fixed="6.18",
    release="7.0",
    without_fix={"test_kho_checks_enabled": False},
    caught_by=("kernel-survives",),
    story="""
The test module may be built in, and then it runs at every boot, with KHO switched on or off. It
never asked. Where KHO is off nothing of it is set up, and there is no root FDT that a subtree could
be added to.

How bad that is depends on the release. It is shown on 7.0, where bitmaps need no preparation but
the root FDT is a pointer to nothing: the kernel dies in boot, because of a test for something that
nobody had switched on.

The fix asks kho_is_enabled() first.
""",
    scenario=scenario,
)
