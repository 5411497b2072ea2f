"""The orchestrator's state in the handovers of real kernels, written again by a simulated one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim import Machine
from khosim.abi.luo import unpack_luo_file_ser, unpack_luo_ser, unpack_luo_session_ser
from khosim.kernel.liveupdate.file_ops import FileHandler
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOps

GOLDEN = Path(__file__).parent / "golden" / "captures"
CAPTURES = [
    (name, generation)
    for name in ("uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k")
    for generation in (0, 1)
]


def with_addresses(page: bytes, addresses: dict[int, int]) -> bytes:
    """The page with the u64 at each offset replaced."""
    copy = bytearray(page)
    for offset, value in addresses.items():
        struct.pack_into("<Q", copy, offset, value)
    return bytes(copy)


@pytest.mark.parametrize(("capture", "generation"), CAPTURES)
def test_bytes_of_real_kernels(capture: str, generation: int) -> None:
    """Root, session block and file blocks: the same bytes, but for the addresses."""
    folder = GOLDEN / capture / f"gen{generation}"
    facts: dict[str, Any] = json.loads((folder / "handover.json").read_text())
    with np.load(folder / "ram.npz") as ram:
        rows = zip(ram["pfn"], ram["data"], strict=True)
        pages = {int(pfn): page.tobytes() for pfn, page in rows}
    arm64 = capture.startswith("arm64")
    options: dict[str, Any] = {"arch": "arm64", "page_size": 16384} if arm64 else {}
    machine = Machine("1G", checks=False, **options)
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    for _ in range(generation):
        kernel = machine.kexec(kernel)
    page, shift = kernel.arch.page_size, kernel.arch.page_shift
    held = []
    for said in facts["luo"]["sessions"]:
        session = kernel.liveupdate.create_session(said["name"])
        held.append(session)
        for number, fact in enumerate(said["files"]):
            file = kernel.memfd(f"{number}", size=fact["size"])
            session.preserve(file, token=fact["token"])
    kernel.liveupdate.reboot()

    blob = facts["subtrees"]["LUO"]
    real_root = bytes.fromhex(blob["hex"])
    real = unpack_luo_ser(real_root)
    our_root = kernel.ram.read(kernel.liveupdate.luo_ser_out, blob["size"])
    ours = unpack_luo_ser(our_root)
    assert kernel.kho_out.fdt_phys
    assert with_addresses(our_root, {16: real.sessions_pa, 24: real.flbs_pa}) == real_root
    block = pages[real.sessions_pa >> shift]
    our_block = kernel.ram.read(ours.sessions_pa, page)
    addresses = {}
    for number, said in enumerate(facts["luo"]["sessions"]):
        at = 16 + 80 * number
        real_session = unpack_luo_session_ser(block, at)
        our_session = unpack_luo_session_ser(our_block, at)
        addresses[at + 64] = real_session.file_set.files
        files = pages[real_session.file_set.files >> shift]
        data = {
            16 + 64 * i + 48: unpack_luo_file_ser(files, 16 + 64 * i).data
            for i in range(len(said["files"]))
        }
        our_files = kernel.ram.read(our_session.file_set.files, page)
        assert with_addresses(our_files, data) == files
    assert with_addresses(our_block, addresses) == block


def test_the_bytes_of_shared_state() -> None:
    """The page of FLBs, which captures leave out: header and one entry, field by field."""
    kernel = Machine("64M", checks=False).boot(cmdline="kho=on liveupdate=on")
    luo = kernel.liveupdate

    def preserve(args: Any) -> None:
        args.data = 0xFEEDF00DCAFEBEE0

    def nothing(args: Any) -> None:
        del args

    flb = Flb(
        "liveupdate-test-flb-v0",
        LiveupdateFlbOps(preserve=preserve, unpreserve=nothing, retrieve=nothing, finish=nothing),
    )
    handler: FileHandler = luo.handlers["memfd-v2"]
    luo.register_flb(handler, flb)
    session = luo.create_session("s")
    for token in range(3):
        session.preserve(kernel.memfd("f"), token)
    luo.reboot()
    root = unpack_luo_ser(kernel.ram.read(luo.luo_ser_out, 32))
    expected = bytes.fromhex("0100000000000000 0100000000000000")
    expected += b"liveupdate-test-flb-v0".ljust(48, b"\0")
    expected += bytes.fromhex("e0befeca0df0edfe 0300000000000000")
    assert kernel.ram.read(root.flbs_pa, 4096) == expected.ljust(4096, b"\0")
