"""Exercise 3: a driver with three bugs."""

from __future__ import annotations

from driver import Driver

from khosim.explore.kit import Stage, audit


def start() -> tuple[Stage, Driver]:
    """A machine, and the driver in its first kernel."""
    machine = Stage("64M")
    return machine, Driver(machine.boot(cmdline="kho=on"))


def update(driver: Driver) -> Driver:
    """The driver in the next kernel."""
    addresses = [buffer.phys for buffer in driver.buffers]
    successor = Driver(driver.kernel.kexec())
    successor.take_over(addresses)
    return successor


def test_buffers_lie_where_they_may() -> None:
    """A buffer is added: all invariants hold."""
    machine, driver = start()
    driver.add_buffer()
    assert audit(machine) == []


def test_a_removed_buffer_is_free_and_nothing_else() -> None:
    """A buffer is added and removed: all invariants hold."""
    machine, driver = start()
    driver.add_buffer()
    driver.remove_buffer()
    assert audit(machine) == []


def test_a_buffer_lives_through_two_updates() -> None:
    """What was taken over is handed on."""
    machine, driver = start()
    driver.add_buffer().write(0, b"packets")
    driver = update(update(driver))
    assert [buffer.read(0, 7) for buffer in driver.buffers] == [b"packets"]
    assert audit(machine) == []


def test_many_buffers_come_and_go() -> None:
    """All of it together, over five generations."""
    machine, driver = start()
    for generation in range(5):
        for _ in range(20):
            driver.add_buffer()
        for _ in range(10 + generation):
            driver.remove_buffer()
        driver = update(driver)
        assert audit(machine) == []
    assert len(driver.buffers) == 40
