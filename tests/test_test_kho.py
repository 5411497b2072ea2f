"""KHO's own test module, on a cold boot."""

from __future__ import annotations

import errno

from khosim import Machine
from khosim.kernel.test_kho import kho_test_init


def test_it_preserves_all_of_its_memory():
    """Folios of 531 pages in all, a list, a tree: and the subtree arrives."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on")
    assert kho_test_init(kernel) == 0
    successor = kernel.kexec()
    phys, size = successor.kho_retrieve_subtree("kho_test")
    assert successor.page(phys >> 12).kind == "incoming"
    assert successor.fdt_totalsize(phys) == size
    assert not machine.check()


def test_all_of_it_comes_back_when_something_fails():
    """A second failure takes no more memory than the first, whose pages for the map stay."""
    kernel = Machine("128M").boot(cmdline="kho=on")
    kernel.kho_add_subtree("kho_test", kernel.kho_alloc_preserve(64).phys, 64)
    assert kho_test_init(kernel) == -errno.EEXIST
    free = kernel.pages.nr_free_pages()
    assert kho_test_init(kernel) == -errno.EEXIST
    kernel.pages.fail = lambda order, owner: owner == "new_vmalloc_chunk"
    assert kho_test_init(kernel) == -errno.ENOMEM
    assert kernel.pages.nr_free_pages() == free


def test_it_does_nothing_where_kho_is_off():
    """It loads and is content."""
    kernel = Machine("64M").boot(cmdline="kho=off")
    free = kernel.pages.nr_free_pages()
    assert kho_test_init(kernel) == 0
    assert kernel.pages.nr_free_pages() == free
