"""Boots a kernel, lets it hand over, and collects what each generation did.

At each jump the guest is stopped at ``machine_kexec`` (``arch/x86/kernel/machine_kexec_64.c``
@ 7.3): everything that is handed over is in memory then, and nothing has moved yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from khosim.errors import InputError, KhoSimError
from khosim.inspect.memory import Memory, MemoryReport, inspect_memory
from khosim.lab.bzimage import BzImage
from khosim.lab.channel import ChannelError, Event, GuestFile
from khosim.lab.folder import GenerationFiles, plain_log
from khosim.lab.gdb import GdbError
from khosim.lab.guest_ram import RecordingReader
from khosim.lab.qemu import Qemu
from khosim.lab.reach import read_the_rest

__all__ = ("Generation", "GuestTrouble", "Lab", "Observer", "RetrievedFile")

_PAGE = 4096
_KERNEL_BASE = 0xFFFFFFFF80000000
_DIRECT_MAP = 0xFFFF888000000000
_FDT_MAGIC = b"\xd0\x0d\xfe\xed"
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 1.0


class GuestTrouble(KhoSimError):
    """The guest died, hung or refused: ``finding`` says how, ``console`` its last lines."""

    def __init__(self, finding: str, console: list[str]) -> None:
        self.finding = finding
        self.console = console
        super().__init__(finding)

    def __reduce__(self) -> tuple[type[GuestTrouble], tuple[str, list[str]]]:
        return type(self), (self.finding, self.console)


@dataclass(frozen=True, slots=True)
class RetrievedFile:
    """A memfd that the guest got back; ``pos`` and ``size`` in bytes."""

    pos: int
    seals: int
    size: int
    sha256: str


@dataclass(slots=True)
class Generation:
    """One kernel of the guest, as far as it told of itself."""

    index: int
    files: GenerationFiles
    release: str = ""
    arch: str = ""
    page_size: int = 0
    has_liveupdate: bool = False
    symbols: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    retrieved: dict[tuple[str, int], RetrievedFile] = field(default_factory=dict)
    handover: MemoryReport | None = None

    @property
    def name(self) -> str:
        """Its folder in the capture."""
        return self.files.name


class Observer(Protocol):
    """Whoever wants to look at the guest, or to change it, at these moments."""

    def at_jump(self, generation: Generation, fdt_phys: int) -> None:
        """The guest is stopped at ``machine_kexec``; ``fdt_phys`` is its root FDT's page."""

    def when_up(self, generation: Generation) -> None:
        """All of ``generation`` is known but its handover; its program waits."""


