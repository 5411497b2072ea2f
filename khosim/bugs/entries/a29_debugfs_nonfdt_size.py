"""A29: files in debugfs were as long as their bytes happened to say."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Somebody looks at what the predecessor left, in debugfs."""
    kernel = stage.boot("128M")
    successor = kernel.kexec()
    path = "in/sub_fdts/kexec-metadata"
    _, told = successor.kho_retrieve_subtree("kexec-metadata")
    stage.tell(f"the subtree has {told} bytes")
    got = len(successor.debugfs.read(path))
    stage.tell(f"{path} has {got}")
    stage.expect(
        got == told, "accounting-exact", f"{path} has {got} bytes and not {told}", generation=1
    )


BUG = Bug(
    id="A29",
    name="debugfs-nonfdt-size",
    subject="kho: fix kho_in_debugfs_init() to handle non-FDT blobs",
    commit="062dd306d99c",
    broken="7.1 merge window",
    fixed="7.1",
    release="7.1",
    without_fix={"debugfs_sizes_by_totalsize": True},
    caught_by=("kernel-survives",),
    story="""
For each subtree that came over there is a file in debugfs. As long as all subtrees were device
trees, their length stood in their own header.

7.1 lets a subtree be any bytes and writes its size beside its address. The files of the outgoing
side used it; those of the incoming side went on reading the second word of the blob as a length. In
kexec-metadata that word is the beginning of a version, "7.1.": a file of 880 MiB. Reading it to the
end runs off the end of memory.

The fix uses the size that is there.
""",
    scenario=scenario,
)
