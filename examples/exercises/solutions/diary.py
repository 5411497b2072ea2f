"""A solution of exercise 2."""

from __future__ import annotations

from khosim import KernelError
from khosim.kernel.kernel import Kernel

NAME = "diary"


def load(kernel: Kernel) -> list[str]:
    """The lines that the predecessor left, [] if there are none; its memory is given back."""
    try:
        phys, size = kernel.kho_retrieve_subtree(NAME)
    except KernelError:
        return []
    folio = kernel.kho_restore_folio(phys)
    assert folio is not None
    text = folio.read(0, size).decode()
    folio.put()
    return text.split("\n")[:-1]  # each line ends with a line break, also an empty one


def save(kernel: Kernel, lines: list[str]) -> None:
    """Leave lines for the successor. Lines have no line breaks in them. Called once."""
    data = "".join(f"{line}\n" for line in lines).encode()
    folio = kernel.kho_alloc_preserve(len(data))
    folio.write(0, data)
    kernel.kho_add_subtree(NAME, folio.phys, len(data))
