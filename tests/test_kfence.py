"""KFENCE's pool: where its objects lie, and when kmalloc gets one."""

from __future__ import annotations

from khosim import Machine
from khosim.kernel.image import KernelConfig
from khosim.kernel.kfence import GATE
from khosim.kernel.kmalloc_cache import KmallocCache
from khosim.kernel.release import find_release

PAGE = 4096


def boot(nr_objects: int) -> tuple[Machine, KernelConfig]:
    """A machine, and the configuration of a kernel with so many objects."""
    config = KernelConfig(release=find_release("6.17"), kfence_objects=nr_objects)
    return Machine("128M"), config


def test_one_in_so_many_objects_is_guarded():
    """The first object and every GATE-th after it lie alone on the second page of a pair."""
    machine, config = boot(3)
    kernel = machine.boot(config=config, cmdline="kho=on", kernel_size="4M")
    pool = kernel.kfence.phys
    cache = KmallocCache(kernel, 64)
    objects = [cache.kzalloc("test") for _ in range(4 * GATE)]
    guarded = [at for at in objects if kernel.kfence.holds(at)]
    # Three objects are all there are; the very first pair holds none.
    assert guarded == [pool + pair * 2 * PAGE for pair in (1, 2, 3)]
    assert [objects.index(at) for at in guarded] == [0, GATE, 2 * GATE]
    cache.kfree(guarded[1])
    assert [cache.kzalloc("test") for _ in range(GATE)].count(guarded[1]) == 1


def test_large_objects_are_not():
    """More than a page is nothing for KFENCE."""
    machine, config = boot(3)
    kernel = machine.boot(config=config, cmdline="kho=on", kernel_size="4M")
    assert not kernel.kfence.alloc(PAGE + 1)


def test_the_pool_of_a_successor_lies_in_scratch():
    """It is taken while nothing but scratch can be."""
    machine, config = boot(3)
    kernel = machine.boot(config=config, cmdline="kho=on", kernel_size="4M")
    areas = kernel.scratch_areas()
    assert not any(at <= kernel.kfence.phys < at + size for at, size in areas)
    successor = kernel.kexec()
    assert any(at <= successor.kfence.phys < at + size for at, size in areas)


def test_there_is_none_by_default():
    """Without CONFIG_KFENCE nothing is reserved."""
    assert Machine("64M").boot(cmdline="kho=on").kfence is None