class Lab:
    """Follows a guest from jump to jump. ``timeout`` is in seconds, for each generation."""

    def __init__(
        self,
        qemu: Qemu,
        kernel: BzImage,
        *,
        timeout: float,
        progress: Callable[[str], None] = lambda line: None,
        observer: Observer | None = None,
    ) -> None:
        self._qemu = qemu
        self._kernel = kernel
        self._timeout = timeout
        self._progress = progress
        self._observer = observer
        self._began = time.monotonic()

    def run(self, handovers: int) -> list[Generation]:
        """All generations, ``handovers`` + 1 of them; :class:`GuestTrouble` where one fails."""
        generations: list[Generation] = []
        try:
            self._qemu.gdb.resume()
            for index in range(handovers + 1):
                generations.append(self._boot(index, handovers))
                if index < handovers:
                    self._jump(generations[-1])
            self._qemu.answer()
        except (GdbError, ChannelError, OSError) as error:
            # Most of all where QEMU ends under our hands, as it does when the guest panics.
            raise self._trouble(f"gen{max(0, len(generations) - 1)}: {error}") from None
        return generations

    # -- one generation ---------------------------------------------------------------------------

    def _boot(self, index: int, handovers: int) -> Generation:
        self._begin()
        self._progress(f"gen{index}: booting")
        generation = Generation(index, GenerationFiles(f"gen{index}"))
        for event in self._events(f"gen{index}", "no end to its boot"):
            if isinstance(event, GuestFile):
                self._keep(generation, event)
            elif event.key in ("READY", "DONE"):
                break
            else:
                self._note(generation, event.key, event.text)
        if index < handovers and "kho/out/scratch_phys" not in generation.files.files:
            raise self._trouble(f"gen{index}: {_no_kho(generation)}")
        seconds = time.monotonic() - self._began
        self._progress(f"gen{index}: Linux {generation.release} is up, {seconds:.1f} s")
        if self._observer is not None:
            self._observer.when_up(generation)
        return generation

    def _keep(self, generation: Generation, file: GuestFile) -> None:
        data = plain_log(file.data) if file.name == "dmesg" else file.data
        generation.files.files[file.name] = data

    def _note(self, generation: Generation, key: str, text: str) -> None:
        words = text.split()
        if key == "FAIL":
            raise self._trouble(f"{generation.name}: {text}")
        if key == "GENERATION" and text != str(generation.index):
            raise self._trouble(f"{generation.name}: the guest says that it is gen{text}")
        if key == "RELEASE" and len(words) == 3:
            generation.release, generation.arch = words[0], words[1]
            generation.page_size = int(words[2])
        elif key == "SYMBOL" and len(words) == 2:
            generation.symbols[words[0]] = int(words[1], 0)
        elif key == "FILE" and len(words) == 6:
            session, token, pos, seals, size, digest = words
            got = RetrievedFile(int(pos), int(seals, 0), int(size), digest)
            generation.retrieved[session, int(token, 0)] = got
        elif key == "LIVEUPDATE":
            generation.has_liveupdate = True
        elif key == "NOTE":
            generation.notes.append(text)

    def _jump(self, generation: Generation) -> None:
        entry = self._machine_kexec(generation)
        gdb = self._qemu.gdb
        gdb.interrupt()
        gdb.insert_breakpoint(entry)
        gdb.resume()
        self._begin()
        self._qemu.answer()
        for _ in self._events(generation.name, "no jump", until_stop=True):
            pass
        if gdb.register("rip") != entry:
            raise self._trouble(f"{generation.name}: stopped somewhere else than at machine_kexec")
        gdb.remove_breakpoint(entry)
        fdt_phys = self._root_fdt(generation)
        if self._observer is not None:
            self._observer.at_jump(generation, fdt_phys)
        self._read_handover(generation, fdt_phys)
        self._qemu.console.begin_generation()
        gdb.resume()

    def _machine_kexec(self, generation: Generation) -> int:
        entry = generation.symbols.get("machine_kexec")
        if not entry:
            cause = "no machine_kexec in /proc/kallsyms: the kernel needs CONFIG_KALLSYMS"
            raise self._trouble(f"{generation.name}: {cause}")
        text = generation.symbols.get("_text", 0)
        if text - _KERNEL_BASE != self._kernel.load_phys:
            cause = f"the kernel was moved to {text:#x}: KASLR is on, in spite of nokaslr"
            raise self._trouble(f"{generation.name}: {cause}")
        return entry

    def _root_fdt(self, generation: Generation) -> int:
        """Where ``kho_out.fdt`` points to; its first member @ 7.1 and on."""
        gdb, ram = self._qemu.gdb, self._qemu.ram
        symbol = generation.symbols.get("kho_out")
        if symbol:
            base = generation.symbols.get("page_offset_base")
            offset = gdb.read_u64(base) if base else _DIRECT_MAP
            phys = gdb.read_u64(symbol) - offset
            try:
                if phys % _PAGE == 0 and ram.read(phys, 4) == _FDT_MAGIC:
                    return phys
            except KhoSimError:
                pass  # another layout of struct kho_out
        try:
            memory = Memory(generation.name, "guest memory", ram, _PAGE)
            return inspect_memory(memory, content=False).handover.fdt_phys
        except InputError as error:
            raise self._trouble(f"{generation.name}: {error.cause}") from None

    def _read_handover(self, generation: Generation, fdt_phys: int) -> None:
        reader = RecordingReader(self._qemu.ram)
        memory = Memory(f"{generation.name} at its jump", "guest memory", reader, _PAGE)
        generation.handover = inspect_memory(memory, name=generation.name, fdt_phys=fdt_phys)
        read_the_rest(generation.handover.handover, reader)
        generation.files.add_handover(generation.handover, reader)
        handover = generation.handover.handover
        self._progress(
            f"{generation.name}: jumps with {handover.compatible}, root FDT at {fdt_phys:#x}, "
            f"{len(reader.pfns)} pages of handover"
        )

    # -- waiting ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._began = time.monotonic()

    def _events(self, name: str, late: str, *, until_stop: bool = False) -> Iterator[Event]:
        """What the guest says, until the caller has enough, or until the guest stops.

        ``name`` is the generation's, ``late`` what to say when it takes too long.
        """
        end = self._began + self._timeout
        while True:
            yield from self._qemu.pump(_POLL_SECONDS)
            if until_stop and self._qemu.gdb.wait_stop(0):
                return
            if self._qemu.console.died() or self._qemu.is_gone:
                raise self._trouble(f"{name}: the guest is gone")
            if time.monotonic() > end:
                raise self._trouble(f"{name}: {late} in {self._timeout:.0f} s")

    def _trouble(self, finding: str) -> GuestTrouble:
        """Take the console's last words, and say what they mean."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        with contextlib.suppress(ChannelError):
            while time.monotonic() < end and not self._qemu.is_gone:
                for _ in self._qemu.pump(_POLL_SECONDS):
                    pass
        said = self._qemu.console.trouble()
        if said is not None:
            finding = f"{finding}: {said}"
        return GuestTrouble(finding, self._qemu.console.tail())


def _no_kho(generation: Generation) -> str:
    log = generation.files.files.get("dmesg", b"").decode("utf-8", "replace")
    said = [line for line in log.splitlines() if "KHO: " in line]
    cause = "no kho/out in debugfs, so no KHO (kho=on, CONFIG_KEXEC_HANDOVER_DEBUGFS?)"
    return f"{cause}; {said[-1].strip()}" if said else cause
