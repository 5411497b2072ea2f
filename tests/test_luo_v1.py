"""luo-v1 and memfd-v1 of 6.19 to 7.1: bytes by hand, limits, what other releases make of them."""

from __future__ import annotations

import struct

import pytest

from khosim import KernelError, KernelPanic, KhoSimError, Machine
from khosim.abi import fdt
from khosim.abi.memfd import LAYOUTS, KhoVmalloc, MemfdLuoSer, pack_memfd_luo_ser
from khosim.abi.memfd import unpack_memfd_luo_ser as unpack
from khosim.kernel.liveupdate.flb_ops import Flb
from khosim.kernel.liveupdate.luo_v1 import LuoArraySet

RELEASES = ["6.19", "7.0", "7.1"]
CMDLINE = "kho=on liveupdate=on"


def boot(release, **options):
    """A machine and its first kernel with live update on."""
    machine = Machine("256M", **options)
    return machine, machine.boot(release, cmdline=CMDLINE)


def luo_tree(kernel):
    """The device tree of the subtree LUO."""
    tree = kernel.fdt_at(kernel.liveupdate.luo_ser_out)
    return bytes(tree[: fdt.fdt_totalsize(tree)])


def u64_prop(tree, path, name):
    """A property of 8 bytes, lowest first."""
    node = fdt.fdt_subnode_offset(tree, 0, path) if path else 0
    value, length = fdt.fdt_getprop(tree, node, name)
    assert length == 8
    return int.from_bytes(value, "little")


def strings(tree, path):
    """The compatible string of a node."""
    node = fdt.fdt_subnode_offset(tree, 0, path) if path else 0
    return bytes(fdt.fdt_getprop(tree, node, "compatible")[0])


def one_file(kernel, name="vm-a", token=0x11, size="24K"):
    """A session with one memfd in it."""
    session = kernel.liveupdate.create_session(name)
    guest = kernel.memfd("guest", size=size)
    guest.write(0, b"state")
    session.preserve(guest, token=token)
    return session, guest


@pytest.mark.parametrize("release", RELEASES)
def test_the_tree(release):
    """Root and session node, and from 7.0 on a node of FLBs, each with a u64."""
    _, kernel = boot(release)
    tree = luo_tree(kernel)
    assert strings(tree, "") == b"luo-v1\0"
    assert u64_prop(tree, "", "liveupdate-number") == 1
    assert strings(tree, "luo-session") == b"luo-session-v2\0"
    sessions = u64_prop(tree, "luo-session", "luo-session-header")
    assert kernel.page(sessions >> 12).order == 4
    has_flb = fdt.fdt_subnode_offset(tree, 0, "luo-flb") >= 0
    assert has_flb == (release != "6.19")
    if has_flb:
        assert strings(tree, "luo-flb") == b"luo-flb-v1\0"
        page = u64_prop(tree, "luo-flb", "luo-flb-header")
        assert kernel.ram.read(page, 16) == struct.pack("<QQ", 1, 0)


@pytest.mark.parametrize("release", RELEASES)
def test_the_arrays(release):
    """u64 count, then 80 bytes for a session: name[64], address, count; 64 bytes for a file."""
    _, kernel = boot(release)
    _, guest = one_file(kernel)
    kernel.liveupdate.reboot()
    at = u64_prop(luo_tree(kernel), "luo-session", "luo-session-header")
    data = kernel.ram.read(at, 8 + 80 + 8)
    assert data[:8] == bytes([1, 0, 0, 0, 0, 0, 0, 0])
    assert data[8:72] == b"vm-a" + bytes(60)
    files = int.from_bytes(data[72:80], "little")
    assert data[80:88] == bytes([1, 0, 0, 0, 0, 0, 0, 0])
    assert data[88:] == bytes(8)
    assert kernel.page(files >> 12).order == 1
    file_ser = kernel.ram.read(files, 128)
    name = b"memfd-v2" if release == "7.1" else b"memfd-v1"
    assert file_ser[:48] == name + bytes(40)
    assert file_ser[56:64] == bytes([0x11, 0, 0, 0, 0, 0, 0, 0])
    assert file_ser[64:] == bytes(64)
    ser = int.from_bytes(file_ser[48:56], "little")
    head = kernel.ram.read(ser, 48)
    assert head[:16] == struct.pack("<QQ", guest.f_pos, 24 << 10)
    if release == "7.1":
        assert head[16:24] == bytes(8)
        head = head[24:]
    else:
        head = head[16:40]
    nr_folios, first, total_pages, flags, order = struct.unpack("<QQIHH", head)
    assert (nr_folios, total_pages, flags, order) == (6, 1, 1, 0)
    assert kernel.ram.read_u64(first) == 0


def test_a_memfd_v1_by_hand():
    """40 bytes: position, size, number of folios, and 16 bytes of vmalloc descriptor."""
    layout = LAYOUTS["memfd-v1"]
    ser = MemfdLuoSer(5, 0x2000, 0, 0, 2, KhoVmalloc(0x7000, 1, 1, 0))
    data = bytes.fromhex(
        "050000000000000000200000000000000200000000000000"
        "00700000000000000100000001000000"
    )
    assert pack_memfd_luo_ser(ser, layout) == data
    assert unpack(data, 0, layout) == ser
    assert layout.ser_bytes == len(data) == 40


