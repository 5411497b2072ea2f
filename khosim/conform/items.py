"""One line of a comparison with a real kernel: what was held against what, and how it came out."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ("Item", "in_order", "unknown")

_MOST = 8


class Item(NamedTuple):
    """How one item of one generation came out.

    ``ok`` is None where the capture does not tell, or contradicts itself; ``note`` says why, or
    says more of what was compared. ``same`` of ``total`` things were found equal. ``needs`` names
    items of the same generation (or ``-1/NAME``: of the one before) without which a difference here
    says nothing about khosim.
    """

    name: str
    ok: bool | None
    same: int = 0
    total: int = 0
    differences: tuple[str, ...] = ()
    note: str = ""
    needs: tuple[str, ...] = ()

    @staticmethod
    def counted(
        name: str,
        same: int,
        total: int,
        differences: list[str],
        *,
        note: str = "",
        needs: tuple[str, ...] = (),
    ) -> Item:
        """An item that is fine where nothing differs."""
        return Item(
            name, not differences and same == total, same, total, tuple(differences), note, needs
        )

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        said: dict[str, Any] = {"ok": self.ok, "same": self.same, "total": self.total}
        if self.differences:
            said["differences"] = list(self.differences)
        if self.note:
            said["note"] = self.note
        return said


def unknown(name: str, why: str) -> Item:
    """An item that cannot be judged."""
    return Item(name, None, note=why)


def in_order(
    name: str,
    real: list[tuple[int, int]],
    own: list[tuple[int, int]],
    places: list[str],
    *,
    needs: tuple[str, ...],
) -> Item:
    """An item of address ranges that have to be the same, one after the other.

    ``places`` says where each of ``real`` was found.
    """
    same = sum(left == right for left, right in zip(real, own, strict=False))
    differences = [
        f"{places[i]}: {_range(left)}, simulated {_range(right)}"
        for i, (left, right) in enumerate(zip(real, own, strict=False))
        if left != right
    ]
    if len(real) != len(own):
        differences.append(f"{len(real)} ranges, simulated {len(own)}")
    total = max(len(real), len(own))
    return Item.counted(name, same, total, differences[:_MOST], needs=needs)


def _range(ends: tuple[int, int]) -> str:
    return f"[{ends[0]:#x}-{ends[1]:#x})"
