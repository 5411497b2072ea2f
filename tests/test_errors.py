"""The errors: what they say, and that they cross process borders."""

from __future__ import annotations

import pickle

import pytest

from khosim import InputError, KernelError, KernelPanic, KhoSimError
from khosim.errors import RamFault


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("cloud.toml: ram", "0 is too small"), "cloud.toml: ram: 0 is too small"),
        (KernelError(22, "kho_preserve_folio"), "kho_preserve_folio: -EINVAL"),
        (KernelError(12, "folio_alloc", "order 3"), "folio_alloc: -ENOMEM (order 3)"),
        (KernelError(524, "f"), "f: -ENOTSUPP"),
        (KernelPanic("no memory", 2), "no memory"),
        (RamFault(0x1000, 8, "no RAM"), "RAM access [0x1000-0x1008): no RAM"),
    ],
)
def test_text_and_pickle(error: KhoSimError, text: str) -> None:
    """Each error reads as documented and survives a trip to another process with its fields."""
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == text
    assert str(again) == text
    assert type(again) is type(error)
    assert vars(again) == vars(error)
