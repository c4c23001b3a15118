"""``model.family=seq2seq``: models that read one sequence and write another (T5, BART; Whisper from sound)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.models.checkpoint import load_checkpoint, weights_sha256
from quantlab.models.defaults import beside_the_language_model, default_exclusions, output_head
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.reading import as_model_error, required_path
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig

NEEDS_PATH = ("a model", "google-t5/t5-small")
"""What ``model.path`` leads to, and an example."""
SOUNDS = ("input_features", "input_values")
"""What models that read sound call it: features of it (Whisper), or its samples (Moonshine)."""


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The model at ``config.path`` (a local folder or a Hub id), encoder and decoder, with its tokenizer; for one that
    reads sound also what makes features of it.

    One component, ``model``; its output head is excluded by default. Raises ModelError beginning with
    ``model.path=...`` for whatever cannot be read.
    """
    path = required_path(config, *NEEDS_PATH)
    key = f"model.path={path}"
    import transformers

    kinds = [transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq]
    model, tokenizer = load_checkpoint(kinds, path, config, device)
    if not output_head(model) or not getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{key}: {type(model).__name__} does not read one sequence to write another; choose model=auto"
        )
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    if model.main_input_name in SOUNDS:
        with as_model_error(f"{key} (feature extractor)", "the folder must hold a preprocessor_config.json"):
            where = {"revision": config.revision, "trust_remote_code": False}
            extractors: Any = transformers.AutoFeatureExtractor
            parts["processor"] = extractors.from_pretrained(str(Path(path).expanduser()), **where)
    return LoadedModel(
        name=Path(path).name,
        protocol="seq2seq",
        components={"model": model},
        parts=parts,  # type: ignore[arg-type]
        dtype=dtype_name(model.dtype),
        device=device,
        default_exclusions={
            "model": default_exclusions(model, [*beside_the_language_model(model), *config.default_exclusions])
        },
        weights_sha256=weights_sha256(model, path, config.revision, cache_dir),
    )
