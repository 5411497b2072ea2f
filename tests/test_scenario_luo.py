"""Scenarios of guests and sessions: each step, what it expects, and what is wrong with it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from khosim.errors import InputError
from khosim.scenario.facts import StepRecord
from khosim.scenario.files import Device, DeviceFile
from khosim.scenario.parse import parse_scenario
from khosim.scenario.play import Player, play
from khosim.scenario.result import Result

GUEST = '{ do = "guest", name = "vm", size = "4M", pages = 9, huge = "always", small = 3 }'
OTHER = '{ do = "guest", name = "other", size = "1M", position = 77, seals = ["grow", "seal"] }'
DEVICE = '{ do = "device", name = "nic" }'
SESSION = '{ do = "session", name = "s", files = ["vm"] }'
TAKE = '{ do = "retrieve", session = "*" }'
END = '{ do = "finish", session = "*" }, { do = "close", session = "*" }'


def _text(*generations: str, cmdline: str = "kho=on liveupdate=on", release: str = "7.3") -> str:
    tables = []
    for generation in generations:
        steps, _, kexec = generation.partition("|")
        tables.append(f"[[generation]]\nsteps = [ {steps} ]\n" + (f"kexec = {kexec}" * bool(kexec)))
    kernel = f'[kernel]\ncmdline = "{cmdline}"\nrelease = "{release}"\n'
    return f'[machine]\nram = "128M"\n{kernel}' + "\n".join(tables)


def _run(*generations: str, **parts: str) -> Result:
    return play(parse_scenario(_text(*generations, **parts), "test"))


def _ok(*generations: str, **parts: str) -> Result:
    result = _run(*generations, **parts)
    assert result.failures == []
    assert result.violations == []
    return result


def _steps(result: Result, generation: int) -> dict[str, StepRecord]:
    return {step.do: step for step in result.kernels[generation].steps}


def test_guests_come_back_as_they_were() -> None:
    """Through three kernels: size, position, seals, folios, content; the facts name them."""
    again = f'{TAKE}, {END}, {{ do = "check", guest = "*" }}, {{ do = "write", guest = "vm" }}'
    both = '{ do = "session", name = "s", files = ["vm", "other"], tokens = [0, 1234567890123] }'
    result = _ok(f"{GUEST}, {OTHER}, {both}", f"{again}, {both}", again)
    assert [len(kernel.sessions) for kernel in result.kernels] == [1, 1, 0]
    (session,) = result.kernels[1].sessions
    assert session.files == {"0x0": "vm", "0x11f71fb04cb": "other"}
    assert set(session.handlers.values()) == {"memfd-v2"}
    retrieved = _steps(result, 1)["retrieve"]
    assert (retrieved.blocks, retrieved.len_bytes) == (2, 5 << 20)
    pages = sum(count << int(order) for order, count in retrieved.by_order.items())
    assert pages == 5 << 20 >> 12
    assert len(retrieved.by_order) > 5


@pytest.mark.parametrize(
    ("when", "word"), [("jump", "damaged"), ("now", "ok")], ids=["at the jump", "before it"]
)
def test_a_flipped_byte_of_a_guest_is_found(when: str, word: str) -> None:
    """By the step that takes it back; by an invariant too. Before the jump it is the check's."""
    corrupt = f'{{ do = "corrupt", at = "vm", flip = 4, when = "{when}" }}'
    result = _run(f"{GUEST}, {SESSION}, {corrupt}", '{ do = "retrieve", session = "s" }')
    assert [step.outcome for step in result.kernels[1].steps] == ["damaged"]
    assert "vm: page " in result.failures[0]
    broken = {violation.invariant for violation in result.violations}
    assert ("preserved-content" in broken) == (word == "damaged")
    result = _run(f"{GUEST}, {corrupt}, {{ do = 'check', guest = 'vm' }}")
    assert [step.outcome for step in result.kernels[0].steps][-1] == (
        "ok" if when == "jump" else "damaged"
    )


def test_content_where_there_was_none_is_found() -> None:
    """A page that has to be empty is not: the observer looks at every page that was touched."""
    player = Player(parse_scenario(_text(GUEST), "test"))
    for _ in player.generations():
        pass
    guest: Any = player.files["vm"]
    assert guest.content_fault(guest.memfd) == ""
    page = next(page for page in range(1 << 10) if page not in guest.pages)
    guest.memfd.store((page << 12) + 4095, b"!")
    assert guest.content_fault(guest.memfd) == f"page {page:#x} is not empty any more"


