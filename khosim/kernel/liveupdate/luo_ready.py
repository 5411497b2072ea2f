"""Is everybody there whom the predecessor's files need? No kernel asks yet (``fix_handler_late``).

``luo_session_deserialize`` @ 7.3 reads all sessions at the first ``open`` of ``/dev/liveupdate``.
A file whose handler is not registered then, because its module comes later, ends that for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.kho_block import (
    KHO_BLOCK_HEADER_BYTES,
    kho_block_capacity,
    unpack_kho_block_header,
)
from khosim.abi.luo import LUO_FILE_SER_BYTES, unpack_luo_file_ser, unpack_luo_session_ser
from khosim.kernel.kho_block import KhoBlockSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.luo_core import Luo

__all__ = ("missing_handler",)


def missing_handler(luo: Luo) -> str:
    """The ``compatible`` of a file that came and that nobody handles yet, or "".

    Takes no memory and changes nothing; sessions that make no sense have none.
    """
    sessions = luo.sessions
    header = sessions.incoming.block_set
    if sessions.deserialized is not None or not isinstance(header, KhoBlockSet):
        return ""
    for session in _entries(luo.kernel, header.head_pa, header.entry_size):
        files = unpack_luo_session_ser(session).file_set.files
        for file in _entries(luo.kernel, files, LUO_FILE_SER_BYTES):
            name = unpack_luo_file_ser(file).compatible
            if name not in luo.handlers:
                return name
    return ""


def _entries(kernel: Kernel, head_pa: int, entry_size: int) -> Iterator[bytes]:
    page = kernel.arch.page_size
    seen: set[int] = set()
    while head_pa and head_pa not in seen and kernel.hardware.is_ram(head_pa, page):
        seen.add(head_pa)
        block = kernel.ram.read(head_pa, page)
        header = unpack_kho_block_header(block)
        for n in range(min(header.count, kho_block_capacity(page, entry_size))):
            at = KHO_BLOCK_HEADER_BYTES + n * entry_size
            yield block[at : at + entry_size]
        head_pa = header.next
