"""The orchestrator's switch, its place in a boot, its device, and the reboot path."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from khosim import KernelError, KernelPanic, KhoSimError, Machine
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.luo_dev import LiveupdateDevice

ON = "kho=on liveupdate=on"


def boot(cmdline: str = ON, ram: str = "64M", **options: bool) -> tuple[Machine, Kernel]:
    machine = Machine(ram, **{"checks": False, **options})
    return machine, machine.boot(cmdline=cmdline)


def refused(error: int, call: Callable[..., object], *args: object) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error
    return caught.value


def root_of(kernel: Kernel) -> tuple[bytes, int, int, int]:
    data = kernel.ram.read(kernel.liveupdate.luo_ser_out, 32)
    compatible, number, sessions_pa, flbs_pa = struct.unpack("<8sQQQ", data)
    return compatible, number, sessions_pa, flbs_pa


def test_the_example_of_the_documentation() -> None:
    """A guest's memory reaches the successor, and every invariant holds."""
    machine = Machine(ram="16G", nodes=2)
    kernel = machine.boot(
        release="7.3", cmdline="kho=on liveupdate=on reserve_mem=4M:2M:trace"
    )
    session = kernel.liveupdate.create_session("vm-a")
    guest = kernel.memfd("guest", size="2G")
    guest.write(0, b"state")
    session.preserve(guest, token=1)
    successor = kernel.kexec(release="7.3")
    assert successor.liveupdate.retrieve_session("vm-a").retrieve(1).read(0, 5) == b"state"
    assert not machine.check()


@pytest.mark.parametrize(
    ("cmdline", "is_on"),
    [
        (ON, True),
        ("kho=on liveupdate=1", True),
        ("kho=on", False),
        ("kho=on liveupdate=off", False),
        ("kho=on liveupdate=on liveupdate=0", False),
        ("liveupdate=on kho=off", False),
    ],
)
def test_the_switch(cmdline: str, is_on: bool) -> None:
    """Off by default, and of no use without KHO."""
    _, kernel = boot(cmdline)
    luo = kernel.liveupdate
    assert luo.enabled is is_on
    assert bool(luo.luo_ser_out) is is_on
    assert list(luo.handlers) == (["memfd-v2"] if is_on else [])
    without_kho = "luo: Disabling liveupdate because KHO is disabled" in kernel.messages
    assert without_kho == ("kho=off" in cmdline)
    if not is_on:
        assert refused(errno.ENOENT, luo.open).symbol == "open"
        refused(errno.ENOENT, luo.create_session, "s")
        luo.reboot()


def test_the_root_for_the_successor() -> None:
    """Written late in boot: compatible, number, no sessions, the page of FLBs."""
    _, kernel = boot()
    compatible, number, sessions_pa, flbs_pa = root_of(kernel)
    assert (compatible, number, sessions_pa) == (b"luo-v5\0\0", 1, 0)
    assert kernel.ram.read(flbs_pa, 4096) == b"\1".ljust(4096, b"\0")
    assert kernel.ram.read(kernel.liveupdate.luo_ser_out + 32, 4064) == bytes(4064)


def test_the_number_of_live_updates() -> None:
    """One more in each generation with LUO; a generation without it starts over."""
    machine, kernel = boot()
    for number in range(1, 4):
        kernel = machine.kexec(kernel)
        assert kernel.liveupdate.liveupdate_num == number
        assert root_of(kernel)[1] == number + 1
        said = f"luo: Retrieved live update data, liveupdate number: {number}"
        assert said in kernel.messages
    kernel = machine.kexec(kernel, cmdline="kho=on liveupdate=off")
    assert kernel.liveupdate.liveupdate_num == 4
    kernel = machine.kexec(kernel, cmdline=ON)
    assert kernel.liveupdate.liveupdate_num == 0
    assert repr(kernel.liveupdate) == "Luo(on, liveupdate_num=0)"


def test_the_predecessors_root_is_freed() -> None:
    """Its page is in the allocator's hands again; that of the FLBs is kept for ever."""
    machine, kernel = boot()
    phys, flbs_pa = kernel.liveupdate.luo_ser_out, root_of(kernel)[3]
    kernel = machine.kexec(kernel)
    assert kernel.page(phys >> 12).kind != "incoming"
    assert kernel.page(flbs_pa >> 12).kind == "incoming"


def patch_root(machine: Machine, kernel: Kernel, offset: int, data: bytes) -> None:
    machine.load_successor(kernel)
    machine.hardware.ram.write(kernel.liveupdate.luo_ser_out + offset, data, (9, "test"))


