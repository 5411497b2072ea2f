"""The command line: words as ``next_arg`` cuts them, and good and bad values of early options."""

from __future__ import annotations

import errno

import pytest

from khosim.kernel.arch import find_arch
from khosim.kernel.cmdline import BootOptions, kstrtobool, parse_words

X86 = find_arch("x86_64", 4096)
ARM_16K = find_arch("arm64", 16384)


def parsed(cmdline: str, *, arch=X86, kho_default=False, scratch=lambda value: 0):
    """Options after ``parse_early_param``, and what the kernel printed."""
    options = BootOptions(arch, kho_default=kho_default, log_buf_bytes=1 << 17)
    printed: list[str] = []
    options.parse_early(cmdline, scratch, printed.append)
    return options, printed


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cmdline", "words"),
    [
        ("", []),
        ("   ", []),
        ("quiet", [("quiet", None)]),
        ("a  b", [("a", None), ("b", None)]),
        ("  quiet   kho=on ", [("quiet", None), ("kho", "on")]),
        ("a=b\tc\nd\x0be\x0cf\rg", [("a", "b"), *((name, None) for name in "cdefg")]),
        ("kho=", [("kho", "")]),
        ("a=b=c", [("a", "b=c")]),
        ('a="b c" d', [("a", "b c"), ("d", None)]),
        ('"a=b c" d', [("a", "b c"), ("d", None)]),
        ('"a b" d', [("a b", None), ("d", None)]),
        ('a="b c', [("a", "b c")]),  # the quote is never closed
        ('a=b" "c', [("a", 'b" "c')]),  # protects the space, and stays
        ('a=""', [("a", "")]),
        ('a="', [("a", "")]),
        ('a="b"c', [("a", 'b"c')]),
        ('""', [("", None)]),
        ('"a="b c""', [("a", "b"), ('c""', None)]),  # the second quote ends the first
        ("=foo", [("=foo", None)]),  # an equals sign in front is part of the name
        ("=foo=bar", [("=foo", "bar")]),
        ("a -- kho=on", [("a", None)]),
        ('a "--" kho=on', [("a", None)]),
        ("a --x kho=on", [("a", None), ("--x", None), ("kho", "on")]),
        ("a --=x kho=on", [("a", None), ("--", "x"), ("kho", "on")]),
        ("a\x1cb c", [("a\x1cb", None), ("c", None)]),  # no space to the kernel
        ("a\xa0b", [("a", None), ("b", None)]),  # a space to the kernel
    ],
)
def test_words_are_cut_as_next_arg_does(cmdline, words):
    """Spaces, quotes, equals signs and the double dash."""
    assert parse_words(cmdline) == words


@pytest.mark.parametrize("text", ["1", "y", "Yes", "t", "True", "e", "enable", "on", "ON", "oN!"])
def test_kstrtobool_true(text):
    """Only the first letter counts, or the first two after an o."""
    assert kstrtobool(text) is True


@pytest.mark.parametrize("text", ["0", "n", "No", "f", "false", "d", "Disable", "of", "oFf", "off"])
def test_kstrtobool_false(text):
    """The same letters in the negative; "of" is enough."""
    assert kstrtobool(text) is False


@pytest.mark.parametrize("text", [None, "", "o", "ok", "2", "-1", " on", "+y"])
def test_kstrtobool_refuses(text):
    """-EINVAL for all else, for a missing value and for a lone o."""
    assert kstrtobool(text) is None


# -- early options --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["kho", "liveupdate"])
def test_switches(option):
    """On, off, the last one wins, and a malformed one is reported and changes nothing."""
    assert getattr(parsed(f"{option}=on")[0], option) is True
    assert getattr(parsed(f"{option}=on {option}=0")[0], option) is False
    options, printed = parsed(f"{option}=1 {option}=maybe {option} {option}=")
    assert getattr(options, option) is True
    assert printed == [f"Malformed early option '{option}'"] * 3


