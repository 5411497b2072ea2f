"""What a test begins with, as plain data that can be drawn, shrunk and printed as a program."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from khosim.simulator import Machine

__all__ = ("FolioPlan", "MachinePlan", "MemfdPlan", "SessionPlan")


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """A machine that is still to be built; the fields are the arguments of ``khosim.Machine``.

    ``ram`` is a size, ``nodes`` a number of nodes, ``holes`` are ``(start, end)`` in bytes.
    """

    ram: str = "64M"
    nodes: int = 1
    memoryless: tuple[int, ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    arch: str = "x86_64"
    page_size: int = 4096
    allocator: str = "linux"
    seed: int = 0

    @property
    def source(self) -> str:
        """The call that builds it."""
        parts = [repr(self.ram)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "ram" and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"Machine({', '.join(parts)})"

    def build(self) -> Machine:
        """The machine. Raises :class:`~khosim.errors.InputError` for what cannot be one."""
        return Machine(**{field.name: getattr(self, field.name) for field in fields(self)})


class FolioPlan(NamedTuple):
    """A folio: ``1 << order`` pages of ``owner``, on node ``nid`` (None: any), and its content."""

    order: int
    owner: str
    nid: int | None
    content: bytes


class MemfdPlan(NamedTuple):
    """A memfd of ``size`` bytes, with ``content`` written at offset ``at``."""

    name: str
    size: int
    at: int
    content: bytes


class SessionPlan(NamedTuple):
    """A session and the memfds in it by token."""

    name: str
    files: tuple[tuple[int, MemfdPlan], ...]
