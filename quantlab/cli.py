"""The command line: ``quantlab [run] key=value ...`` and ``quantlab list WHAT``.

Exit codes: 0 all done, 1 a job failed at run time, 2 a bad request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from quantlab.commands import (
    agree,
    export_reference,
    run,
    show_comparison,
    show_configs,
    show_dry_run,
    show_export,
    show_first_recipe,
    show_list,
    show_meanings,
    show_prices,
    show_reproduction,
    show_status,
)
from quantlab.errors import ConfigError, QuantlabError, is_disk_full, nearest
from quantlab.modules.device import collect_rarely
from quantlab.planning.completion import SCRIPT, completions
from quantlab.planning.listing import LISTS
from quantlab.planning.places import groups, option_dirs, own_options, recipe_dirs
from quantlab.planning.plan import plan
from quantlab.planning.trust import trusted_file
from quantlab.progress import printable, spell_out
from quantlab.report.terminal import complain, fitted, terminal

HELP = """quantlab: what does each quantization scheme cost in quality, and what does it
save in bytes, on your model?

  quantlab key=value ...              run one scheme
  quantlab -m key=a,b ...             run a grid
  quantlab recipe=NAME [key=value]    run a recipe, or recipe=path/to/mine.yaml
  quantlab init FILE model.path=PATH  a first recipe: candidates that fit the
                                      model's shapes, commented, to change
  quantlab compare sweep=latest       which is better? also RUN_ID RUN_ID,
                                      experiment=NAME; with metric=NAME,
                                      margin=VALUE, --json, --csv FILE,
                                      --markdown (for issues and model cards),
                                      --html FILE (else in outputs/reports), -q
  quantlab plan key=value ...         will it fit? any request: reads
                                      configurations, no weights; --json
  quantlab reference export DIR key=value ...
                                      the unquantized model's outputs, for runs
                                      elsewhere: reference.path=DIR
  quantlab reproduce RUN_ID [--json]  run a tracked job again (or latest): each
                                      metric identical, within its interval,
                                      different
  quantlab export RUN_ID DIR          the run's quantized model as Diffusers or
                                      transformers load it (RUN_ID or latest;
                                      while it is measured: export.path=DIR, in
                                      a sweep with export.winner=true)
  quantlab push RUN_ID OWNER/NAME     upload what was exported of a run to a Hub
  quantlab status [SWEEP] [--json]    how are its jobs? queued, running,
                                      finished, failed; node, attempt, time, log
  quantlab list WHAT [--json]         what there is:
    {lists}
  quantlab help WORD [--json]         what a word, metric, dtype or algorithm is

for example
  quantlab backend=torchao dtype=int4 group_size=64
  quantlab -m backend=quanto,torchao dtype=int8,int4
  quantlab recipe=digits_backends
  quantlab plan model=flux_dev backend=bitsandbytes dtype=nf4
  quantlab help floor

options
  -m, --multirun    several values of a key (group_size=32,64,128, range(1,4),
                    dtype='glob(int*)') are a sweep; of one value, a sweep of
                    one job, which is resumed where it has finished
  --json            the result rows as JSON on stdout instead of the table
  --plain, --wide   the table tab-separated; or whole, where a narrow terminal
                    hides columns
  --columns NAME,NAME
                    further columns of it: perf/decode_tokens_per_s (with
                    evaluation.speed=true), quality/kld_p99, ...
  -c, --cfg [job]   print the composed config of each job and stop (--resolve:
                    it always is)
  -cd, --config-dir DIR
                    options of your own: DIR/dtype/mine.yaml, DIR/model/...
                    as those in conf/ are written (--config-dir conf for ./conf,
                    which is not read by itself: other people's checkouts have
                    one too)
  -i, --info        print where the vocabulary and the recipes are looked for
  --version         print the version
  -sc, --shell-completion
                    print what a shell evaluates:
                    eval "$(quantlab --shell-completion)"
  --trust           agree to the places that a recipe of others decides
                    (tracking, output_dir, paths, launcher)
  -q, --quiet       no progress bars, and no word on what to do next
  -h, --help        this text

config groups (choose with group=option)
{groups}

