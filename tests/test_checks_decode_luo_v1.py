"""The checkers' reader of luo-v1 and memfd-v1, on bytes put together by hand."""

from __future__ import annotations

import struct

import fdt as fdt_library
import pytest

from khosim import Machine
from khosim.checks.decode_luo import Luo, decode_luo
from khosim.checks.decode_root import Region

PAGE = 4096
BASE = 0x100000
TREE, SESSIONS, FILES, RECORD, FOLIO, CHUNK, AREA = (
    BASE + n * PAGE for n in (0, 16, 48, 64, 66, 68, 70)
)
"""The array of sessions takes 16 pages, that of files two."""


class Memory:
    """RAM that holds what was written, and zeros elsewhere."""

    def __init__(self) -> None:
        self.machine = Machine("16M", checks=False)

    def write(self, phys: int, data: bytes) -> None:
        self.machine.hardware.ram.write(phys, data, (0, "test"))

    def decode(self, size: int) -> Luo:
        return decode_luo(self.machine.hardware.ram, Region(TREE, size), PAGE, None)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def name(text: str, size: int) -> bytes:
    return text.encode().ljust(size, b"\0")


def tree(
    *, compatible: str = "luo-v1", sessions: int = SESSIONS, number: bytes | None = u64(3)
) -> bytes:
    """Return a blob made by another library than those under test."""
    root = fdt_library.Node("/")
    root.append(fdt_library.PropStrings("compatible", compatible))
    if number is not None:
        root.append(fdt_library.PropBytes("liveupdate-number", data=number))
    node = fdt_library.Node("luo-session")
    node.append(fdt_library.PropStrings("compatible", "luo-session-v2"))
    node.append(fdt_library.PropBytes("luo-session-header", data=u64(sessions)))
    root.append(node)
    blob = fdt_library.FDT()
    blob.root = root
    return bytes(blob.to_dtb(version=17))


def one_session(memory: Memory) -> None:
    """Write one session 'vm' with one memfd of one page, token 7."""
    memory.write(SESSIONS, u64(1) + name("vm", 64) + u64(FILES) + u64(1))
    memory.write(FILES, name("memfd-v1", 48) + u64(RECORD) + u64(7))
    # pos, size, nr_folios; then the area of records: first chunk, pages, flags, order.
    memory.write(RECORD, u64(5) + u64(100) + u64(1) + u64(CHUNK) + struct.pack("<IHH", 1, 1, 0))
    memory.write(CHUNK, u64(0) + u64(AREA))
    memory.write(AREA, u64(FOLIO // PAGE | 3 << 52) + u64(0))


def test_one_session_of_one_memfd() -> None:
    """Every field is where 6.19 writes it; a memfd-v1 has no seals."""
    memory = Memory()
    one_session(memory)
    blob = tree()
    memory.write(TREE, blob)
    luo = memory.decode(len(blob))
    assert luo.problems == ()
    assert (luo.compatible, luo.liveupdate_num, luo.flbs) == ("luo-v1", 3, [])
    (session,) = luo.sessions
    assert (session.name, session.nr_files) == ("vm", 1)
    (file,) = session.files
    assert (file.compatible, file.data, file.token) == ("memfd-v1", RECORD, 7)
    memfd = file.memfd
    assert memfd is not None
    assert (memfd.pos, memfd.size, memfd.seals, memfd.nr_folios) == (5, 100, 0, 1)
    assert memfd.pfn.tolist() == [FOLIO // PAGE]
    assert memfd.folio_flags.tolist() == [3]
    # 16 pages of sessions, two of files, the tree, the record, chunk and area.
    assert len(luo.pages) == 16 + 2 + 4


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"compatible": "luo-v0"}, "luo-compatible"),
        ({"number": b"\3\0\0\0"}, "luo-number"),
        ({"sessions": SESSIONS + 8}, "luo-pointer"),
    ],
)
def test_a_tree_that_is_wrong(changes: dict[str, object], code: str) -> None:
    """A foreign name, a number of the wrong size, an address that is none: each is said."""
    memory = Memory()
    one_session(memory)
    blob = tree(**changes)  # type: ignore[arg-type]
    memory.write(TREE, blob)
    assert [problem.code for problem in memory.decode(len(blob)).problems] == [code]


def test_more_than_fits_into_an_array() -> None:
    """819 sessions and 128 files are the most; a larger count is said, and not believed."""
    memory = Memory()
    one_session(memory)
    blob = tree()
    memory.write(TREE, blob)
    memory.write(SESSIONS + 8 + 72, u64(129))
    luo = memory.decode(len(blob))
    assert [problem.code for problem in luo.problems] == ["luo-count", "luo-count"]
    memory.write(SESSIONS, u64(820))
    luo = memory.decode(len(blob))
    assert [problem.code for problem in luo.problems] == ["luo-count"]
    assert luo.sessions == []


def test_a_page_of_two_owners() -> None:
    """Two sessions with one array of files: the second owner is a problem."""
    memory = Memory()
    one_session(memory)
    blob = tree()
    memory.write(TREE, blob)
    memory.write(SESSIONS, u64(2))
    memory.write(SESSIONS + 8 + 80, name("other", 64) + u64(FILES) + u64(0))
    assert [problem.code for problem in memory.decode(len(blob)).problems] == ["luo-shared"]
