"""The command line: ``quantlab [run] key=value ...`` and ``quantlab list WHAT``.

Exit codes: 0 all done, 1 a job failed at run time, 2 a bad request.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from quantlab.errors import ConfigError, QuantlabError, TrackingError, is_disk_full, nearest
from quantlab.planning.completion import SCRIPT, completions
from quantlab.planning.job import Job, Plan
from quantlab.planning.listing import BRIEF, DEVICES, LISTS, Row, combinations, meaning
from quantlab.planning.places import groups, option_dirs, own_options, recipe_dirs, recipes
from quantlab.planning.plan import plan
from quantlab.planning.ready import check_ready
from quantlab.planning.trust import is_trusted, question, remember, require_trust, trusted_file
from quantlab.progress import file_name, plain, printable, spell_out
from quantlab.report.terminal import Column, Sheet, show
from quantlab.vocabulary.reports import RunReport

HELP = """quantlab: what does each quantization scheme cost in quality, and what does it save in bytes, on your model?

  quantlab key=value ...              run one scheme:      quantlab backend=torchao dtype=int4 group_size=64
  quantlab -m key=a,b ...             run a grid:          quantlab -m backend=quanto,torchao dtype=int8,int4
  quantlab recipe=NAME [key=value]    run a recipe:        quantlab recipe=digits_backends, recipe=path/to/mine.yaml
  quantlab compare sweep=latest       which is better:     quantlab compare RUN_ID RUN_ID, experiment=NAME, metric=NAME,
                                      margin=VALUE, --json, --csv FILE, --html FILE (outputs/reports/<sweep>.html)
  quantlab plan key=value ...         will it fit?         quantlab plan model=flux_dev backend=bitsandbytes dtype=nf4
                                      memory.device_gib=24 (any request; reads configurations, no weights; --json)
  quantlab reference export DIR key=value ...
                                      the unquantized model's outputs, for runs elsewhere: reference.path=DIR
  quantlab reproduce RUN_ID [--json]  run a tracked job again: each metric identical, within its interval, different
  quantlab export RUN_ID DIR          the run's quantized model as Diffusers or transformers load it (RUN_ID or latest;
                                      while it is measured: export.path=DIR, in a sweep with export.winner=true)
  quantlab push RUN_ID OWNER/NAME     upload what was exported of a run to a Hub
  quantlab list WHAT [--json]         what there is:
          {lists}
  quantlab help WORD                  what a word, metric, dtype or algorithm is: quantlab help floor

