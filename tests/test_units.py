"""Sizes as the kernel reads them: expected values worked out by hand from lib/cmdline.c @ 7.3."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.units import format_size, memparse, parse_size

U64_MAX = 0xFFFF_FFFF_FFFF_FFFF

# text, value, number of characters consumed
READ = [
    ("0", 0, 1),
    ("4096", 4096, 4),
    ("4K", 4096, 2),
    ("4k", 4096, 2),
    ("16M", 16777216, 3),
    ("16G", 17179869184, 3),
    ("2t", 2199023255552, 2),
    ("1P", 1125899906842624, 2),
    ("3e", 3458764513820540928, 2),
    # the base: 0x is hexadecimal only before a hexadecimal digit, any other 0 starts octal
    ("0x1000", 4096, 6),
    ("0X1fM", 32505856, 5),
    ("010", 8, 3),
    ("010K", 8192, 4),
    ("0755", 493, 4),
    ("08", 0, 1),
    ("0x", 0, 1),
    ("0xg", 0, 1),
    ("00x10", 0, 2),
    # E is a hexadecimal digit before it is a suffix
    ("0x1E", 30, 4),
    ("0x1EK", 30720, 5),
    # one suffix, then it ends
    ("1MM", 1048576, 2),
    ("1KiB", 1024, 2),
    ("64K,128M,32M", 65536, 3),
    ("4M:2M:trace", 4194304, 2),
    ("12x", 12, 2),
    ("1 K", 1, 1),
    ("1.5G", 1, 1),
    # no digit: 0, and nothing is consumed, not even a suffix
    ("", 0, 0),
    ("K", 0, 0),
    ("M16", 0, 0),
    ("-4K", 0, 0),
    ("+4K", 0, 0),
    (" 4K", 0, 0),
    ("nn", 0, 0),
    # 64 bits are the limit; what is past them stays at the limit, the suffix is still consumed
    ("18446744073709551615", U64_MAX, 20),
    ("18446744073709551616", U64_MAX, 20),
    ("0xffffffffffffffff", U64_MAX, 18),
    ("0x1ffffffffffffffff", U64_MAX, 19),
    ("01777777777777777777777", U64_MAX, 23),
    ("02000000000000000000000", U64_MAX, 23),
    ("99999999999999999999999K", U64_MAX, 24),
    ("15E", 0xF000_0000_0000_0000, 3),
    ("16E", U64_MAX, 3),
    ("16777216T", U64_MAX, 9),
    ("16777215T", 0xFFFF_FF00_0000_0000, 9),
    # only ASCII digits are digits
    ("\u0664K", 0, 0),
    ("4\u212a", 4, 1),
]


@pytest.mark.parametrize(("text", "value", "end"), READ, ids=[repr(row[0]) for row in READ])
def test_memparse_reads_as_the_kernel(text: str, value: int, end: int) -> None:
    """The value and the place where reading stopped are the kernel's."""
    assert memparse(text) == (value, end)


@pytest.mark.parametrize(("text", "value", "end"), READ, ids=[repr(row[0]) for row in READ])
def test_memparse_starts_where_it_is_told(text: str, value: int, end: int) -> None:
    """What stands before the start plays no part, and the end counts from the text's beginning."""
    assert memparse("0x7,0" + text, 5) == (value, 5 + end)


def test_memparse_past_the_end() -> None:
    """Nothing is left to read: 0, and the position stays."""
    assert memparse("4K", 2) == (0, 2)


@given(st.text(alphabet="0123456789abcdefxXkKmMgGtTpPeE ,:-", max_size=24))
def test_memparse_agrees_with_a_slow_reader(text: str) -> None:
    """A second reader, written with a table of powers and Python's int(), says the same."""
    base, skip = 10, 0
    if text.startswith("0"):
        is_hex = text[1:2] in ("x", "X") and text[2:3] in set("0123456789abcdefABCDEF")
        base, skip = (16, 2) if is_hex else (8, 0)
    digits = set("0123456789abcdefABCDEF" if base == 16 else "0123456789"[:base])
    end = skip
    while end < len(text) and text[end] in digits:
        end += 1
    value = int(text[skip:end], base) if end > skip else 0
    if end > skip and end < len(text) and text[end].lower() in "kmgtpe":
        value *= 1024 ** ("kmgtpe".index(text[end].lower()) + 1)
        end += 1
    assert memparse(text) == (min(value, U64_MAX), end)


@pytest.mark.parametrize(
    ("size", "len_bytes"),
    [
        (0, 0),
        (4096, 4096),
        (1 << 70, 1 << 70),
        ("0", 0),
        ("16G", 17179869184),
        ("0x1000", 4096),
        ("010", 8),
        ("1T", 1099511627776),
    ],
)
def test_parse_size_accepts_numbers_and_text(size: int | str, len_bytes: int) -> None:
    """A number is bytes as it is; text is what memparse reads."""
    assert parse_size(size) == len_bytes


@pytest.mark.parametrize("size", ["", "G", "16GB", "16 G", " 16G", "-1", "1.5G", "x", "0x", "08"])
def test_parse_size_wants_the_whole_text(size: str) -> None:
    """Text that is not wholly a size is refused by name, with the text in the message."""
    with pytest.raises(InputError) as refusal:
        parse_size(size, what="machine.ram")
    assert refusal.value.place == "machine.ram"
    assert repr(size) in refusal.value.cause


@pytest.mark.parametrize("size", [-1, True, False, 1.5, None, b"16G", [4096]])
def test_parse_size_refuses_what_is_no_size(size: object) -> None:
    """Negative numbers, booleans and other types are bad input, not a crash."""
    with pytest.raises(InputError, match="size: "):
        parse_size(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("len_bytes", "text"),
    [
        (0, "0"),
        (73, "73"),
        (1023, "1023"),
        (1024, "1K"),
        (1025, "1025"),
        (1536, "1536"),
        (2048, "2K"),
        (2684354560, "2560M"),
        (17179869184, "16G"),
        (1099511627776, "1T"),
        (1100585369600, "1025G"),
    ],
)
def test_format_size_is_exact(len_bytes: int, text: str) -> None:
    """The largest unit that divides the number of bytes."""
    assert format_size(len_bytes) == text


@given(st.integers(0, U64_MAX))
def test_format_size_reads_back(len_bytes: int) -> None:
    """What format_size writes is the same number of bytes to parse_size."""
    assert parse_size(format_size(len_bytes)) == len_bytes
