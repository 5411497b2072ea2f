"""Exercise 4: an agent that does not lose a guest."""

from __future__ import annotations

import pytest
from agent import update

from khosim.explore.kit import Stage, audit


@pytest.mark.parametrize("count", [0, 1, 5])
def test_guests_live_through_updates(count: int) -> None:
    """Content and size of every guest, through three kernels; every invariant holds."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    guests = {}
    for token in range(10, 10 + count):
        guests[token] = kernel.memfd(f"vm-{token}", size="1M")
        guests[token].write(4096 * token, f"guest {token}".encode())
    for _ in range(2):
        kernel, guests = update(kernel, guests)
        assert sorted(guests) == list(range(10, 10 + count))
        for token, memory in guests.items():
            text = f"guest {token}".encode()
            assert memory.size == 1 << 20
            assert memory.read(4096 * token, len(text)) == text
        assert audit(machine) == []
    assert machine.generation == 2


def test_a_guest_that_comes_later() -> None:
    """Between two updates a guest ends and another one starts."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    kernel, guests = update(kernel, {1: kernel.memfd("old", size="64K")})
    guests.pop(1).fput()
    guests[2] = kernel.memfd("new", size="64K")
    guests[2].write(0, b"new")
    kernel, guests = update(kernel, guests)
    assert {token: memory.read(0, 3) for token, memory in guests.items()} == {2: b"new"}
    assert audit(machine) == []