single keys, for example
  device=auto|cpu|cuda   model.path=PATH   evaluation.num_samples=50
  tracking.uri=http://host:5000   activation_dtype=int8
  quantization.on_mismatch=error|skip|DTYPE
  quantization.bnb_4bit_use_double_quant=true
  quantization.quantization_config=FILE|JSON (a model card's block)
  checkpoint=PATH|ID (quantized by others)
  components.NAME='{{backend: quanto, dtype: int8}}' (a scheme for each component)
  evaluation.attribute=true (which component costs what)
  evaluation.speed=true (tokens a second, seconds an image)
  evaluation.compile=true (as torch.compile makes it)
  memory.placement=spread memory.devices=2 (over several devices)
  sweep.dry_run=true   sweep.on_invalid=skip   sweep.search.num_trials=12

Results: a table here, everything in MLflow (outputs/mlflow.db; look at it with
mlflow ui), a folder a run in outputs/runs. Recipes are also looked for in
./recipes and in the folders of QUANTLAB_RECIPES. QUANTLAB_TRACEBACK=1 shows
where an error comes from, QUANTLAB_VERBOSE=1 what the libraries print,
QUANTLAB_PLAN_WITH_ALL=1 plans with all packages at once.
From Python: import quantlab; quantlab.run(recipe="digits_backends").
"""
HELP_WIDTH = 80
"""Columns: of a terminal that has fewer, lines go on between two words."""

HELPS = "quantlab --help shows them"
LONG = {"-h": "--help", "--info": "-i", "--shell-completion": "-sc"}
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
        "--columns",
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


def help_text() -> str:
    """The text of ``--help``: its examples stand in lines of their own, to be pasted."""
    width = max(map(len, groups()))
    lines = [f"  {name:<{width}}  {_wrap(' '.join(options), width + 4)}" for name, options in groups().items()]
    lists = _wrap(", ".join(LISTS), 4)
    return fitted(HELP.format(lists=lists, groups="\n".join(lines)), min(terminal(HELP_WIDTH).width, HELP_WIDTH))


def usage(command: str) -> str:
    """What ``--help`` says of a command that is no word of the glossary; "" for what is none."""
    found: list[str] = []
    for line in help_text().partition("\n\n")[2].partition("\nfor example")[0].splitlines():
        if line.startswith("  quantlab "):
            is_its = line.split()[1] == command and command.isalpha()
        elif not line.startswith("   "):
            is_its = False
        found += [line] if is_its else []
    return "\n".join(found)


def _wrap(text: str, indent: int) -> str:
    import textwrap

    return f"\n{' ' * indent}".join(textwrap.wrap(text, HELP_WIDTH - 2 - indent))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; never shows a traceback for an error of ours unless ``QUANTLAB_TRACEBACK=1``.

    Without ``argv`` the process is the command's own, and ends with it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        collect_rarely()
    spell_out(sys.stdout, sys.stderr)
    try:
        code = dispatch(words, is_last=argv is None)
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
        complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        print("quantlab: interrupted; finished jobs are kept", file=sys.stderr)
        code = 130
    except SystemExit as ended:
        if ended.code == 128 + signal.SIGTERM:  # its run has closed itself
            print("quantlab: told to end; finished jobs are kept", file=sys.stderr)
        raise
    sys.exit(code)


def _drop_output() -> None:
    """Let go of an output that takes no more: the interpreter flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


READING = ("compare", "export", "push", "reproduce", "status")
_STORES = {"tracking=none": ["tracking.uri=none"], "tracking=sqlite": []}
"""What a run is told of its store -> the same to those that read it."""


def dispatch(words: list[str], is_last: bool = False) -> int:
    """Run one command; returns the exit code. ``is_last``: nothing comes after it in this process."""
    if words[:1] and words[0] in READING:
        words = [same for word in words for same in _STORES.get(word, [word])]
    if words[:1] == ["compare"] and not {"-h", "--help"} & set(words):
        return show_comparison(words[1:])
    if words[:1] in (["export"], ["push"]) and not {"-h", "--help"} & set(words):
        return show_export(words)
    if words[:1] == ["reproduce"] and not {"-h", "--help"} & set(words):
        return show_reproduction(words[1:])
    if words[:1] == ["status"] and not {"-h", "--help"} & set(words):
        return show_status(words[1:])
    if words[:1] == ["--complete"]:
        print("\n".join(completions(*words[1:3])))
        return 0
    words, folder = _config_dir(_with_columns(_config_words(words)))
    with own_options(folder):
        return _dispatch(words, is_last)


def _dispatch(words: list[str], is_last: bool) -> int:
    flags = {w for w in words if w.startswith("-")}
    rest = [w for w in words if not w.startswith("-")]
    if unknown := [w for w in words if w in flags - KNOWN_FLAGS and not w.startswith("--columns=")]:
        key = unknown[0].lstrip("-").partition("=")[0]
        is_key = key in (*groups(), "recipe")
        near = f"; keys have no dashes: {key}=..." if is_key else nearest(unknown[0], KNOWN_FLAGS)
        raise ConfigError(
            f"{unknown[0]}: {HYDRAS_FLAGS.get(unknown[0].partition('=')[0], f'no such option{near}')}; {HELPS}"
        )
    for flag, text in {"-h": help_text, "--version": version, "--info": info, "--shell-completion": script}.items():
        if {flag, LONG.get(flag, flag)} & flags or (flag == "-h" and words in ([], ["help"])):
            print(text())
            return 0
    if "--json" in flags and ("--cfg" in flags or rest[:1] in (["init"], ["reference"])):
        what = "--cfg job, which prints a recipe" if "--cfg" in flags else rest[0]
        raise ConfigError(f"--json: no such option of {what}; leave it out")
    if rest and rest[0] == "help":
        if len(rest) == 2 and (told := usage(rest[1])) and "--json" not in flags:
            with contextlib.suppress(ConfigError):  # few are words as well
                show_meanings(rest[1:], flags)
            print(told)
            return 0
        return show_meanings(rest[1:], flags)
    if rest and rest[0] == "list":
        return show_list(rest[1:], flags)
    if rest and rest[0] == "init":
        return show_first_recipe(rest[1:])
    if rest and rest[0] == "plan":
        return show_prices(rest[1:], flags, is_last)
    if rest and rest[0] == "reference":
        return export_reference(rest[1:], flags)
    if rest and rest[0] == "run":
        rest = rest[1:]
    is_multirun = bool(flags & {"-m", "--multirun"})
    request = plan(rest, multirun=is_multirun, is_sweep=is_multirun)
    if "--cfg" in flags:
        return show_configs(request)
    if request.dry_run:
        return show_dry_run(request, flags, is_last)
    agree(request, "--trust" in flags)
    return run(request, flags)


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


def _with_columns(words: Sequence[str]) -> list[str]:
    """The words with ``--columns A,B`` as ``--columns=A,B``."""
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--columns" and "=" not in word:  # the next key is no column
            out[-1] = f"--columns={word}"
        else:
            out.append(word)
    if "--columns" in out:
        raise ConfigError("--columns: it needs a value, such as --columns perf/evaluate_s,quality/kld_p99")
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
