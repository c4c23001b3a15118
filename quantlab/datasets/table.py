"""The data sets: name -> ``load(config, evaluation, model)``, the evaluation inputs of the model's protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantlab.datasets import digits_classes, prompts, text, wiki_extracts

DATASETS: dict[str, Callable[..., Any]] = {
    "digits_classes": digits_classes.load,
    "prompts": prompts.load,
    "wiki_extracts": wiki_extracts.load,
    "text": text.load,
}
