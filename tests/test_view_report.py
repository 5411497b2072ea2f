"""The report: what is in the page, that it needs no network, and wrong input."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from khosim import Machine
from khosim.bugs.catalogue import find_bug
from khosim.cli.main import main
from khosim.errors import InputError
from khosim.kernel.trace import Event
from khosim.view.museum import record_bug
from khosim.view.recording import Recording, recording
from khosim.view.report import report_html
from khosim.view.touched import touched

PAGE = 4096


@pytest.fixture(scope="module")
def story() -> Recording:
    """A folio with content crosses; its page is written again after it is restored."""
    machine = Machine("64M")
    with recording(machine, "a <b>folio</b>", in_depth=True) as story:
        kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
        folio = kernel.alloc_folio(2, owner="guest")
        folio.write(0, b"hello")
        kernel.kho_preserve_folio(folio)
        story.mark("preserved")
        kernel.kexec().kho_restore_folio(folio.phys)
        story.mark("restored")
    return story


def _parts(page: str) -> tuple[dict[str, Any], bytes]:
    facts = re.search(r'<script id="facts" type="application/json">(.*?)</script>', page, re.DOTALL)
    columns = re.search(r'<script id="columns"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert facts is not None
    assert columns is not None
    return json.loads(facts[1]), zlib.decompress(base64.b64decode(columns[1]))


def _rows(facts: dict[str, Any], columns: bytes, moment: int, layer: str) -> list[tuple[Any, ...]]:
    sheet = facts["sheets"][facts["moments"][moment]["layers"][layer]]
    kinds = (("start", "d"), ("end", "d"), ("order", "b"), ("owner", "i"), ("hash", "Q"))
    read = [
        struct.unpack_from(f"<{sheet['n']}{letter}", columns, sheet[name]) for name, letter in kinds
    ]
    return [
        (int(start), int(end), order, facts["strings"][owner], content)
        for start, end, order, owner, content in zip(*read, strict=True)
    ]


def test_the_page_holds_every_range_of_every_moment(story: Recording) -> None:
    """Ranges, orders and owners come back out of the page as they were recorded."""
    facts, columns = _parts(report_html(story))
    assert len(facts["moments"]) == len(story.moments)
    for moment in story.moments:
        for name, layer in moment.layers.items():
            rows = _rows(facts, columns, moment.index, name)
            assert [row[0] for row in rows] == layer.start.tolist()
            assert [row[1] for row in rows] == layer.end.tolist()
            assert [row[2] for row in rows] == layer.order.tolist()
            assert [row[3] for row in rows] == layer.owner_names()


def test_content_stays_the_same_through_the_jump(story: Recording) -> None:
    """The folio has one fingerprint before and behind the jump, and it is not that of zeros."""
    facts, columns = _parts(report_html(story))
    names = [moment["title"] for moment in facts["moments"]]
    before = _rows(facts, columns, names.index("preserved"), "preserved")
    (mine,) = [row for row in before if row[3] == "guest"]
    after = _rows(facts, columns, len(names) - 2, "incoming")
    (same,) = [row for row in after if row[0] == mine[0]]
    assert mine[4] == same[4] != 0


def test_equal_sheets_are_held_once(story: Recording) -> None:
    """RAM does not change, so that all moments share one sheet."""
    facts, _ = _parts(report_html(story))
    assert len({moment["layers"]["ram"] for moment in facts["moments"]}) == 1


def test_the_page_is_whole_in_itself_and_escapes_what_it_shows(story: Recording) -> None:
    """No address of the network is loaded, and a title is text."""
    page = report_html(story)
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page)
    assert loaded == []
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket)\(", page.split("@D3@")[0][-40_000:])
    assert "a &lt;b&gt;folio&lt;/b&gt;" in page
    assert "<b>folio" not in page
    assert page.count("</script>") == 4
    assert report_html(story) == page


def test_trees_show_fdt_and_map(story: Recording) -> None:
    """The map's leaf names the folio's block; reserve_mem's region has its address."""
    facts, _ = _parts(report_html(story))
    jump = next(moment for moment in facts["moments"] if moment["stage"] == "jump")
    text = json.dumps(facts["trees"][jump["tree"]])
    assert "root FDT at" in text
    folio = next(
        int(start)
        for start, owner in zip(
            story.moments[jump["index"]].layers["preserved"].start,
            story.moments[jump["index"]].layers["preserved"].owner_names(),
            strict=True,
        )
        if owner == "guest"
    )
    assert f"a block of order 2 from {folio:#x}" in text
    assert "oops" in text


def test_a_bug_is_recorded_with_what_spoke() -> None:
    """A museum bug's violation is in the page, and with its fix on there is none."""
    broken = record_bug(find_bug("A9"))
    facts, _ = _parts(report_html(broken))
    said = {it["name"]: it["violations"] for it in facts["invariants"]}
    assert len(said["map-outside-scratch"]) == 1
    assert facts["findings"][0]["phys"] == said["map-outside-scratch"][0]["phys"] > 0
    assert record_bug(find_bug("A9"), is_fixed=True).violations == []