options
  -m, --multirun    several values of a key (group_size=32,64,128, range(1,4), dtype='glob(int*)') are a sweep
  --json            the result rows as JSON on stdout instead of the table
  --plain, --wide   the table tab-separated; or whole, where a narrow terminal hides columns
  -c, --cfg [job]   print the composed config of each job and stop (--resolve: it always is)
  -cd, --config-dir DIR
                    options of your own: DIR/dtype/mine.yaml, DIR/model/mine.yaml, ... as those in conf/ are written
                    (--config-dir conf for ./conf, which is not read by itself: other people's checkouts have one too)
  -i, --info        print where the vocabulary and the recipes are looked for
  --version         print the version
  -sc, --shell-completion
                    print what a shell evaluates: eval "$(quantlab --shell-completion)"
  --trust           agree to the places that a recipe of others decides (tracking, output_dir, paths, launcher)
  -q, --quiet       no progress bars
  -h, --help        this text

config groups (choose with group=option)
{groups}

single keys, for example
  device=auto|cpu|cuda   model.path=PATH   evaluation.num_samples=50   tracking.uri=http://host:5000
  quantization.on_mismatch=error|skip|DTYPE   activation_dtype=int8   quantization.bnb_4bit_use_double_quant=true
  quantization.quantization_config=FILE|JSON (a model card's block)
  components.NAME='{{backend: quanto, dtype: int8}}' (one scheme for each component)   evaluation.attribute=true
  sweep.dry_run=true   sweep.on_invalid=skip   sweep.search.num_trials=12

Results: a table here, everything in MLflow (outputs/mlflow.db; look at it with mlflow ui), a folder a run in
outputs/runs. Recipes are also looked for in ./recipes and in the folders of QUANTLAB_RECIPES. QUANTLAB_TRACEBACK=1
shows where an error comes from, QUANTLAB_VERBOSE=1 what the libraries print.
From Python: import quantlab; quantlab.run(recipe="digits_backends").
"""

HELPS = "quantlab --help shows them"
LONG = {"-h": "--help", "--info": "-i", "--shell-completion": "-sc"}
CPU_SECONDS = "; seconds on a CPU say nothing about a GPU"
KNOWN_FLAGS = {
    *(
        "-m",
        "--multirun",
        "--json",
        "--cfg",
        "--resolve",
        "-q",
        "--quiet",
        "-h",
        "--help",
        "--trust",
        "--plain",
        "--wide",
    ),
    *("--version", "--info", "-i", "--shell-completion", "-sc"),
}
HYDRAS_FLAGS = {
    "--config-path": "the vocabulary is quantlab's; recipe=path/to/mine.yaml is your own",
    "--config-name": "the vocabulary is quantlab's; recipe=path/to/mine.yaml is your own",
    "--package": "the whole config is printed by --cfg job",
    "-p": "the whole config is printed by --cfg job",
    "--run": "is what quantlab key=value does",
    "-r": "is what quantlab key=value does",
    "--experimental-rerun": "quantlab recipe=outputs/runs/RUN/recipe.yaml runs a job again",
    "--hydra-help": "Hydra's own keys do nothing here",
}
"""Flag of Hydra's -> what does its work here."""


class Terminal(Console):
    """Rich's console, which leaves a reader that went away to :func:`main`."""

    def on_broken_pipe(self) -> None:
        """Called by Rich, whose own answer is exit code 1: here that is a job that failed."""
        raise BrokenPipeError


def terminal(width: int | None = None) -> Console:
    """Where tables go; ``width`` is that of a file or a pipe, which has none of its own."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    wide = None if is_known else width
    return Terminal(width=wide, markup=False, highlight=False, emoji=False)  # what is printed is text, never markup


def help_text() -> str:
    """The text of ``--help``."""
    width = max(map(len, groups()))
    lines = [f"  {name:<{width}}  {_wrap(' '.join(options), width + 4)}" for name, options in groups().items()]
    return HELP.format(lists="|".join(LISTS), groups="\n".join(lines))


def _wrap(text: str, indent: int) -> str:
    import textwrap

    return f"\n{' ' * indent}".join(textwrap.wrap(text, 116 - indent))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; never shows a traceback for an error of ours unless ``QUANTLAB_TRACEBACK=1``."""
    words = list(sys.argv[1:] if argv is None else argv)
    spell_out(sys.stdout, sys.stderr)
    try:
        code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `quantlab ... | head` does
        _drop_output()
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if not is_disk_full(error):
            raise
        _drop_output()
        print(
            f"quantlab: output: cannot be written ({error}); results are tracked and kept: send the output to a disk "
            "with room, and give the same command again",
            file=sys.stderr,
        )
        code = 1
    except QuantlabError as error:
        if os.environ.get("QUANTLAB_TRACEBACK") == "1":
            raise
        print(f"quantlab: {printable(str(error), 20_000, lines=True)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("quantlab: interrupted; finished jobs are kept", file=sys.stderr)
        code = 130
    sys.exit(code)


def _drop_output() -> None:
    """Let go of an output that takes no more: the interpreter flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(words: list[str]) -> int:
    """Run one command; returns the exit code."""
    if words[:1] == ["compare"] and not {"-h", "--help"} & set(words):
        return show_comparison(words[1:])
    if words[:1] in (["export"], ["push"]) and not {"-h", "--help"} & set(words):
        return show_export(words)
    if words[:1] == ["reproduce"] and not {"-h", "--help"} & set(words):
        return show_reproduction(words[1:])
    if words[:1] == ["help"] and words[1:]:
        for word in words[1:]:
            print(f"{printable(word)}: {meaning(word)}")
        return 0
    if words[:1] == ["--complete"]:
        print("\n".join(completions(*words[1:3])))
        return 0
    words, folder = _config_dir(_config_words(words))
    with own_options(folder):
        return _dispatch(words)


def _dispatch(words: list[str]) -> int:
    flags = {w for w in words if w.startswith("-")}
    rest = [w for w in words if not w.startswith("-")]
    if unknown := [w for w in words if w in flags - KNOWN_FLAGS]:
        near = nearest(unknown[0], KNOWN_FLAGS)
        raise ConfigError(
            f"{unknown[0]}: {HYDRAS_FLAGS.get(unknown[0].partition('=')[0], f'no such option{near}')}; {HELPS}"
        )
    for flag, text in {"-h": help_text, "--version": version, "--info": info, "--shell-completion": script}.items():
        if {flag, LONG.get(flag, flag)} & flags or (flag == "-h" and not words):
            print(text())
            return 0
    if rest and rest[0] == "list":
        return show_list(rest[1:], flags)
    if rest and rest[0] == "plan":
        return show_prices(rest[1:], flags)
    if rest and rest[0] == "reference":
        return export_reference(rest[1:], flags)
    if rest and rest[0] == "run":
        rest = rest[1:]
    request = plan(rest, multirun=bool(flags & {"-m", "--multirun"}))
    if "--cfg" in flags:
        return show_configs(request)
    if request.dry_run:
        return show_jobs(request)
    agree(request, "--trust" in flags)
    return run(request, flags)


def agree(request: Plan, trust: bool) -> None:
    """Ask for what a stranger's recipe decides, where someone can answer; ConfigError where nobody agrees."""
    if trust or is_trusted(request) or not (sys.stdin.isatty() and sys.stderr.isatty()):
        require_trust(request, trust)
        return
    print(f"{question(request)}\nrun it so? (y/N) ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError(f"recipe={request.recipe.name if request.recipe else ''}: not agreed to; nothing was run")
    remember(request)


def _config_words(words: Sequence[str]) -> list[str]:
    """The words with ``--cfg job`` (or ``-c job``, ``--cfg=job``) as ``--cfg`` alone."""
    out: list[str] = []
    for word in words:
        flag, has_value, value = word.partition("=")
        if out and out[-1] == "--cfg" and word in ("job", "hydra", "all"):
            flag, has_value, value = out.pop(), "=", word
        if flag in ("-c", "--cfg"):
            if has_value and value != "job":
                raise ConfigError(
                    f"--cfg {value}: quantlab has no settings of Hydra's own; --cfg job prints what would run"
                )
            out.append("--cfg")
        else:
            out.append(word)
    return out


def _config_dir(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without ``--config-dir FOLDER`` (``-cd FOLDER``, ``--config-dir=FOLDER``), and the folder."""
    out, found = [], None
    left = iter(words)
    for word in left:
        flag, has_value, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            found = value if has_value else next(left, "")
        else:
            out.append(word)
    return out, found


def version() -> str:
    """``quantlab 0.1.0``."""
    from importlib import metadata

    try:
        return f"quantlab {metadata.version('quantlab-recipes')}"
    except metadata.PackageNotFoundError:
        return "quantlab (not installed: it runs from its sources)"


def info() -> str:
    """Where the vocabulary and the recipes are looked for, first ones first, and where the user's answers are kept."""
    rows = [
        ("version", version()),
        *(("conf", folder) for folder in option_dirs()),
        *(("recipes", folder) for folder in recipe_dirs()),
    ]
    rows.append(("agreed to", trusted_file()))
    return "\n".join(f"{name:<10} {printable(str(value))}" for name, value in rows)


def script() -> str:
    """What a shell evaluates for completion."""
    return SCRIPT


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
    keys = keys or every[:-1]
    columns = [Column(title=key.replace("_", " "), is_text=True, may_wrap=key != keys[0]) for key in keys]
    texts = [[_cell(row[key]) for key in keys] for row in rows if row.get("offered", True)]
    show(terminal(), Sheet(columns=columns, rows=texts, caption=[caption or ""]), **_look(flags))
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


def show_jobs(request: Plan) -> int:
    """Print what a sweep would run, each job with the command that gives it alone, and what it would not run.

    The exit code is the run's: 2 where it would refuse impossible combinations.
    """
    check_ready(request.jobs)
    sweep = request.jobs[0].config.sweep
    trials = sweep.search.num_trials
    print(f"{len(request.jobs)} jobs{f', of which a search runs {min(trials, len(request.jobs))}' if trials else ''}:")
    for job in request.jobs:
        print(printable(f"  {job.name}\n      {alone(job, request)}", lines=True))
    for one in request.merged:
        print(printable(f"  one scheme: {' = '.join(one.spellings)} ({one.name})"))
    for combination, reason in request.invalid:
        print(printable(f"  impossible: {combination}\n      {reason}", lines=True))
    if not request.invalid or trials or sweep.on_invalid == "skip":
        return 0
    num, every = len(request.invalid), len(request.invalid) + len(request.jobs)
    print(
        f"quantlab: the run refuses {num} of {every} combinations; sweep.on_invalid=skip runs the others",
        file=sys.stderr,
    )
    return ConfigError.exit_code


def alone(job: Job, request: Plan) -> str:
    """The command that runs one job of a request by itself, as a shell takes it."""
    recipe, sweep = request.recipe, job.config.sweep
    words = [f"recipe={recipe.stem if recipes().get(recipe.stem) == recipe else recipe}"] if recipe else []
    words += ["sweep.candidates=[]"] if recipe and sweep.candidates else []
    words += ["sweep.grid={}"] if recipe and sweep.grid else []
    own = [w for w in job.overrides if w.lstrip("+").partition("=")[0] not in _OF_THE_SWEEP]
    return shlex.join(["quantlab", *words, *own])


_OF_THE_SWEEP = ("sweep.dry_run", "sweep.candidates", "sweep.grid")


def show_prices(words: Sequence[str], flags: set[str]) -> int:
    """Print what each combination will occupy; 2 where none is possible."""
    from quantlab.report.price_table import price_tables
    from quantlab.running.forecast import forecast

    request = plan([*words, "sweep.dry_run=true"], multirun=bool(flags & {"-m", "--multirun"}))
    agree(request, "--trust" in flags)  # it may name a path of its own, or one to be asked for on the Hub
    prices = forecast(request)
    if "--json" in flags:
        print(json.dumps([price.data() for price in prices], indent=2))
    else:
        console = terminal(132)
        for told in price_tables(prices):
            console.print(plain(told, 2000) if isinstance(told, str) else told, soft_wrap=isinstance(told, str))
    return 0 if any(price.components for price in prices) else ConfigError.exit_code


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
    from quantlab.report.comparison_data import write_csv
    from quantlab.report.comparison_table import show_groups
    from quantlab.report.html import page_data, write_page
    from quantlab.report.reading import open_reader
    from quantlab.report.selection import parse_request, select

    request = parse_request(words)
    reader = open_reader(request.tracking, Path.cwd())
    selection = select(request, reader)
    groups = compare(request, selection, reader)
    data = page_data(groups, selection, reader)
    if request.csv:
        write_csv(data["groups"], data["failed"], request.csv)
    page = request.html or Path("outputs", "reports", f"{file_name(selection.title, 100)}.html")
    write_page(data, page)
    logged = request.sweep and reader.add_artifact(selection.parents[0], page, "reports")
    if request.as_json:
        told = ("title", "groups", "failed", "skipped")
        print(json.dumps({k: v for k, v in data.items() if k in told}, indent=2))
    else:
        show_groups(terminal(160), groups, selection.failed, is_plain=request.is_plain, wide=request.is_wide)
    print(f"page: {printable(str(page))}{' (and at the run of the sweep)' if logged else ''}", file=sys.stderr)
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
            console.print(plain(line, 1000), soft_wrap=True)
    return 1 if found.verdict == DIFFERENT else 0


def show_export(words: Sequence[str]) -> int:
    """Write a tracked job's quantized model as others load it, or upload it; tell what came of it."""
    from quantlab.running.export import export_lines, push_lines

    print("\n".join(map(printable, (export_lines if words[0] == "export" else push_lines)(words[1:]))))
    return 0


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
    return [f"{len(points)} of {len(request.jobs)} possible points were measured; Pareto front ({told}):", *lines]


def run(request: Plan, flags: set[str]) -> int:
    """Run the jobs and show the table; 1 when a job failed."""
    from quantlab.report.attribution import attribution_sheets
    from quantlab.report.said_first import said_first
    from quantlab.report.table import MAX_SKIPPED, rows_sheet
    from quantlab.running.sweep import run_plan
    from quantlab.tracking.results import report_data

    as_json = "--json" in flags
    reports = run_plan(request, quiet=as_json or bool(flags & {"-q", "--quiet"}), trust=True)
    rows = [report_data(r) for r in reports]
    failed = [r for r in rows if r["status"] == "FAILED"]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        config = request.jobs[0].config
        size = f"{config.model.family}, n = {config.evaluation.num_samples}"
        here = "" if any(r["metrics"].get("perf/representative") for r in rows) else CPU_SECONDS
        caption = f"{size}; saving is against 16 bit{here}"
        console = terminal(132)
        for line in said_first((r["name"], r["unquantized"]) for r in rows):
            console.print(plain(line, 1000), style="yellow", soft_wrap=True)
        apart = {p: [r for r in rows if r["protocol"] == p] for p in sorted({r["protocol"] for r in rows})}
        for sheet in [*(rows_sheet(some, p, caption) for p, some in apart.items()), *attribution_sheets(rows)]:
            show(console, sheet, **_look(flags))
        for row in [r for r in rows if r["status"] == "SKIPPED"][:MAX_SKIPPED]:
            console.print(plain(f"skipped: {row['name']}: {row['error']}", 1000), soft_wrap=True)
        for line in front_lines(reports, request):
            console.print(plain(line, 1000), soft_wrap=True)
    for report in failed:
        told = f"failed: {report['name']} at {report['failed_stage']}: {report['error']}"
        print(printable(told, lines=True), file=sys.stderr)
    if not flags & {"-q", "--quiet", "--json", "--plain"}:
        _show_next_steps(reports, request)
    return 1 if failed else 0


def _show_next_steps(reports: Sequence[RunReport], request: Plan) -> None:
    from quantlab.report.reading import open_reader
    from quantlab.report.results import Results, next_steps

    config = request.jobs[0].config
    with contextlib.suppress(TrackingError):  # a store that is away by now has said so
        results = Results(reports, lambda: open_reader(config.tracking, Path.cwd()))
        for line in next_steps(results, config.output_dir, config.tracking):
            print(printable(line), file=sys.stderr)
