"""The live update benchmark: its yardstick in C, and that it measures what it says."""

from __future__ import annotations

import pytest

from benchmarks.luo import _hand_over
from benchmarks.native import Guest, NoCompiler, build_native


@pytest.mark.parametrize(("nr_folios", "nodes"), [(0, 0), (1, 5), (64, 5), (65, 6), (5000, 84)])
def test_native_guest(nr_folios: int, nodes: int) -> None:
    """Every folio arrives, at its index; the cache has a node for each 64 of them."""
    try:
        native = build_native()
    except NoCompiler as error:
        pytest.skip(str(error))
    expected = Guest(nr_folios, sum(range(nr_folios)), nodes)
    assert native.hand_over_guest(nr_folios) == expected


def test_a_small_guest() -> None:
    """The measured run itself checks the guest's content."""
    preserve, kexec, retrieve, resident = _hand_over(2)
    assert min(preserve, kexec, retrieve) > 0
    assert resident < 64 << 20
