"""What khosim wrote, held against what its real successor says: each item can fail."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from khosim.capture.folder import Capture
from khosim.lab.folder import GenerationFiles
from khosim.lab.guest_ram import GuestRam
from khosim.lab.predecessor import Predecessor
from khosim.lab.run import Generation, RetrievedFile
from khosim.lab.stand_in import StandIn

GOLDEN = Path(__file__).parent / "golden" / "captures"
FDT_PHYS = 0x4A6000
ITEMS = [
    "predecessor named",
    "khosim's blocks reserved",
    "region oops",
    "kho_test folios",
    "khosim's memfds",
]


@pytest.fixture
def ram(tmp_path: Path) -> GuestRam:
    """The memory of a guest with 1 GiB."""
    path = tmp_path / "ram0"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    return GuestRam([path], [1 << 30])


@pytest.fixture
def scene(ram: GuestRam) -> tuple[StandIn, Generation]:
    """A stand-in that has handed over, and a successor that got everything."""
    stand_in = StandIn(Predecessor((1 << 30,), "reserve_mem=2M:4096:oops"), ram, lambda line: None)
    golden = Capture(GOLDEN / "uma1g").generation(0)
    first = Generation(0, GenerationFiles("gen0", {"dmesg": golden.bytes_of("dmesg")}), "7.3.4")
    stand_in.at_jump(first, FDT_PHYS)
    handed = stand_in._handed
    assert handed is not None
    log = [
        "KHO: exec from: 7.3-khosim (count 1)",
        "Revived memory reservation 'oops' from KHO",
        "test_kho: KHO restore succeeded",
    ]
    log += [
        f"__memblock_reserve: [{phys:#018x}-{phys + (4096 << order) - 1:#018x}] nid=-1 flags=20"
        " kho_preserved_memory_reserve+0x4b/0x60"
        for phys, order in handed.blocks
    ]
    start, _ = handed.belongings.regions["oops"]
    tree = golden.bytes_of("kho/out/sub_fdts/memblock")
    old = Capture(GOLDEN / "uma1g").generation(0)
    name = b"oops"
    assert name in tree
    old_start = _start_of(old.bytes_of("kho/out/sub_fdts/memblock"))
    files = {
        "dmesg": "\n".join(log).encode(),
        "kho/out/sub_fdts/memblock": tree.replace(old_start, start.to_bytes(8, "little")),
    }
    second = Generation(1, GenerationFiles("gen1", files), "7.3.4", has_liveupdate=True)
    for key, file in handed.belongings.files.items():
        digest = sha256(file.content).hexdigest()
        second.retrieved[key] = RetrievedFile(file.pos, file.seals, len(file.content), digest)
    return stand_in, second


def _start_of(tree: bytes) -> bytes:
    # The value of "start": the property before that of 8 bytes with the region's size.
    at = tree.index((2 << 20).to_bytes(8, "little"))
    return tree[at - 20 : at - 12]


def _bad(scene: tuple[StandIn, Generation]) -> list[str]:
    stand_in, second = scene
    stand_in.when_up(second)
    return [item.name for item in stand_in.items if not item.ok]


def test_all_of_it_is_right(scene: tuple[StandIn, Generation]) -> None:
    """Each item is there once, and holds."""
    assert _bad(scene) == []
    assert [item.name for item in scene[0].items] == ITEMS


@pytest.mark.parametrize(
    ("old", "new", "item"),
    [
        (b"7.3-khosim", b"7.3.4", "predecessor named"),
        (b"(count 1)", b"(count 2)", "predecessor named"),
        (b"exec from", b"exec", "predecessor named"),
        (b"Revived", b"Lost", "region oops"),
        (b"restore succeeded", b"restore failed", "kho_test folios"),
        (b"kho_preserved_memory_reserve", b"other", "khosim's blocks reserved"),
    ],
)
def test_a_log_that_says_otherwise(
    scene: tuple[StandIn, Generation], old: bytes, new: bytes, item: str
) -> None:
    """One word of the successor's log fails one item."""
    files = scene[1].files.files
    assert old in files["dmesg"]
    files["dmesg"] = files["dmesg"].replace(old, new, 1)
    assert _bad(scene) == [item]


def test_blocks_in_another_order(scene: tuple[StandIn, Generation]) -> None:
    """The same blocks in another order are not khosim's order."""
    files = scene[1].files.files
    lines = files["dmesg"].split(b"\n")
    lines[3], lines[4] = lines[4], lines[3]
    files["dmesg"] = b"\n".join(lines)
    assert _bad(scene) == ["khosim's blocks reserved"]


def test_other_content(scene: tuple[StandIn, Generation], ram: GuestRam) -> None:
    """One byte of the region is enough."""
    handed = scene[0]._handed
    assert handed is not None
    start, content = handed.belongings.regions["oops"]
    ram.write(start + len(content) - 1, bytes([content[-1] ^ 1]))
    assert _bad(scene) == ["region oops"]


def test_a_region_that_is_not_owned(scene: tuple[StandIn, Generation]) -> None:
    """A successor that revived the region hands it on in its turn."""
    del scene[1].files.files["kho/out/sub_fdts/memblock"]
    assert _bad(scene) == ["region oops"]


def test_a_lost_memfd(scene: tuple[StandIn, Generation]) -> None:
    """Each of the five counts."""
    del scene[1].retrieved["vm-b", 0x7]
    assert _bad(scene) == ["khosim's memfds"]


def test_without_live_update_no_memfds_are_asked_for(
    scene: tuple[StandIn, Generation],
) -> None:
    """A kernel without the device is not blamed; one without the test module neither."""
    second = scene[1]
    second.has_liveupdate = False
    second.files.files["dmesg"] = second.files.files["dmesg"].replace(b"test_kho: ", b"")
    assert _bad(scene) == []
    assert [item.name for item in scene[0].items] == ITEMS[:3]


def test_later_generations_are_left_alone(scene: tuple[StandIn, Generation], ram: GuestRam) -> None:
    """Only the first handover is khosim's, and only its successor is asked."""
    before = ram.read(FDT_PHYS, 4096)
    third = Generation(2, GenerationFiles("gen2"))
    scene[0].at_jump(third, FDT_PHYS + 4096)
    scene[0].when_up(third)
    assert scene[0].items == []
    assert ram.read(FDT_PHYS, 4096) == before
    assert not any(ram.read(FDT_PHYS + 4096, 4096))
