"""An NVMe controller: queues in memory, doorbells, commands that fetch and store by DMA.

Registers, 64-byte commands and 16-byte completions of the NVM Express base specification, which
``include/linux/nvme.h @ 7.3`` names too. Each step does one command. There is one namespace, of
512-byte blocks; a block never written reads as a pattern of its number. Left out: admin commands
but identify and the creation and deletion of queues, SGLs, metadata, errors with more than a
status, shutdown notification, pages other than 4 KiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.machine.devices.engine import Engine, fill

if TYPE_CHECKING:
    from khosim.machine.devices.events import DmaEvent

__all__ = ("NvmeEngine",)

CAP, VS, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_CAP = 255 | 1 << 16 | 20 << 24 | 1 << 37  # 256 entries, contiguous queues, 10 s, NVM commands
_READY, _FATAL = 1, 2
DELETE_SQ, CREATE_SQ, DELETE_CQ, CREATE_CQ, IDENTIFY = 0, 1, 4, 5, 6
FLUSH, WRITE, READ = 0, 1, 2
_BLOCK, _PAGE, _MAX_QUEUES = 512, 4096, 64
_OK, _BAD_OPCODE, _BAD_FIELD, _BAD_QUEUE, _BAD_TRANSFER = 0, 1, 2, 0x101, 4


class _Refused(Exception):
    """A command ends with this status (type and code of the specification)."""


class NvmeEngine(Engine):
    """The controller. ``submission`` and ``completion`` are its queues by number.

    A submission queue is [base, entries, head, tail, number of its completion queue], a completion
    queue [base, entries, head, tail, phase, MSI-X entry or -1].
    """

    has_registers = True

    __slots__ = ("blocks", "completion", "registers", "submission")

    def __init__(self, *arguments: Any) -> None:
        self.blocks: dict[int, bytes] = {}
        super().__init__(*arguments)

    def reset(self) -> None:
        """Disabled, without queues. What is stored stays."""
        super().reset()
        self.registers = {CAP: _CAP, VS: 1 << 16 | 4 << 8, CC: 0, CSTS: 0, AQA: 0, ASQ: 0, ACQ: 0}
        self.submission: dict[int, list[int]] = {}
        self.completion: dict[int, list[int]] = {}

    # -- registers --------------------------------------------------------------------------------

    def read_register(self, offset: int, size: int) -> int:
        """A register or half of one; doorbells read as 0."""
        if offset in self.registers:
            return self.registers[offset]
        return self.registers.get(offset - 4, 0) >> 32 if offset & 4 else 0

    def write_register(self, offset: int, value: int, size: int) -> None:
        """Write a register, or ring a doorbell."""
        held = self.registers
        if offset == CC:
            was, held[CC] = held[CC], value
            if value & 1 and not was & 1:
                entries = held[AQA]
                self.submission = {0: [held[ASQ], (entries & 0xFFF) + 1, 0, 0, 0]}
                self.completion = {0: [held[ACQ], (entries >> 16 & 0xFFF) + 1, 0, 0, 1, 0]}
                held[CSTS] = _READY
            elif not value & 1 and was & 1:
                self.submission, self.completion, held[CSTS] = {}, {}, 0
        elif offset in (AQA, ASQ, ACQ):
            whole = size == 8 or offset == AQA
            held[offset] = value if whole else held[offset] >> 32 << 32 | value
        elif offset - 4 in (ASQ, ACQ):
            held[offset - 4] = held[offset - 4] & 0xFFFF_FFFF | value << 32
        elif offset >= DOORBELLS:
            number, is_completion = divmod((offset - DOORBELLS) // 4, 2)
            queue = (self.completion if is_completion else self.submission).get(number)
            if queue is not None and value < queue[1]:
                queue[2 if is_completion else 3] = value

    # -- steps ------------------------------------------------------------------------------------

    def _waiting(self) -> int | None:
        """The first queue with a command, and room for its completion."""
        if self.registers[CSTS] != _READY:
            return None
        for number, queue in self.submission.items():
            if queue[2] != queue[3]:
                done = self.completion[queue[4]]
                if (done[3] + 1) % done[1] != done[2]:
                    return number
        return None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.running or self._waiting() is not None

    def step(self) -> list[DmaEvent]:
        """One transfer of the program, one command."""
        events = super().step()
        number = self._waiting()
        if number is None:
            return events
        queue = self.submission[number]
        try:
            command = self._fetch(queue[0] + 64 * queue[2], 64, events)
        except _Refused:
            self.registers[CSTS] |= _FATAL
            return events
        queue[2] = (queue[2] + 1) % queue[1]
        self.steps += 1
        try:
            (self._admin if number == 0 else self._io)(command, events)
            status = _OK
        except _Refused as refused:
            status = refused.args[0]
        self._complete(number, queue, command, status, events)
        return events

    def _fetch(self, iova: int, len_bytes: int, events: list[DmaEvent]) -> bytes:
        event, data = self.dma.transact(self.function, iova, len_bytes, None)
        events.append(event)
        if event.outcome not in ("done", "peer"):
            raise _Refused(_BAD_TRANSFER)
        return data

    def _store(self, iova: int, data: bytes, events: list[DmaEvent]) -> None:
        row = np.frombuffer(data, dtype=np.uint8)
        event, _ = self.dma.transact(self.function, iova, len(data), row)
        events.append(event)
        if event.outcome not in ("done", "peer"):
            raise _Refused(_BAD_TRANSFER)

    def _complete(
        self, number: int, queue: list[int], command: bytes, status: int, events: list[DmaEvent]
    ) -> None:
        done = self.completion[queue[4]]
        last = int.from_bytes(command[2:4], "little") | (status << 1 | done[4]) << 16
        entry = bytes(8) + (queue[2] | number << 16).to_bytes(4, "little")
        try:
            self._store(done[0] + 16 * done[3], entry + last.to_bytes(4, "little"), events)
        except _Refused:
            self.registers[CSTS] |= _FATAL
            return
        done[3] += 1
        if done[3] == done[1]:
            done[3], done[4] = 0, done[4] ^ 1
        if done[5] >= 0:
            self.function.msix(done[5])

    # -- commands ---------------------------------------------------------------------------------

    def _admin(self, command: bytes, events: list[DmaEvent]) -> None:
        prp1 = int.from_bytes(command[24:32], "little")
        first = int.from_bytes(command[40:44], "little")
        second = int.from_bytes(command[44:48], "little")
        number, entries = first & 0xFFFF, (first >> 16) + 1
        if command[0] == IDENTIFY:
            page = bytearray(_PAGE)
            page[4:24] = self.function.name.encode().ljust(20)
            self._store(prp1, bytes(page), events)
        elif command[0] in (CREATE_CQ, CREATE_SQ):
            queues = self.completion if command[0] == CREATE_CQ else self.submission
            if not 0 < number < _MAX_QUEUES or number in queues:
                raise _Refused(_BAD_QUEUE)
            if not 2 <= entries <= 256 or prp1 % _PAGE or not second & 1:
                raise _Refused(_BAD_FIELD)
            if command[0] == CREATE_CQ:
                irq = second >> 16 if second & 2 else -1
                if irq * 16 >= len(self.function.msix_table):
                    raise _Refused(_BAD_FIELD)
                self.completion[number] = [prp1, entries, 0, 0, 1, irq]
            elif second >> 16 not in self.completion:
                raise _Refused(0x100)  # no such completion queue
            else:
                self.submission[number] = [prp1, entries, 0, 0, second >> 16]
        elif command[0] in (DELETE_SQ, DELETE_CQ):
            queues = self.submission if command[0] == DELETE_SQ else self.completion
            in_use = {queue[4] for queue in self.submission.values()}
            if not number or number not in queues:
                raise _Refused(_BAD_QUEUE)
            if command[0] == DELETE_CQ and number in in_use:
                raise _Refused(0x10C)
            del queues[number]
        else:
            raise _Refused(_BAD_OPCODE)

    def _io(self, command: bytes, events: list[DmaEvent]) -> None:
        if command[0] == FLUSH:
            return
        if command[0] not in (READ, WRITE):
            raise _Refused(_BAD_OPCODE)
        block = int.from_bytes(command[40:48], "little")
        count = int.from_bytes(command[48:50], "little") + 1
        if block >> 48:
            raise _Refused(0x80)  # behind the end of the namespace
        pages = self._pages(command, count * _BLOCK, events)
        if command[0] == READ:
            data = b"".join(map(self.block, range(block, block + count)))
            at = 0
            for iova, length in pages:
                self._store(iova, data[at : at + length], events)
                at += length
        else:
            data = b"".join(self._fetch(iova, length, events) for iova, length in pages)
            for index in range(count):
                self.blocks[block + index] = data[index * _BLOCK : (index + 1) * _BLOCK]

    def _pages(
        self, command: bytes, len_bytes: int, events: list[DmaEvent]
    ) -> list[tuple[int, int]]:
        """Where a command's data lies: its two pointers, the second to a list if it has to be."""
        prp1 = int.from_bytes(command[24:32], "little")
        prp2 = int.from_bytes(command[32:40], "little")
        length = min(len_bytes, _PAGE - prp1 % _PAGE)
        pages = [(prp1, length)]
        left = len_bytes - length
        if 0 < left <= _PAGE:
            pages.append((prp2, left))
        elif left:
            entries = -(-left // _PAGE)
            while entries:
                room = (_PAGE - prp2 % _PAGE) // 8
                here = min(entries, room)
                if entries > room:
                    here = room - 1  # the last one of a full page leads to the next page
                words = self._fetch(prp2, 8 * (here + (entries > room)), events)
                for word in memoryview(words).cast("Q")[:here]:
                    pages.append((word, min(left, _PAGE)))
                    left -= _PAGE
                entries -= here
                prp2 = int.from_bytes(words[-8:], "little")
                if entries and prp2 % _PAGE:
                    raise _Refused(0x13)
        if any(iova % _PAGE for iova, _ in pages[1:]):
            raise _Refused(0x13)  # an offset in a pointer that may have none
        return pages

    def block(self, number: int) -> bytes:
        """What is stored in a block."""
        return self.blocks.get(number) or fill(number << 8, 0, _BLOCK).tobytes()

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        registers = [[at, value] for at, value in self.registers.items()]
        queues = [
            [[number, list(queue)] for number, queue in held.items()]
            for held in (self.submission, self.completion)
        ]
        blocks = [[number, data] for number, data in sorted(self.blocks.items())]
        return [*super().state(), registers, queues, blocks]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        super().restore(state)
        registers, (submission, completion), blocks = state[5:]
        self.registers = dict(registers)
        self.submission = {number: list(queue) for number, queue in submission}
        self.completion = {number: list(queue) for number, queue in completion}
        self.blocks = {number: bytes(data) for number, data in blocks}