def test_kho_default_stays_without_a_value():
    """CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT holds until the command line says otherwise."""
    assert parsed("", kho_default=True)[0].kho is True
    assert parsed("kho=x", kho_default=True)[0].kho is True
    assert parsed("kho=off", kho_default=True)[0].kho is False


def test_nothing_is_an_option_after_the_double_dash():
    """What follows -- is for init."""
    options, printed = parsed("kho=on -- kho=off mem= reserve_mem=1M:4K:x")
    assert options.kho is True
    assert options.reserve_mem == []
    assert printed == []


def test_dashes_and_underscores_are_one():
    """parameq: log-buf-len, reserve-mem and kho-scratch are names, too; the message keeps them."""
    seen: list[str | None] = []

    def scratch(value):
        seen.append(value)
        return -errno.EINVAL

    options, printed = parsed("log-buf-len=1M reserve-mem=1M:4K:x kho-scratch=5%", scratch=scratch)
    assert options.log_buf_len_bytes == 1 << 20
    assert options.reserve_mem == ["1M:4K:x"]
    assert seen == ["5%"]
    assert printed == ["Malformed early option 'kho-scratch'"]


def test_scratch_gets_the_value_as_it_stands():
    """kho_scratch= with, without and with an empty value; only errors are reported."""
    seen: list[str | None] = []

    def scratch(value):
        seen.append(value)
        return 0 if value else -errno.EINVAL

    _, printed = parsed("kho_scratch=1M,2M,3M kho_scratch kho_scratch=", scratch=scratch)
    assert seen == ["1M,2M,3M", None, ""]
    assert printed == ["Malformed early option 'kho_scratch'"] * 2


def test_reserve_mem_is_only_collected():
    """Handled later in boot, and a word without an equals sign is no reserve_mem at all."""
    options, printed = parsed('reserve_mem=1M:4K:a reserve_mem reserve_mem= reserve_mem="x y"')
    assert options.reserve_mem == ["1M:4K:a", "", "x y"]
    assert printed == []


# -- mem= -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cmdline", "limit"),
    [
        ("mem=512M", 512 << 20),
        ("mem=0x1000", 4096),
        ("mem=010", 8),
        ("mem=1G mem=2G", 1 << 30),
        ("mem=2G mem=1G", 1 << 30),
        ("mem=512Mjunk", 512 << 20),
        ("", None),
    ],
)
def test_mem_on_x86_is_an_address(cmdline, limit):
    """Each mem= cuts RAM off above an address; what follows the number does not matter."""
    options, printed = parsed(cmdline)
    assert options.mem_limit_bytes == limit
    assert printed == []


@pytest.mark.parametrize("text", ["mem", "mem=", "mem=0", "mem=junk", "mem=K"])
def test_mem_on_x86_refuses_nothing(text):
    """A missing value, and a value of 0, which would remove all memory."""
    options, printed = parsed(text)
    assert options.mem_limit_bytes is None
    assert printed == ["Malformed early option 'mem'"]


def test_mem_nopentium_is_refused():
    """A switch of 32-bit kernels."""
    options, printed = parsed("mem=nopentium")
    assert options.mem_limit_bytes is None
    assert printed == [
        "mem=nopentium ignored! (only supported on x86_32)",
        "Malformed early option 'mem'",
    ]


def test_mem_on_arm64_is_an_amount():
    """The last one wins, rounded down to pages; even nothing is taken, and said."""
    options, printed = parsed("mem=1G mem=0x12345678", arch=ARM_16K)
    assert options.mem_limit_bytes == 0x12344000
    assert printed == ["Memory limited to 1024MB", "Memory limited to 291MB"]
    options, printed = parsed("mem=junk", arch=ARM_16K)
    assert options.mem_limit_bytes == 0
    assert printed == ["Memory limited to 0MB"]
    options, printed = parsed("mem", arch=ARM_16K)
    assert options.mem_limit_bytes is None
    assert printed == ["Malformed early option 'mem'"]