@pytest.mark.parametrize("switch", ["on", "off"])
def test_a_root_that_cannot_be_read_is_the_end(switch: str) -> None:
    """Another format: the successor panics, even where live update is off there."""
    machine, kernel = boot()
    machine.load_successor(kernel, cmdline=f"kho=on liveupdate={switch}")
    machine.hardware.ram.write(kernel.liveupdate.luo_ser_out, b"luo-v6", (9, "test"))
    with pytest.raises(KernelPanic, match=r"initialize properly \[-EINVAL\], disabling"):
        machine.resume()
    assert machine.kernel is None


def test_an_empty_or_looping_session_block_is_the_end() -> None:
    """Where the block sets cannot be restored the successor panics."""
    machine, kernel = boot()
    held = kernel.liveupdate.create_session("a")
    machine.load_successor(kernel)
    sessions_pa = root_of(kernel)[2]
    machine.hardware.ram.write(sessions_pa, struct.pack("<QQ", sessions_pa, 1), (9, "test"))
    with pytest.raises(KernelPanic, match="EINVAL"):
        machine.resume()
    assert held.f_count


def test_a_root_that_points_nowhere() -> None:
    """An address outside of memory is a page fault."""
    machine, kernel = boot()
    patch_root(machine, kernel, 16, struct.pack("<Q", 1 << 40))
    with pytest.raises(KernelPanic, match="page fault"):
        machine.resume()


def test_a_blob_that_is_too_small() -> None:
    """A subtree of less than 32 bytes, or without its size."""
    machine, kernel = boot()
    luo_ser = kernel.liveupdate.luo_ser_out
    kernel.kho_remove_subtree(luo_ser)
    kernel.kho_add_subtree("LUO", luo_ser, 31)
    with pytest.raises(KernelPanic, match="EINVAL"):
        machine.kexec(kernel)


def rename_in_fdt(machine: Machine, kernel: Kernel, old: bytes, new: bytes) -> None:
    """Change bytes of the root FDT between the jump and the successor's boot."""
    phys = kernel.kho_out.fdt_phys
    tree = kernel.ram.read(phys, 4096)
    assert old in tree
    machine.load_successor(kernel)
    machine.hardware.ram.write(phys, tree.replace(old, new), (9, "test"))


def test_a_subtree_without_its_size() -> None:
    """A node that KHO calls broken is the end, and the log says whose it was."""
    machine, kernel = boot()
    rename_in_fdt(machine, kernel, b"blob-size", b"blob-lies")
    said: list[object] = []
    machine.listen(lambda event: said.append(event.args.get("message")))
    with pytest.raises(KernelPanic, match=r"\[-EINVAL\], disabling live update"):
        machine.resume()
    assert "luo: failed to retrieve LUO state 'LUO' from KHO: -EINVAL" in said


def test_a_name_that_only_looks_like_it() -> None:
    """No subtree "LUO", though its letters stand in the tree: a boot without live update data."""
    machine, kernel = boot()
    kernel.kho_remove_subtree(kernel.liveupdate.luo_ser_out)
    folio = kernel.kho_alloc_preserve(32)
    kernel.kho_add_subtree("xLUO", folio.phys, 32)
    kernel = machine.kexec(kernel)
    assert (kernel.liveupdate.liveupdate_num, kernel.liveupdate.enabled) == (0, True)


class FailingMachine(Machine):
    """Lets the nth page for preserved memory fail: 2 is LUO's root, 3 the page of its FLBs."""

    nth = 0

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        super().checkpoint(kernel, stage)
        calls = iter(range(1 << 20))

        def fail(order: int, owner: str) -> bool:
            return owner == "kho_alloc_preserve" and next(calls) == self.nth

        kernel.pages.fail = fail if stage == "takeover" else None


@pytest.mark.parametrize("nth", [0, 1, 2, 3, 4])
def test_without_memory_for_the_root(nth: int) -> None:
    """Live update goes off and nothing is lost, also where KHO itself could not be set up."""
    machine = FailingMachine("64M")
    machine.nth = nth
    kernel = machine.boot(cmdline=ON)
    luo = kernel.liveupdate
    assert luo.enabled is (nth == 4)
    said = "luo: failed to allocate/preserve LUO state memory" in kernel.messages
    assert said == (nth < 3)
    assert ("luo: failed to prepare LUO state: -12" in kernel.messages) == (nth == 3)
    # The metadata; root FDT and metadata; nothing more for a root that was given back; all four.
    keys = sum(nr_keys for nr_keys, _ in kernel.kho_out.tree.walk()) if kernel.kho_enable else 0
    assert keys == {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}[nth]
    if nth < 4:
        refused(errno.ENOENT, luo.open)
        refused(errno.EOPNOTSUPP, luo.flb_get_incoming, None)
        refused(errno.ENOENT, machine.kexec(kernel).kho_retrieve_subtree, "LUO")
    assert not machine.check()


