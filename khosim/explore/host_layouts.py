"""The boards whose devices a search lets act between any two events.

Each has a few MiB of guest memory: what matters is who may reach which page, not how many there
are.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("HOSTS", "GuestLayout", "Layout")


class GuestLayout(NamedTuple):
    """A guest: size of its memory, its devices, and which of them write to which other one."""

    name: str
    memory: str
    devices: tuple[str, ...] = ()
    peers: tuple[tuple[str, str], ...] = ()
    vcpus: int = 1
    encrypted: bool = False
    huge: str = "never"


class Layout(NamedTuple):
    """A board: RAM, devices as (name, kind), guests."""

    about: str
    ram: str
    devices: tuple[tuple[str, str], ...]
    guests: tuple[GuestLayout, ...]
    iommu: str = "vtd"

    @property
    def has_secret(self) -> bool:
        """Whether a guest is encrypted, which needs a secure processor."""
        return any(guest.encrypted for guest in self.guests)

    def actions(self) -> list[tuple[str, str]]:
        """All (who, what) of :meth:`Host.act`."""
        found = []
        for guest in self.guests:
            senders = {sender for sender, _ in guest.peers}
            for name in guest.devices:
                found += [(name, what) for what in ("read", "write", "work", "interrupt", "stray")]
                found += [(name, "peer")] if name in senders else []
            found += [(f"{guest.name}/{n}", "run") for n in range(guest.vcpus)]
        return found


_CLOUD = (
    (
        ("nic-a", "nic"),
        ("disk-a", "nvme"),
        ("nic-b", "nic"),
        ("nvme-c", "nvme"),
        ("gpu-c", "plain"),
    ),
    (
        GuestLayout("vm-a", "4M", ("nic-a", "disk-a"), vcpus=2, huge="always"),
        GuestLayout("vm-b", "1M", ("nic-b",)),
        GuestLayout("vm-c", "2M", ("nvme-c", "gpu-c"), (("nvme-c", "gpu-c"),)),
        GuestLayout("vm-s", "1M", encrypted=True),
    ),
)

HOSTS: dict[str, Layout] = {
    "guest-devices": Layout(
        "one guest with a NIC and an NVMe, one of which writes to the other",
        "64M",
        (("nic", "nic"), ("disk", "nvme")),
        (GuestLayout("vm", "2M", ("nic", "disk"), (("nic", "disk"),)),),
    ),
    "cloud-host-devices": Layout(
        "guests with NICs and NVMe, an SEV-SNP guest, a peer-to-peer pair", "128M", *_CLOUD
    ),
    "cloud-host-amd": Layout("the same with AMD's IOMMU", "128M", *_CLOUD, iommu="amd"),
}
