"""``khosim plan``: what it prints, its exit status, and what it says of input that is wrong."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.cli.main import main
from khosim.errors import InputError
from khosim.plan.planner import make_plan
from khosim.plan.source import read_source

CAPTURES = Path(__file__).parent / "golden" / "captures"
UMA = CAPTURES / "uma1g"


def plan(capsys, *words):
    """(status, output, complaint) of ``khosim plan``."""
    status = main(["plan", *map(str, words)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def complaint(capsys, *words):
    """The one line that is said of wrong input; nothing is printed beside it."""
    status, out, err = plan(capsys, *words)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_the_table_for_people(capsys):
    """Areas, owners, what drives it: within 80 columns, exact from a log."""
    status, out, _ = plan(capsys, UMA)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "exact: the memblock calls of the log, made again" in out
    assert re.search(r"^scratch +448M  43\.8% of RAM$", out, re.MULTILINE)
    assert re.search(r"^  lowmem +228M  at 0x2b000000$", out, re.MULTILINE)
    assert re.search(r"^  global +0$", out, re.MULTILINE)
    assert re.search(r"^  node 0 +220M  at 0x1d400000$", out, re.MULTILINE)
    assert re.search(r"^  log buffer +72M +288M$", out, re.MULTILINE)
    told = " ".join(out.split())
    assert "log_buf_len=16M reserves 72M at boot, which makes 288M of scratch: without it" in told


def test_the_model_says_what_it_assumes(capsys):
    """And which of it was given."""
    words = ("2G", "--cmdline", "kho=on", "--cpus", "1", "--initrd", "0", "--cma", "8M")
    status, out, _ = plan(capsys, *words)
    assert status == 0
    told = " ".join(out.split())
    assert "kernel 64M, initrd none (given), 1 CPU (given), CMA 8M (given)" in told
    assert "a distribution's default" in told


def test_json(capsys):
    """One object; scratch, what it takes, and its share of RAM."""
    status, out, _ = plan(capsys, UMA, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["scratch"] == [[0x2B000000, 228 << 20], [0x39800000, 0], [0x1D400000, 220 << 20]]
    assert found["reserved_bytes"] == 448 << 20
    assert found["share"] == pytest.approx((448 << 20) / found["ram_bytes"], abs=1e-6)
    assert found["areas"] == ["lowmem", "global", "node 0"]


def test_equal_calls_print_equal_bytes(capsys):
    """Nothing random, no clock."""
    words = ("16G", "--nodes", "2", "--cmdline", "kho=on crashkernel=512M log_buf_len=64M")
    assert plan(capsys, *words) == plan(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("1G", "--cmdline", "kho=on log_buf_len=16M"),
        ("8G", "--release", "7.0", "--cmdline", "kho=on hugepagesz=1G hugepages=4"),
        ("4G", "--cmdline", "kho=on kho_scratch=16M,16M,16M"),
        ("4G", "--cmdline", "kho=on reserve_mem=8G:1M:big"),
    ],
)
def test_a_finding_is_status_1(capsys, words):
    """KHO would go off, an image would not fit, a region would not be there: said, 80 columns."""
    status, out, _ = plan(capsys, *words)
    assert status == 1
    assert "\nfound: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_options_override_one_by_one(capsys):
    """Each changes the plan, but for the kernel's size on arm64, where it does not count."""
    base = ("4G", "--cmdline", "kho=on", "--json")
    before = json.loads(plan(capsys, *base)[1])["boot_reserved_bytes"]
    changes = {
        "--kernel-size": "32M", "--initrd": "10M", "--percpu": "1M", "--cpus": "64",
        "--cma": "64M", "--swiotlb": "128M", "--nodes": "2", "--arch": "arm64",
    }  # fmt: skip
    for option, value in changes.items():
        after = json.loads(plan(capsys, *base, option, value)[1])["boot_reserved_bytes"]
        assert after != before, option
    grown = json.loads(plan(capsys, *base, "--log-buf", "32M", "--cpus", "8000")[1])
    assert grown["assumptions"]["log_buf_bytes"] == [32 << 20, "given"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nonsense",), "nonsense: neither a file nor a size like '16G'"),
        (("16Q",), "16Q: neither a file nor a size"),
        (("-1",), "MEMORY-MAP"),
        (("0",), "RAM size: none at all"),
        (("1E",), "RAM size: 1048576T are above 16T"),
        (("64M",), "kernel image: 81920 KiB at 0x1000000 do not fit into the machine's RAM"),
        (("4G", "--initrd", "3G"), "initrd: 3145728 KiB do not fit above the kernel"),
        (("4G", "--nodes", "0"), "nodes: 0; a machine has 1 to 64"),
        (("4G", "--nodes", "x"), "argument --nodes: invalid int value: 'x'"),
        (("4G", "--release", "5.4"), "--release: '5.4' is no release khosim knows; it knows 6.16"),
        (("4G", "--arch", "riscv"), "argument --arch: invalid choice: 'riscv'"),
        (("4G", "--page-size", "5K"), "page size: 5120 on x86_64, which has 4096"),
        (("4G", "--page-size", "big"), "--page-size: 'big' is not a size"),
        (("4G", "--cpus", "0"), "--cpus: 0 is not from 1 to 8192"),
        (("4G", "--initrd", "lots"), "--initrd: 'lots' is not a size"),
        (("4G", "--kernel-size", "2G"), "--kernel-size: 2G is not from 2M to 1G"),
        (("4G", "--log-buf", "100K"), "--log-buf: 100K is not a power of two"),
        (("4G", "--cmdline", "kho=\x01"), "cmdline: it must be at most 2000 printable ASCII"),
        (("4G", "--cmdline", "a" * 2001), "cmdline: it must be at most 2000 printable ASCII"),
        ((UMA, "--nodes", "2"), "--nodes: "),
        ((UMA, "--arch", "arm64"), "--arch: "),
        ((CAPTURES,), "neither a capture (no capture.json) nor a folder with a dmesg"),
        ((UMA / "capture.json",), "no BIOS-e820 lines: not a kernel log"),
        ((UMA / "gen0" / "ram.npz",), "no BIOS-e820 lines: not a kernel log"),
        ((UMA / "gen0" / "cmdline",), "no BIOS-e820 lines: not a kernel log"),
    ],
)
def test_wrong_input_is_one_line(capsys, words, message):
    """Status 2, the place and the cause."""
    assert message in complaint(capsys, *words) or message == "MEMORY-MAP"


