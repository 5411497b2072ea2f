"""Releases of a designer's own: the worked example, and files that are none."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim import InputError, KernelPanic, Machine
from khosim.cli.main import main
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelConfig, KernelImage, _pack_config, read_kernel_config
from khosim.kernel.release import MAINLINE, RELEASES, Release, find_release
from khosim.plugins import is_plugin, load_plugin, loaded_plugin

ROOT = Path(__file__).parent.parent
EXAMPLE = str(ROOT / "examples" / "own_release.py")
RELEASE = find_release(EXAMPLE)
FIND = "from khosim.kernel.release import find_release\n"
BARE = "from khosim.kernel.behaviours import Release\n"


@pytest.mark.parametrize("scenario", ["small", "torn-tree", "refused-handover"])
def test_every_scenario_runs_on_it(scenario, capsys):
    """``khosim run SCENARIO --release FILE.py`` as with a release of Linux."""
    assert main(["run", scenario, "--release", EXAMPLE]) == 0
    assert "7.3-list" in capsys.readouterr().out


def test_three_generations_and_both_ways():
    """It takes over from itself, is refused by 7.3 and refuses it; the invariants are silent."""
    machine = Machine("256M")
    kernel = machine.boot(RELEASE, cmdline="kho=on reserve_mem=1M:64K:log")
    folio = kernel.alloc_folio(3)
    folio.write(0, b"kept")
    kernel.kho_preserve_folio(folio)
    for _ in range(2):
        kernel = kernel.kexec()
        assert kernel.is_kho_boot
        folio = kernel.kho_restore_folio(folio.phys)
        assert folio.read(0, 4) == b"kept"
        kernel.kho_preserve_folio(folio)
    kernel = kernel.kexec(release="7.3")
    assert not kernel.is_kho_boot
    kernel = kernel.kexec(release=RELEASE)
    assert not kernel.is_kho_boot
    assert any("is incompatible with 'kho-list-v1'" in line for line in kernel.messages)
    assert machine.check() == []


blocks = st.lists(st.tuples(st.integers(1, 1 << 18), st.integers(0, 10)), max_size=40)


@given(added=blocks, removed=st.lists(st.integers(0, 39), max_size=20))
def test_the_list_beside_a_set(added, removed):
    """The example's tracker and its decoder agree with a plain set of blocks."""
    kernel = kernel_for_lists()
    tracker = loaded_plugin(RELEASE.tracker)(kernel)
    assert tracker.init_tree() == 0
    model = set()
    for number, order in added:
        assert tracker.add_block(number << order, order) == 0
        model.add((number << order, order))
    for i in removed:
        if i < len(added):
            number, order = added[i]
            assert tracker.del_block(number << order, order)
            model.discard((number << order, order))
    read = [(phys >> 12, order) for phys, order, _ in tracker.blocks()]
    assert sorted(read) == sorted(model)
    runs, pages = loaded_plugin(RELEASE.decoder)(kernel.ram, tracker.root, 4096)
    assert [run[:2] for run in runs] == read
    assert pages == tracker.table_pages()
    tracker.destroy()


_KERNEL = []


def kernel_for_lists():
    """One kernel for all examples."""
    if not _KERNEL:
        _KERNEL.append(Machine("64M", checks=False).boot(RELEASE, cmdline="kho=off"))
    return _KERNEL[0]


def test_more_blocks_than_a_page_holds():
    """510 entries a page: the list grows, and the successor reads all of it."""
    machine = Machine("256M")
    kernel = machine.boot(RELEASE, cmdline="kho=on")
    folios = [kernel.alloc_folio(0) for _ in range(600)]
    for folio in folios:
        kernel.kho_preserve_folio(folio)
    assert len(kernel.kho_out.tree.table_pages()) == 2
    successor = kernel.kexec()
    assert all(successor.page(folio.pfn).kind == "incoming" for folio in folios)
    assert machine.check() == []


def test_the_checkers_notice_a_tracker_that_loses_a_block():
    """They read the list themselves: what the successor did not reserve is told."""
    machine = Machine("256M")
    kernel = machine.boot(RELEASE, cmdline="kho=on")
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    machine.load_successor(kernel)
    tracker = loaded_plugin(RELEASE.tracker)
    honest = tracker.blocks
    tracker.blocks = lambda self: list(honest(self))[:-1]
    try:
        machine.resume()
    finally:
        tracker.blocks = honest
    (told,) = [v for v in machine.check() if v.invariant == "map-agrees"]
    assert told.phys == folio.phys
    assert "was preserved but is not reserved" in told.message


