"""What calibration may look at: the ``calibration`` node as inputs of the model's protocol, apart from evaluation's.

The data sets are those of the evaluation with other content: other noise, other prompts, other documents. That is
checked on the inputs themselves: the two may share no noise, no text, window or prompt as a whole, and of the tokens of
either at most 1 % may lie in runs of 32 that the other has too (see :mod:`quantlab.datasets.overlap`). What they share
below that is told, and recorded with the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.datasets import pairs
from quantlab.datasets.overlap import normalised, overlap
from quantlab.datasets.table import CALIBRATION_SETS, DATASETS, check_reads_file
from quantlab.errors import ConfigError, QuantlabError, nearest
from quantlab.models.loaded import LoadedModel
from quantlab.models.seq2seq import SOUNDS
from quantlab.models.table import family_of
from quantlab.progress import say
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.seq2seq import PairInputs
from quantlab.protocols.table import Inputs
from quantlab.protocols.vision import VisionInputs
from quantlab.vocabulary.schema import CalibrationConfig, DatasetConfig, EvaluationConfig, ExperimentConfig

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARED = 0.01
"""Share of the tokens of calibration, or of the evaluation, that may lie in runs which both have. Half of a 256-token
window of 32 is more; a licence or a header that two documents have is less."""


def sampling_settings(config: CalibrationConfig, evaluation: EvaluationConfig) -> EvaluationConfig:
    """How the model is run on the calibration set; what the node leaves open is as in the evaluation.

    In batches as even as they can be, in no more calls: algorithms that average over calls (AWQ's in ModelOpt) would
    give the samples of a short last batch the weight of a whole one.
    """
    steps, guidance = config.num_inference_steps, config.guidance_scale
    return replace(
        evaluation,
        num_samples=config.num_samples,
        batch_size=_even(config.num_samples, config.batch_size),
        num_inference_steps=evaluation.num_inference_steps if steps is None else steps,
        guidance_scale=evaluation.guidance_scale if guidance is None else guidance,
        context_length=config.context_length,
        perplexity_protocol="ppl/v2",
        num_teacher_forced=0,
    )


def _even(num_samples: int, at_most: int) -> int:
    num_calls = -(-num_samples // at_most)
    return -(-num_samples // num_calls)


def calibration_inputs(
    config: CalibrationConfig, evaluation: EvaluationConfig, model: LoadedModel, seen: Inputs
) -> Inputs:
    """Inputs of the model's protocol; ``seen`` are the evaluation's.

    Raises ConfigError, beginning with the key of ``calibration``, for data that cannot be read or is too short for
    ``calibration.num_samples``, and where it holds what the evaluation sees. A little that both hold is told.
    """
    try:
        dataset = DatasetConfig(name=config.source, path=config.path, seed=config.seed)
        inputs = CALIBRATION_SETS[config.source](dataset, sampling_settings(config, evaluation), model)
    except QuantlabError as error:
        raise type(error)(in_words_of_calibration(str(error))) from error
    theirs = _contents(seen)
    for what, mine in _contents(inputs).items():
        if shared := mine & theirs[what]:
            raise ConfigError(
                f"calibration.source={config.source}: it shares {what} with the evaluation ({len(shared)} of "
                f"{len(mine)}), so the numbers would flatter; choose another calibration.seed, calibration.path or "
                "source"
            )
    found = overlap(inputs, seen)
    if not found.of_calibration:
        return inputs
    told = (
        f"calibration.source={config.source}: {found.of_calibration:.2%} of its tokens and {found.of_evaluation:.2%} "
        f"of the evaluation's lie in runs of {found.run_tokens} tokens that both have"
    )
    if found.num_whole or max(found.of_calibration, found.of_evaluation) > MAX_SHARED:
        raise ConfigError(
            f"{told} (at most {MAX_SHARED:.0%}, and nothing as a whole), so the numbers would flatter; take the shared "
            "text out, or choose another calibration.path, calibration.source or dataset"
        )
    say(told, "warning")
    return inputs


def check_calibration(config: ExperimentConfig) -> None:
    """ConfigError for what can be known of the calibration set before anything is loaded."""
    asked = config.calibration
    if asked.source not in CALIBRATION_SETS:
        raise ConfigError(
            f"calibration.source={asked.source}: there are {', '.join(CALIBRATION_SETS)}"
            f"{nearest(asked.source, CALIBRATION_SETS)}"
        )
    _check_fits(config)
    _check_source(asked)
    _check_reads(asked, config.dataset)
    if asked.source != config.dataset.name:
        return
    if DATASETS[asked.source].seed_is_content and asked.seed == config.dataset.seed:
        raise ConfigError(
            f"calibration.seed={asked.seed}: this is the noise of the evaluation (dataset.seed); choose another number"
        )
    if asked.path is not None and config.dataset.path is not None and _same(asked.path, config.dataset.path):
        raise ConfigError(f"calibration.path={asked.path}: this is the data of the evaluation; give another file")


def _check_fits(config: ExperimentConfig) -> None:
    """ConfigError where the source has nothing for the model, or no file of the user's that it would read."""
    asked, family = config.calibration, family_of(config.model)
    if family.protocol not in DATASETS[asked.source].protocols:
        fitting = [name for name in CALIBRATION_SETS if family.protocol in DATASETS[name].protocols]
        raise ConfigError(
            f"calibration.source={asked.source}: it has no inputs for model.family={family.name}, whose models are run "
            f"by the protocol {family.protocol}; choose one of {', '.join(fitting)}"
        )
    check_reads_file("calibration", asked.source, asked.path, family.protocol)


def _check_source(asked: CalibrationConfig) -> None:
    """ConfigError where the source reads a file of the user's and cannot, or cannot have so many samples."""
    row = DATASETS[asked.source]
    try:
        if row.check_samples:
            row.check_samples(asked.num_samples)
        found = row.read_file(asked.path) if row.read_file else None
        if row.check_rows:
            row.check_rows(found, asked.num_samples, f"dataset.path={asked.path}")
    except ConfigError as error:
        raise ConfigError(in_words_of_calibration(str(error))) from error


def _check_reads(asked: CalibrationConfig, dataset: DatasetConfig) -> None:
    """ConfigError where the evaluation's pairs are of sound and calibration's data of text, or the other way round."""
    if dataset.name != "pairs":
        return
    theirs = min(pairs.read(dataset.path)[0])
    mine = min(pairs.read(asked.path)[0]) if asked.source == "pairs" else "source"
    if mine != theirs:
        key = f"calibration.path={asked.path}" if asked.source == "pairs" else f"calibration.source={asked.source}"
        say_of = {"audio": "sound", "source": "text"}
        raise ConfigError(
            f"{key}: it has {say_of[mine]}, and the pairs of the evaluation have {say_of[theirs]}; give "
            f"calibration.source=pairs calibration.path= with lines as those of dataset.path"
        )


def _same(path: str, other: str) -> bool:
    return Path(path).expanduser().resolve() == Path(other).expanduser().resolve()


def in_words_of_calibration(message: str) -> str:
    """A data set's message with the keys as the user of ``calibration`` typed them."""
    for theirs, ours in (
        ("evaluation.", "calibration."),
        ("dataset.path", "calibration.path"),
        ("dataset=", "calibration.source="),
        ("dataset.", "calibration."),
    ):
        message = message.replace(theirs, ours)
    return message


def _contents(inputs: Inputs) -> dict[str, set[bytes] | set[str]]:
    """What may not be shared at all, by its name: initial noise, prompts and pictures, or the text as a whole."""
    if isinstance(inputs, DiffusionInputs):
        return {
            "noise": _rows(inputs.noise),
            "prompts": {normalised(p) for p in inputs.conditioning.get("prompt", [])},
            "pictures": {p.contiguous().numpy().tobytes() for p in inputs.conditioning.get("image", [])},
        }
    if isinstance(inputs, VisionInputs):
        return {"pictures": _rows(inputs.pixel_values)}
    if isinstance(inputs, PairInputs) and (named := set(SOUNDS) & set(inputs.source)):
        sounds, masks = inputs.source[named.pop()], inputs.source.get("attention_mask")
        heard = sounds if masks is None else [row[mask.bool()] for row, mask in zip(sounds, masks, strict=True)]
        return {"sounds": _rows(heard)}
    return {"text": {inputs.protocol["text_sha256"]}}


def _rows(tensors: Iterable[Tensor]) -> set[bytes]:
    return {row.contiguous().numpy().tobytes() for row in tensors}
