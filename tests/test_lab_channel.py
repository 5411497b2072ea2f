"""What the guest says: through its port, and on its console."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.lab.channel import ChannelError, Event, GuestFile, Message, PortReader
from khosim.lab.console import Console

WORDS = st.text("abc019 =:@", max_size=12).map(str.strip)
MESSAGES = st.builds(Message, st.text("ABC", min_size=1, max_size=5), WORDS)
NAMES = st.sampled_from(["dmesg", "kho/out/fdt", "kho/out/sub_fdts/LUO", "a b"])
FILES = st.builds(GuestFile, NAMES, st.binary(max_size=20))


def _said(event: Event) -> bytes:
    if isinstance(event, GuestFile):
        return b"@%s %d\n" % (event.name.encode(), len(event.data)) + event.data
    return f":{event.key} {event.text}\n".encode()


@given(st.lists(MESSAGES | FILES, max_size=6), st.integers(1, 7))
def test_events_arrive_however_they_are_cut(events: list[Event], step: int) -> None:
    """What is read does not depend on how many bytes come at a time."""
    reader = PortReader()
    stream = b"".join(map(_said, events))
    got = [
        event for at in range(0, len(stream), step) for event in reader.feed(stream[at : at + step])
    ]
    assert got == events
    assert reader.pending() == (0, 0)


def test_a_file_under_way() -> None:
    """Its progress can be told."""
    reader = PortReader()
    assert list(reader.feed(b"@dmesg 10\nabcd")) == []
    assert reader.pending() == (4, 10)


@pytest.mark.parametrize(
    ("noise", "cause"),
    [
        (b"hello\n", "'hello' is neither a message nor a file"),
        (b"@/etc/passwd 3\n", "names no file of a capture"),
        (b"@../x 3\n", "names no file of a capture"),
        (b"@ 3\n", "names no file of a capture"),
        (b"@x -3\n", "no sane length"),
        (b"@x 99999999999\n", "no sane length"),
        (b"@x\n", "names no file"),
        (b":" + b"x" * 5000, "no end to the line"),
    ],
)
def test_noise_is_refused(noise: bytes, cause: str) -> None:
    """What the guest's program does not say is an error that shows it."""
    with pytest.raises(ChannelError, match=cause):
        list(PortReader().feed(noise))


def test_the_console_is_plain_text() -> None:
    """Escape sequences and carriage returns of firmware and kernel are left out."""
    console = Console()
    console.feed(b"\x1b[2J\x1bcSeaBIOS\r\n\r\nBooting \x1b[1mfrom ROM\x1b[0m\r\n")
    assert console.tail() == ["cSeaBIOS", "Booting from ROM"]
    assert console.trouble() is None
    assert not console.died()


def test_a_panic_is_what_matters() -> None:
    """Of several bad lines the panic is named; without one, the first."""
    console = Console()
    console.feed(b"BUG: unable to handle page fault for address: 00\r\nOops: 0000 [#1]\r\n")
    assert console.trouble() == "BUG: unable to handle page fault for address: 00"
    console.feed(b"---[ end Kernel panic - not syncing: Fatal exception ]---\r\n")
    assert console.trouble() == "Kernel panic - not syncing: Fatal exception ]---"
    assert console.died()


def test_a_new_kernel_has_a_clean_slate() -> None:
    """An older kernel's oops is not held against its successor."""
    console = Console()
    console.feed(b"BUG: something\n")
    console.begin_generation()
    console.feed(b"fine\n")
    assert console.trouble() is None
    assert console.tail(1) == ["fine"]
    assert "BUG: something" in console.text
