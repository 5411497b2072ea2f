"""Campaigns: equal findings whoever does the work, nothing lost by an end, hangs and deaths."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from khosim.cli.main import main
from khosim.errors import InputError
from khosim.explore.campaign import Campaign
from khosim.explore.causes import explanations, silencers
from khosim.explore.corpus import Corpus
from khosim.explore.crew import Workers
from khosim.explore.hazards import SWITCHES, fixed, hazard_of
from khosim.explore.keeper import Keeper, together
from khosim.explore.limits import NoEnd, alarm
from khosim.explore.search import KINDS, problems_of, replay
from khosim.explore.shrink import Finding, cause_of
from khosim.explore.work import Shrunk, Spec, Suspect, Task, do, run_unit, shrunk
from khosim.explore.world import Problem, Step, World
from khosim.kernel.release import Release

BOOT = Step("boot", ('"64M"', "kho=on liveupdate=on", "7.3"))
SCENARIO = "reserve-mem"
RUNS = 8
_known: dict[str, Any] = {}


def do_once(spec: Spec, task: Task) -> Any:
    """Work is a function of its arguments: these tests do each piece once, to be quick."""
    name = repr((spec, task))
    if name not in _known:
        _known[name] = do(spec, task)
    return deepcopy(_known[name])


def _small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("khosim.explore.campaign.CHUNK", 3)
    patch.setattr("khosim.explore.campaign._ROUND", 3)
    patch.setattr("khosim.explore.work._WHOLE", 5)
    patch.setattr("khosim.explore.crew.do", do_once)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and rounds of three runs, so that a few runs are many pieces."""
    _small(monkeypatch)


class Backwards:
    """A crew that gives the last result first, and one at a time."""

    def __init__(self, width: int, scenario: str = SCENARIO) -> None:
        self.width = width
        self._spec = Spec(scenario, "7.3", "4")
        self._tasks: list[tuple[int, Task]] = []

    def submit(self, number: int, task: Task) -> None:
        """Take it on."""
        assert len(self._tasks) < self.width
        self._tasks.append((number, task))

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """The last one."""
        number, task = self._tasks.pop()
        return [(number, do_once(self._spec, task))]

    def close(self) -> None:
        """Nothing is left."""
        self._tasks.clear()


def _corpus(path: Path) -> Corpus:
    return Corpus(path, {"scenario": SCENARIO, "seed": "4"})


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _campaign(path: Path, **options: Any) -> dict[str, Any]:
    with _corpus(path) as corpus:
        campaign = Campaign("4", SCENARIO, "7.3", corpus=corpus, **options)
        campaign.run(runs=RUNS)
    return campaign.as_json()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """A campaign that went through at one go: what it told, and its corpus."""
    path = tmp_path_factory.mktemp("whole") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        yield _campaign(path), path


