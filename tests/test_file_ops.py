"""The interface that handlers are written against."""

from __future__ import annotations

import errno

import pytest

from khosim import KernelError, Machine
from khosim.errors import InputError, KhoSimError
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import (
    FileHandler,
    LiveupdateFileOpArgs,
    LiveupdateFileOps,
    call_op,
)


class CounterFile(File):
    """A device file that counts."""

    __slots__ = ("value",)

    def __init__(self, kernel: Kernel, value: int = 0) -> None:
        super().__init__(kernel, "counter")
        self.value = value


class CounterHandler(FileHandler):
    """The example of the module's documentation."""

    compatible = "counter-v1"

    def can_preserve(self, file: File) -> bool:
        return isinstance(file, CounterFile)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        assert isinstance(args.file, CounterFile)
        page = args.kernel.kho_alloc_preserve(8)
        page.write(0, args.file.value.to_bytes(8, "little"))
        args.serialized_data = page.phys
        args.private_data = page

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        args.kernel.kho_unpreserve_free(args.private_data)

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        assert isinstance(args.file, CounterFile)
        if args.file.value < 0:
            raise KernelError(errno.EBUSY, "counter_freeze", "it counts down")
        args.private_data.write(0, args.file.value.to_bytes(8, "little"))

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        args.file = CounterFile(args.kernel, args.kernel.ram.read_u64(args.serialized_data))
        args.kernel.kho_restore_free(args.serialized_data)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


def test_a_handler_of_ones_own() -> None:
    """Preserve, freeze, jump, retrieve: the value is there, and no page is lost."""
    machine = Machine("64M", checks=False)
    kernel = machine.boot(cmdline="kho=on")
    handler = CounterHandler()
    file = CounterFile(kernel, 41)
    assert handler.can_preserve(file)
    assert not handler.can_preserve(File(kernel))
    args = LiveupdateFileOpArgs(kernel, handler, file=file)
    assert handler.ops.preserve is not None
    assert call_op(handler.ops.preserve, args) == 0
    file.value = 42
    handler.freeze(args)
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    args = LiveupdateFileOpArgs(successor, handler, serialized_data=args.serialized_data)
    handler.retrieve(args)
    assert isinstance(args.file, CounterFile)
    assert args.file.value == 42
    handler.finish(
        LiveupdateFileOpArgs(
            successor, handler, serialized_data=args.serialized_data, retrieve_status=1
        )
    )
    assert successor.pages.nr_free_pages() == free + 1


def test_operations_are_the_methods_that_are_there() -> None:
    """Optional callbacks that a class does not have are None; required ones are reported."""
    ops = CounterHandler().ops
    assert (ops.unfreeze, ops.can_finish, ops.get_id, ops.owner) == (
        None,
        None,
        None,
        None,
    )
    assert ops.freeze is not None
    assert ops.missing() == []
    bare = FileHandler("bare-v1")
    assert bare.ops.missing() == ["preserve", "unpreserve", "retrieve", "finish", "can_preserve"]
    by_hand = FileHandler("hand-v1", LiveupdateFileOps(finish=lambda args: None))
    assert by_hand.ops.missing() == ["preserve", "unpreserve", "retrieve", "can_preserve"]
    assert repr(by_hand) == "FileHandler('hand-v1')"


def test_a_refusal_is_an_errno() -> None:
    """What a callback raises is what the kernel's would return."""
    kernel = Machine("64M", checks=False).boot(cmdline="kho=on")
    handler = CounterHandler()
    args = LiveupdateFileOpArgs(kernel, handler, file=CounterFile(kernel, -1))
    assert handler.ops.freeze is not None
    assert call_op(handler.ops.freeze, args) == -errno.EBUSY


@pytest.mark.parametrize("name", ["", "x" * 48, "nul\0inside"])
def test_names_that_do_not_fit(name: str) -> None:
    """47 bytes and a NUL are all there is room for."""
    with pytest.raises(InputError, match="is not 1 to 47 bytes"):
        FileHandler(name)
    assert FileHandler("x" * 47).compatible == "x" * 47


def test_references() -> None:
    """The last reference releases a file; after that it is of no use."""
    kernel = Machine("64M", checks=False).boot(cmdline="kho=on")
    released = []

    class Watched(File):
        __slots__ = ()

        def release(self) -> None:
            released.append(self.name)

    file = Watched(kernel, "w")
    file.get_file()
    file.fput()
    assert (file.f_count, released) == (1, [])
    file.close()
    assert released == ["w"]
    assert repr(file) == "Watched('w', released)"
    with pytest.raises(KhoSimError, match="last reference"):
        file.get_file()
    with pytest.raises(KhoSimError, match="last reference"):
        file.fput()
