"""Exercise 2, after lessons 2 and 5: a diary that outlives its kernels.

Write a user of KHO. Each kernel writes a line into the diary before it goes; the next one reads all
lines that there are, and so on. Useful calls of a kernel:

* ``kernel.kho_alloc_preserve(size)``: a folio that is preserved; ``folio.phys`` is its address,
  ``folio.write(offset, data)`` and ``folio.read(offset, size)`` do what they say;
* ``kernel.kho_add_subtree(name, phys, size)``: a note under a name in the root of all notes;
* ``kernel.kho_retrieve_subtree(name)``: ``(phys, size)`` of the predecessor's note; raises
  ``khosim.KernelError`` (-ENOENT) where it left none;
* ``kernel.kho_restore_folio(phys)``: the folio at that address; ``folio.put()`` frees it.

The note is at most one page. Whatever you restore and no longer need has to be freed.
"""

from __future__ import annotations

from khosim.kernel.kernel import Kernel

NAME = "diary"


def load(kernel: Kernel) -> list[str]:
    """The lines that the predecessor left, [] if there are none; its memory is given back."""
    raise NotImplementedError


def save(kernel: Kernel, lines: list[str]) -> None:
    """Leave lines for the successor. Lines have no line breaks in them. Called once."""
    raise NotImplementedError
