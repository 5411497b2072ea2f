"""How a guest's memory is scrambled: cheap, reversible, and different at each address.

Stands for the AES-XEX of a memory controller: the same bytes look different at another physical
address or with another key, and what was moved or written without the key reads as garbage. It is
no cryptography: words are combined with a hash of key and address.
"""

from __future__ import annotations

import numpy as np

__all__ = ("scramble",)


def scramble(
    key: int, phys: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]] | bytes
) -> bytes:
    """Plain bytes at ``phys`` to what RAM holds, and back: the same function does both."""
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype=np.uint8)
    first = phys >> 3
    count = (phys + len(data) + 7 >> 3) - first
    with np.errstate(over="ignore"):
        word = np.arange(first, first + count, dtype=np.uint64)
        word = (word + np.uint64(key)) * np.uint64(0x9E37_79B9_7F4A_7C15)
        word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
        word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
        word ^= word >> np.uint64(31)
    stream = word.view(np.uint8)[phys & 7 : (phys & 7) + len(data)]
    return (data ^ stream).tobytes()