@pytest.mark.parametrize("width", [2, 5])
def test_findings_do_not_depend_on_the_crew(
    width: int, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Results in another order, some shrunk beside each other: equal words, equal corpus."""
    assert _campaign(tmp_path, crew=Backwards(width)) == whole[0]
    assert _bytes(tmp_path) == _bytes(whole[1])
    assert whole[0]["explored"] == RUNS
    assert len(whole[0]["findings"]) >= 2


def test_a_cut_journal_is_gone_on_from(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Whatever was written when the process ended, the end of the campaign is the same."""
    text = (whole[1] / "journal.jsonl").read_bytes()
    first = text.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, len(text) // 2, text.index(b'"shrunk"'), len(text) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "corpus.json").write_bytes((whole[1] / "corpus.json").read_bytes())
        (folder / "journal.jsonl").write_bytes(text[:cut])
        (folder / "corpus.json.cut").write_bytes(b"{")
        assert _campaign(folder) == whole[0]
        assert _bytes(folder) == _bytes(whole[1])


def test_finished_work_is_not_done_again(
    whole: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete corpus needs no run, and more runs go on where it ends."""
    copytree(whole[1], tmp_path, dirs_exist_ok=True)
    made: list[Task] = []

    def count(spec: Spec, task: Task) -> Any:
        made.append(task)
        return do_once(spec, task)

    monkeypatch.setattr("khosim.explore.crew.do", count)
    assert _campaign(tmp_path) == whole[0]
    assert made == []
    with _corpus(tmp_path) as corpus:
        campaign = Campaign("4", SCENARIO, "7.3", corpus=corpus)
        campaign.run(runs=RUNS + 2)
    assert [task.args[:3] for task in made if task.name == "runs"] == [
        (RUNS, 1, ()),
        (RUNS + 1, 1, ()),
    ]
    assert campaign.explored == RUNS + 2
    with pytest.raises(InputError, match="holds 10 runs"):
        _campaign(tmp_path)


def test_what_was_found_is_off_from_then_on(
    whole: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round's runs are made without the hazards that were found before it, and no others."""
    made: list[Task] = []

    def note(spec: Spec, task: Task) -> Any:
        made.append(task)
        return do_once(spec, task)

    monkeypatch.setattr("khosim.explore.crew.do", note)
    campaign = Campaign("4", SCENARIO, "7.3")
    campaign.run(runs=RUNS)
    off = {first: off for first, _, _, off in (t.args for t in made if t.name == "runs")}
    assert list(off) == [0, 3, 6]
    for first, names in off.items():
        before = Campaign("4", SCENARIO, "7.3")
        before.run(runs=first or 1)
        found = {name for hazards in before.findings for name in hazards.switches}
        assert first == 0 or found <= set(names)
    assert off[0] == ()
    assert 1 < len(off[3]) <= len(off[6])
    for finding in campaign.findings:
        world = replay(finding.steps, "7.3")
        assert cause_of(finding.problem) in map(cause_of, problems_of(world))


def test_a_run_is_made_with_some_hazards_off() -> None:
    """It is silent about them, but for each fifth here; its program is one of the release."""
    off = tuple(SWITCHES)
    numbers = [one.seed for one in run_unit("4", SCENARIO, "7.3", 5, 5).suspects]
    assert numbers == ["4:5", "4:6", "4:7", "4:8"]
    runs = run_unit("4", SCENARIO, "7.3", 5, 5, off=off)
    assert [(one.seed, one.off) for one in runs.suspects] == [("4:5", ())]
    found = run_unit("4", SCENARIO, "7.3", 0, 12, off=off[:1]).suspects
    assert [one for one in found if one.off == off[:1]]
    assert all(one.steps[0].args[2] == "7.3" for one in found)
    assert not any("fix_" in repr(one.steps) for one in found)


def test_what_speaks_with_hazards_off_speaks_with_them_on_as_well() -> None:
    """Otherwise it is told which of them hide it."""
    steps = (BOOT, Step("kexec", ("kho=on liveupdate=on",), 1, True))
    cause = ("kernel-warned", "WARNING: kho_radix_add_key: tree has no root")
    assert shrunk(Suspect("4:0", steps, (cause,)), cause, "7.3") is None
    off = ("fix_region_release", "fix_kho_init_failure", "fix_luo_off")
    suspect = Suspect("4:0", (*steps, Step("alloc_folio", ("f0", 0))), (cause,), (), off)
    found = shrunk(suspect, cause, "7.3")
    assert found is not None
    assert found.steps == list(steps)
    assert (found.switches, found.behind) == (("fix_luo_without_kho",), off[1:2])
    plain = Step("kexec", ("kho=on liveupdate=on elfcorehdr=1M",))
    cause = cause_of(problems_of(replay([BOOT, plain]))[0])
    for switches in ((), off):
        found = shrunk(Suspect("4:0", (BOOT, plain), (cause,), (), switches), cause, "7.3")
        assert found is not None
        assert (found.switches, found.behind) == (("fix_elfcorehdr",), ())


def test_words_are_those_of_the_release_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said with fewer hazards off than the run had off may name other pages."""
    cause = ("kernel-warned", "WARNING: page #")
    hides = "fix_kho_init_failure"

    def says(steps: object, of: object, release: str | Release) -> Problem | None:
        name = getattr(release, "name", str(release))
        return Problem(cause[0], f"WARNING: page {len(name)}", 0) if hides in name else None

    monkeypatch.setattr("khosim.explore.work.speaks", says)
    monkeypatch.setattr("khosim.explore.shrink.speaks", says)
    monkeypatch.setattr("khosim.explore.causes.speaks", says)
    off = ("fix_region_release", hides, "fix_luo_off")
    found = shrunk(Suspect("4:0", (BOOT,), (cause,), (), off), cause, "7.3")
    assert found is not None
    assert found.behind == (hides,)
    assert found.problem.message == f"WARNING: page {len(f'7.3+{hides}=on')}"


def test_a_corpus_knows_what_its_release_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another text under the same name is another release."""
    file = tmp_path / "mine.py"
    file.write_text("from khosim.kernel.release import RELEASES\n\nRELEASE = RELEASES['7.3']\n")
    arguments = ["explore", "subtrees", "--runs", "1", "--release", str(file)]
    arguments += ["--corpus", str(tmp_path / "corpus")]
    assert main(arguments) in (0, 1)
    assert main(arguments) in (0, 1)
    file.write_text(f"{file.read_text()}RELEASE = RELEASES['7.2']\n")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "its release file is " in capsys.readouterr().err


def test_an_interruption_keeps_what_was_found(
    whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """A campaign that is told to stop writes what it has; the same arguments finish it."""
    with _corpus(tmp_path) as corpus:
        campaign = Campaign(
            "4", SCENARIO, "7.3", corpus=corpus, crew=Backwards(2), stops=lambda: True
        )
        campaign.run(runs=RUNS)
    assert campaign.is_interrupted
    assert campaign.explored == 3
    assert (tmp_path / "journal.jsonl").read_bytes()
    assert _campaign(tmp_path) == whole[0]
    assert _bytes(tmp_path) == _bytes(whole[1])


def test_an_exhaustive_search_resumes_too(tmp_path: Path) -> None:
    """All programs of two steps: as many states with another crew, and from a cut journal."""
    plain = Campaign("4", "subtrees", "7.3").exhaust(2)
    assert plain.is_complete
    assert plain.states > 10
    journals = []
    for crew in (Backwards(3, "subtrees"), None):
        with Corpus(tmp_path, {}) as corpus:
            campaign = Campaign("4", "subtrees", "7.3", crew=crew, corpus=corpus)
            assert campaign.exhaust(2) == plain
            assert campaign.explored == plain.runs
        journals.append((tmp_path / "journal.jsonl").read_bytes())
        (tmp_path / "journal.jsonl").write_bytes(journals[0][: len(journals[0]) // 2])
    assert journals[0] == journals[1]


def _runs(first: int, count: int) -> bytes:
    return b'{"runs":[%d,%d],"suspects":[],"reached":[]}\n' % (first, count)


def _with_off(off: bytes) -> bytes:
    steps = b'[["boot",["x","y"]]]'
    return b'{"runs":[0,3],"suspects":[[0,[["a","b"]],%s,%s]],"reached":[]}\n' % (steps, off)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("notes.txt", b"mine", "notes.txt: it does not belong into a corpus"),
        ("findings/notes", b"mine", "notes: it does not belong into a corpus"),
        ("findings/0123456789ab.json", b'{"id": ', "0123456789ab.json: it is torn"),
        ("journal.jsonl", b"\xff\xfe\n{}\n", "line 1: it is torn or no JSON"),
        ("journal.jsonl", b"[1]\n", "line 1: not an object"),
        ("journal.jsonl", b"[" * 99999 + b"\n", "line 1: it is torn"),
        ("journal.jsonl", b'{"runs":[0,-3],"suspects":[],"reached":[]}\n', "line 1: not what"),
        ("journal.jsonl", b'{"runs":[0,3],"suspects":[7],"reached":[]}\n', "line 1: not what"),
        ("journal.jsonl", _with_off(b'["fix_luo_off"]'), "line 1: step 0: it boots no machine"),
        ("journal.jsonl", _with_off(b'["page_magic"]'), "line 1: not what"),
        ("journal.jsonl", _with_off(b"7"), "line 1: not what"),
        ("journal.jsonl", b'{"shrunk":["4:0","x","y"],"steps":[]}\n', "line 1"),
        ("journal.jsonl", b'{"expand":[0,0],"children":[[[1]]]}\n', "line 1: not what"),
        ("journal.jsonl", b"{}\n", "line 1: not what"),
        ("journal.jsonl", _runs(0, 3) + _runs(2, 3), "line 2: runs that a line before it has"),
        ("corpus.json", b"{", "corpus.json: it is torn"),
        ("corpus.json", b'{"format": "other"}', "its format is not"),
    ],
)
def test_spoilt_corpora_are_refused(
    name: str, text: bytes, told: str, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """One line says which file is torn or foreign, and nothing is touched."""
    copytree(whole[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(text)
    before = _bytes(tmp_path)
    with pytest.raises(InputError) as caught:
        _campaign(tmp_path)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert _bytes(tmp_path) == before


def test_a_corpus_belongs_to_one_campaign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other arguments, a file in its place, another process: a line, and status 2."""
    folder = tmp_path / "corpus"
    arguments = ["explore", "subtrees", "--corpus", str(folder)]
    assert main([*arguments, "--runs", "1"]) in (0, 1)
    capsys.readouterr()
    for more, told in (
        (["--seed", "3"], "its seed is '0', not '3'"),
        (["--fixed"], "its release is '7.3', not '7.3 fixed'"),
        (["--exhaustive", "1"], "its search is 'random', not 'exhaustive 1'"),
    ):
        runs = [] if "--exhaustive" in more else ["--runs", "1"]
        assert main([*arguments, *runs, *more]) == 2
        assert told in capsys.readouterr().err
    with Corpus(folder, {}):
        assert main(arguments) == 2
    assert "another campaign is writing to it" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*arguments[:-1], str(tmp_path / "file")]) == 2
    assert "this is none" in capsys.readouterr().err
    about = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**about, "khosim": "x"}))
    assert main(arguments) == 2
    assert "made by another version of khosim" in capsys.readouterr().err


# -- no end, and death -----------------------------------------------------------------------------


def test_a_program_without_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many events end a program, and that is what it is told for."""
    steps = [BOOT, Step("kexec", ("kho=on liveupdate=on",))]
    world = replay(steps)
    assert world is not None
    assert 50 < world.heard < 5000
    monkeypatch.setattr("khosim.explore.world.EVENTS_MAX", world.heard - 1)
    again = replay(steps)
    assert again is not None
    assert [(p.invariant, p.at) for p in again.problems] == [("no-end", 1)]


def test_the_alarm_rings() -> None:
    """A loop without events is ended by the clock, in a step and outside of one."""
    spin = replace(KINDS["free_folio"], name="spin", source=lambda world: "while True: pass")
    world = World({**KINDS, "spin": spin})
    world.run(BOOT)
    with alarm(0.02):
        world.run(Step("spin"))
    assert [p.invariant for p in world.judge()] == ["no-end"]
    assert world.is_over
    with pytest.raises(NoEnd), alarm(0.01):
        exec("while True: pass")


@pytest.mark.slow
def test_a_dead_worker_is_replaced() -> None:
    """Killed from outside it is a line, and the result is the same."""
    spec = Spec("subtrees", "7.3", "1")
    said: list[str] = []
    crew = Workers(spec, 1, said.append)
    crew.submit(7, Task("runs", (0, 40, (), ())))
    results: list[tuple[int, Any]] = []
    while crew._workers[0].at is None:
        results += crew.wait(1)
    crew._workers[0].process.kill()
    while not results:
        results += crew.wait(1)
    crew.close()
    assert results == [(7, do(spec, Task("runs", (0, 40, (), ()))))]
    assert len(said) == 1
    assert said[0].startswith("a worker was killed (SIGKILL) at run 1:")


@pytest.mark.slow
def test_a_deadly_run_is_left_out(tmp_path: Path) -> None:
    """A run that kills its worker twice is named and left out; the campaign goes on."""
    deadly = tmp_path / "deadly.py"
    deadly.write_text("import os\nos._exit(3)\n")
    said: list[str] = []
    spec = Spec("subtrees", str(deadly), "1")
    campaign = Campaign("1", "subtrees", str(deadly), crew=Workers(spec, 1, said.append))
    campaign.run(runs=1)
    assert campaign.lost == [0]
    assert campaign.as_json()["lost"] == [0]
    assert campaign.explored == 0
    assert said == [
        "a worker ended with status 3 at run 1:0; what it was at is done again",
        "a worker ended with status 3 at run 1:0 again; that run is left out",
    ]


# -- the command, with real processes --------------------------------------------------------------

COMMAND = [sys.executable, "-m", "khosim", "explore", SCENARIO, "--runs", "24", "--seed", "1"]


@pytest.mark.slow
def test_any_number_of_workers_and_any_kill(tmp_path: Path) -> None:
    """One worker, three, and two that are killed twice and interrupted: equal bytes everywhere."""
    texts, corpora = [], []
    for jobs in ("1", "3"):
        command = [*COMMAND, "--jobs", jobs, "--corpus", str(tmp_path / jobs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        texts.append(done.stdout)
        corpora.append(_bytes(tmp_path / jobs))
    folder = tmp_path / "killed"
    command = [*COMMAND, "--jobs", "2", "--corpus", str(folder)]
    for lines, number in ((1, signal.SIGKILL), (2, signal.SIGKILL), (4, signal.SIGINT)):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        journal = folder / "journal.jsonl"
        until = time.monotonic() + 100
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=100)
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert err.startswith("khosim explore: interrupted after ")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert {*texts, done.stdout} == {texts[0]}
    assert corpora[0] == corpora[1] == _bytes(folder)


def test_engines_draw_other_programs(tmp_path: Path) -> None:
    """Hypothesis draws programs of its own, the same again for equal seeds, piece by piece."""
    made = [run_unit("3", SCENARIO, "7.3", 20, count, engine="hypothesis") for count in (6, 6)]
    assert made[0] == made[1]
    assert made[0].suspects
    later = run_unit("3", SCENARIO, "7.3", 23, 3, engine="hypothesis")
    assert later.suspects == [s for s in made[0].suspects if int(s.seed.split(":")[1]) >= 23]
    assert made[0].suspects != run_unit("3", SCENARIO, "7.3", 20, 6).suspects
    campaign = Campaign("3", SCENARIO, "7.3", engine="hypothesis")
    campaign.run(runs=3)
    assert campaign.explored == 3


def test_a_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr alone, and no line of it is longer than 80 columns; a pipe has none."""
    arguments = ["explore", "subtrees", "--fixed", "--runs", "4"]
    status = main(arguments)
    plain = capsys.readouterr()
    assert plain.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out == plain.out
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.err).replace("\r", "\n").splitlines()
    assert any(line.startswith("4 runs ") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--jobs", "0"], "--jobs: '0' is not a whole number"),
        (["--jobs", "257"], "--jobs: 257 is more than 256"),
        (["--jobs", "2", "--cluster", "local:2"], "--jobs: not together with --cluster"),
        (["--engine", "magic"], "--engine: 'magic' is not one of"),
        (["--cluster", "local:x"], "--cluster: "),
    ],
)
def test_wrong_arguments_of_campaigns(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, and status 2; also where Dask is not installed."""
    assert main(["explore", *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1


# -- what is one cause -----------------------------------------------------------------------------


def _finding(number: int, invariant: str, steps: list[Step], *switches: str) -> Finding:
    found = Finding(Problem(invariant, "", 0), "", steps, f"0:{number}", "7.3")
    found.kinds = frozenset(step.kind for step in steps)
    found.switches = switches
    found.runs = {found.seed}
    return found


def test_findings_of_one_cause_are_one() -> None:
    """Equal switches, or else equal programs or words; the shortest program speaks for all."""
    longer = [BOOT, BOOT]
    joined = together(
        [
            _finding(1, "a", longer, "fix_x"),
            _finding(2, "b", [BOOT], "fix_x", "fix_y"),
            _finding(3, "c", longer, "fix_y"),
            _finding(4, "d", longer),
            _finding(5, "e", longer),
            _finding(6, "e", [BOOT, Step("kexec", ("kho=on",))]),
            _finding(7, "g", [BOOT, Step("kexec", ("kho=on",)), BOOT]),
        ]
    )
    told = [(f.seed, f.invariant, f.also, f.switches, f.count) for f in joined]
    assert told == [
        ("0:2", "b", ("a",), ("fix_x",), 2),
        ("0:3", "c", (), ("fix_y",), 1),
        ("0:6", "e", ("d", "g"), (), 4),
    ]


def test_a_switch_that_silences_names_the_hazard() -> None:
    """A released region is silenced by its own fix; where all are on, nothing names a hazard."""
    line = "kho=on liveupdate=on reserve_mem=4096:4096:b"
    steps = [Step("boot", ('"64M"', line, "7.3")), Step("release_region", ("b",))]
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "preserved-is-held")
    assert silencers(steps, cause_of(problem), "7.3") == ("fix_region_release",)
    assert silencers(steps, cause_of(problem), fixed("7.3")) == ()
    assert silencers(steps, ("nobody", "says so"), "7.3")[:1] == (next(iter(SWITCHES)),)


TWO = [
    Step("boot", ('"64M"', "kho=on liveupdate=on reserve_mem=4096:4096:a", "7.3")),
    Step("create_session", ("s0", "vm")),
    Step("kexec", ("kho=on",)),
]
WAITS = "page # (pfn #, # pages) waits to be restored, and nobody is left to do it"


def test_two_hazards_with_equal_words_are_told_apart() -> None:
    """A set of switches explains a program, a single one each of its halves."""
    cause = ("all-given-back", WAITS)
    luo, region = "fix_luo_off", "fix_region_unclaimed"
    one = [TWO[0], TWO[2]]
    other = [Step("boot", ('"64M"', "kho=on liveupdate=on", "7.3")), *TWO[1:]]
    told = [explanations(steps, [cause], "7.3") for steps in (TWO, one, other)]
    assert [set(switches) for (switches,) in told] == [{luo, region}, {region}, {luo}]
    assert explanations(one, [cause, ("no", "words")], fixed("7.3")) == ((), ())
    assert explanations(one, [("no", "words")], "7.3") == ((),)


def test_a_successor_of_its_own_release_gets_the_switches() -> None:
    """What speaks in another release's kernel is explained as well."""
    line = "kho=on liveupdate=on"
    odd = Step("kexec", (f"{line} elfcorehdr=1M", 'release="7.3"'))
    steps = [Step("boot", ('"64M"', line, "7.2")), odd]
    world = replay(steps)
    assert world is not None
    cause = cause_of(world.problems[0])
    assert explanations(steps, [cause], "7.2") == (("fix_elfcorehdr",),)


def test_what_two_hazards_explain_is_counted_for_both() -> None:
    """A program with both needs no shrinking once each was seen alone."""
    keeper = Keeper("7.3")
    cause = ("a", "x")
    for n, switches in enumerate((("fix_a",), ("fix_b",), ("fix_a", "fix_b"))):
        steps = (BOOT, Step("memfd" if n else "vmalloc", (n,)))
        keeper.take(Suspect(f"0:{n}", steps, (cause,), (switches,)))
    for name in ("fix_a", "fix_b"):
        wanted = keeper.next_wanted()
        assert wanted is not None
        keeper.answer(wanted[0], Shrunk(list(wanted[1].steps), Problem("a", "x", 0), (name,)))
    assert keeper.next_wanted() is None
    assert [(f.switches, f.count) for f in keeper.findings()] == [(("fix_a",), 2), (("fix_b",), 2)]


def test_what_is_hidden_does_not_stand_for_what_is_plain() -> None:
    """A hazard that shows once another is fixed is looked for on, and told by its plain program."""
    keeper = Keeper("7.3")
    cause = ("a", "x")
    short, long = [BOOT, Step("vmalloc", (1,))], [BOOT, Step("memfd", (1,)), Step("memfd", (2,))]
    for n, steps in enumerate((short, long)):
        keeper.take(Suspect(f"0:{n}", tuple(steps), (cause,), (("fix_luo_off",),)))
        wanted = keeper.next_wanted()
        assert wanted is not None
        assert not keeper.is_settled
        behind = () if n else ("fix_elfcorehdr",)
        answer = Shrunk(steps, Problem("a", "x", 0), ("fix_luo_off",), behind)
        keeper.answer(wanted[0], answer)
        assert keeper.is_settled
        assert keeper.known == (("fix_luo_off",) if n else ())
    (told,) = together(keeper.findings())
    assert (told.steps, told.behind, told.release, told.count) == (long, (), "7.3", 2)
    hidden = keeper.findings()[0]
    assert hidden.release == "7.3+fix_elfcorehdr=on"
    assert hidden.steps[0].args[2] == hidden.release


def test_what_two_hazards_explain_alone_stands_for_neither() -> None:
    """Each of them is looked for on, until a program has just one."""
    keeper = Keeper("7.3")
    cause, fixes = ("a", "x"), ("fix_luo_without_kho", "fix_debugfs_refused")
    for n, switches in enumerate((fixes, fixes, fixes[:1])):
        steps = [BOOT, *(Step(kind, (n,)) for kind in ("memfd", "vmalloc", "vfree")[n : n + 1])]
        keeper.take(Suspect(f"0:{n}", tuple(steps), (cause,), (fixes[:1],)))
        wanted = keeper.next_wanted()
        assert wanted is not None
        keeper.answer(wanted[0], Shrunk(steps, Problem("a", "x", 0), switches))
        assert keeper.known == (fixes[:1] if n == 2 else ())


def test_each_switch_has_a_page() -> None:
    """The names of hazards are those of their pages."""
    pages = Path(__file__).resolve().parent.parent / "docs" / "hazards"
    assert {hazard_of(switch) for switch in SWITCHES} <= {page.stem for page in pages.iterdir()}


def test_causes_wait_for_each_other_no_longer_than_needed() -> None:
    """Two causes can be shrunk at once; one that explains a suspect saves the second shrinking."""
    keeper = Keeper("7.3")
    cause, other = ("a", "x"), ("b", "y")
    keeper.take(Suspect("0:1", (BOOT,), (cause, other)))
    keeper.take(Suspect("0:2", (BOOT,), (cause,)))
    asked = [keeper.next_wanted(), keeper.next_wanted()]
    assert [one and one[0].cause for one in asked] == [cause, other]
    assert keeper.next_wanted() is None
    assert keeper.waits == 3
    assert asked[0] is not None
    keeper.answer(asked[0][0], Shrunk([BOOT], Problem("a", "x", 0), ()))
    assert keeper.waits == 1
    assert [(f.seed, f.count) for f in keeper.findings()] == [("0:1", 2)]


def test_what_is_not_shrunk_is_counted() -> None:
    """A cause with five findings takes no more; how often it was shown is kept."""
    keeper = Keeper("7.3")
    kinds = ("memfd", "vmalloc", "free_folio", "finish", "ledger", "vfree", "free_pages")
    for n, kind in enumerate(kinds):
        keeper.take(Suspect(f"0:{n}", (BOOT, Step(kind, (n,))), (("a", "x"),)))
    for n, kind in enumerate(kinds[:5]):
        wanted = keeper.next_wanted()
        assert wanted is not None
        keeper.answer(wanted[0], Shrunk([BOOT, Step(kind, (n,))], Problem("a", "x", 0), ()))
    assert keeper.next_wanted() is None
    assert len(keeper.findings()) == 5
    assert (keeper.unexplained, keeper.waits) == (2, 0)
