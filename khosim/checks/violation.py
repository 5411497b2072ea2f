"""What a checker says when an invariant does not hold."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("Violation",)


class Violation(NamedTuple):
    """One broken promise: which invariant, where, and who is behind it.

    ``phys`` is the first byte of the first page concerned, ``generation`` the kernel that was
    running. ``owner`` is who held the page, ``writer`` the kernel symbol that wrote it last and
    ``writer_generation`` the kernel it ran in (-1: before any kernel).
    """

    invariant: str
    message: str
    generation: int
    phys: int = 0
    owner: str = ""
    writer: str = ""
    writer_generation: int = -1

    def __str__(self) -> str:
        text = f"{self.invariant}: {self.message}"
        if self.owner:
            text += f"; owner {self.owner}"
        if self.writer:
            text += f"; last written by {self.writer} in generation {self.writer_generation}"
        return text
