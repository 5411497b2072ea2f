"""The kernel's selftests that reboot, and its in-kernel tests, played again.

``tools/testing/selftests/liveupdate/luo_{kexec_simple,multi_session,stress_files,
stress_sessions}.c`` in two stages, ``lib/tests/liveupdate.c`` and ``lib/test_kho.c`` @ 7.3. Each
test bears the name of its scenario and expects what that expects.
"""

from __future__ import annotations

import errno
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from khosim import KernelError, Machine
from khosim.abi import fdt
from khosim.abi import liveupdate as uapi
from khosim.kernel.kernel import Folio, Kernel
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_restore_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.memfd import Memfd
from khosim.kernel.process import Process
from khosim.kernel.vmalloc import VmStruct, vfree, vmalloc

GOLDEN = Path(__file__).parent / "golden" / "captures"
ON = "kho=on liveupdate=on"


class Test(Process):
    """``libliveupdate``: the library of the selftests, in a process with the device open."""

    __test__ = False
    __slots__ = ("luo_fd",)

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, "test")
        self.luo_fd = self.open("/dev/liveupdate")

    def _answer(self, fd: int, command: int, arg: bytearray) -> int:
        self.ioctl(fd, command, arg)
        return int.from_bytes(arg[4:8], "little", signed=True)

    def luo_create_session(self, name: str) -> int:
        arg = uapi.create_session(name.encode())
        return self._answer(self.luo_fd, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, arg)

    def luo_retrieve_session(self, name: str) -> int:
        arg = uapi.retrieve_session(name.encode())
        return self._answer(self.luo_fd, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, arg)

    def luo_session_finish(self, session_fd: int) -> None:
        self.ioctl(session_fd, uapi.LIVEUPDATE_SESSION_FINISH, uapi.finish())

    def memfd_of(self, fd: int) -> Memfd:
        file = self.file(fd)
        assert isinstance(file, Memfd)
        return file

    def create_and_preserve_memfd(self, session_fd: int, token: int, data: str) -> None:
        mfd = self.memfd_create("test_mfd", 0)
        file = self.memfd_of(mfd)
        file.ftruncate(self.kernel.arch.page_size)
        file.write(0, data.encode() + b"\0")
        command = uapi.LIVEUPDATE_SESSION_PRESERVE_FD
        self.ioctl(session_fd, command, uapi.preserve_fd(mfd, token))
        self.close(mfd)

    def restore_and_verify_memfd(self, session_fd: int, token: int, expected: str) -> None:
        arg = uapi.retrieve_fd(token)
        mfd = self._answer(session_fd, uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, arg)
        content = self.memfd_of(mfd).read(0, self.kernel.arch.page_size)
        assert content.split(b"\0")[0].decode() == expected
        self.close(mfd)

    def finish_and_close(self, session_fd: int) -> None:
        self.luo_session_finish(session_fd)
        self.close(session_fd)

    def daemonize_and_wait(self) -> None:
        """The device is closed; a child holds the sessions when the test itself exits."""
        self.close(self.luo_fd)
        self.fork("child")
        self.exit()


Stage = Callable[[Test], None]


def luo_test(ram: str, state: str, token: int, stage_1: Stage, stage_2: Stage) -> None:
    """Stage 1, a kexec, stage 2; a state session tells the stages apart, as in ``luo_test``."""
    machine = Machine(ram)
    test = Test(machine.boot(cmdline=ON))
    with pytest.raises(KernelError) as caught:
        test.luo_retrieve_session(state)
    assert caught.value.errno == errno.ENOENT
    session_fd = test.luo_create_session(state)
    test.create_and_preserve_memfd(session_fd, token, "2")
    stage_1(test)
    test.daemonize_and_wait()
    test = Test(machine.kexec(test.kernel))
    session_fd = test.luo_retrieve_session(state)
    test.restore_and_verify_memfd(session_fd, token, "2")
    stage_2(test)
    test.finish_and_close(session_fd)
    luo = test.kernel.liveupdate
    assert (luo.sessions.incoming.sessions, luo.preserved_files) == ({}, {})
    assert not machine.check()


