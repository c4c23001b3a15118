"""One file as a model: a GGUF file, or a ``.safetensors`` file in Diffusers' layout or the published one.

A file holds tensors. Of which class they are, says a ``config.json``: that beside the file, or of a named folder. A
GGUF file of a language model holds its own. What would have to be fetched or guessed is refused.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from quantlab.backends.checkpoints import require_method
from quantlab.backends.gguf.header import check_header
from quantlab.backends.gguf.names import ARCHITECTURES, architecture_said
from quantlab.errors import ConfigError, ModelError
from quantlab.modules.source import tensor_names
from quantlab.vocabulary.native import QuantizationMethod

CONFIG = "config.json"
_TO_PICK = "give config=, a folder whose config.json is that of the model (the transformer's folder of its pipeline)"


def load_file(file: Path, config: str | Path | None) -> Any:
    """The model in a file, as ``from_single_file`` of Diffusers or transformers' ``from_pretrained`` load it.

    ``config`` is a folder with the ``config.json`` of its class; None: the file's own folder.

    Raises:
        ConfigError: a kind of file that is not loaded, or one whose configuration is not known.
        ModelError: a GGUF file whose header lies.
    """
    if file.suffix == ".gguf":
        return _gguf(file, config)
    if file.suffix == ".safetensors":
        return _safetensors(file, config)
    raise ConfigError(
        f"path={file}: a {file.suffix or 'file without a suffix'} is not loaded, as pickles run code; give a folder, a "
        ".gguf or a .safetensors file"
    )


def _gguf(file: Path, config: str | Path | None) -> Any:
    require_method(QuantizationMethod.GGUF.value, f"path={file}")
    try:
        check_header(file)
    except (OSError, ValueError, KeyError, OverflowError) as error:
        raise ModelError(f"path={file}: not a readable GGUF file ({error}); copy or download it again") from error
    said = architecture_said(file)
    if said in {architecture.name for architecture in ARCHITECTURES.values()}:
        made: Any = importlib.import_module("transformers").AutoModelForCausalLM
        return made.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    kind, folder = _kind(file, config, f"a GGUF file of {said or 'no architecture'}")
    blocks = importlib.import_module("diffusers").GGUFQuantizationConfig
    torch = importlib.import_module("torch")
    quantization = blocks(compute_dtype=torch.float32)
    return kind.from_single_file(str(file), config=str(folder), quantization_config=quantization, dtype=torch.float32)


def _safetensors(file: Path, config: str | Path | None) -> Any:
    tensor_names(f"path={file}: it", file)
    kind, folder = _kind(file, config, "a .safetensors file")
    return kind.from_single_file(str(file), config=str(folder))


def _kind(file: Path, config: str | Path | None, what: str) -> tuple[Any, Path]:
    """The class of Diffusers that reads the file, and the folder of its configuration."""
    folder = file.parent if config is None else Path(config).expanduser()
    if not (folder / CONFIG).is_file():
        beside = "beside it" if config is None else f"in {folder}"
        raise ConfigError(
            f"path={file}: {what} does not say its configuration, and {beside} is no {CONFIG}; {_TO_PICK}"
        )
    said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = str(said.get("_class_name", "")) if isinstance(said, dict) else ""
    kind = getattr(importlib.import_module("diffusers"), name, None) if name.isidentifier() else None
    if kind is None or not hasattr(kind, "from_single_file"):
        other = f"names {name}, of which Diffusers reads no single file" if name else "is none of Diffusers"
        raise ConfigError(f"path={file}: {folder / CONFIG} {other}; load the folder, or {_TO_PICK}")
    return kind, folder
