"""memfds in the handovers of real kernels: their bytes written again, and their files retrieved."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim import Machine
from khosim.abi.kho_vmalloc import unpack_kho_vmalloc_chunk
from khosim.abi.memfd import unpack_memfd_luo_ser
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs
from khosim.kernel.liveupdate.memfd_luo import MemfdLuoHandler
from khosim.kernel.memfd import Memfd, memfd
from khosim.kernel.page_map import INCOMING, PageState

GOLDEN = Path(__file__).parent / "golden" / "captures"
HANDLER = MemfdLuoHandler()


def boot(ram: str, capture: str) -> Kernel:
    options: dict[str, Any] = {}
    if capture.startswith("arm64"):
        options = {"arch": "arm64", "page_size": 16384}
    return Machine(ram, checks=False, **options).boot(cmdline="kho=on")


@cache
def handover(capture: str, generation: str) -> tuple[dict[str, Any], dict[int, bytes]]:
    folder = GOLDEN / capture / generation
    ram = np.load(folder / "ram.npz")
    pages = {int(pfn): page.tobytes() for pfn, page in zip(ram["pfn"], ram["data"], strict=True)}
    return json.loads((folder / "handover.json").read_text()), pages


CAPTURES = [
    (name, generation)
    for name in ("uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k")
    for generation in ("gen0", "gen1")
]


@pytest.mark.parametrize(("capture", "generation"), CAPTURES)
def test_bytes_of_real_kernels(capture: str, generation: str) -> None:
    """For the same files khosim writes the same pages, but for the addresses."""
    facts, pages = handover(capture, generation)
    kernel = boot("1G", capture)
    page, shift = kernel.arch.page_size, kernel.arch.page_shift
    seen = 0
    for session in facts["luo"]["sessions"]:
        for fact in session["files"]:
            file = memfd(kernel, "guest", size=fact["size"])
            file.add_seals(fact["seals"])
            args = LiveupdateFileOpArgs(kernel, HANDLER, file=file)
            HANDLER.preserve(args)
            file.lseek(fact["pos"])
            HANDLER.freeze(args)
            # Everything that the handle reaches, with our addresses replaced by the real ones.
            real = unpack_memfd_luo_ser(pages[fact["data"] >> shift])
            ours = unpack_memfd_luo_ser(kernel.ram.read(args.serialized_data, 48))
            new_ser = kernel.ram.read(args.serialized_data, page)
            if fact["nr_folios"]:
                new_ser = new_ser[:32] + struct.pack("<Q", real.folios.first) + new_ser[40:]
                _, our_areas = unpack_kho_vmalloc_chunk(kernel.ram.read(ours.folios.first, page))
                real_chunk = pages[real.folios.first >> shift]
                _, real_areas = unpack_kho_vmalloc_chunk(real_chunk)
                new_chunk = bytearray(kernel.ram.read(ours.folios.first, page))
                new_chunk[8 : 8 + 8 * len(real_areas)] = struct.pack(
                    f"<{len(real_areas)}Q", *real_areas
                )
                assert len(our_areas) == len(real_areas)
                assert bytes(new_chunk) == real_chunk
                written = b"".join(kernel.ram.read(phys, page) for phys in our_areas)
                words = np.frombuffer(written, dtype="<u8").reshape(-1, 2).copy()
                count = fact["nr_folios"]
                words[:count, 0] += np.array(fact["folios"], dtype=np.uint64)[:, 0]
                pfns = [
                    run.pfn_of(at) for run in file.inode.mapping for at in range(run.index, run.end)
                ]
                words[:count, 0] -= np.array(pfns, dtype=np.uint64)
                assert words.tobytes() == b"".join(pages[phys >> shift] for phys in real_areas)
                seen += count
            assert new_ser == pages[fact["data"] >> shift]
    assert seen == sum(f["nr_folios"] for s in facts["luo"]["sessions"] for f in s["files"])


@pytest.mark.parametrize(("capture", "generation"), CAPTURES)
def test_real_handovers_are_retrieved(capture: str, generation: str) -> None:
    """A kernel on the real RAM image gets the real files back, to the last byte."""
    facts, pages = handover(capture, generation)
    kernel = boot("4G", capture)
    shift = kernel.arch.page_shift
    files = [fact for session in facts["luo"]["sessions"] for fact in session["files"]]

    # As if this kernel had been handed those pages: their bytes, and struct pages to restore.
    def adopt(pfn: int) -> None:
        kernel.ram.write(pfn << shift, pages[pfn], (0, "predecessor"))
        kernel.pages.pages.set(pfn, pfn + 1, PageState(INCOMING, 0, False, "predecessor"))

    for fact in files:
        adopt(fact["data"] >> shift)
        first = unpack_memfd_luo_ser(pages[fact["data"] >> shift]).folios.first
        if first:
            adopt(first >> shift)
            for phys in unpack_kho_vmalloc_chunk(pages[first >> shift])[1]:
                adopt(phys >> shift)
        for pfn, _, _ in fact["folios"]:
            adopt(pfn)
    for fact in files:
        args = LiveupdateFileOpArgs(kernel, HANDLER, serialized_data=fact["data"])
        HANDLER.retrieve(args)
        again = args.file
        assert isinstance(again, Memfd)
        assert (again.size, again.f_pos, again.seals) == (fact["size"], fact["pos"], fact["seals"])
        content = again.read(0, again.size)
        if "sha256" in fact:
            assert hashlib.sha256(content).hexdigest() == fact["sha256"]
        listed = [
            [run.pfn_of(at), 3, at]
            for run in again.inode.mapping
            for at in range(run.index, run.end)
        ]
        assert listed == fact["folios"]