def test_luo_kexec_simple() -> None:
    """One session with one file."""
    name, token, data = "test-session", 0x1A, "hello kexec world"

    def stage_1(test: Test) -> None:
        test.create_and_preserve_memfd(test.luo_create_session(name), token, data)

    def stage_2(test: Test) -> None:
        session_fd = test.luo_retrieve_session(name)
        test.restore_and_verify_memfd(session_fd, token, data)
        test.finish_and_close(session_fd)

    luo_test("64M", "kexec_simple_state", 999, stage_1, stage_2)


def test_luo_multi_session() -> None:
    """Two empty sessions, one with a file, one with two."""
    sessions: dict[str, dict[int, str]] = {
        "multi-test-empty-1": {},
        "multi-test-empty-2": {},
        "multi-test-files-1": {0x1001: "Data for session files 1"},
        "multi-test-files-2": {
            0x2002: "First file for session files 2",
            0x3003: "Second file for session files 2",
        },
    }

    def stage_1(test: Test) -> None:
        for name, files in sessions.items():
            session_fd = test.luo_create_session(name)
            for token, data in files.items():
                test.create_and_preserve_memfd(session_fd, token, data)

    def stage_2(test: Test) -> None:
        session_fds = [test.luo_retrieve_session(name) for name in sessions]
        for session_fd, files in zip(session_fds, sessions.values(), strict=True):
            for token, data in files.items():
                test.restore_and_verify_memfd(session_fd, token, data)
        for session_fd in session_fds:
            test.finish_and_close(session_fd)

    luo_test("64M", "kexec_multi_state", 998, stage_1, stage_2)


def test_luo_stress_files() -> None:
    """500 files in one session."""
    name, count = "many_files_session", 500

    def stage_1(test: Test) -> None:
        session_fd = test.luo_create_session(name)
        for i in range(count):
            test.create_and_preserve_memfd(session_fd, i, f"file-data-{i}")

    def stage_2(test: Test) -> None:
        session_fd = test.luo_retrieve_session(name)
        for i in range(count):
            test.restore_and_verify_memfd(session_fd, i, f"file-data-{i}")
        test.finish_and_close(session_fd)

    luo_test("128M", "kexec_many_files_state", 9999, stage_1, stage_2)


def test_luo_stress_sessions() -> None:
    """2000 empty sessions."""
    count = 2000

    def stage_1(test: Test) -> None:
        test.rlimit_nofile = count + 32
        for i in range(count):
            test.luo_create_session(f"many-test-{i}")

    def stage_2(test: Test) -> None:
        for i in range(count):
            test.finish_and_close(test.luo_retrieve_session(f"many-test-{i}"))

    luo_test("128M", "kexec_many_state", 999, stage_1, stage_2)


# -- lib/tests/liveupdate.c -----------------------------------------------------------------------

TEST_FLB_MAGIC_BASE = 0xFEEDF00DCAFEBEE0


class TestFlb(Flb):
    """One of the three objects that are registered with every handler."""

    __test__ = False

    def __init__(self, index: int) -> None:
        super().__init__(f"liveupdate-test-flb-v{index}")
        self.magic = TEST_FLB_MAGIC_BASE + index

    def _say(self, args: LiveupdateFlbOpArgs, what: str) -> None:
        args.kernel.printk(f"{self.compatible}: {what}")

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        self._say(args, "preserve was triggered")
        args.data = self.magic

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        self._say(args, "unpreserve was triggered")

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        if args.data != self.magic:
            raise KernelError(errno.EINVAL, "test_flb_retrieve", f"data {args.data:#x}")
        self._say(args, "found flb data from the previous boot")
        args.obj = args.data

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        assert args.obj == self.magic
        self._say(args, "finish was triggered")


def liveupdate_test_register(kernel: Kernel) -> None:
    """``liveupdate_test_register`` for memfd's handler."""
    luo = kernel.liveupdate
    flbs = [TestFlb(index) for index in range(3)]
    for flb in flbs:
        try:
            luo.flb_get_incoming(flb)
        except KernelError as refused:
            if refused.errno not in (errno.ENODATA, errno.ENOENT):
                raise
        else:
            luo.flb_put_incoming(flb)
    handler = luo.handlers["memfd-v2"]
    for flb in flbs:
        luo.register_flb(handler, flb)
    with pytest.raises(KernelError) as caught:
        luo.register_flb(handler, flbs[0])
    assert caught.value.errno == errno.EEXIST
    kernel.printk(f"Registered 3 FLBs with file handler: [{handler.compatible}]")


