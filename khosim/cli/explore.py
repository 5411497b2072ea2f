"""``khosim explore [SCENARIO]``: draw programs, run them, tell what broke and how to see it.

Every finding is the shortest program found that makes an invariant speak, with the events that
have to do with it. Equal arguments with ``--runs`` give equal bytes, with any number of jobs, and
also after an interruption that a corpus was resumed from; with ``--seconds`` it depends on the
machine how far a search comes. Progress is shown on a terminal only, on stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from khosim.cli.explore_progress import Bar
    from khosim.explore.campaign import Campaign
    from khosim.explore.corpus import Corpus
    from khosim.explore.crew import Crew
    from khosim.explore.work import Spec

__all__ = ("HELP", "configure", "run")

HELP = (
    "Search for what breaks a release: random programs over the public API with faults and odd "
    "successors, judged by every invariant. Exit status: 0 nothing was found; 1 something was; 2 "
    "wrong input; 130 interrupted."
)

_RUNS = 300
_JOBS_MAX = 256
_COLUMNS = 80
_EXIT_INTERRUPTED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", nargs="?", default="all", help="what to try; see --list")
    add("--list", action="store_true", help="list the scenarios and the steps of each")
    add("--release", metavar="R", default="7.3", help="kernel release, such as 7.3")
    add("--fixed", action="store_true", help="with every known hazard of 7.3 switched off")
    add("--seed", metavar="N", default="0", help="where the search starts")
    add("--runs", metavar="N", help=f"how many programs to run (default {_RUNS})")
    add("--seconds", metavar="S", help="how long to go on, instead of --runs")
    add("--exhaustive", metavar="DEPTH", help="every program of that many steps, not random ones")
    add("--without", metavar="PIECE", action="append", help="of a host: leave that piece out")
    add("--engine", metavar="E", default="plain", help="who draws programs: plain or hypothesis")
    add("--jobs", metavar="N", default="1", help="how many processes do the work (default 1)")
    add("--cluster", metavar="ADDRESS", help="a Dask scheduler, or local:N, that does the work")
    add("--corpus", metavar="DIR", type=Path, help="keep findings there, and go on from there")
    add("--coverage", action="store_true", help="tell what of the kernel was reached (slower)")
    add("--json", action="store_true", help="one JSON object instead of the account")


def run(args: argparse.Namespace) -> int:
    """Search, and tell: 0, or 1 where something was found."""
    from khosim.cli.explore_progress import shown
    from khosim.explore.campaign import Campaign
    from khosim.explore.engine import hypothesis_version
    from khosim.explore.hazards import fixed
    from khosim.explore.hosts import HOSTS
    from khosim.explore.search import SCENARIOS
    from khosim.explore.work import Spec
    from khosim.kernel.release import find_release

    if args.list:
        print("\n".join(f"{name:<12} {', '.join(groups)}" for name, groups in SCENARIOS.items()))
        print("\n".join(f"{name}: {host.about}" for name, host in HOSTS.items()))
        return 0
    if args.scenario in HOSTS:
        return _explore_host(args)
    if args.without:
        raise InputError("--without", f"only for {' and '.join(HOSTS)}")
    if args.scenario not in SCENARIOS:
        known = ", ".join((*SCENARIOS, *HOSTS))
        raise InputError("SCENARIO", f"{args.scenario!r} is not one of {known}")
    if args.runs is not None and args.seconds is not None:
        raise InputError("--seconds", "not together with --runs")
    seed = _number("--seed", args.seed, 0)
    seconds = None if args.seconds is None else _number("--seconds", args.seconds, 1)
    runs = None if seconds else _number("--runs", args.runs or str(_RUNS), 1)
    depth = None
    if args.exhaustive is not None:
        depth = _number("--exhaustive", args.exhaustive, 1)
        for option in ("runs", "seconds"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option}", "not together with --exhaustive")
    jobs = _number("--jobs", args.jobs, 1, _JOBS_MAX)
    if args.cluster is not None and jobs != 1:
        raise InputError("--jobs", "not together with --cluster")
    find_release(args.release)
    release = fixed(args.release) if args.fixed else args.release
    if args.engine not in ("plain", "hypothesis"):
        raise InputError("--engine", f"{args.engine!r} is not one of plain, hypothesis")
    if args.engine == "hypothesis":
        if depth is not None:
            raise InputError("--engine", "nothing is drawn with --exhaustive")
        hypothesis_version()
    spec = Spec(args.scenario, release, str(seed), args.coverage, args.engine)
    with ExitStack() as stack:
        corpus = None
        if args.corpus is not None:
            corpus = stack.enter_context(_corpus(args.corpus, spec, depth))
        bar = stack.enter_context(shown(None if depth else runs, seconds))
        stops = stack.enter_context(_stopping())
        campaign = Campaign(
            *(spec.seed, spec.scenario, spec.release),
            crew=_crew(spec, jobs, args.cluster, bar),
            corpus=corpus,
            progress=bar.show,
            stops=stops,
            engine=spec.engine,
        )
        if depth is not None:
            campaign.exhaust(depth)
        else:
            campaign.run(runs=runs, seconds=seconds)
    return _tell(campaign, as_json=args.json, covers=args.coverage)


def _explore_host(args: argparse.Namespace) -> int:
    # Devices between the events of a live update, instead of programs.
    from khosim.cli import explore_hosts as hosts
    from khosim.cli.explore_progress import shown
    from khosim.explore.interleave import DEPTH_MAX, nr_plans
    from khosim.explore.work import Spec

    hosts.check_options(args)
    if args.seconds is not None:
        raise InputError("--seconds", f"not for {args.scenario}; --runs says how many")
    if args.runs is not None and args.exhaustive is not None:
        raise InputError("--exhaustive", "not together with --runs")
    seed = str(_number("--seed", args.seed, 0))
    jobs = _number("--jobs", args.jobs, 1, _JOBS_MAX)
    depth = 0
    if args.exhaustive is not None:
        depth = _number("--exhaustive", args.exhaustive, 1, DEPTH_MAX)
    runs = _number("--runs", args.runs or str(_RUNS), 1)
    model = hosts.model_of(args)
    total = nr_plans(model, depth) if depth else runs
    with shown(total, None) as bar, _stopping() as stops:
        crew = _crew(Spec(args.scenario, args.release, seed), jobs, None, bar)
        search = hosts.Hosts(model, seed, crew, depth)
        search.run(hosts.counter(total), stops, bar.show)
    return hosts.tell(search, as_json=args.json)


def _crew(spec: Spec, jobs: int, cluster: str | None, bar: Bar) -> Crew:
    from khosim.explore.crew import Inline, Workers

    if cluster is not None:
        from khosim.explore.cluster import Cluster

        return Cluster(spec, cluster, bar.say)
    return Inline(spec) if jobs == 1 else Workers(spec, jobs, bar.say)


def _corpus(path: Path, spec: Spec, depth: int | None) -> Corpus:
    from khosim.explore.codec import release_text
    from khosim.explore.corpus import Corpus, fingerprint
    from khosim.explore.engine import hypothesis_version
    from khosim.plugins import is_plugin, plugin_file

    search = "random" if depth is None else f"exhaustive {depth}"
    if spec.engine == "hypothesis":
        search += f", drawn by hypothesis {hypothesis_version()}"
    about = {
        "scenario": spec.scenario,
        "release": release_text(spec.release),
        "seed": spec.seed,
        "search": search,
        "khosim": fingerprint(),
    }
    base = spec.release.partition("+")[0] if isinstance(spec.release, str) else ""
    if is_plugin(base):  # what it says, not only its name, decides what is found
        text = plugin_file(base).read_bytes()
        about["release file"] = blake2b(text, digest_size=8).hexdigest()
    return Corpus(path, about)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    # The first Ctrl-C is a wish, the second one an order.
    rung: list[int] = []

    def ring(number: int, frame: object) -> None:
        rung.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, ring)
    except ValueError:  # not the main thread, which alone is told of Ctrl-C
        yield lambda: False
        return
    try:
        yield lambda: bool(rung)
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(campaign: Campaign, *, as_json: bool, covers: bool) -> int:
    from khosim.explore.coverage import Account

    result = campaign.as_json()
    account = Account(campaign.covered) if covers else None
    if campaign.is_interrupted:
        waits = campaign.keeper.waits
        more = f"; {waits} suspects were not looked into" if waits else ""
        again = " (the same arguments go on from there)" if campaign.corpus else ""
        said = f"khosim explore: interrupted after {campaign.explored} programs{more}{again}"
        print(said, file=sys.stderr)
    if as_json:
        told = {} if account is None else {"coverage": account.as_json()}
        print(json.dumps(result | told, indent=1))
    else:
        print(printable(_text(result)), end="")
        if account is not None:
            print("", *map(printable, account.lines()), sep="\n")
    if campaign.is_interrupted:
        return _EXIT_INTERRUPTED
    return 1 if result["findings"] else 0


def _text(result: dict[str, Any]) -> str:
    findings = result["findings"]
    new = sum(not finding["hazards"] for finding in findings)
    heading = f"{result['explored']} programs of scenario {result['scenario']} on Linux"
    told = f"{len(findings)} findings" + (f", {new} NEW" if findings else "")
    lines = [f"{heading} {result['release']}, seed {result['seed']}: {told}"]
    if "states" in result:
        lines += wrap(_states_text(result), _COLUMNS)
    if "lost" in result:
        lines.append(f"left out, for they end their workers: runs {result['lost']}")
    if "unexplained" in result:
        lines.append(f"not shrunk, for it was shown often: {result['unexplained']} times")
    for n, finding in enumerate(findings, 1):
        what = "known hazard " + " with ".join(finding["hazards"]) if finding["hazards"] else "NEW"
        where = f"in {finding['count']} programs, first shown by {finding['seed']}"
        if finding["behind"]:
            where += f"; it shows once {' and '.join(finding['behind'])} is fixed"
        lines += ["", f"-- {n}. {finding['invariant']}: {what}", where]
        lines += wrap(finding["message"], _COLUMNS)
        if finding["also"]:
            lines += wrap(f"also said by {', '.join(finding['also'])}", _COLUMNS)
        lines += ["", *(f"    {line}".rstrip() for line in finding["program"].splitlines()), ""]
        for event in finding["trace"]:
            first, *more = wrap(event, _COLUMNS - 8) or [""]
            lines += [f"    | {first}", *(f"    |   {line}" for line in more)]
    return "\n".join(lines) + "\n"


def _states_text(result: dict[str, Any]) -> str:
    states, depth = result["states"], result["exhaustive"]
    if result["is_complete"]:
        return f"every program of up to {depth} steps after the boot; {states} different states"
    return f"not every program of up to {depth} steps: it ended at {states} different states"


def _number(option: str, text: str, low: int, high: int = 10**12 - 1) -> int:
    shown = text if len(text) <= 30 else f"{text[:30]}..."
    if not text.isascii() or not text.isdigit() or (len(text) <= 12 and int(text) < low):
        raise InputError(option, f"{shown!r} is not a whole number from {low} on")
    if len(text) > 12 or int(text) > high:
        raise InputError(option, f"{shown} is more than {high}")
    return int(text)
