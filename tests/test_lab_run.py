"""A guest followed from jump to jump: with a QEMU that only plays its part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from khosim.capture.folder import Capture
from khosim.cli.main import main
from khosim.errors import KhoSimError
from khosim.lab import run as run_module
from khosim.lab.bzimage import BzImage
from khosim.lab.channel import ChannelError, Event, GuestFile, Message
from khosim.lab.console import Console
from khosim.lab.gdb import GdbError
from khosim.lab.guest_ram import GuestRam
from khosim.lab.run import Generation, GuestTrouble, Lab
from khosim.lab.verdict import Item, reserved_blocks, verdict

GOLDEN = Path(__file__).parent / "golden" / "captures"
ENTRY = 0xFFFFFFFF81060000
KHO_OUT = 0xFFFFFFFF81700000
KERNEL = BzImage(Path("bzImage"), b"", "7.3.4", 16 << 20)


class FakeGdb:
    """A stub whose guest stops at machine_kexec as soon as it runs to it."""

    def __init__(self, qemu: FakeQemu) -> None:
        self.qemu = qemu
        self.breakpoints: list[int] = []

    def resume(self) -> None:
        """Run."""
        self.qemu.log.append("resume")
        if not self.breakpoints:
            self.qemu.next_generation()

    def interrupt(self) -> None:
        """Stop."""
        self.qemu.log.append("interrupt")

    def insert_breakpoint(self, address: int) -> None:
        """Note it."""
        self.breakpoints.append(address)

    def remove_breakpoint(self, address: int) -> None:
        """Forget it."""
        self.breakpoints.remove(address)

    def wait_stop(self, timeout: float) -> bool:
        """It stops once it was told to go on."""
        return self.qemu.log[-1] == "answer" and self.qemu.jumps

    def register(self, name: str) -> int:
        """It is where the breakpoint is."""
        assert name == "rip"
        return self.breakpoints[0] if self.qemu.at_breakpoint else 0x1234

    def read_u64(self, address: int) -> int:
        """``kho_out.fdt``, in the direct map."""
        assert address == KHO_OUT
        return 0xFFFF888000000000 + self.qemu.fdt_phys[self.qemu.generation]


class FakeQemu:
    """Plays ``script``: the events of each generation, whose memory comes from a capture."""

    def __init__(self, script: list[list[Event]], ram: list[GuestRam], fdt: list[int]) -> None:
        self.script = script
        self.rams = ram
        self.fdt_phys = fdt
        self.generation = -1
        self.log: list[str] = []
        self.console = Console()
        self.gdb = FakeGdb(self)
        self.is_gone = False
        self.jumps = True
        self.at_breakpoint = True
        self.pending: list[Event] = []

    @property
    def ram(self) -> GuestRam:
        """The memory of the generation that runs."""
        return self.rams[self.generation]

    def next_generation(self) -> None:
        """The next one begins to speak."""
        self.generation += 1
        self.pending = list(self.script[self.generation])

    def answer(self) -> None:
        """The guest goes on."""
        self.log.append("answer")

    def pump(self, timeout: float) -> Iterator[Event]:
        """All that is pending."""
        events, self.pending = self.pending, []
        yield from events


def _told(index: int, last: bool) -> list[Event]:
    """What a golden generation would have said of itself."""
    golden = Capture(GOLDEN / "uma1g").generation(index)
    told: list[Event] = [
        Message("GENERATION", str(index)),
        Message("RELEASE", "7.3.4 x86_64 4096"),
        Message("SYMBOL", "_text 0xffffffff81000000"),
        Message("SYMBOL", f"machine_kexec {ENTRY:#x}"),
        Message("SYMBOL", f"kho_out {KHO_OUT:#x}"),
        Message("LIVEUPDATE", ""),
    ]
    for path in sorted(golden.path.rglob("*")):
        if path.is_file() and path.name not in ("ram.npz", "handover.json"):
            data = path.read_bytes()
            if path.name == "dmesg":
                data = b"".join(b"<6>" + line + b"\n" for line in data.splitlines())
            told.append(GuestFile(str(path.relative_to(golden.path)), data))
    if index:
        for session in Capture(GOLDEN / "uma1g").generation(index - 1).handover["luo"]["sessions"]:
            for file in session["files"]:
                digest = file.get("sha256", "e3b0c442" + "98fc1c149afbf4c8996fb924"
                                  "27ae41e4649b934ca495991b7852b855")  # fmt: skip
                text = f"{session['name']} {file['token']:#x} {file['pos']} {file['seals']:#x}"
                told.append(Message("FILE", f"{text} {file['size']} {digest}"))
    told.append(Message("DONE" if last else "READY", ""))
    return told


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[GuestRam], list[int]]:
    """The golden generations' memory at their jumps, and where their root FDTs are."""
    rams, fdts = [], []
    for index in range(2):
        golden = Capture(GOLDEN / "uma1g").generation(index)
        path = tmp_path_factory.mktemp("ram") / "ram0"
        with open(path, "wb") as file:
            file.truncate(1 << 30)
        ram = GuestRam([path], [1 << 30])
        pfn, data = golden.ram_pages
        for at, page in zip(pfn.tolist(), np.asarray(data), strict=True):
            ram.write(at * 4096, page.tobytes())
        rams.append(ram)
        fdts.append(golden.handover["fdt_phys"])
    return [*rams, rams[-1]], fdts