@pytest.mark.parametrize(
    ("note", "value", "fault"),
    [
        ("size", 1, "size 0x400000, not 0x1"),
        ("position", 5, "position 0x0, not 0x5"),
        ("seals", 4, "seals 0x0, not 0x4"),
        ("folios", [], "its folios are not those that were handed over"),
        ("keys", None, "page "),
    ],
)
def test_each_attribute_is_compared(note: str, value: object, fault: str) -> None:
    """What comes back is held against the notes: with another note it is found to differ."""
    player = Player(parse_scenario(_text(f"{GUEST}, {SESSION}", TAKE), "test"))
    for _ in player.generations():
        pass
    guest: Any = player.files["vm"]
    assert guest.fault(guest.memfd) == ""
    setattr(guest, note, guest.keys[::-1] if value is None else value)
    assert guest.fault(guest.memfd).startswith(fault)
    device = Device("nic", 7)
    assert device.fault(guest.memfd) == "a Memfd came back, not a device"
    assert device.fault(DeviceFile(player.kernel, "nic", 8)) == "its value is 0x8, not 0x7"
    assert guest.fault(DeviceFile(player.kernel, "nic", 8)) == "a DeviceFile came back, not a memfd"


@pytest.mark.parametrize(
    "steps",
    [
        f'{SESSION}, {{ do = "session", name = "s", expect = "EEXIST" }}',
        '{ do = "session", name = "", expect = "EINVAL" }',
        f'{{ do = "session", name = "{"x" * 64}", expect = "EINVAL" }}',
        (f'{SESSION}, {{ do = "preserve_fd", session = "s", file = "vm", token = 2, '
        'expect = "EBUSY" }'),
        (f'{SESSION}, {DEVICE}, {{ do = "preserve_fd", session = "s", file = "nic", token = 1, '
        'expect = "EEXIST" }'),
        '{ do = "retrieve", session = "never made", expect = "ENOENT" }',
        f'{SESSION}, {{ do = "finish", session = "s", expect = "EINVAL" }}',
        ('{ do = "guest", name = "big", size = "1T" }, '
        '{ do = "session", name = "t", files = ["big"], expect = "ENOMEM" }, '
        '{ do = "stop", name = "big" }'),
        ('{ do = "guest", name = "big", size = "17T" }, '
        '{ do = "session", name = "t", files = ["big"], expect = "EFBIG" }'),
    ],
)
def test_the_kernel_refuses(steps: str) -> None:
    """With the errno that the step expects; nothing is lost by it, and the next step goes on."""
    result = _ok(f'{GUEST}, {steps}, {{ do = "check", guest = "vm" }}')
    assert [step.outcome for step in result.kernels[0].steps][-1] == "ok"


def test_a_session_is_retrieved_once_and_its_files_one_by_one() -> None:
    """Some tokens first, others later; the second time the session is refused."""
    session = '{ do = "session", name = "s", files = ["vm", "other"], tokens = [5, 6] }'
    retrieve = '{{ do = "retrieve", session = "s", tokens = [{}] }}'.format
    result = _ok(
        f"{GUEST}, {OTHER}, {session}",
        f'{retrieve(6)}, {retrieve(5)}, {retrieve("6, 5")}, {retrieve("7")[:-1]}, '
        'expect = "ENOENT" }, { do = "retrieve", session = "s", expect = "EINVAL" }, '
        f'{END}, {{ do = "check", guest = "*" }}',
    )
    assert [step.blocks for step in result.kernels[1].steps[:3]] == [1, 1, 2]


def test_what_is_not_retrieved_is_freed() -> None:
    """Finish lets go of it: the guest is gone, no page is lost, and its name is free again."""
    result = _run(
        f"{GUEST}, {OTHER}, {SESSION}, "
        '{ do = "preserve_fd", session = "s", file = "other", token = 9 }',
        f'{{ do = "retrieve", session = "s", tokens = [9] }}, {END}, {GUEST}, '
        '{ do = "check", guest = "*" }',
    )
    assert (result.failures, result.violations) == ([], [])
    assert _steps(result, 1)["check"].blocks == 9 + 64


