"""``dataset=text dataset.path=FILE``: a text file of the user's own, UTF-8.

A language model is evaluated on the file as one text (all of it: a perplexity preset must see what other programs see,
so calibrate on another file); an encoder on its non-empty lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.encoder import EncoderInputs, encoder_inputs
from quantlab.protocols.language import TextInputs, text_inputs
from quantlab.vocabulary import files
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> TextInputs | EncoderInputs:
    """Evaluation inputs from the file. ConfigError beginning with ``dataset.path=...`` for a file that is missing, not
    UTF-8, empty or too short, and for models that do not take text."""
    key = f"dataset.path={config.path}"
    require_text_model(key, model)
    text = read_text(config.path)
    lines = [line.strip() for _, line in files.lines_of(text)]
    return inputs_of(text, lines, evaluation, model, key)


def require_text_model(key: str, model: LoadedModel) -> None:
    """ConfigError for a model that does not take text."""
    if model.protocol not in ("language", "encoder"):
        raise ConfigError(
            f"{key}: text is for language models and text encoders; {model.name} is run by the protocol "
            f"{model.protocol}: choose another dataset"
        )


def inputs_of(
    whole: str, parts: Sequence[str], evaluation: EvaluationConfig, model: LoadedModel, key: str
) -> TextInputs | EncoderInputs:
    """Windows of the whole text for a language model, the parts one by one for an encoder; ``key`` begins errors."""
    if model.protocol == "encoder":
        return encoder_inputs(parts, evaluation, model, key)
    return text_inputs(whole, evaluation, model, key)


def read_text(path: str | None) -> str:
    """The file's text. ConfigError beginning with ``dataset.path=...`` where it is missing, not UTF-8, or empty."""
    key = f"dataset.path={path}"
    if not path:
        raise ConfigError("dataset.path=null: dataset=text needs a file; give dataset.path=FILE (UTF-8 text)")
    text = files.read_text(path, key, "give the path of a text file (UTF-8)", files.MAX_TEXT_BYTES)
    if not text.strip():
        raise ConfigError(f"{key}: the file is empty; give a file with text")
    return text
