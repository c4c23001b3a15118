"""The same from Python: whole recipes, and what is stored of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, Interrupted
from quantlab.exporting.load import holds_model
from quantlab.exporting.load import load as load_model
from quantlab.planning.job import Plan
from quantlab.planning.plan import plan
from quantlab.report.reading import open_reader
from quantlab.report.results import Results, chosen_rows, kept_beside
from quantlab.running.dry_run import show_jobs
from quantlab.running.rows import row_beside, stored_row
from quantlab.running.sweep import run_plan
from quantlab.vocabulary.called import called_in_words
from quantlab.vocabulary.schema import TrackingConfig

_WORDS = "; words of the command line go into overrides=[{word}]"


@called_in_words(others=_WORDS, own=["recipe"])
def compose(overrides: Sequence[str] | str = (), recipe: str | Path | None = None) -> Plan:
    """The checked jobs of a request: what the command line would run. Imports no torch.

    Args:
        overrides: words of the command line (``["dtype=int4", "device=cpu"]``); a single one may stand alone; several
            values (``"group_size=32,64"``) are a sweep.
        recipe: name of a recipe, or path of a YAML file.

    Raises:
        ConfigError: a bad word or an impossible combination.
    """
    words = _words(overrides)
    if recipe is None or recipe == "":
        return plan(words, multirun=True)
    is_word = isinstance(recipe, str) and _IS_WORD.match(recipe) and not Path(recipe).is_file()
    if is_word or not isinstance(recipe, (str, Path)):
        wrong = [recipe] if isinstance(recipe, str) else recipe
        raise ConfigError(f"recipe={recipe!r}: is no name of a recipe; words go elsewhere: overrides={wrong!r}")
    return plan([f"recipe={recipe}", *words], multirun=True)


_IS_WORD = re.compile(r"[\w.+~]+=")
"""How an override begins."""


def _words(overrides: object) -> list[str]:
    """Each word of a request; ConfigError for what is no list of words, with the list that was meant."""
    if isinstance(overrides, str):
        parts = overrides.split()
        if len(parts) > 1 and all(map(_IS_WORD.match, parts)):
            raise ConfigError(f"overrides={overrides!r}: several words are a list: {parts!r}")
        return [overrides] if overrides else []
    if isinstance(overrides, Mapping):
        meant = [f"{key}={value}" for key, value in overrides.items()]
        raise ConfigError(f"overrides={overrides!r}: a list of words is wanted, as {meant!r}")
    if not isinstance(overrides, Sequence) or not all(isinstance(word, str) for word in overrides):
        example = ["evaluation=quick", "device=cpu"]
        raise ConfigError(f"overrides={overrides!r}: a list of words is wanted, as {example!r}")
    if options := [word for word in overrides if word.startswith("-")]:
        is_sweep = options[0] in ("-m", "--multirun")
        way = "several values of a key are a sweep by themselves" if is_sweep else "leave it out"
        raise ConfigError(f"overrides: {options[0]!r} is an option of the command line; {way}")
    return list(overrides)


@called_in_words(others=_WORDS, own=["recipe"])
def run(
    recipe: str | Path | None = None, overrides: Sequence[str] | str = (), quiet: bool = False, trust: bool = False
) -> Results:
    """Run a request: a report a row (reference and floors first); everything is tracked as from the shell.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        overrides: words of the command line, ``["evaluation=quick", "device=cpu"]``; a single one may stand alone.
        quiet: show no progress.
        trust: agree to the places and addresses that a recipe which does not come with quantlab decides.

    Returns:
        The reports, with ``rows``, ``layers``, ``samples``, ``steps`` and ``images`` as DataFrames and arrays. With
        ``sweep.dry_run=true`` none: what would run is printed.

    Raises:
        QuantlabError: a bad request; in a sweep, a failing job is a row with status ``FAILED`` instead.
        KeyboardInterrupt: stopped by its user; the same call goes on with the jobs that had not finished.
    """
    request, base_dir = compose(overrides, recipe), Path.cwd()  # whoever reads the rows may stand elsewhere by then
    if request.dry_run:
        show_jobs(request, trust)
    try:
        reports = [] if request.dry_run else run_plan(request, quiet=quiet, trust=trust)
    except KeyboardInterrupt:
        raise Interrupted("finished jobs are kept; the same call goes on with the others") from None
    config = request.jobs[0].config
    return Results(reports, lambda: open_reader(config.tracking, base_dir, config.output_dir))


@called_in_words(meant={"tracking": "uri", "tracking_uri": "uri", "sweep": "what", "run": "what", "run_id": "what"})
def load(
    what: str | Path = "latest",
    *,
    uri: str | Path | None = None,
    experiment: str | None = None,
    device: str | None = None,
    config: str | Path | None = None,
    output_dir: str | Path = "outputs",
) -> Any:
    """What earlier runs found out, as :class:`Results`; of a folder or file with a model, that model.

    Args:
        what: ``latest`` (the newest sweep or single run that has a finished job), the id of a sweep or a run, or the
            name of an experiment. Or a folder that ``quantlab export`` wrote, or a checkpoint of Diffusers or
            transformers, or a single GGUF or ``.safetensors`` file: its module or pipeline comes back as that library
            loads it, in eval mode.
        uri: address of the store, by default that of the command line (``outputs/mlflow.db`` here), or the path of
            another database; ``none``: the runs' folders in ``output_dir``, which are also read where the usual store
            was never made.
        experiment: where ``latest`` is looked for, by default that of the command line.
        device: where a loaded model is put; None: where its library leaves it.
        config: of a single file: a folder with the ``config.json`` of its class; None: the file's own folder.
        output_dir: where runs without a store left their folders.

    Raises:
        TrackingError: a store that is not there, or no such run.
        ConfigError, MissingPackage, ModelError: see :func:`quantlab.exporting.load.load`.
    """
    if isinstance(what, Path) or holds_model(what):
        return load_model(what, device, config)
    key, _, value = what.partition("=")
    what = value if key in ("sweep", "experiment") else what  # as quantlab compare takes it
    tracking = TrackingConfig()
    uri = f"sqlite:///{uri}" if isinstance(uri, Path) else uri or tracking.uri
    tracking = replace(tracking, uri=uri, experiment=experiment or tracking.experiment)
    reader = open_reader(tracking, Path.cwd(), str(output_dir))
    chosen = chosen_rows(what, reader, tracking)
    reports = [row_beside(row) for row in kept_beside(reader, chosen)]
    reports += [stored_row(run, report) for run, report in chosen]
    return Results(reports, lambda: reader)