def test_closing_a_session_calls_it_off() -> None:
    """The guest goes on in this kernel; the successor has no such session, and no such guest."""
    result = _ok(
        f'{GUEST}, {SESSION}, {{ do = "close", session = "s" }}, {{ do = "write", guest = "vm" }}',
        '{ do = "retrieve", session = "s", expect = "ENOENT" }',
    )
    assert result.kernels[0].sessions == []


def test_the_agent_can_be_killed_on_both_sides() -> None:
    """Before the jump its sessions are called off and guests live on; after it they are finished.

    What was retrieved stays with its guest, what was not is freed.
    """
    kill = '{ do = "kill" }'
    both = f'{SESSION}, {{ do = "session", name = "t", files = ["other"] }}'
    result = _ok(
        f'{GUEST}, {OTHER}, {both}, {kill}, {{ do = "check", guest = "*" }}, {both}',
        f'{{ do = "retrieve", session = "s" }}, {kill}, {{ do = "check", guest = "*" }}, '
        '{ do = "retrieve", session = "t" }, { do = "session", name = "u", files = ["vm"] }',
    )
    assert _steps(result, 0)["kill"].blocks == 2
    assert _steps(result, 1)["check"].blocks == 9
    assert [session.name for session in result.kernels[1].sessions] == ["u"]


def test_a_refused_freeze_leaves_all_as_it_was() -> None:
    """The reboot fails with the device's errno; guests, sessions and the next reboot are fine."""
    refusing = '{ do = "device", name = "nic", refuses = "EIO" }'
    session = '{ do = "session", name = "s", files = ["vm", "nic", "other"] }'
    result = _ok(
        f'{GUEST}, {OTHER}, {refusing}, {session}, {{ do = "reboot", expect = "EIO" }}, '
        f'{{ do = "write", guest = "*" }}, {{ do = "check", guest = "*" }}, {DEVICE}',
        f"{TAKE}, {END}",
    )
    assert _steps(result, 1)["retrieve"].blocks == 3
    result = _run(f'{GUEST}, {SESSION}, {{ do = "reboot", expect = "EIO" }}')
    assert "the machine jumped, but EIO was expected" in result.failures[0]


def test_a_kexec_may_expect_the_refusal() -> None:
    """The run ends there, as with a load that is refused."""
    refusing = '{ do = "device", name = "nic", refuses = "EBUSY" }'
    session = '{ do = "session", name = "s", files = ["nic"] }'
    result = _ok(f'{refusing}, {session} | {{ expect = "EBUSY" }}', DEVICE)
    assert len(result.kernels) == 1


def test_a_stopped_guest_is_its_sessions() -> None:
    """Its process is gone, the session keeps the memory, the successor gives it back."""
    result = _ok(
        f'{GUEST}, {SESSION}, {{ do = "stop", name = "vm" }}',
        f'{TAKE}, {END}, {{ do = "check", guest = "vm" }}, {{ do = "stop", name = "vm" }}',
    )
    assert result.kernels[1].preserved.blocks < 10


@pytest.mark.parametrize("release", ["6.19", "7.0", "7.1", "7.2"])
def test_older_releases_carry_guests(release: str) -> None:
    """Each what its format has a place for: memfd-v1 forgets seals, which an invariant tells."""
    plain = '{ do = "guest", name = "vm", size = "4M" }, { do = "guest", name = "b", size = 77777 }'
    both = '{ do = "session", name = "s", files = ["vm", "b"] }'
    _ok(f"{plain}, {both}", f"{TAKE}, {END}, {both}", TAKE, release=release)
    sealed = '{ do = "session", name = "s", files = ["other"] }'
    result = _run(f"{OTHER}, {sealed}", TAKE, release=release)
    broken = {violation.invariant for violation in result.violations}
    assert broken == ({"luo-file-equal"} if release < "7.1" else set())


@pytest.mark.parametrize(
    "parts",
    [{"cmdline": "kho=on"}, {"cmdline": "liveupdate=on"}, {"release": "6.18"}],
    ids=["no liveupdate=", "no kho=", "before LUO"],
)
def test_without_luo_there_is_no_device(parts: dict[str, str]) -> None:
    """ENOENT, from opening it."""
    _ok(f'{GUEST}, {SESSION[:-1]}, expect = "ENOENT" }}', **parts)


