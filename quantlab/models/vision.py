"""``model.family=vision``: models that read images (ViT, DINOv2, the image half of CLIP), from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError
from quantlab.models.auto import HEADS, another_family
from quantlab.models.checkpoint import load_model, read_config, saved_from, weights_sha256
from quantlab.models.defaults import default_exclusions
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.reading import as_model_error, local_folder, required_path
from quantlab.progress import say
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NEEDS_PATH = ("a model", "facebook/dinov2-small")
"""What ``model.path`` leads to, and an example."""


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The model at ``config.path`` with its image processor, as one component, ``model``.

    Of a model of images and texts (CLIP) the half that reads images, which is told. Raises ModelError beginning with
    ``model.path=...`` for whatever cannot be read.
    """
    path = required_path(config, *NEEDS_PATH)
    key = f"model.path={path}"
    local = local_folder(key, path, "config.json", "a transformers model", "save_pretrained")
    stored = read_config(str(local or path), config, key)
    kind, is_half = _class_of(stored)
    model = load_model([kind], path, config, device, key, is_base=True, is_half=is_half)
    if is_half:
        say(f"{key}: the half that reads images, {type(model).__name__}, is measured", "warning")
    if model.main_input_name != "pixel_values":
        raise ModelError(
            f"{key}: {type(model).__name__} takes {model.main_input_name} and no images; "
            + another_family(saved_from(stored), stored.to_dict(), config.family)
        )
    import transformers

    processors: Any = transformers.AutoImageProcessor
    with as_model_error(f"{key} (image processor)", "the folder must hold a preprocessor_config.json"):
        processor = processors.from_pretrained(str(local or path), revision=config.revision, trust_remote_code=False)
    return LoadedModel(
        name=Path(path).name,
        protocol="vision",
        components={"model": model},
        parts={"processor": processor},
        dtype=dtype_name(model.dtype),
        device=device,
        default_exclusions={"model": default_exclusions(model, config.default_exclusions)},
        weights_sha256=weights_sha256(model, path, config.revision, cache_dir),
    )


def _class_of(stored: PreTrainedConfig) -> tuple[Any, bool]:
    """The class to build, and whether it is half of the checkpoint."""
    import transformers

    name = (getattr(stored, "architectures", None) or [""])[0]
    half = name.removesuffix("Model") + "VisionModel"
    if hasattr(stored, "vision_config") and hasattr(transformers, half):
        return getattr(transformers, half), True
    task = name.rpartition("For")[2] if "For" in name else ""
    if name.endswith(("VisionModel", "VisionModelWithProjection")) or (task and task not in HEADS):
        return getattr(transformers, name, transformers.AutoModel), False
    return transformers.AutoModel, False
