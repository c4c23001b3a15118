"""``quantlab reference export DIR key=value ...``: the reference of a request, for runs on other machines."""

from __future__ import annotations

from pathlib import Path

from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.models.table import family_of
from quantlab.planning.job import Plan
from quantlab.planning.ready import check_ready
from quantlab.protocols.table import PROTOCOLS
from quantlab.running.sweep import open_session, told_apart
from quantlab.running.workbench import in_stage, step_progress
from quantlab.stages.bundle import write_bundle
from quantlab.stages.observe import observe
from quantlab.vocabulary.fields import checked_path

USAGE = "quantlab reference export DIR key=value ..."


def export_reference(plan: Plan, folder: str, quiet: bool = False) -> Path:
    """Observe the unquantized model of a request and write the reference to ``folder``; the scheme is not looked at.

    Raises ConfigError for a request of several models, and what loading and observing raise.
    """
    target, config = checked_path("reference export", folder), plan.jobs[0].config
    if config.reference.path is not None:
        raise ConfigError("reference.path: names a reference, and this makes one; leave it out")
    check_ready(plan.jobs[:1])
    with open_session(config, quiet) as session, told_apart("reference"):
        cache = session.output_dir / "cache"
        with in_stage(session, None, "load"):
            model = family_of(config.model).load(config.model, session.device, cache, session.advance)
        inputs = DATASETS[config.dataset.name].load(config.dataset, config.evaluation, model)
        with in_stage(session, None, "observe"):
            PROTOCOLS[model.protocol].check(model, inputs)
            progress = step_progress(session, "observe reference")
            outputs = observe(model, inputs, config.evaluation, cache, progress)
        write_bundle(target, model, inputs, config, outputs)
    return target