# -- files that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("x = 1", "the file defines no 'RELEASE'"),
        ("RELEASE = 7", "RELEASE is a int, not a Release"),
        ("1 / 0", "line 1: ZeroDivisionError: division by zero"),
        ("RELEASE = (", "line 1: SyntaxError"),
        (
            FIND + "RELEASE = find_release('7.3').evolve(speed=9)\n",
            "there is no behaviour named 'speed'",
        ),
        (
            FIND + "RELEASE = find_release('7.3').evolve(tracker=f'{__file__}:Nothing')\n",
            "the file defines no 'Nothing'",
        ),
        (
            FIND + "class T: pass\n"
            "RELEASE = find_release('7.3').evolve(tracker=f'{__file__}:T')\n",
            "not a class derived from BlockTracker",
        ),
        (
            FIND + "from khosim.kernel.kho_tracker import BlockTracker\n"
            "class T(BlockTracker): pass\n"
            "RELEASE = find_release('7.3').evolve(tracker=f'{__file__}:T')\n",
            "it lacks add_block, blocks, del_block",
        ),
        (
            FIND + "d = 7\nRELEASE = find_release('7.3').evolve(decoder=f'{__file__}:d')\n",
            "not a function",
        ),
        (
            FIND + "def decode(*them): return 7\n"
            "RELEASE = find_release('7.3').evolve(decoder=f'{__file__}:decode')\n",
            "it returns no (pfn, order, blocks) runs",
        ),
        (
            FIND + "def decode(*them):\n    return 1 // 0\n"
            "RELEASE = find_release('7.3').evolve(decoder=f'{__file__}:decode')\n",
            "line 3: ZeroDivisionError",
        ),
        (BARE + "RELEASE = Release(name='', uname='', luo=7)", "luo=7: not a str"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
    ],
)
def test_a_file_that_is_no_release(text, cause, tmp_path, capsys):
    """One line that names the file and the cause, and exit status 2."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert main(["run", "small", "--release", str(file)]) == 2
    told = capsys.readouterr().err
    assert cause in told
    assert told.count("\n") == 1


def test_bytes_in_memory_run_no_file(tmp_path):
    """An image that names a file nobody loaded is a kernel that dies; the file is not run."""
    file = tmp_path / "evil.py"
    trace = tmp_path / "trace"
    file.write_text(f"open({str(trace)!r}, 'w')\nclass T: pass\n")
    release = RELEASES["7.3"].evolve(tracker=f"{file}:T")
    config = KernelConfig(release=release)
    assert read_kernel_config(_pack_config(config)).release == release
    machine = Machine("64M", checks=False)
    image = KernelImage.build("7.3", size="4M")
    data = image.data
    at = data.index(b"KHOSIM\0\x01")
    packed = _pack_config(dataclasses.replace(image.config, release=release))
    data = data[:at] + packed + data[at + len(packed) :]
    load_kernel(machine.hardware, data, initrd_bytes=1 << 20, cmdline="kho=on")
    with pytest.raises(KernelPanic, match="not loaded: name the file of the release first"):
        boot(machine.hardware, 0)
    assert not trace.exists()


def test_what_names_a_file():
    """A path that ends with .py, alone or with an object's name."""
    assert is_plugin("a/b.py")
    assert is_plugin("a/b.py:Thing")
    assert not is_plugin("7.3")
    assert not is_plugin("chunks")
    assert load_plugin(f"{EXAMPLE}:RELEASE") is RELEASE
    with pytest.raises(InputError, match="there is no such file"):
        load_plugin("nowhere.py:X")


def test_what_khosim_itself_gets_wrong_is_no_files_fault(monkeypatch):
    """An error in khosim's own code is not put down to a loaded file: it stays a traceback."""

    def broken(*them):
        raise ZeroDivisionError

    monkeypatch.setattr("khosim.cli.run.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", "small", "--release", EXAMPLE])


# -- the page in docs/ ------------------------------------------------------------------------


def test_the_table_in_the_docs_is_the_data():
    """docs/releases.md shows every behaviour of every release as it is."""
    text = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    words = {"True": "on", "False": "off", "": "-"}
    fields = [field.name for field in dataclasses.fields(Release)]
    left_out = {"name", "uname", "functions", "decoder"}
    assert [name for name, _ in rows] == [name for name in fields if name not in left_out]
    for name, cells in rows:
        values = [getattr(RELEASES[release], name) for release in MAINLINE]
        shown = [words.get(str(value), str(value)) for value in values]
        assert [cell.strip() for cell in cells.split("|")] == shown, name


