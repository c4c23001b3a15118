"""``dataset=prompts``: texts for a pipeline, from ``prompts_v1.txt`` or a file of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantlab.errors import ConfigError
from quantlab.metrics.statistics import MIN_CLUSTERS
from quantlab.models.loaded import LoadedModel
from quantlab.models.pipeline_call import check_conditions
from quantlab.progress import say
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.files import lines_of, read_text
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

SHIPPED = Path(__file__).with_name("prompts_v1.txt")
CALIBRATION = Path(__file__).with_name("calibration_prompts_v1.txt")
"""Other prompts than those of the evaluation."""


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """``evaluation.num_samples`` samples: each prompt once, then each again with other noise (a replica), and so on.

    The samples of one prompt are a cluster, whichever lines it stands in. What a sample draws comes from a CPU
    generator of its own, seeded by prompt set (the file's name), line, replica and ``config.seed``: it depends neither
    on the number of samples nor on batches, and a prompt appended to the file leaves the noise of the others as it was.
    Raises ConfigError for a file that cannot be read or holds no prompt, and for a model that takes no prompts.
    """
    import numpy as np
    import torch

    num = require_samples(evaluation)
    require_pipeline(config, model, ("prompt",))
    prompts = read_prompts(config.path)
    prompt_set = SHIPPED.stem if config.path is None else Path(config.path).stem
    rows = [(i % len(prompts), i // len(prompts)) for i in range(num)]
    return DiffusionInputs(
        noise=torch.tensor([seed_of(prompt_set, prompt, replica, config.seed) for prompt, replica in rows]),
        conditioning={"prompt": [prompts[prompt] for prompt, _ in rows]},
        sample_ids=tuple(f"prompt {prompt} replica {replica}" for prompt, replica in rows),
        clusters=np.array([prompts.index(prompts[prompt]) for prompt, _ in rows]),
    )


def tell_replicas(prompts: Sequence[str], num_samples: int, key: str) -> None:
    """Tell where samples are replicas: the uncertainty is over prompts, however many samples there are of each."""
    tell_fewer(len(set(prompts)), num_samples, key, "prompt")


def tell_fewer(num: int, num_samples: int, key: str, what: str) -> None:
    """Tell that ``num_samples`` samples are of ``num`` prompts or pictures, and what their intervals are of."""
    if num >= num_samples:
        return
    kinds = f"{num} different {what}{'s' * (num > 1)}"
    rests = f"intervals are over the {kinds}" if num >= MIN_CLUSTERS else f"of {kinds} there is no interval"
    say(
        f"{key}: {num_samples} samples of {kinds}: each again with other noise, which is no further {what}; {rests}. "
        f"For more give more {what}s, or set evaluation.num_samples={num}",
        "warning",
    )


def require_samples(evaluation: EvaluationConfig) -> int:
    """``evaluation.num_samples``; ConfigError for none."""
    num = evaluation.num_samples
    if num < 1:
        raise ConfigError(f"evaluation.num_samples={num}: at least one sample is needed; take 64 or more for intervals")
    return num


def require_pipeline(config: DatasetConfig, model: LoadedModel, conditions: Sequence[str]) -> None:
    """ConfigError for a model that is no pipeline, or whose call does not take these conditions."""
    if model.protocol != "diffusion" or "pipeline" not in model.parts:
        raise ConfigError(
            f"dataset={config.name}: it is for pipelines of Diffusers, and {model.name} is none; "
            "choose a model of family diffusers, or another dataset"
        )
    check_conditions(type(model.parts["pipeline"]), config.name, conditions, model.parts.get("call", {}))


MAX_PROMPT_CHARS = 10_000
"""More than any text encoder reads."""


def load_calibration(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """As :func:`load`, of other prompts where the user names none."""
    return load(replace(config, path=config.path or str(CALIBRATION)), evaluation, model)


def own_files() -> list[Path]:
    """The shipped texts."""
    return [SHIPPED]


def read_prompts(path: str | None = None) -> list[str]:
    """The non-empty lines of a UTF-8 file (default: the shipped one). ConfigError ``dataset.path=...`` without any."""
    file = SHIPPED if path is None else Path(path).expanduser()
    key = f"dataset.path={path}"
    way_out = "give a text file, one prompt a line, or leave dataset.path out for the shipped prompts"
    prompts = [line.strip() for _, line in lines_of(read_text(file, key, way_out))]
    if too_long := [i for i, prompt in enumerate(prompts, 1) if len(prompt) > MAX_PROMPT_CHARS]:
        raise ConfigError(
            f"{key}: prompt {too_long[0]} has {len(prompts[too_long[0] - 1])} characters and at most "
            f"{MAX_PROMPT_CHARS} are taken; {way_out}"
        )
    if not prompts:
        raise ConfigError(
            f"{key}: the file holds no prompt; write one prompt a line, "
            "or leave dataset.path out for the shipped prompts"
        )
    return prompts


def seed_of(prompt_set: str, prompt: int, replica: int, seed: int) -> int:
    """Seed of one sample's noise: the first 32 bits of a digest, so that neighbours are not related."""
    return int(hashlib.sha256(f"{prompt_set}:{prompt}:{replica}:{seed}".encode()).hexdigest()[:8], 16)