def test_the_device_is_exclusive() -> None:
    """One open file at a time; closing makes room. Sessions do not need it."""
    _, kernel = boot()
    luo = kernel.liveupdate
    device = luo.open()
    assert isinstance(device, LiveupdateDevice)
    refused(errno.EBUSY, luo.open)
    refused(errno.EBUSY, luo.create_session, "s")
    session = device.create_session("s")
    device.close()
    with pytest.raises(KhoSimError, match="last reference"):
        device.create_session("t")
    again = luo.open()
    assert session.name == "s"
    again.close()


def test_a_failed_freeze_leaves_everything_usable() -> None:
    """The reboot system call fails, the kernel lives, and a second attempt succeeds."""
    machine, kernel = boot(ram="128M")
    session = kernel.liveupdate.create_session("s")
    guest = kernel.memfd("guest", size="1M")
    session.preserve(guest, 1)
    luo_file = session.session.file_set.files[0]
    handle, luo_file.serialized_data = luo_file.serialized_data, 0
    assert refused(errno.EINVAL, machine.kexec, kernel).symbol == "memfd_luo_freeze"
    assert kernel.alive
    assert machine.kernel is kernel
    assert kernel.kexec_image is not None
    assert root_of(kernel)[2] == 0
    luo_file.serialized_data = handle
    guest.write(5, b"later")
    other = kernel.liveupdate.create_session("t")
    session.preserve(kernel.memfd("more"), 2)
    kernel.kernel_kexec()
    successor = machine.resume()
    incoming = successor.liveupdate.retrieve_session("s")
    assert incoming.tokens == [1, 2]
    assert incoming.retrieve(1).read(0, 10) == b"\0\0\0\0\0later"
    assert successor.liveupdate.retrieve_session("t").tokens == []
    assert not other.kernel.alive


def test_nothing_changes_after_the_serialization() -> None:
    """Whoever wants to create, preserve, close or serialize again sleeps for ever."""
    _, kernel = boot()
    luo = kernel.liveupdate
    device = luo.open()
    session = device.create_session("s")
    file = kernel.memfd("f")
    luo.reboot()
    before = root_of(kernel)
    for call in (
        lambda: device.create_session("t"),
        lambda: device.retrieve_session("s"),
        lambda: session.preserve(file, 1),
        session.close,
        luo.reboot,
    ):
        with pytest.raises(KhoSimError, match="for ever"):
            call()
    assert root_of(kernel) == before


def test_kexec_without_an_image() -> None:
    """-EINVAL, and nothing is serialized."""
    _, kernel = boot()
    session = kernel.liveupdate.create_session("s")
    assert refused(errno.EINVAL, kernel.kernel_kexec).symbol == "kernel_kexec"
    assert not kernel.liveupdate.sessions.serialized
    session.close()


def test_a_context_preserving_kexec_serializes_nothing() -> None:
    """The old kernel is to come back with its sessions as they were."""
    machine, kernel = boot()
    session = kernel.liveupdate.create_session("s")
    image = kernel.kexec_file_load(machine_image(machine, kernel))
    image.preserve_context = True
    kernel.kernel_kexec(image)
    assert not kernel.liveupdate.sessions.serialized
    assert root_of(kernel)[2] == 0
    assert session.f_count


def test_a_crash_asks_nobody() -> None:
    """The jump into a crash kernel freezes no file and serializes no session."""
    machine = Machine("1G", checks=False)
    kernel = machine.boot(cmdline=f"{ON} crashkernel=256M")
    session = kernel.liveupdate.create_session("s")
    session.preserve(kernel.memfd("f"), 1)
    session.session.file_set.files[0].serialized_data = 0  # its freeze would be refused
    image = kernel.kexec_file_load(machine_image(machine, kernel), on_crash=True)
    kernel.kernel_kexec(image)
    assert not kernel.alive
    assert not kernel.liveupdate.sessions.serialized


def machine_image(machine: Machine, kernel: Kernel) -> bytes:
    from khosim.kernel.image import KernelImage

    assert machine.kernel is kernel
    return KernelImage.build("7.3", size=4 << 20).data


def test_a_release_without_luo() -> None:
    """The switch does nothing there, and no subtree is left or looked for."""
    from khosim.kernel.release import find_release

    machine, kernel = boot()
    assert kernel.liveupdate.enabled
    old = find_release("7.3").evolve(luo="")
    kernel = machine.kexec(kernel, release=old)
    assert (kernel.liveupdate.enabled, kernel.liveupdate.liveupdate_num) == (False, 0)
    kernel = machine.kexec(kernel, release=old)
    refused(errno.ENOENT, kernel.kho_retrieve_subtree, "LUO")