@pytest.fixture
def qemu(memory: tuple[list[GuestRam], list[int]], monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """A guest that goes through the golden generations."""
    monkeypatch.setattr(run_module, "_LAST_WORDS_SECONDS", 0.0)
    return FakeQemu([_told(n, n == 2) for n in range(3)], *memory)


def _run(qemu: FakeQemu, handovers: int = 2, timeout: float = 5) -> list[Generation]:
    lab = Lab(qemu, KERNEL, timeout=timeout)  # type: ignore[arg-type]
    return lab.run(handovers)


def test_a_guest_is_followed_to_its_end(qemu: FakeQemu) -> None:
    """Each generation's files and handover are kept, and it is let go in the right order."""
    generations = _run(qemu)
    assert [one.name for one in generations] == ["gen0", "gen1", "gen2"]
    jump = ["interrupt", "resume", "answer", "resume"]
    assert qemu.log == ["resume", *jump, *jump, "answer"]
    assert qemu.gdb.breakpoints == []
    golden = Capture(GOLDEN / "uma1g")
    for one in generations:
        real = golden.generation(one.index)
        assert one.files.files["dmesg"].rstrip() == real.bytes_of("dmesg").rstrip()
        if one.index < 2:
            said = json.loads(one.files.files["handover.json"])
            assert said["preserved"] == real.handover["preserved"]
            assert said["luo"]["sessions"] == real.handover["luo"]["sessions"]
    assert "handover.json" not in generations[2].files.files


def test_all_holds_for_the_golden_generations(qemu: FakeQemu) -> None:
    """Every item is right, and counts what the capture holds."""
    items = verdict(_run(qemu))
    assert all(item.ok for item in items)
    blocks = len(Capture(GOLDEN / "uma1g").generation(0).handover["preserved"])
    wanted = f"{blocks} of {blocks} blocks, in order"
    assert Item("gen1", "preserved blocks reserved", True, wanted) in items
    assert Item("gen2", "memfds read back", True, "5 of 5") in items


@pytest.mark.parametrize(
    ("name", "old", "new", "item"),
    [
        (
            "dmesg",
            b" kho_preserved_memory_reserve+",
            b" somebody_else+",
            "preserved blocks reserved",
        ),
        ("kho/in/fdt", b"kho-v4", b"kho-v5", "root FDT received"),
    ],
)
def test_one_difference_is_found(
    qemu: FakeQemu, name: str, old: bytes, new: bytes, item: str
) -> None:
    """A file that differs in one place fails one item."""
    generations = _run(qemu)
    files = generations[1].files.files
    assert old in files[name]
    files[name] = files[name].replace(old, new, 1)
    assert [one.name for one in verdict(generations) if not one.ok] == [item]


@pytest.mark.parametrize("field", ["pos", "seals", "size", "sha256", None])
def test_a_memfd_that_differs_is_found(qemu: FakeQemu, field: str | None) -> None:
    """Whatever is wrong with one, or if it is not there at all."""
    generations = _run(qemu)
    retrieved = generations[1].retrieved
    key = ("vm-b", 0xDEADBEEF)
    one = retrieved.pop(key)
    if field is not None:
        values = {name: getattr(one, name) for name in ("pos", "seals", "size", "sha256")}
        values[field] = "00" if field == "sha256" else values[field] + 1
        retrieved[key] = type(one)(**values)
    bad = [item for item in verdict(generations) if not item.ok]
    assert [(item.name, item.detail) for item in bad] == [("memfds read back", "4 of 5")]


def test_reserved_blocks_are_read_from_the_log() -> None:
    """Addresses in a log are inclusive."""
    line = "__memblock_reserve: [0x0000000000c00000-0x0000000000ffffff] nid=-1 flags=20 "
    assert reserved_blocks(line + "kho_preserved_memory_reserve+0x4b/0x60") == [(0xC00000, 4 << 20)]
    assert reserved_blocks(line + "setup_arch+0x5e3/0x8b6") == []


def _without(qemu: FakeQemu, generation: int, *words: str) -> None:
    qemu.script[generation] = [
        event for event in qemu.script[generation] if not any(word in str(event) for word in words)
    ]


def _trouble(qemu: FakeQemu, timeout: float = 5) -> GuestTrouble:
    with pytest.raises(GuestTrouble) as caught:
        _run(qemu, timeout=timeout)
    return caught.value


def test_kaslr_is_noticed(qemu: FakeQemu) -> None:
    """A kernel that was moved is refused."""
    _without(qemu, 0, "_text")
    qemu.script[0].insert(0, Message("SYMBOL", "_text 0xffffffff9e000000"))
    assert "moved to 0xffffffff9e000000: KASLR is on" in _trouble(qemu).finding


def test_no_kallsyms(qemu: FakeQemu) -> None:
    """The option that the kernel lacks is named."""
    _without(qemu, 0, "machine_kexec")
    assert _trouble(qemu).finding == (
        "gen0: no machine_kexec in /proc/kallsyms: the kernel needs CONFIG_KALLSYMS"
    )


def test_no_kho(qemu: FakeQemu) -> None:
    """What the kernel said about it is told."""
    _without(qemu, 0, "kho/out", "name='dmesg'")
    qemu.script[0].insert(
        1, GuestFile("dmesg", b"<4>KHO: Failed to reserve nid 2 scratch buffer\n")
    )
    finding = _trouble(qemu).finding
    assert finding.startswith("gen0: no kho/out in debugfs, so no KHO")
    assert finding.endswith("; KHO: Failed to reserve nid 2 scratch buffer")


def test_a_boot_without_handover_needs_no_kho(qemu: FakeQemu) -> None:
    """With no handover asked for, one generation is all."""
    _without(qemu, 0, "kho/out", "READY")
    qemu.script[0].append(Message("DONE", ""))
    assert [one.name for one in _run(qemu, handovers=0)] == ["gen0"]


def test_the_guest_says_why(qemu: FakeQemu) -> None:
    """A call that failed in the guest is the finding."""
    qemu.script[1].insert(3, Message("FAIL", "kexec_file_load: Cannot allocate memory"))
    assert _trouble(qemu).finding == "gen1: kexec_file_load: Cannot allocate memory"


def test_a_panic(qemu: FakeQemu) -> None:
    """The panic's line is the finding, and the console's end comes with it."""
    qemu.script[1] = []
    qemu.console.feed(b"BUG: of an older kernel\n")

    def panics() -> None:
        FakeQemu.next_generation(qemu)
        if qemu.generation == 1:
            qemu.console.feed(b"hello\nKernel panic - not syncing: VFS: no root\nbye\n")

    qemu.next_generation = panics  # type: ignore[method-assign]
    trouble = _trouble(qemu)
    assert trouble.finding == "gen1: the guest is gone: Kernel panic - not syncing: VFS: no root"
    assert trouble.console[-1] == "bye"


def test_a_hang(qemu: FakeQemu) -> None:
    """What did not come, and how long it was waited for."""
    qemu.script[1] = []
    assert _trouble(qemu, timeout=0.0).finding == "gen1: no end to its boot in 0 s"


def test_no_jump(qemu: FakeQemu) -> None:
    """A guest that never gets to machine_kexec."""
    qemu.jumps = False
    assert _trouble(qemu, timeout=0.05).finding == "gen0: no jump in 0 s"


def test_a_stop_elsewhere(qemu: FakeQemu) -> None:
    """A guest that stops for another reason."""
    qemu.at_breakpoint = False
    assert "stopped somewhere else" in _trouble(qemu).finding


def test_qemu_dies(qemu: FakeQemu) -> None:
    """Its end is noticed while waiting."""
    qemu.script[0] = []
    qemu.is_gone = True
    assert _trouble(qemu).finding == "gen0: the guest is gone"


@pytest.mark.parametrize(
    "error", [GdbError("gdb stub: the guest is gone"), BrokenPipeError(32, "Broken pipe")]
)
def test_qemu_ends_under_our_hands(qemu: FakeQemu, error: Exception) -> None:
    """A panic on the way to the jump ends QEMU: that is the guest's trouble, not a wrong call."""

    def ends(timeout: float) -> bool:
        qemu.console.feed(b"Kernel panic - not syncing: Fatal exception\n")
        raise error

    qemu.gdb.wait_stop = ends  # type: ignore[method-assign]
    finding = _trouble(qemu).finding
    assert finding.startswith("gen0: ")
    assert finding.endswith(": Kernel panic - not syncing: Fatal exception")


def test_a_guest_that_babbles(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the port is the guest's trouble as well, also while its last words are awaited."""
    monkeypatch.setattr(run_module, "_LAST_WORDS_SECONDS", 5.0)

    def noise(timeout: float) -> Iterator[Event]:
        raise ChannelError("guest: 'x' is neither a message nor a file")
        yield

    qemu.pump = noise  # type: ignore[method-assign]
    with pytest.raises(KhoSimError, match="gen0: guest: 'x' is neither") as caught:
        Lab(qemu, KERNEL, timeout=5).run(1)  # type: ignore[arg-type]
    assert isinstance(caught.value, GuestTrouble)


def test_a_wrong_generation(qemu: FakeQemu) -> None:
    """A guest that fell back to its first kernel."""
    qemu.script[1][0] = Message("GENERATION", "0")
    assert _trouble(qemu).finding == "gen1: the guest says that it is gen0"


def test_another_layout_of_kho_out(qemu: FakeQemu) -> None:
    """Where the symbol does not lead to a device tree, memory is searched for it."""
    found = qemu.fdt_phys
    qemu.fdt_phys = [0x1000, 0x1001]
    generations = _run(qemu)
    assert [one.handover.handover.fdt_phys for one in generations[:2] if one.handover] == found


def test_an_observer_sees_each_moment(qemu: FakeQemu) -> None:
    """It is called when a generation is up, and at its jump with the root FDT's address."""
    seen: list[tuple[str, int]] = []

    class Observer:
        def at_jump(self, generation: Generation, fdt_phys: int) -> None:
            seen.append((generation.name, fdt_phys))

        def when_up(self, generation: Generation) -> None:
            seen.append((generation.name, 0))

    Lab(qemu, KERNEL, timeout=5, observer=Observer()).run(1)  # type: ignore[arg-type]
    assert seen == [("gen0", 0), ("gen0", qemu.fdt_phys[0]), ("gen1", 0)]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_tells_of_trouble(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    as_json: bool,
) -> None:
    """A guest that fails is a finding, status 1, with what its console said."""
    from khosim.kernel.image import KernelImage
    from khosim.lab import experiment

    def fails(*_: object) -> None:
        raise GuestTrouble("gen1: it hangs", ["one", "two"])

    monkeypatch.setattr(experiment, "run_experiment", fails)
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(KernelImage.build(size=2 << 20).data)
    call = ["lab", str(kernel), "--out", str(tmp_path / "out"), *(["--json"] if as_json else [])]
    assert main(call) == 1
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out) == {"finding": "gen1: it hangs", "console": ["one", "two"]}
    else:
        assert out == "gen1: it hangs\n\nthe console's last lines:\n  one\n  two\n"


def test_trouble_travels() -> None:
    """It can be pickled, as all of khosim's errors can."""
    import pickle

    trouble = pickle.loads(pickle.dumps(GuestTrouble("x", ["y"])))
    assert isinstance(trouble, KhoSimError)
    assert (trouble.finding, trouble.console) == ("x", ["y"])