@pytest.mark.parametrize("release", RELEASES)
def test_there_and_back(release):
    """Sessions, files and contents over two handovers, with every invariant silent."""
    machine, kernel = boot(release)
    one_file(kernel)
    for number in (1, 2):
        kernel = kernel.kexec()
        assert kernel.liveupdate.liveupdate_num == number
        session = kernel.liveupdate.retrieve_session("vm-a")
        guest = session.retrieve(0x11)
        assert guest.read(0, 5) == b"state"
        session.finish()
        session.close()
        again = kernel.liveupdate.create_session("vm-a")
        again.preserve(guest, token=0x11)
    assert machine.check() == []


@pytest.mark.parametrize(
    ("page_size", "sessions", "files"), [(4096, 819, 128), (16384, 3276, 512), (65536, 13107, 2048)]
)
def test_how_many_fit(page_size, sessions, files):
    """(16 pages - 8) / 80 sessions, 2 pages / 64 files."""
    kernel = Machine("3G", arch="arm64", page_size=page_size, checks=False).boot("6.19")
    assert LuoArraySet(kernel, 80, 16, 8).capacity == sessions
    assert LuoArraySet(kernel, 64, 2, 0).capacity == files


def test_the_820th_session_and_the_129th_file():
    """-ENOMEM and -ENOSPC, where 7.2 and later take another block."""
    _, kernel = boot("7.0")
    device = kernel.liveupdate.open()
    for i in range(819):
        device.create_session(f"s{i}")
    with pytest.raises(KernelError, match="-ENOMEM"):
        device.create_session("one more")
    device.close()
    files = kernel.liveupdate.sessions.outgoing.sessions["s0"].file_set
    for token in range(128):
        files.preserve(token, kernel.memfd(f"f{token}"))
    with pytest.raises(KernelError, match="-ENOSPC"):
        files.preserve(128, kernel.memfd("one more"))


def test_a_tree_without_flbs_kills_7_0():
    """Both are luo-v1, and only the newer insists on the node."""
    machine, kernel = boot("6.19")
    one_file(kernel)
    with pytest.raises(KernelPanic, match=r"failed to initialize properly \[-ENOENT\]"):
        kernel.kexec(release="7.0")
    assert machine.kernel is None


def test_a_tree_with_flbs_is_fine_for_6_19():
    """It does not look for the node."""
    machine, kernel = boot("7.0")
    one_file(kernel)
    successor = kernel.kexec(release="6.19")
    assert successor.liveupdate.retrieve_session("vm-a").retrieve(0x11).read(0, 5) == b"state"
    assert machine.check() == []


def test_seals_do_not_cross_in_memfd_v1():
    """The file comes back without them, and cannot be sealed either."""
    for release, seals in (("7.0", 1), ("7.1", 6)):
        _, kernel = boot(release)
        session = kernel.liveupdate.create_session("vm")
        guest = kernel.memfd("guest", size="4K")
        guest.add_seals(6)
        session.preserve(guest, token=1)
        got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
        assert got.inode.seals == seals


def test_closing_the_session_gives_everything_back():
    """The file's array goes with its last file, and nothing stays preserved."""
    machine, kernel = boot("6.19")
    free = kernel.pages.nr_free_pages()
    session, guest = one_file(kernel)
    session.close()
    guest.fput()
    kept = kernel.pages.nr_free_pages()
    assert free - kept <= 4  # bitmaps of orders that were not used before
    assert kernel.kexec().liveupdate.sessions.incoming.count == 0
    assert machine.check() == []


def test_flbs_begin_with_7_0():
    """6.19 has no such call."""
    _, kernel = boot("6.19")
    with pytest.raises(KhoSimError, match=r"Linux 6\.19 has no liveupdate_flb_get_outgoing"):
        kernel.liveupdate.flb_get_outgoing(Flb("x"))


@pytest.mark.parametrize(
    ("node", "prop", "cause"),
    [
        ("", "compatible", "FDT 'LUO' is incompatible with 'luo-v1'"),
        ("", "liveupdate-number", "Unable to get live update number 'liveupdate-number' [-1]"),
        ("luo-session", "compatible", "Session node incompatible [luo-session-v2]"),
        ("luo-session", "luo-session-header", "Unable to get session header"),
        ("luo-flb", "compatible", "FLB node is incompatible with 'luo-flb-v1'"),
        ("luo-flb", "luo-flb-header", "Unable to get FLB header property 'luo-flb-header' [-1]"),
    ],
)
def test_a_torn_tree_is_deadly(node, prop, cause):
    """Each part that is missing is named before the panic."""
    machine, kernel = boot("7.0", checks=False)
    buf = kernel.ram.writable_mv(kernel.liveupdate.luo_ser_out, 4096, (0, "somebody"))
    offset = fdt.fdt_subnode_offset(buf, 0, node) if node else 0
    assert fdt.fdt_delprop(buf, offset, prop) == 0
    machine.load_successor(kernel)
    told = []
    machine.listen(lambda event: told.append(event.args.get("message", "")))
    with pytest.raises(KernelPanic, match=r"failed to initialize properly \[-EINVAL\]"):
        machine.resume()
    assert any(cause in line for line in told)
