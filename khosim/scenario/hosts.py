"""What is known of a guest with devices: its parts, and whether they come back.

The outside observer's notes, and what a host's management knows (:class:`VmmPlan`). A kernel learns
none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.drivers.vmm import Vmm, VmmPlan, piece_of
from khosim.errors import KernelError
from khosim.scenario.files import Carried, Guest

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.scenario.agent import SessionNote
    from khosim.scenario.play import Player

__all__ = ("VmNote", "VmPart")

class VmPart(Carried):
    """A file of a guest besides its memory: ``part`` as :meth:`Vmm.files` names it."""

    kind = "device"

    def __init__(self, name: str, part: str) -> None:
        super().__init__(name)
        self.part = part

    def fault(self, file: File) -> str:
        """Nothing: what has to be as it was is for invariants to say."""
        return ""

    def bytes_of(self, file: File) -> int:
        """None of its own."""
        return 0


class VmNote:
    """A guest: ``vmm`` is its process here, None while it does not run."""

    def __init__(self, plan: VmmPlan, memory: Guest) -> None:
        self.plan = plan
        self.memory = memory
        self.vmm: Vmm | None = None
        self.parts: dict[int, str] = {}
        """Names as in :meth:`Vmm.files` of what its session carries, by token."""
        self.session = ""
        self._next_page = 0

    def free_gpa(self, page_size: int) -> int | None:
        """Guest-physical address of a page that nobody uses yet, for a device or vCPU to write to.

        It is left out where the guest's content is compared. None where no page is left.
        """
        memory = self.memory
        content = set(memory.pages.tolist())
        while self._next_page in content:
            self._next_page += 1
        page = self._next_page
        if (page + 1) * page_size > memory.size:
            return None
        self._next_page += 1
        memory.busy.add(page)
        return self.plan.gpa + page * page_size

    def preserve(self, player: Player, session: str) -> list[str]:
        """A session with all its files but those whose piece is left out; the names of these.

        Raises the kernel's refusals.
        """
        assert self.vmm is not None
        note = player.agent.create(player.kernel, session)
        self.session = session
        self.parts = {}
        left_out = []
        for part, file in self.vmm.files().items():
            piece = piece_of(part)
            if piece in player.without and piece != "vfio":  # that one comes back, but reset
                left_out.append(part)
                continue
            carried = self._carried(player, part, file)
            token = len(self.parts) + 1
            player.agent.preserve(note, carried, token)
            self.parts[token] = part
        return left_out

    def _carried(self, player: Player, part: str, file: File) -> Carried:
        if part == "memory":
            return self.memory
        name = f"{self.plan.name}.{part}" if part not in self.vmm_devices() else part
        carried = VmPart(name, part)
        file.get_file()
        carried.hold(player.kernel, file)
        player.files[name] = carried
        return carried

    def vmm_devices(self) -> set[str]:
        """The names of its devices."""
        return set() if self.vmm is None else set(self.vmm.devices)

    def resume(self, player: Player) -> list[str]:
        """Get everything back and let the guest run on; what is missing, in words.

        With a piece left out from the start refusals are told; else they are raised.
        """
        agent, kernel = player.agent, player.kernel
        missing: list[str] = []
        self.vmm = None
        try:
            note = agent.retrieve(kernel, self.session)
        except KernelError as refused:
            return self._told(player, missing, f"session: {refused.name}", refused)
        files: dict[str, File] = {}
        for token, part in self.parts.items():
            try:
                files[part] = self._retrieve(player, note, token)
            except KernelError as refused:
                self._told(player, missing, f"{part}: {refused.name}", refused)
        vmm = Vmm.resume(kernel, self.plan, files)
        try:
            agent.session(note).finish()
        except KernelError as refused:
            self._told(player, missing, f"finish: {refused.name}", refused)
        agent.close(note)
        self.session = ""
        if "memory" not in files:
            return [*missing, "memory is gone"]
        fault = self.memory.fault(files["memory"])
        if fault:
            missing.append(f"memory: {fault}")
        self.vmm = vmm
        if "vcpu0" not in files:
            missing.append("vCPUs start over")
        missing += [
            f"{name} is blocked" for name, file in vmm.devices.items() if file.hwpt is None
        ]
        return missing

    def _retrieve(self, player: Player, note: SessionNote, token: int) -> File:
        file = player.agent.retrieve_file(note, token)
        carried = note.files[token]
        file.get_file()
        carried.hold(player.kernel, file)
        return file

    def _told(
        self, player: Player, missing: list[str], text: str, refused: KernelError
    ) -> list[str]:
        if not player.scenario.kernel.without:
            raise refused
        missing.append(text)
        return missing