def test_what_it_handed_over_can_be_inspected(tmp_path, capsys):
    """``khosim inspect --release FILE.py`` reads the list; without, it knows of no handover."""
    machine = Machine("64M")
    kernel = machine.boot(RELEASE, cmdline="kho=on kho_scratch=16M,8M,8M")
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    machine.load_successor(kernel)
    path = str(tmp_path / "machine.khosim")
    machine.save(path)
    assert main(["inspect", path, "--release", EXAMPLE, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["compatible"] == "kho-list-v1"
    assert [folio.phys, 2] in told["preserved"]
    assert main(["inspect", path, "--release", "7.3"]) == 2
    assert "no handover in it" in capsys.readouterr().err
    assert main(["inspect", path, "--release", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "khosim: --release: nowhere.py: there is no such file\n"
    tree = tmp_path / "lone.dtb"
    tree.write_bytes(bytes.fromhex(told["fdt"]))
    assert main(["inspect", str(tree), "--release", EXAMPLE]) == 2
    assert "--release: means nothing for a device tree" in capsys.readouterr().err


# -- every command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "status", "told"),
    [
        ("run small --release {}", 0, "Linux 7.3-list (kho-list-v1)"),
        ("explore --release {} --runs 2 --seed 5 pages", 0, "mine.py, seed 5: 0 findings"),
        ("matrix --page-size 4K --only pages,oops --from {0},7.3 --to {0}", 0, "7.3-list"),
        ("plan 4G --release {}", 0, "Linux 7.3-list"),
    ],
)
def test_every_command_takes_the_file(call, status, told, monkeypatch, tmp_path, capsys):
    """As docs/releases.md says, from another folder too."""
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert main(call.format("mine.py").split()) == status
    assert told in capsys.readouterr().out


def test_what_a_release_of_ones_own_hands_over_on_a_captured_machine(capsys):
    """``conform``: the checkers read the list of the simulated predecessor, block by block."""
    capture = str(ROOT / "tests" / "golden" / "captures" / "uma1g")
    assert main(["conform", capture, "--json", "--release", EXAMPLE]) == 1
    first, second, _ = json.loads(capsys.readouterr().out)["generations"].values()
    assert first["predecessor: inspected"]["ok"] is True
    assert first["predecessor: inspected"]["same"] > 5
    assert first["predecessor: taken over"]["ok"] is True
    assert second["successor: messages"]["ok"] is False  # it refuses what Linux 7.3 wrote


@pytest.mark.parametrize("command", ["memblock", "replay", "lab", "bugs"])
def test_commands_without_a_release_say_why(command, capsys):
    """One line, and status 2; ``matrix`` says where it wants them."""
    for option in (["--release", EXAMPLE], [f"--release={EXAMPLE}"]):
        assert main([command, "x", *option]) == 2
        told = capsys.readouterr().err
        assert told.startswith("khosim: --release: ")
        assert "unrecognized" not in told
        assert told.count("\n") == 1
    assert main(["matrix", "--release", EXAMPLE]) == 2
    assert "--from and --to" in capsys.readouterr().err


WRONG = {
    "nowhere.py": (None, "there is no such file"),
    "torn.py": ("RELEASE = (", "line 1: SyntaxError"),
    "empty.py": ("", "the file defines no 'RELEASE'"),
    "switch.py": (FIND + "RELEASE = find_release('7.3').evolve(page_magik=False)", "'page_magik'"),
    "mine.py+page_magik=off": (FIND + "RELEASE = find_release('7.2')", "did you mean page_magic?"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "call",
    [
        "run small --release {}",
        "explore --release {} --runs 1",
        "matrix --from {}",
        "matrix --to 7.3,{}",
        "matrix --program 7.3 {}",
        "plan 4G --release {}",
        "inspect x --release {}",
        "conform {capture} --release {}",
    ],
)
def test_every_command_says_what_is_wrong_with_a_file(call, name, monkeypatch, tmp_path, capsys):
    """One line that names file and cause, status 2, and nothing else."""
    text, cause = WRONG[name]
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name.partition("+")[0]).write_text(text)
    capture = ROOT / "tests" / "golden" / "captures" / "uma1g"
    assert main(call.format(name, capture=capture).split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert name.partition("+")[0] in said.err
    assert cause in said.err


def test_a_file_under_the_name_of_linux_gets_one_of_its_own(tmp_path, capsys):
    """A release of one's own that is still called 7.3 is not to be taken for 7.3."""
    file = tmp_path / "mine.py"
    file.write_text(FIND + "RELEASE = find_release('7.3').evolve(restore_order_cap=True)")
    assert find_release(str(file)).name == "7.3-mine"
    assert find_release(str(file)).restore_order_cap
    assert main(["matrix", "--page-size", "4K", "--only", "pages", "--from", f"{file},7.3",
                 "--to", f"{file},7.3"]) == 0  # fmt: skip
    assert "from \\ to 7.3-mine  7.3\n" in capsys.readouterr().out
    same = tmp_path / "same.py"
    same.write_text(FIND + "RELEASE = find_release('7.3')")
    assert find_release(str(same)) is RELEASES["7.3"]