def test_hidden_addresses(capsys, tmp_path):
    """/proc/iomem as a user sees it."""
    iomem = tmp_path / "iomem"
    text = (UMA / "gen0" / "iomem").read_text()
    iomem.write_text(re.sub(r"[0-9a-f]{8,16}-[0-9a-f]{8,16}", "00000000-00000000", text))
    assert "all addresses are 0: it was not read as root" in complaint(capsys, iomem)


@pytest.mark.parametrize("name", ["uma1g", "arm64-16k"])
def test_a_log_cut_anywhere(name, tmp_path):
    """A plan, by the model with a note where the trace is cut short; or one line."""
    text = (CAPTURES / name / "gen0" / "dmesg").read_bytes()
    log = tmp_path / "dmesg"
    methods = set()
    for part in range(41):
        cut = text[: len(text) * part // 40]
        log.write_bytes(cut)
        try:
            found = make_plan(read_source(str(log)))
        except InputError:
            methods.add("refused")
            continue
        methods.add(found.method)
        if found.method == "model" and b"memblock_" in cut:
            assert any("not used" in note for note in found.notes)
    assert methods == {"refused", "model", "trace"}


@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_log_with_a_damaged_byte(tmp_path_factory, at, byte):
    """A plan or one line, never anything else."""
    text = bytearray((UMA / "gen0" / "dmesg").read_bytes())
    text[int(at * len(text))] = byte
    log = tmp_path_factory.mktemp("damaged") / "dmesg"
    log.write_bytes(text)
    try:
        method = make_plan(read_source(str(log))).method
    except InputError as error:
        method = str(error)
    assert method in ("trace", "model") or ("\n" not in method and ": " in method)


@settings(max_examples=60, deadline=None)
@given(
    ram=st.integers(200, 20_000),
    words=st.lists(
        st.sampled_from(
            [
                "kho=off", "kho_scratch=50%", "kho_scratch=64M,0,16M", "log_buf_len=64M", "mem=1G",
                "crashkernel=1G-:256M", "crashkernel=512M,high", "hugepagesz=1G hugepages=2",
                "reserve_mem=16M:2M:a", "reserve_mem=1G:1M:b", "cma=128M", "cma=1M@0-16M",
            ]
        ),
        max_size=5,
    ),
    nodes=st.integers(1, 3),
    arch=st.sampled_from(["x86_64", "arm64"]),
    release=st.sampled_from(["6.16", "7.0", "7.2", "7.3"]),
)
def test_any_machine_gets_a_plan(ram, words, nodes, arch, release):
    """Areas apart from each other and in RAM; sums are sums; what is off has no area."""
    source = read_source(f"{ram}M", nodes=nodes, arch=arch)
    cmdline = " ".join(["kho=on", *words])
    if ram < 300:
        given = {"kernel_bytes": 16 << 20, "initrd_bytes": 8 << 20}
    else:
        given = None
    found = make_plan(source, cmdline=cmdline, release=release, given=given).as_json()
    taken = sorted(area for area in found["scratch"] if area[1])
    assert sum(size for _, size in taken) == found["reserved_bytes"]
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(taken))
    ranges = source.memory_map.ram_ranges
    assert all(any(s <= phys and phys + size <= e for s, e in ranges) for phys, size in taken)
    assert found["enabled"] == bool(found["scratch"])
    assert sum(owner["reserved_bytes"] for owner in found["owners"]) == found["boot_reserved_bytes"]