def test_a_recording_that_is_not_in_depth_is_refused() -> None:
    """It has no evidence to show."""
    machine = Machine("64M")
    with recording(machine) as story:
        machine.boot(cmdline="kho=on")
    with pytest.raises(InputError, match="in depth"):
        report_html(story)


@pytest.mark.parametrize(
    ("symbol", "args", "result", "place"),
    [
        ("memblock_reserve", {"args": [0x1000, 0x2000]}, 0, (0x1000, 0x3000)),
        ("memblock_phys_alloc_range", {"args": [0x2000, 4096, 0, 0]}, 0x8000, (0x8000, 0xA000)),
        ("memblock_phys_alloc_range", {"args": [0x2000, 4096, 0, 0]}, 0, (0, 0)),
        ("memblock_free_all", {"args": []}, 10, (0, 0)),
        ("kho_preserve_folio", {"pfn": 5, "order": 2}, 0, (5 * PAGE, 9 * PAGE)),
        ("kho_preserve_pages", {"pfn": 5, "nr_pages": 3}, 0, (5 * PAGE, 8 * PAGE)),
        (
            "kho_preserved_memory_reserve",
            {"phys": PAGE, "order": 1, "nr_blocks": 3},
            None,
            (PAGE, 7 * PAGE),
        ),
        ("alloc_pages", {"order": 1, "owner": "x"}, 7, (7 * PAGE, 9 * PAGE)),
        ("alloc_pages", {"order": 1, "owner": "x"}, None, (0, 0)),
        ("kexec_add_buffer", {"name": "kernel", "memsz": 100}, 0x4000, (0x4000, 0x4064)),
        ("printk", {"message": "x"}, None, (0, 0)),
    ],
)
def test_which_memory_an_event_is_about(
    symbol: str, args: dict[str, Any], result: Any, place: tuple[int, int]
) -> None:
    """Worked out by hand from what the functions take and return."""
    assert touched(Event(0, "running", symbol, args, result), 12) == place


def test_the_command_writes_a_file_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 0 where all holds, 1 where an invariant spoke; one line tells what was written."""
    path = tmp_path / "small.html"
    assert main(["report", "small", "--out", str(path)]) == 0
    assert path.read_text().startswith("<!doctype html>")
    assert main(["report", "--bug", "A9", "--out", str(tmp_path / "bug.html")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "every invariant holds" in lines[0]
    assert "1 violation" in lines[1]
    assert sorted(it.name for it in tmp_path.iterdir()) == ["bug.html", "small.html"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no-such"], "no-such"),
        (["--bug", "Z99"], "Z99"),
        (["small", "--bug", "A9"], "--bug"),
        (["small", "--fixed"], "--fixed"),
        (["small", "--release", "9.9"], "9.9"),
    ],
)
def test_wrong_input_is_one_line(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line, and no file."""
    assert main(["report", *argv, "--out", str(tmp_path / "x.html")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says in message
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is not there, and a folder where the file should be."""
    for path in (tmp_path / "no" / "x.html", tmp_path):
        assert main(["report", "small", "--out", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_document_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    """Its program runs, and its map is what the command prints."""
    text = (Path(__file__).parent.parent / "docs" / "view.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, "docs/view.md", "exec"), {})
    capsys.readouterr()
    (shown,) = re.findall(r"```\n\$ khosim (view map small)\n(.*?)```", text, re.DOTALL)
    assert main([*shown[0].split(), "--width", "80"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == shown[1].splitlines()


def test_the_trees_leaves_say_what_the_checkers_decoder_says() -> None:
    """Runs of blocks, also long ones: order, first address and number are those of the decoder."""
    machine = Machine("64M")
    with recording(machine, in_depth=True) as story:
        kernel = machine.boot(cmdline="kho=on")
        for order in (0,) * 40 + (1,) * 9 + (3,) * 140:
            kernel.kho_preserve_folio(kernel.alloc_folio(order, owner="guest"))
        moment = story.mark("preserved")
    assert moment is not None
    assert moment.handover is not None
    preserved = moment.handover.preserved
    columns = (preserved.order, preserved.start_pfn, preserved.nr_blocks)
    expected = set(zip(*(column.tolist() for column in columns), strict=True))
    assert max(count for _, _, count in expected) > 64
    text = json.dumps(story.trees[moment.index])
    said = re.findall(r"(a block|[\d,]+ blocks) of order (\d+) from (0x[0-9a-f]+)", text)
    numbers = [1 if words == "a block" else int(words.split()[0]) for words, _, _ in said]
    found = {
        (int(order), int(phys, 16) >> 12, count)
        for (_, order, phys), count in zip(said, numbers, strict=True)
    }
    assert found == expected
