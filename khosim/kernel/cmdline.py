"""The kernel command line.

Models ``lib/cmdline.c:next_arg``, ``kernel/params.c:parse_args`` and ``parameq``,
``lib/kstrtox.c:kstrtobool``, ``init/main.c:do_early_param`` and ``obsolete_checksetup``, and the
handlers of the parameters that a handover depends on @ 7.3. Parameters that khosim does not know
are kept and ignored, as the kernel passes them to init.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import lru_cache

from khosim.kernel.arch import Arch
from khosim.units import memparse

__all__ = ("BootOptions", "kstrtobool", "parse_words")

_LOG_BUF_LEN_MAX = 1 << 31
_ELFCORE_ADDR_MAX = (1 << 64) - 1
_SPACE = " \t\n\v\f\r\xa0"  # isspace: ctype's _S
_HUGE_MAX_CMDLINE_ARGS = {"x86_64": 2 * 2 + 1, "arm64": 2 * 4 + 1}
"""Two options for each huge page size of the architecture, and one default."""
_HUGETLB = ("hugepages", "hugepagesz", "default_hugepagesz")


def parse_words(cmdline: str) -> list[tuple[str, str | None]]:
    """``(parameter, value)`` words up to ``--``; the value is None where no ``=`` stands.

    As ``next_arg`` cuts them: a double quote protects spaces wherever it stands; one pair around
    the whole word or around the value is dropped, any other quotes stay.
    """
    words: list[tuple[str, str | None]] = []
    at, end = 0, len(cmdline)
    while True:
        while at < end and cmdline[at] in _SPACE:
            at += 1
        if at >= end:
            return words
        name, value, at = _next_arg(cmdline, at)
        if value is None and name == "--":
            return words
        words.append((name, value))


@lru_cache(maxsize=32)
def _words(cmdline: str) -> tuple[tuple[str, str | None], ...]:
    # Kernel after kernel is started with the same command line.
    return tuple(parse_words(cmdline))


def _next_arg(args: str, at: int) -> tuple[str, str | None, int]:
    quoted = in_quote = args[at] == '"'
    start = at + quoted
    equals = 0
    stop = start
    while stop < len(args):
        char = args[stop]
        if char in _SPACE and not in_quote:
            break
        if char == "=" and not equals:
            equals = stop - start  # one at the very beginning does not count
        if char == '"':
            in_quote = not in_quote
        stop += 1
    word = args[start:stop]
    value = None
    if equals:
        word, value = word[:equals], word[equals + 1 :]
        if value.startswith('"'):
            value = value[1:].removesuffix('"')
        elif quoted:
            value = value.removesuffix('"')
    elif quoted:
        word = word.removesuffix('"')
    return word, value, stop + 1


def kstrtobool(text: str | None) -> bool | None:
    """``kstrtobool``: by first letters e, y, t, 1, on and d, n, f, 0, off; None for -EINVAL."""
    if not text:
        return None
    first = text[0].lower()
    if first in "eyt1":
        return True
    if first in "dnf0":
        return False
    if first == "o" and len(text) > 1:
        return {"n": True, "f": False}.get(text[1].lower())
    return None


class BootOptions:
    """Early parameters as boot code reads them; sizes in bytes.

    ``arch`` is the architecture, ``log_buf_bytes`` the size of the built-in log buffer.
    """

    __slots__ = (
        "_arch",
        "_log_buf_bytes",
        "crashkernel",
        "elfcorehdr_addr",
        "hugetlb",
        "kho",
        "liveupdate",
        "log_buf_len_bytes",
        "mem_limit_bytes",
        "memblock_debug",
        "reserve_mem",
        "words",
    )

    def __init__(self, arch: Arch, *, kho_default: bool, log_buf_bytes: int) -> None:
        self._arch = arch
        self._log_buf_bytes = log_buf_bytes
        self.kho = kho_default
        self.liveupdate = False
        self.memblock_debug = False
        self.mem_limit_bytes: int | None = None
        """x86-64: the address where RAM is cut off. arm64: how much RAM is kept."""
        self.log_buf_len_bytes = 0
        """``new_log_buf_len``: 0 while the built-in buffer is large enough."""
        self.crashkernel: str | None = None
        self.elfcorehdr_addr: int | None = None
        self.hugetlb: list[tuple[str, str]] = []
        """``hugetlb_params``: the huge page options in order, for ``hugetlb_parse_params``."""
        self.reserve_mem: list[str] = []
        self.words: list[tuple[str, str | None]] = []

    @property
    def is_kdump(self) -> bool:
        """``is_kdump_kernel``: somebody gave the address of ELF core headers."""
        return self.elfcorehdr_addr is not None

    def parse_early(
        self,
        cmdline: str,
        scratch: Callable[[str | None], int],
        printk: Callable[[str], None],
    ) -> None:
        """``parse_early_param``: run the early handlers in the order of the words.

        ``scratch`` takes the value of ``kho_scratch=`` and returns 0 or a negative errno. Also
        collects the values of ``reserve_mem=``, which are handled later in boot.
        """
        self.words = list(_words(cmdline))
        for name, value in self.words:
            # parameq: '-' and '_' are one character.
            parameter = name.replace("-", "_") if "-" in name else name
            error = 0
            if parameter == "kho":
                enabled = kstrtobool(value)
                error = -errno.EINVAL if enabled is None else 0
                self.kho = self.kho if enabled is None else enabled
            elif parameter == "liveupdate":
                enabled = kstrtobool(value)
                error = -errno.EINVAL if enabled is None else 0
                self.liveupdate = self.liveupdate if enabled is None else enabled
            elif parameter == "kho_scratch":
                error = scratch(value)
            elif parameter == "mem":
                error = self._parse_mem(value, printk)
            elif parameter == "log_buf_len":
                error = self._parse_log_buf_len(value, printk)
            elif parameter == "memblock":
                self.memblock_debug |= value is not None and "debug" in value
            elif parameter == "crashkernel":
                self.crashkernel = value
            elif parameter == "elfcorehdr":
                error = self._parse_elfcorehdr(value)
            elif parameter in _HUGETLB:
                error = self._add_hugetlb(parameter, value)
            elif parameter == "reserve_mem" and value is not None:
                # __setup("reserve_mem=") does not match a word without '='.
                self.reserve_mem.append(value)
            if error:
                printk(f"Malformed early option '{name}'")

    def _parse_mem(self, value: str | None, printk: Callable[[str], None]) -> int:
        if value is None:
            return -errno.EINVAL
        if self._arch.name == "arm64":
            # early_mem takes what memparse makes of it, even nothing.
            self.mem_limit_bytes = memparse(value)[0] & -self._arch.page_size
            printk(f"Memory limited to {self.mem_limit_bytes >> 20}MB")
            return 0
        if value == "nopentium":
            printk("mem=nopentium ignored! (only supported on x86_32)")
            return -errno.EINVAL
        limit = memparse(value)[0]
        if not limit:
            return -errno.EINVAL
        if self.mem_limit_bytes is not None:
            limit = min(limit, self.mem_limit_bytes)  # each one removes RAM from the map
        self.mem_limit_bytes = limit
        return 0

    def _parse_log_buf_len(self, value: str | None, printk: Callable[[str], None]) -> int:
        if value is None:
            return -errno.EINVAL
        size = memparse(value)[0]
        if size > _LOG_BUF_LEN_MAX:
            size = _LOG_BUF_LEN_MAX
            printk("printk: log_buf over 2G is not supported.")
        self.grow_log_buf(size)
        return 0

    def grow_log_buf(self, size_bytes: int) -> None:
        """``log_buf_len_update``: the next power of two, if that exceeds the built-in buffer."""
        rounded = 1 << (size_bytes - 1).bit_length() if size_bytes else 0
        if rounded > self._log_buf_bytes:
            self.log_buf_len_bytes = rounded

    def _parse_elfcorehdr(self, value: str | None) -> int:
        if value is None:
            return -errno.EINVAL
        addr, end = memparse(value)
        if value[end : end + 1] == "@":
            addr, end = memparse(value, end + 1)
        # Set even where the value is refused: such a kernel takes itself for a kdump kernel.
        self.elfcorehdr_addr = addr if addr != _ELFCORE_ADDR_MAX else None
        return 0 if end else -errno.EINVAL

    def _add_hugetlb(self, parameter: str, value: str | None) -> int:
        if value is None or len(self.hugetlb) >= _HUGE_MAX_CMDLINE_ARGS[self._arch.name]:
            return -errno.EINVAL
        self.hugetlb.append((parameter, value))
        return 0