def said(kernel: Kernel) -> list[str]:
    """What the test wrote into the log."""
    return [line for line in kernel.messages if "liveupdate-test-flb" in line]


def test_lib_liveupdate() -> None:
    """Preserved with the first file, found in early boot, finished with the last file."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline=ON)
    liveupdate_test_register(kernel)
    names = [f"liveupdate-test-flb-v{index}" for index in range(3)]
    for generation in range(3):
        session = kernel.liveupdate.create_session(f"gen{generation}")
        session.preserve(kernel.memfd("a", size=4096), 1)
        session.preserve(kernel.memfd("b"), 2)
        assert said(kernel)[-3:] == [f"{name}: preserve was triggered" for name in names]
        kernel = machine.kexec(kernel)
        liveupdate_test_register(kernel)
        found = [f"{name}: found flb data from the previous boot" for name in names]
        assert said(kernel) == found
        incoming = kernel.liveupdate.retrieve_session(f"gen{generation}")
        incoming.retrieve(1)
        incoming.close()
        assert said(kernel)[3:] == [f"{name}: finish was triggered" for name in names[::-1]]
    session = kernel.liveupdate.create_session("last")
    session.preserve(kernel.memfd("a"), 1)
    session.close()
    undone = [f"{name}: unpreserve was triggered" for name in names[::-1]]
    assert said(kernel)[-3:] == undone
    assert not machine.check()


# -- lib/test_kho.c -------------------------------------------------------------------------------

KHO_TEST_FDT, KHO_TEST_COMPAT = "kho_test", "kho-test-v1"
KHO_TEST_MAGIC = 0x4B484F21


class KhoTest:
    """The module's state: folios of random orders with random content, and their description."""

    __test__ = False

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.folios: list[Folio] = []
        self.csum = 0
        self.info: VmStruct | None = None
        self.slot = KhoVmallocSlot(kernel)
        self.fdt: Folio | None = None

    def save(self, max_mem: int, random_orders: random.Random) -> None:
        """``kho_test_save``."""
        page, largest = self.kernel.arch.page_size, self.kernel.arch.max_page_order
        left = max_mem
        while left:
            order = random_orders.randrange(largest + 1)
            if page << order > left:
                order = max((left // page - 1).bit_length() - 1, 0)
            folio = self.kernel.alloc_folio(order, owner="kho_test")
            self.folios.append(folio)
            folio.write(0, random_orders.randbytes(page << order))
            left -= page << order
        for folio in self.folios:
            self.csum = zlib.crc32(folio.read(0, folio.len_bytes), self.csum)
        self._preserve()

    def _preserve(self) -> None:
        # kho_test_preserve
        kernel = self.kernel
        fdt_size = len(self.folios) * 8 + kernel.arch.page_size
        order = ((fdt_size - 1) >> kernel.arch.page_shift).bit_length()
        self.fdt = kernel.alloc_folio(order, owner="kho_test", zero=True)
        kernel.kho_preserve_folio(self.fdt)
        self.info = vmalloc(kernel, len(self.folios) * 8)
        kho_preserve_vmalloc(kernel, self.info, self.slot)
        assert self.info is not None
        for index, folio in enumerate(self.folios):
            self.info.write(index * 8, struct.pack("<Q", folio.phys | folio.order))
            kernel.kho_preserve_folio(folio)
        descriptor = struct.pack("<QIHH", *self.slot.load())
        tree = kho_test_fdt(fdt_size, len(self.folios), descriptor, self.csum)
        self.fdt.write(0, tree)
        kernel.kho_add_subtree(KHO_TEST_FDT, self.fdt.phys, fdt.fdt_totalsize(tree))

    def exit(self) -> None:
        """``kho_test_exit``: everything is unpreserved and freed."""
        assert self.fdt is not None
        self.kernel.kho_remove_subtree(self.fdt.phys)
        for folio in self.folios:
            self.kernel.kho_unpreserve_folio(folio)
        kho_unpreserve_vmalloc(self.kernel, self.slot)
        vfree(self.kernel, self.info)
        for folio in self.folios:
            folio.put()
        self.kernel.kho_unpreserve_folio(self.fdt)
        self.fdt.put()


def kho_test_fdt(size: int, nr_folios: int, folios_info: bytes, csum: int) -> bytearray:
    """``kho_test_prepare_fdt``."""
    buf = bytearray(size)
    error = fdt.fdt_create(buf, size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", KHO_TEST_COMPAT)
    error |= fdt.fdt_property(buf, "magic", struct.pack("<I", KHO_TEST_MAGIC))
    error |= fdt.fdt_begin_node(buf, "data")
    error |= fdt.fdt_property(buf, "nr_folios", struct.pack("<I", nr_folios))
    error |= fdt.fdt_property(buf, "folios_info", folios_info)
    error |= fdt.fdt_property(buf, "csum", struct.pack("<I", csum))
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    assert error == 0
    return buf


def properties(tree: Any) -> dict[str, bytes]:
    """Those of ``/data``."""
    node = fdt.fdt_subnode_offset(tree, 0, "data")
    names = ("nr_folios", "folios_info", "csum")
    return {name: bytes(fdt.fdt_getprop(tree, node, name)[0] or b"") for name in names}


def kho_test_restore(kernel: Kernel, fdt_phys: int) -> None:
    """``kho_test_restore``: every folio with its order, and the checksum over all of them."""
    tree = kernel.fdt_at(fdt_phys)
    assert fdt.fdt_node_check_compatible(tree, 0, KHO_TEST_COMPAT) == 0
    assert fdt.fdt_getprop(tree, 0, "magic")[0] == struct.pack("<I", KHO_TEST_MAGIC)
    found = properties(tree)
    info = kho_restore_vmalloc(kernel, KhoVmallocSlot(kernel, stack=found["folios_info"]))
    assert info is not None
    csum, page = 0, kernel.arch.page_size
    for index in range(struct.unpack("<I", found["nr_folios"])[0]):
        (entry,) = struct.unpack("<Q", info.read(index * 8, 8))
        folio = kernel.kho_restore_folio(entry & -page)
        assert folio is not None
        assert folio.order == entry & (page - 1)
        csum = zlib.crc32(folio.read(0, folio.len_bytes), csum)
        folio.put()
    vfree(kernel, info)
    assert struct.pack("<I", csum) == found["csum"]


@pytest.mark.parametrize("seed", range(3))
def test_kho(seed: int) -> None:
    """``lib/test_kho.c``: 8 MiB in folios of random orders, saved and restored."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on")
    with pytest.raises(KernelError) as caught:
        kernel.kho_retrieve_subtree(KHO_TEST_FDT)
    assert caught.value.errno == errno.ENOENT
    KhoTest(kernel).save(8 << 20, random.Random(seed))
    successor = machine.kexec(kernel)
    fdt_phys, _ = successor.kho_retrieve_subtree(KHO_TEST_FDT)
    kho_test_restore(successor, fdt_phys)
    assert not machine.check()


def test_kho_cleanup() -> None:
    """``kho_test_exit``: unloaded before the kexec, nothing of it is left."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on")
    keys = sum(nr_keys for nr_keys, _ in kernel.kho_out.tree.walk())
    test = KhoTest(kernel)
    test.save(8 << 20, random.Random(1))
    test.exit()
    assert sum(nr_keys for nr_keys, _ in kernel.kho_out.tree.walk()) == keys
    assert kernel.pages.nr_pages("allocated") < 64
    with pytest.raises(KernelError):
        machine.kexec(kernel).kho_retrieve_subtree(KHO_TEST_FDT)
    assert not machine.check()


@pytest.mark.parametrize("capture", ["uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k"])
def test_kho_bytes_of_real_kernels(capture: str) -> None:
    """The module's device tree in real handovers, made again from its three facts."""
    handover = json.loads((GOLDEN / capture / "gen0" / "handover.json").read_text())
    real = bytes.fromhex(handover["subtrees"][KHO_TEST_FDT]["hex"])
    found = properties(real)
    (nr_folios,) = struct.unpack("<I", found["nr_folios"])
    (csum,) = struct.unpack("<I", found["csum"])
    size = nr_folios * 8 + 4096
    ours = kho_test_fdt(size, nr_folios, found["folios_info"], csum)
    assert bytes(ours[: fdt.fdt_totalsize(ours)]) == real
