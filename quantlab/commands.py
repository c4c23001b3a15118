"""What each command of the command line does once its words are known: it prints, and returns the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError, TrackingError, nearest
from quantlab.planning.job import Plan
from quantlab.planning.listing import BRIEF, DEVICES, LISTS, Row, combinations, meaning
from quantlab.planning.plan import plan
from quantlab.planning.trust import is_trusted, question, remember, require_trust
from quantlab.progress import console as stderr
from quantlab.progress import file_name, printable, progress_bars, under_way, was_said
from quantlab.report.terminal import Column, Sheet, complain, show, tell, terminal
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    from rich.console import Console

WITH_ALL = "QUANTLAB_PLAN_WITH_ALL"
"""Variable of the environment: a plan's process imports all that the libraries import."""


_STAYS = ("what it is", "question")
"""Columns of a list that never give way, beside the names."""


def can_ask() -> bool:
    """Whether someone sits at a terminal who can read a question and answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agree(request: Plan, trust: bool) -> None:
    """Ask for what a stranger's recipe decides, where someone can answer; ConfigError where nobody agrees."""
    if trust or is_trusted(request) or not can_ask():
        require_trust(request, trust)
        return
    print(f"{question(request)}\nrun it so? (y/N) ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError(f"{request.typed_recipe}: not agreed to; nothing was run")
    remember(request)


def show_list(words: Sequence[str], flags: set[str]) -> int:
    """Print one of the lists."""
    if not words or words[0] not in LISTS:
        what = words[0] if words else ""
        raise ConfigError(f"{' '.join(['list', *words[:1]])}: there are {', '.join(LISTS)}{nearest(what, LISTS)}")
    rows = _on_device(words[1:]) if words[0] == "combinations" else LISTS[words[0]]() if not words[1:] else None
    if rows is None:
        raise ConfigError(f"{words[1]}: list {words[0]} takes no further word; leave it out")
    if "--json" in flags:
        print(json.dumps(rows, indent=2))
        return 0
    of = "combinations of a device" if words[1:] else words[0]
    every = tuple(rows[0]) if rows else ()
    keys, caption = BRIEF.get(of, (every, ""))
    columns = [
        Column(
            title=key.replace("_", " "), is_text=True, may_wrap=key != keys[0], keep=9 if key in _STAYS or not j else 5
        )
        for j, key in enumerate(keys)
    ]
    texts = [[_cell(row[key]) for key in keys] for row in rows if row.get("offered", True)]
    show(terminal(), Sheet(columns=columns, rows=texts, caption=[caption]), **_look(flags))
    return 0


def show_meanings(words: Sequence[str], flags: set[str]) -> int:
    """Print what words are; without one, in JSON, all of the glossary."""
    if not words:
        return show_list(["words"], flags)
    whole = " ".join(words)
    with contextlib.suppress(ConfigError):
        meaning(whole)
        words = [whole]  # a word of several, as a verdict is
    rows = [{"word": word, "what it is": meaning(word)} for word in words]
    if "--json" in flags:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        tell(terminal(), f"{printable(row['word'])}: {row['what it is']}")
    return 0


def _look(flags: set[str]) -> dict[str, bool]:
    return {"is_plain": "--plain" in flags, "wide": "--wide" in flags}


def _on_device(words: Sequence[str]) -> list[Row]:
    """The combinations, of all devices or of the one that ``device=...`` says."""
    key, _, value = words[0].partition("=") if words else ("device", "", "")
    if key != "device" or len(words) > 1 or (words and value not in DEVICES):
        wrong = words[-1] if key == "device" else words[0]
        raise ConfigError(f"{wrong}: list combinations takes device={' or device='.join(DEVICES)}")
    return combinations(value)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def show_configs(request: Plan) -> int:
    """Print each job as a recipe."""
    for job in request.jobs:
        header, _, rest = job.whole_yaml.partition("\n")  # Hydra reads the header from the first line alone
        print(f"{header}\n# {job.name}\n{rest}")
    return 0


def show_prices(words: Sequence[str], flags: set[str], is_last: bool = False) -> int:
    """Print what each combination will occupy; 2 where none is possible. ``is_last``: the process ends with it."""
    from quantlab.report.price_table import price_tables
    from quantlab.running.forecast import forecast

    request = plan([*words, "sweep.dry_run=true"], multirun=bool(flags & {"-m", "--multirun"}))
    agree(request, "--trust" in flags)  # it may name a path of its own, or one to be asked for on the Hub
    is_spared = _is_spared(is_last)
    try:
        with progress_bars():
            under_way("reading configurations")
            prices = forecast(request, is_last=is_spared)
    except Exception as error:  # may be of what it does without: then the answer is that of a process that has all
        if not is_spared or type(error) is ConfigError:
            raise
        code = _with_all()
        if code == 0:  # else the other one has said why
            why = printable(f"{type(error).__name__}: {error}".partition("\n")[0], 200)
            line = f"plan: took longer, with packages that few models need (without them: {why})"
            print(f"quantlab: {line}", file=sys.stderr)
        return code
    if "--json" in flags:
        print(json.dumps([price.data() for price in prices], indent=2))
    else:
        console = terminal(132)
        for told in price_tables(prices):
            if isinstance(told, Sheet):
                show(console, told, **_look(flags))
            elif "--plain" in flags:  # there the tables are for programs, and what is said is for people
                print(printable(told), file=sys.stderr)
            else:
                tell(console, told)
    return ConfigError.exit_code if all(price.why_refused for price in prices) else 0


def _is_spared(is_last: bool) -> bool:
    return is_last and os.environ.get(WITH_ALL) != "1"


def _with_all() -> int:
    """Give this command to a process that imports all; its exit code."""
    again = {**os.environ, WITH_ALL: "1"}
    return subprocess.run([sys.executable, *sys.orig_argv[1:]], env=again, check=False).returncode


def show_first_recipe(words: Sequence[str]) -> int:
    """Write a recipe for a model of one's own, and say what is done with it."""
    from quantlab.running.first_look import first_look
    from quantlab.running.first_recipe import first_recipe, left_open

    with progress_bars():
        under_way("reading the model's configuration")
        file, planned = first_recipe(words)
    told = shlex.quote(printable(str(file)))
    of_ones_own = f" {open_key}=..." if (open_key := left_open(planned)) else ""
    print(f"{told}: {len(planned.jobs)} candidates that fit the model's shapes; read it, change it, then")
    print(f"what it would run:  quantlab recipe={told}{of_ones_own} sweep.dry_run=true")
    print(f"will it fit:        quantlab plan recipe={told}{of_ones_own}")
    if fewer := first_look(planned.jobs[0].config):
        print(f"a first look:       quantlab recipe={told}{of_ones_own} {' '.join(fewer)}")
    print(f"run it:             quantlab recipe={told}{of_ones_own}")
    return 0


def export_reference(words: Sequence[str], flags: set[str]) -> int:
    """Write the reference of a request to a folder."""
    from quantlab.running.reference import USAGE
    from quantlab.running.reference import export_reference as export

    if words[:1] != ["export"] or len(words) < 2 or "=" in words[1]:
        raise ConfigError(f"reference: write {USAGE}")
    request = plan(list(words[2:]))
    agree(request, "--trust" in flags)
    print(f"reference: {printable(str(export(request, words[1], bool(flags & {'-q', '--quiet'}))))}", file=sys.stderr)
    return 0


def show_comparison(words: Sequence[str]) -> int:
    """Compare tracked runs: a table or JSON here, a page in a file and at the sweep's run, a CSV file if asked for."""
    from quantlab.report.compare import compare
    from quantlab.report.comparison_data import failure_data, group_data, write_csv
    from quantlab.report.comparison_markdown import comparison_markdown
    from quantlab.report.comparison_table import show_groups
    from quantlab.report.html import page_data, write_page
    from quantlab.report.reading import open_reader
    from quantlab.report.selection import parse_request, select

    request = parse_request(words)
    with progress_bars(request.is_quiet):
        under_way("reading runs")
        reader = open_reader(request.tracking, Path.cwd(), request.output_dir)
        selection = select(request, reader)
        under_way("comparing")
        groups = compare(request, selection, reader)
        failed = [failure_data(run) for run in selection.failed]
        if request.csv:
            write_csv([group_data(group) for group in groups], failed, request.csv)
        page = request.html or Path(request.output_dir, "reports", f"{file_name(selection.title, 100)}.html")
        under_way("writing the page")
        write_page(page_data(groups, selection, reader), page)
        logged = request.sweep and reader.add_artifact(selection.parents[0], page, "reports")
    if request.as_json:
        compared = [group_data(group) for group in groups]
        told = {"title": selection.title, "groups": compared, "failed": failed, "skipped": list(selection.skipped)}
        print(json.dumps(told, indent=2))
    elif request.as_markdown:
        print(comparison_markdown(groups, selection))
    else:
        look = {"is_plain": request.is_plain, "wide": request.is_wide}
        show_groups(terminal(160), groups, selection.failed, more=request.columns, **look)
    if not request.is_quiet:
        print(f"page: {printable(str(page))}{' (and at the run of the sweep)' if logged else ''}", file=sys.stderr)
    return 0


def show_status(words: Sequence[str]) -> int:
    """Print where the jobs of a sweep are."""
    from quantlab.running.status import data, sheet, status

    jobs = status([word for word in words if word not in ("--json", "--plain", "--wide", "-q", "--quiet")])
    if "--json" in words:
        print(json.dumps(data(jobs), indent=2))
    else:
        show(terminal(160), sheet(jobs), **_look(set(words)))
    return 0


def show_reproduction(words: Sequence[str]) -> int:
    """Run a tracked job again and show each of its numbers beside the new one; 1 where one is different."""
    from quantlab.report.reproduction import DIFFERENT, reproduction_sheets, summary_lines
    from quantlab.running.reproduce import parse_request, reproduce

    request = parse_request(words)
    found = reproduce(request)
    if request.as_json:
        print(json.dumps(found.data(), indent=2))
    else:
        console = terminal(132)
        for sheet in reproduction_sheets(found):
            show(console, sheet)
        for line in summary_lines(found):
            tell(console, line)
    return 1 if found.verdict == DIFFERENT else 0


def show_export(words: Sequence[str]) -> int:
    """Write a tracked job's quantized model as others load it, or upload it; tell what came of it."""
    from quantlab.running.export import export_lines, push_lines

    for line in (export_lines if words[0] == "export" else push_lines)(words[1:]):
        tell(terminal(), line)
    return 0


def model_told(config: ModelConfig) -> str:
    """A model in a word: the last part of its path or Hub id, or its family where it has none."""
    return file_name((config.path or "").rstrip("/").rpartition("/")[2]) or config.family


def front_lines(reports: Sequence[RunReport], request: Plan) -> list[str]:
    """The Pareto front of a search, a line a scheme; nothing where there was none."""
    from quantlab.planning.space import objectives_of
    from quantlab.running.search import front_of, values_of

    search = request.jobs[0].config.sweep.search
    if not search.num_trials or not reports:
        return []
    objectives = objectives_of(search, reports[0].protocol)
    names = {job.name for job in request.jobs}
    points = [(r.name, values_of(r, objectives)) for r in reports if r.name in names]
    front = [points[i] for i in front_of([v for _, v in points], objectives)]
    told = ", ".join(f"{direction} {name}" for name, direction in objectives.items())
    width = max((len(name) for name, _ in front), default=0)
    front.sort(key=lambda point: point[1] or ())
    lines = [f"  {name:<{width}}  {'  '.join(f'{x:<12.6g}' for x in v or ())}".rstrip() for name, v in front]
    return [f"{len(points)} of {len(request.jobs)} possible jobs were measured; Pareto front ({told}):", *lines]


def columns_of(flags: set[str]) -> list[str]:
    """The metrics of ``--columns=NAME,NAME``."""
    chosen = [flag.removeprefix("--columns=") for flag in flags if flag.startswith("--columns=")]
    return [name for word in chosen for name in word.split(",") if name]


def show_dry_run(request: Plan, flags: set[str], is_last: bool = False) -> int:
    """Print what would run, and which columns the table of it could not have. ``is_last``: the process ends with it."""
    from quantlab.report.table import no_columns
    from quantlab.running.dry_run import show_jobs
    from quantlab.running.outlined import LacksPackages

    as_json = "--json" in flags
    try:
        code = show_jobs(request, "--trust" in flags, can_ask(), is_last=_is_spared(is_last), as_json=as_json)
    except LacksPackages:  # before a line was printed
        return _with_all()
    for line in no_columns(columns_of(flags)):
        print(printable(line), file=sys.stderr) if as_json else tell(terminal(), line)
    return code


def run(request: Plan, flags: set[str]) -> int:
    """Run the jobs and show the table; 1 when a job failed."""
    from quantlab.report.attribution import attribution_sheet
    from quantlab.report.said_first import said_first
    from quantlab.report.table import MAX_SKIPPED, headline, rows_sheet
    from quantlab.running.sweep import run_plan
    from quantlab.tracking.results import report_data

    as_json, is_plain, more = "--json" in flags, "--plain" in flags, columns_of(flags)
    reports = run_plan(request, quiet=bool(flags & {"-q", "--quiet"}), trust=True)
    rows = [report_data(r) for r in reports]
    failed = [r for r in rows if r["status"] == "FAILED"]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        config = request.jobs[0].config
        caption = f"{model_told(config.model)}, n = {config.evaluation.num_samples}"
        console = terminal(132)
        schemes = [r for r in rows if "quantization/coverage" in r["metrics"]]
        is_on_screen = is_plain or (console.is_terminal and stderr.is_terminal)
        for line in said_first((r["name"], _unsaid(r["unquantized"], is_on_screen, is_plain)) for r in schemes):
            _tell_beside(console, line, is_plain, "yellow")
        apart = {p: [r for r in rows if r["protocol"] == p] for p in sorted({r["protocol"] for r in rows})}
        for protocol, some in apart.items():
            costs = attribution_sheet(some, headline(protocol, some), is_plain=is_plain)
            for sheet in (rows_sheet(some, protocol, caption, more, is_plain=is_plain), costs):
                if sheet:
                    show(console, sheet, **_look(flags))
        for row in [r for r in rows if r["status"] == "SKIPPED"][:MAX_SKIPPED]:
            _tell_beside(console, f"skipped: {row['name']}: {row['error']}", is_plain)
        for line in front_lines(reports, request):
            _tell_beside(console, line, is_plain)
    for report in failed:
        told = f"failed: {report['name']} at {report['failed_stage']}: {report['error']}"
        complain(told, "")
    if not flags & {"-q", "--quiet", "--json", "--plain"}:
        _show_next_steps(reports, request)
    return 1 if failed else 0


def _tell_beside(console: Console, line: str, is_plain: bool, style: str = "") -> None:
    """Print a sentence beside a table; where that is for programs (``is_plain``), for people: on stderr."""
    if is_plain:
        print(printable(line), file=sys.stderr)
    else:
        tell(console, line, style)


def _unsaid(sentences: Sequence[str], is_on_screen: bool, is_plain: bool) -> list[str]:
    """Of sentences that stand on the reader's screen already their beginning, and beside a plain table nothing."""
    if not is_on_screen:
        return [*sentences]
    left = [s for s in sentences if not (is_plain and was_said(s))]
    return [f"{s.partition(';')[0]} (as told above)" if was_said(s) else s for s in left]


def _show_next_steps(reports: Sequence[RunReport], request: Plan) -> None:
    from quantlab.report.reading import open_reader
    from quantlab.report.results import Results, next_steps

    config = request.jobs[0].config
    with contextlib.suppress(TrackingError):  # a store that is away by now has said so
        results = Results(reports, lambda: open_reader(config.tracking, Path.cwd(), config.output_dir))
        width = {"width": stderr.width} if stderr.is_terminal else {}
        for line in next_steps(results, config.output_dir, config.tracking, **width):
            print(printable(line), file=sys.stderr)