# -- log_buf_len= ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cmdline", "size"),
    [
        ("", 0),
        ("log_buf_len=16M", 16 << 20),
        ("log_buf_len=3000000", 4 << 20),
        ("log_buf_len=131072", 0),  # no larger than the built-in one
        ("log_buf_len=131073", 1 << 18),
        ("log_buf_len=", 0),
        ("log_buf_len=junk", 0),
        ("log_buf_len=16M log_buf_len=64K", 16 << 20),  # a small one does not undo a large one
        ("log_buf_len=16M log_buf_len=1M", 1 << 20),
        ("log_buf_len=2G", 1 << 31),
    ],
)
def test_log_buf_len(cmdline, size):
    """The next power of two, if that is more than the built-in buffer."""
    options, printed = parsed(cmdline)
    assert options.log_buf_len_bytes == size
    assert printed == []


def test_log_buf_len_has_a_top():
    """More than 2 GiB becomes 2 GiB, with a word."""
    options, printed = parsed("log_buf_len=1T")
    assert options.log_buf_len_bytes == 1 << 31
    assert printed == ["printk: log_buf over 2G is not supported."]


def test_log_buf_len_without_value_is_malformed():
    """A bare name only: an empty value is a size of 0."""
    assert parsed("log_buf_len")[1] == ["Malformed early option 'log_buf_len'"]


# -- the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cmdline", "debug"),
    [("", False), ("memblock=debug", True), ("memblock=nodebugging", True), ("memblock", False)],
)
def test_memblock_debug(cmdline, debug):
    """Any value with the word in it."""
    assert parsed(cmdline)[0].memblock_debug is debug


@pytest.mark.parametrize(
    ("cmdline", "addr", "printed"),
    [
        ("", None, []),
        ("elfcorehdr=0x1000000", 0x1000000, []),
        ("elfcorehdr=64K@16M", 16 << 20, []),
        ("elfcorehdr=0xffffffffffffffff", None, []),  # ELFCORE_ADDR_MAX: not set
        ("elfcorehdr=0xfffffffffffffffe", (1 << 64) - 2, []),
        ("elfcorehdr=", 0, ["Malformed early option 'elfcorehdr'"]),
        ("elfcorehdr=x", 0, ["Malformed early option 'elfcorehdr'"]),
        ("elfcorehdr", None, ["Malformed early option 'elfcorehdr'"]),
    ],
)
def test_elfcorehdr_makes_a_kdump_kernel(cmdline, addr, printed):
    """Even a value that is refused is stored: that kernel takes itself for a kdump kernel."""
    options, said = parsed(cmdline)
    assert options.elfcorehdr_addr == addr
    assert options.is_kdump is (addr is not None)
    assert said == printed


def test_crashkernel_is_the_last_one():
    """Kept as text; crash kernel reservation reads it."""
    assert parsed("crashkernel=64M crashkernel=128M@16M")[0].crashkernel == "128M@16M"


def test_huge_page_options_keep_their_order():
    """hugetlb_add_param stores them for later; a bare name is malformed."""
    options, printed = parsed("hugepagesz=1G hugepages=2 default_hugepagesz=2M hugepages")
    assert options.hugetlb == [
        ("hugepagesz", "1G"),
        ("hugepages", "2"),
        ("default_hugepagesz", "2M"),
    ]
    assert printed == ["Malformed early option 'hugepages'"]


@pytest.mark.parametrize(("arch", "room"), [(X86, 5), (ARM_16K, 9)])
def test_huge_page_options_have_a_limit(arch, room):
    """A pair for each huge page size of the architecture, and one default."""
    options, printed = parsed("hugepages=1 " * (room + 2), arch=arch)
    assert len(options.hugetlb) == room
    assert printed == ["Malformed early option 'hugepages'"] * 2