def test_sessions_do_not_outlive_a_refused_handover() -> None:
    """The successor boots cold and has none of them; guests may start anew."""
    _ok(
        f'{GUEST}, {SESSION} | {{ release = "7.0", expect = "refused" }}',
        f'{{ do = "retrieve", session = "s", expect = "ENOENT" }}, {GUEST}',
    )


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        ('{ do = "guest", name = "vm" }', "step 1: 'size' is missing"),
        ('{ do = "guest", name = "vm", size = "x%" }', "size: 'x%' is not a share of RAM from 1%"),
        ('{ do = "guest", name = "vm", size = "0%" }', "size: '0%' is not a share of RAM"),
        ('{ do = "guest", name = "vm", size = -1 }', "size: "),
        ('{ do = "guest", name = "vm", size = 9, most = 3 }', "unknown key 'most'"),
        ('{ do = "guest", name = "fdt", size = 9 }', "'fdt' names something else"),
        ('{ do = "guest", name = "vm", size = 9, seals = ["wryte"] }', "did you mean 'write'?"),
        ('{ do = "guest", name = "vm", size = 9, seals = [[]] }', "seals, entry 1: [] is no seal"),
        ('{ do = "guest", name = "vm", size = 9, huge = "alway" }', "did you mean 'always'?"),
        ('{ do = "guest", name = "vm", size = 9, pages = 10001 }', "pages: 10001 is above 10,000"),
        (f'{GUEST}, {{ do = "folios", name = "vm" }}', "'vm' is a guest or a device"),
        ('{ do = "folios", name = "vm" }, ' + GUEST, "'vm' names something else"),
        ('{ do = "device", name = "nic", refuses = "no" }', "'no' is not the name of an errno"),
        (f'{GUEST}, {{ do = "session", name = "s", files = ["vn"] }}', "known: vm"),
        (f'{GUEST}, {{ do = "session", name = "s", files = [1] }}', "files, entry 1: "),
        (f'{GUEST}, {SESSION[:-1]}, tokens = [1, 2] }}', "tokens: 2 for 1 file"),
        (f'{GUEST}, {SESSION[:-1]}, tokens = [-1] }}', "tokens, entry 1: -1 is negative"),
        (f'{GUEST}, {SESSION[:-1]}, tokens = [1.5] }}', "tokens, entry 1: 1.5 is not a whole"),
        (f'{GUEST}, {SESSION}, {{ do = "close", session = "t" }}', "no step before this makes 't'"),
        ('{ do = "retrieve", session = "*", tokens = [1] }', "tokens: for one session only"),
        ('{ do = "reboot" }', "expect: the errno with which something refuses is missing"),
        ('{ do = "write", guest = "vm" }', "guest: no step before this starts 'vm'"),
        ('{ do = "stop", name = "vm" }', "name: no step before this starts 'vm'"),
        ('{ do = "check", guest = "*", name = "*" }', "give 'name' (a group), 'region'"),
    ],
)
def test_wrong_steps_are_told_in_one_line(steps: str, cause: str) -> None:
    """With the place, before anything runs."""
    with pytest.raises(InputError, match=re.escape(cause)) as error:
        parse_scenario(_text(steps), "test.toml")
    assert str(error.value).startswith("test.toml: generation 0, step ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        (f"{GUEST}, {GUEST}", "step 2: there is a 'vm' already"),
        (f'{GUEST}, {{ do = "close", session = "*" }}', "the agent does not have a session open"),
        (TAKE, "no session came from the predecessor"),
        (f'{GUEST}, {{ do = "stop", name = "vm" }}, {SESSION}', "no 'vm' runs in generation 0"),
        ('{ do = "write", guest = "*" }', "no guest runs in generation 0"),
        (f'{DEVICE}, {{ do = "check", guest = "nic" }}', "'nic' is no guest"),
        (f'{DEVICE}, {{ do = "check", guest = "*" }}', "step 2: no guest runs here"),
        (f'{GUEST}, {{ do = "device", name = "vm" }}', "'vm' is no device of this kernel"),
    ],
)
def test_steps_that_make_no_sense_are_told_on_the_way(steps: str, cause: str) -> None:
    """Where only the run can know."""
    with pytest.raises(InputError, match=re.escape(cause)):
        _run(steps)


def test_too_many_folios_are_refused_before_anything_runs() -> None:
    """By their number, which large folios keep small."""
    text = _text('{ do = "guest", name = "vm", size = "100G" }').replace('"128M"', '"1T"')
    with pytest.raises(InputError, match="guests have more than 16,777,216 folios"):
        parse_scenario(text, "test")
    parse_scenario(text.replace('"100G"', '"100G", huge = "always"'), "test")
