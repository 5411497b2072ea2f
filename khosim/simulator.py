"""The simulator's front door: a machine, the kernels that run on it, and the checks around them.

:class:`Machine` ties the hardware that survives (:mod:`khosim.machine`) to the kernels that do not
(:mod:`khosim.kernel`) and to the auditor that watches both (:mod:`khosim.checks`). Nothing passes
through it from one kernel to the next: a successor is booted from RAM and registers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from khosim.capture.dmesg import parse_dmesg
from khosim.capture.folder import Capture
from khosim.capture.iomem import parse_iomem
from khosim.checks.auditor import Auditor
from khosim.checks.violation import Violation
from khosim.errors import InputError, KhoSimError
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.dismantle import dismantle
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.page_policy import AdversarialPolicy, Policy
from khosim.kernel.release import Release, find_release
from khosim.kernel.trace import Event, Initcall, Trace
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap
from khosim.units import parse_size

if TYPE_CHECKING:
    from khosim.conform.jump import Jump
    from khosim.machine.devices import Part

__all__ = ("Machine",)

ALLOCATORS = ("linux", "adversarial")
_DEFAULT_INITRD = {True: 1 << 20, False: 8 << 20}


class Machine:
    """A machine that survives kexec after kexec.

    ``ram`` is a size (``"16G"``); ``nodes`` a number of equal nodes or their sizes. ``allocator``
    is "linux" or "adversarial"; both are reproducible, the second from ``seed``. With
    ``checks=False`` no invariants are recorded and :meth:`check` refuses. ``devices`` are parts of
    :mod:`khosim.machine.devices`; with ``drivers=False`` no kernel touches them.

    ``kernel`` is the kernel that runs now, or None before the first boot and after a panic.

    Kernel and machine know each other, so Python frees them when its garbage collector comes by.
    Who makes thousands of machines in a row frees each at once with ``with Machine() as machine:``.
    """

    __slots__ = (
        "__weakref__",
        "_auditor",
        "_jump",
        "_kernels",
        "_last_boot",
        "_loaded",
        "allocator",
        "drivers",
        "generation",
        "hardware",
        "kernel",
        "listeners",
        "seed",
        "watchers",
    )

    def __init__(
        self,
        ram: int | str = "1G",
        *,
        nodes: int | Sequence[int | str] = 1,
        memoryless: Iterable[int] = (),
        holes: Iterable[tuple[int, int]] = (),
        arch: str = "x86_64",
        page_size: int = 4096,
        memory_map: MemoryMap | None = None,
        allocator: str = "linux",
        seed: int = 0,
        checks: bool = True,
        hardware: Hardware | None = None,
        devices: Sequence[Part] = (),
        drivers: bool = True,
    ) -> None:
        if allocator not in ALLOCATORS:
            raise InputError("allocator", f"{allocator!r} is not one of {', '.join(ALLOCATORS)}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError("seed", f"{seed!r} is not a whole number")
        if hardware is None:
            if memory_map is None:
                memory_map = MemoryMap.from_size(
                    ram, nodes=nodes, arch=arch, holes=holes, memoryless=memoryless
                )
            hardware = Hardware(memory_map, page_size, devices=devices)
        elif devices:
            raise InputError("devices", "this hardware has its own")
        self.hardware = hardware
        self.allocator = allocator
        self.drivers = drivers
        self.seed = seed
        self.generation = -1
        self.kernel: Kernel | None = None
        self._kernels: WeakSet[Kernel] = WeakSet()
        self.listeners: list[Trace] = []
        """Called with every event of every kernel; see :meth:`listen`."""
        self.watchers: list[Callable[[Kernel, str], None]] = []
        """Called with a kernel and its stage; see :meth:`watch`."""
        self._auditor = Auditor(hardware) if checks else None
        self._last_boot: tuple[KernelImage, int, str] | None = None
        self._loaded: tuple[KernelImage, int, str] | None = None
        self._jump: Jump | None = None

    def __repr__(self) -> str:
        ram = self.hardware.memory_map.ram_bytes
        return f"Machine({self.hardware.arch}, {ram >> 20} MiB, generation {self.generation})"

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """The end of all its kernels: what they hold is freed at once, and none can be used again.

        RAM stays as it is, for those who still hold :attr:`hardware`.
        """
        for kernel in self._kernels:
            dismantle(kernel)
        self._kernels.clear()
        self.kernel = None

    # -- other ways to get one ------------------------------------------------------------------

    @classmethod
    def from_capture(
        cls, path: str | Path, generation: int | str | None = None, **options: object
    ) -> Machine:
        """A machine with the memory map, nodes and page size of a capture.

        With a ``generation`` it is at the jump away from that one: RAM holds the pages that were
        captured, and :meth:`boot` starts a kernel that takes over from the real one.
        """
        capture = Capture(path)
        if generation is not None:
            from khosim.conform.jump import Jump, captured_ram

            jump = Jump.find(capture, generation)
            machine = cls(hardware=captured_ram(jump), **options)  # type: ignore[arg-type]
            machine.generation = jump.generation.index
            machine._jump = jump
            return machine
        memory_map = capture.memory_map()
        page_size = capture.page_size
        return cls(memory_map=memory_map, page_size=page_size, **options)  # type: ignore[arg-type]

    @classmethod
    def from_dmesg(cls, text: str, **options: object) -> Machine:
        """A machine with the memory map and nodes that a kernel log tells of."""
        return cls(memory_map=parse_dmesg(text).memory_map, **options)  # type: ignore[arg-type]

    @classmethod
    def from_iomem(cls, text: str, **options: object) -> Machine:
        """A machine with the System RAM of a ``/proc/iomem``."""
        return cls(memory_map=parse_iomem(text).memory_map, **options)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, **options: object) -> Machine:
        """A machine from a saved RAM image; :meth:`resume` boots what it was about to boot."""
        hardware, _ = Hardware.load(path)
        return cls(hardware=hardware, **options)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Save RAM, memory map and registers to a sparse image file."""
        self.hardware.save(path)

    # -- running kernels --------------------------------------------------------------------------

    def boot(
        self,
        release: str | Release | None = None,
        *,
        cmdline: str = "",
        image: KernelImage | None = None,
        config: KernelConfig | None = None,
        kernel_size: int | str | None = None,
        initrd: int | str | None = None,
    ) -> Kernel:
        """A cold boot: the boot loader puts a kernel into RAM and starts it.

        A kernel that was running is gone, as after pressing reset; its bytes stay in RAM.
        ``release`` is that of ``config`` where one is given, else 7.3.
        ``kernel_size`` and ``initrd`` are sizes; small machines get small ones by default.

        On a machine at the jump of a captured kernel it is that kernel's kexec instead: the image
        lies in its scratch, and sizes and command line that are not given are its successor's.
        """
        if self._jump is not None:
            jump, self._jump = self._jump, None
            return self._boot_after(jump, release, cmdline, image, config, kernel_size, initrd)
        image = self._image(release, image, config, kernel_size)
        initrd_bytes = self._initrd_bytes(initrd)
        if self.hardware.devices is not None:
            self.hardware.devices.power_on()
        load_kernel(
            self.hardware, image.data, initrd_bytes=initrd_bytes, cmdline=cmdline
        )
        self._last_boot, self._loaded = (image, initrd_bytes, cmdline), None
        if self.kernel is not None:
            self.kernel.alive = False
        if self._auditor is not None:
            self._auditor.power_on()
        return self.resume()

    def _boot_after(
        self,
        jump: Jump,
        release: str | Release | None,
        cmdline: str,
        image: KernelImage | None,
        config: KernelConfig | None,
        kernel_size: int | str | None,
        initrd: int | str | None,
    ) -> Kernel:
        from khosim.conform.jump import load_image

        chosen = find_release("7.3" if release is None else release)
        if image is not None or config is not None or kernel_size is not None:
            image = self._image(release, image, config, kernel_size)
        initrd_bytes = None if initrd is None else parse_size(initrd, what="initrd")
        image = load_image(
            self.hardware,
            jump,
            chosen,
            image=image,
            initrd_bytes=initrd_bytes,
            cmdline=cmdline or None,
        )
        self._last_boot = (image, initrd_bytes or 0, cmdline or jump.cmdline)
        return self.resume()

    def load_image(
        self,
        kernel: Kernel,
        release: str | Release | None = None,
        *,
        cmdline: str | None = None,
        image: KernelImage | None = None,
        config: KernelConfig | None = None,
        kernel_size: int | str | None = None,
        initrd: int | str | None = None,
        finalize: bool = True,
    ) -> None:
        """``kexec_file_load``: the image that :meth:`jump` will leave for, now or later.

        What is not given is as at the last boot. Where the release wants the handover to be
        finalized, user space does so first, unless it has or ``finalize`` is False. Raises the
        load's :class:`~khosim.errors.KernelError`; an image that was loaded before stays then.
        """
        if kernel.host is not self:
            raise KhoSimError(f"{kernel!r} does not run on this machine")
        last_image, last_initrd, last_cmdline = self._last_boot or (None, None, "")
        if release is None and image is None and config is None and kernel_size is None:
            image = last_image
        if release is None and config is None:
            release = kernel.release
        image = self._image(release, image, config, kernel_size)
        initrd_bytes = last_initrd if initrd is None else None
        if initrd_bytes is None:
            initrd_bytes = self._initrd_bytes(initrd)
        cmdline = last_cmdline if cmdline is None else cmdline
        if finalize:
            kernel.finalize()
        kernel.kexec_file_load(image, initrd_bytes=initrd_bytes, cmdline=cmdline)
        self._loaded = (image, initrd_bytes, cmdline)

    def jump(self, kernel: Kernel) -> None:
        """``reboot(LINUX_REBOOT_CMD_KEXEC)`` without booting: RAM and registers are ready.

        Raises :class:`~khosim.errors.KernelError`: -EINVAL where no image is loaded, or what a file
        refuses to be frozen with; then the kernel lives on, and may try again. Else it is dead.
        """
        if kernel.host is not self:
            raise KhoSimError(f"{kernel!r} does not run on this machine")
        kernel.kernel_kexec()
        if self.hardware.devices is not None:
            self.hardware.devices.at_jump()
        self._last_boot, self._loaded = self._loaded or self._last_boot, None
        self.kernel = None

    def load_successor(
        self, kernel: Kernel, release: str | Release | None = None, **options: Any
    ) -> None:
        """:meth:`load_image` with ``options``, and :meth:`jump`, without booting."""
        self.load_image(kernel, release, **options)
        self.jump(kernel)

    def kexec(self, kernel: Kernel, **options: object) -> Kernel:
        """Load, freeze, jump, boot: returns the successor. Options of :meth:`load_successor`."""
        self.load_successor(kernel, **options)  # type: ignore[arg-type]
        return self.resume()

    def resume(self) -> Kernel:
        """Boot what the registers point at: after :meth:`jump` or :meth:`load`.

        Raises :class:`~khosim.errors.KernelPanic` when that kernel dies in boot.
        """
        self.generation += 1
        self.kernel = None
        kernel = boot(
            self.hardware,
            self.generation,
            policy=self._policy(),
            trace=self._trace(),
            host=self,
            initcall=self._initcall(),
        )
        self.kernel = kernel
        self._kernels.add(kernel)
        return kernel

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        """Called by kernels at their stages: the auditor looks at the machine."""
        if self._auditor is not None:
            self._auditor.observe(kernel, stage)
        for watcher in tuple(self.watchers):  # some leave when they are called
            watcher(kernel, stage)

    def check(self) -> list[Violation]:
        """Every invariant, over all of RAM and the running kernel: the violations so far."""
        if self._auditor is None:
            raise KhoSimError("this machine was made with checks=False")
        return self._auditor.check(self.kernel)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Send every event of kernels booted from now on to ``listener``."""
        self.listeners.append(listener)

    def watch(self, watcher: Callable[[Kernel, str], None]) -> None:
        """Call ``watcher`` with each kernel at its stages, after the checks.

        The stages are those of :class:`~khosim.kernel.trace.Host`: "takeover", "booted",
        "retrieved" and "jump". A watcher may read all and must change nothing, but for a device,
        which writes to RAM (:mod:`khosim.faults.device`).
        """
        self.watchers.append(watcher)

    # -- helpers ----------------------------------------------------------------------------------

    def _trace(self) -> Trace | None:
        devices = self.hardware.devices
        if devices is None and len(self.listeners) < 2:
            return self.listeners[0] if self.listeners else None
        listeners = tuple(self.listeners)
        if devices is not None:
            clock = devices.clock
            listeners += (lambda _: clock.event(),)

        def fan_out(event: Event) -> None:
            for listener in listeners:
                listener(event)

        return fan_out

    def _initcall(self) -> Initcall | None:
        if self.hardware.devices is None or not self.drivers:
            return None
        from khosim.drivers.core import initcall

        return initcall

    def _policy(self) -> Policy | None:
        if self.allocator == "linux":
            return None
        return AdversarialPolicy(self.seed * 1_000_003 + self.generation)

    def _image(
        self,
        release: str | Release | None,
        image: KernelImage | None,
        config: KernelConfig | None,
        kernel_size: int | str | None,
    ) -> KernelImage:
        if image is not None:
            return image
        if config is not None:
            if release is not None:
                config = config.evolve(release=find_release(release))
        elif kernel_size is None and self._is_small():
            kernel_size = 4 << 20
        return KernelImage.build(
            "7.3" if release is None else release,
            arch=self.hardware.arch,
            page_size=self.hardware.page_size,
            config=config,
            size=kernel_size,
        )

    def _is_small(self) -> bool:
        return self.hardware.memory_map.ram_bytes < 256 << 20

    def _initrd_bytes(self, initrd: int | str | None) -> int:
        if initrd is None:
            return _DEFAULT_INITRD[self._is_small()]
        return parse_size(initrd, what="initrd")
