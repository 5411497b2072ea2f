"""D17: an excursion into another kernel left all sessions frozen."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, boot
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelImage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A kernel jumps into an image that preserves the context, and comes back."""
    kernel = boot(stage)
    kernel.liveupdate.register_file_handler(DeviceHandler())
    device = Device(kernel)
    kernel.liveupdate.create_session("vm").preserve(device, 1)
    stage.tell("a running device is in session 'vm'")
    image = kernel.kexec_file_load(KernelImage.build(stage.release, size="4M"))
    image.preserve_context = True
    kernel.kernel_kexec(image)
    state = "frozen" if device.is_frozen else "running"
    stage.tell(f"there and back again: the device is {state}")
    stage.expect(
        not device.is_frozen,
        "undo-restores-state",
        "the kernel goes on as before, but the device in session 'vm' was frozen and stays so",
    )


BUG = Bug(
    id="D17",
    name="preserve-context-serialize",
    subject="liveupdate: skip serialization for context-preserving kexec",
    commit="5eff62b051fb",
    broken="6.19 to 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_skips_preserve_context": False},
    caught_by=("undo-restores-state",),
    story="""
An image can be loaded with KEXEC_PRESERVE_CONTEXT. The kernel then jumps there and comes back, as
hibernation images and firmware tools want it: all memory is put back and it goes on at the next
instruction.

The reboot system call nevertheless told LUO of a live update: every file was frozen and every
session written down for a successor. There is none, and nothing takes it back. Devices that stop
their work in freeze stood still for ever, and since 7.2 every call on a session would wait for a
jump that is over.

The fix asks first, and leaves LUO alone where the kernel is to come back.
""",
    scenario=scenario,
)
