"""The files that a loaded component came from, as a source that its candidates are streamed from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.models.architectures import Part
from quantlab.models.outline import empty
from quantlab.models.reading import as_model_error
from quantlab.modules.source import Source, shards_of

if TYPE_CHECKING:
    from torch import nn

KEY = "memory.placement=streamed"


def component_source(name: str, component: nn.Module, dtype: str, device: str, variant: str | None = None) -> Source:
    """Where the tensors of a component lie that Diffusers or transformers loaded.

    Raises ConfigError for one that was made otherwise, ModelError where its files cannot be read.
    """
    config: Any = getattr(component, "config", None)
    is_mapping = isinstance(config, Mapping)
    origin = config.get("_name_or_path") if is_mapping else getattr(config, "_name_or_path", None)
    if not origin:
        raise ConfigError(
            f"{KEY}: {name} ({type(component).__name__}) was not read from files of its own; pass "
            "memory.placement=resident"
        )
    folder = Path(origin)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with as_model_error(f"{KEY}: {name}", "pass memory.placement=resident"):
            folder = Path(snapshot_download(str(origin), local_files_only=True))
    key = f"{KEY}: {folder.name}"
    said = dict(config) if is_mapping else config.to_dict()
    part = Part(class_name=type(component).__name__, config=said)
    return Source(module=empty(key, part, dtype), shards=shards_of(key, folder, variant), device=device)
