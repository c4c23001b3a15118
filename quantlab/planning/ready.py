"""What can be known of a request before anything is loaded, from the disk: files and folders that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from quantlab.backends.table import loggers
from quantlab.datasets.table import check_call, check_file
from quantlab.models.foreign import check_checkpoint
from quantlab.models.table import check_components, check_path
from quantlab.planning.components import named_by_users
from quantlab.planning.job import Job
from quantlab.quiet import quiet_libraries


def check_ready(jobs: Sequence[Job], by_files: bool = False) -> None:
    """ConfigError for the first model or data set of these jobs whose path leads nowhere; each is looked at once.

    With ``by_files`` a pipeline's class is not looked at, which would import torch: the job that loads it does that.
    """
    quiet_libraries(loggers())  # a pipeline's class is looked at, which imports its library
    known = set()
    for job in jobs:
        config = job.config
        if config.checkpoint is not None:
            check_checkpoint(config.checkpoint)
        whole, asked = config.model_with(), config.evaluation
        sizes = (asked.num_samples, asked.height, asked.width, asked.num_frames, asked.tiled_decoding)
        where = (str(astuple(whole)), str(astuple(config.dataset)), str(sizes))
        if where not in known:
            known.add(where)
            check_path(config.model)
            check_file(config)
            with named_by_users(config):
                check_components(whole)
                check_call(replace(config, model=whole), by_files)
