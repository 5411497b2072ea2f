"""Kernel images: files that kexec can load, and that say in their own bytes which kernel they are.

khosim cannot execute machine code, so the payload of its images is a short description (release
and configuration, as JSON) in front of zeros. It travels through RAM like a real kernel's code:
the successor is whatever stands at the entry point, and a corrupted image does not boot.

The file formats are the real ones: a bzImage on x86-64, an ``Image`` on arm64.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from functools import lru_cache
from zlib import crc32

from khosim.abi.arm64_image import ARM64_HEADER_BYTES, build_arm64_image
from khosim.abi.boot_params import build_bzimage
from khosim.errors import InputError, KernelPanic
from khosim.kernel.release import RELEASES, Release, find_release
from khosim.units import parse_size

__all__ = (
    "PREFIX_BYTES",
    "KernelConfig",
    "KernelImage",
    "config_bytes",
    "config_offset",
    "read_kernel_config",
)

_MAGIC = b"KHOSIM\0\x01"
_PREFIX = struct.Struct("<8sII")
PREFIX_BYTES = _PREFIX.size
_ENTRY64_OFFSET = 0x200
_MAX_CONFIG_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """What is fixed when a kernel is built. Sizes in bytes; defaults are those of a small kernel.

    ``debug`` is ``CONFIG_KEXEC_HANDOVER_DEBUG``, ``enable_default`` is
    ``CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT``. ``kernel_bytes`` lie between ``_text`` and ``_end``,
    ``brk_bytes`` after them (x86-64), ``init_bytes`` of them are freed after boot.
    """

    release: Release
    debug: bool = False
    enable_default: bool = False
    kernel_bytes: int = 0x7F4000
    brk_bytes: int = 0x10000
    init_offset_bytes: int = 0x6C4000
    init_bytes: int = 0xE7000
    init_size_bytes: int = 0xA00000
    """bzImage ``init_size``: what the kernel needs in memory while it decompresses itself."""
    nr_cpus: int = 2
    cpu_nodes: tuple[int, ...] = ()
    """Node of each CPU; CPUs beyond are dealt to the nodes in turn."""
    percpu_bytes: int = 37 << 12
    """One CPU's area; real kernels print it as pages per cpu."""
    log_buf_shift: int = 17
    """``CONFIG_LOG_BUF_SHIFT``."""
    swiotlb_bytes: int = 64 << 20
    cma_bytes: int | None = 0
    """``CONFIG_CMA_SIZE_MBYTES`` as bytes; None: without ``CONFIG_DMA_CMA``."""
    kfence_objects: int = 0
    """``CONFIG_KFENCE_NUM_OBJECTS``; 0: without ``CONFIG_KFENCE``."""
    efi: bool = False
    """arm64: booted by EFI firmware, whose memory map takes the place of the device tree's."""
    zone_dma: bool = False
    """arm64: ``CONFIG_ZONE_DMA``, so that low memory ends at 4 GiB."""
    without: tuple[str, ...] = ()
    """Pieces of live update that its drivers are built without; see :mod:`khosim.drivers.core`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cpu_nodes", tuple(self.cpu_nodes))
        object.__setattr__(self, "without", tuple(self.without))

    def evolve(self, **changes: object) -> KernelConfig:
        """This configuration with some fields changed; an unknown name is an InputError."""
        names = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in names:
                raise InputError("kernel config", f"there is no setting named {name!r}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel file and its configuration; :meth:`build` makes one."""

    config: KernelConfig
    arch: str
    page_size: int
    data: bytes
    """The file: what ``kexec_file_load`` is given."""

    @staticmethod
    def build(
        release: str | Release = "7.3",
        *,
        arch: str = "x86_64",
        page_size: int = 4096,
        config: KernelConfig | None = None,
        size: int | str | None = None,
    ) -> KernelImage:
        """An image of ``release`` for one architecture; ``size`` scales what it takes in memory."""
        if config is None:
            if isinstance(release, str) and release in RELEASES:
                return _plain(release, arch, page_size, size)
            config = KernelConfig(release=find_release(release))
        if size is not None:
            config = _scaled(config, parse_size(size, what="kernel image size"))
        return _built(config, arch, page_size)


# What follows is asked again and again, of few different kernels, and depends on nothing but its
# arguments.


@lru_cache(maxsize=16)
def _plain(release: str, arch: str, page_size: int, size: int | str | None) -> KernelImage:
    config = KernelConfig(release=find_release(release))
    return KernelImage.build(arch=arch, page_size=page_size, config=config, size=size)


@lru_cache(maxsize=16)
def _built(config: KernelConfig, arch: str, page_size: int) -> KernelImage:
    payload = _pack_config(config)
    if arch == "x86_64":
        data = build_bzimage(
            bytes(_ENTRY64_OFFSET) + payload,
            kernel_alignment=2 << 20,
            pref_address=16 << 20,
            init_size=config.init_size_bytes,
            cmdline_size=2047,
        )
    else:
        data = build_arm64_image(payload, image_size=config.kernel_bytes, page_size=page_size)
    return KernelImage(config, arch, page_size, data)


@lru_cache(maxsize=16)
def _scaled(config: KernelConfig, size_bytes: int) -> KernelConfig:
    if not 2 << 20 <= size_bytes <= 1 << 30:
        raise InputError("kernel image size", f"{size_bytes} is not between 2M and 1G")
    page = 1 << 16
    kernel_bytes = size_bytes & -page
    return config.evolve(
        kernel_bytes=kernel_bytes,
        init_offset_bytes=kernel_bytes * 3 // 4 & -page,
        init_bytes=kernel_bytes // 8 & -page,
        init_size_bytes=kernel_bytes * 5 // 4 & -page,
    )


def _pack_config(config: KernelConfig) -> bytes:
    fields = _fields(config)
    fields["release"] = _fields(config.release)
    text = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
    return _PREFIX.pack(_MAGIC, len(text), crc32(text)) + text


def _fields(value: KernelConfig | Release) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def config_bytes(data: bytes) -> int:
    """How long the description is that begins with these :data:`PREFIX_BYTES` bytes."""
    return PREFIX_BYTES + min(int(_PREFIX.unpack_from(data)[1]), _MAX_CONFIG_BYTES)


def config_offset(arch: str) -> int:
    """Where the description starts in a loaded image: bytes after its load address."""
    return _ENTRY64_OFFSET if arch == "x86_64" else ARM64_HEADER_BYTES


@lru_cache(maxsize=16)
def read_kernel_config(data: bytes) -> KernelConfig:
    """The configuration in a loaded image's bytes; :class:`KernelPanic` where it is no kernel."""
    if len(data) < _PREFIX.size:
        raise KernelPanic("no kernel at the entry point: the image is cut short")
    magic, length, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC or length > _MAX_CONFIG_BYTES:
        raise KernelPanic("no kernel at the entry point: the image is overwritten")
    text = data[_PREFIX.size : _PREFIX.size + length]
    try:
        if crc32(text) != checksum:
            raise ValueError("what a flipped bit does to code is anybody's guess, but no good")
        return _parse_config(text)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise KernelPanic("the kernel image is corrupted: it faults in early boot") from None


@lru_cache(maxsize=16)
def _parse_config(text: bytes) -> KernelConfig:
    # Equal bytes are equal configurations, and a chain of kernels boots the same image for ever.
    fields = json.loads(text)
    behaviours = fields.pop("release")
    behaviours["functions"] = tuple(behaviours["functions"])
    return KernelConfig(release=Release(**behaviours), **fields)
