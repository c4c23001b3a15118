"""``model=auto``: which family a checkpoint is of, from its own configuration. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError

AUTO = "auto"
HEADS = ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering")
"""What stands behind ``For`` in the class of an encoder with a head."""
_TEXT_ENCODERS = ("EncoderModel", "TextModel", "TextModelWithProjection")
_VISION = ("VisionModel", "VisionModelWithProjection", "ForImageClassification", "ForMaskedImageModeling")
_WRITES = ("ForConditionalGeneration", "LMHeadModel", "ForCausalLM")


def family_of_checkpoint(path: str | None, revision: str | None = None) -> str:
    """``diffusers``, ``causal_lm``, ``encoder``, ``seq2seq`` or ``vision``.

    Raises ModelError, beginning with ``model.path=...``, for what cannot be read, and for an architecture of another
    kind.
    """
    key = f"model.path={path}"
    if not path:
        raise ModelError(f"{key.replace('None', 'null')}: model=auto looks at a checkpoint; give model.path=FOLDER")
    if _read(path, "model_index.json", revision) is not None:
        return "diffusers"
    config = _read(path, "config.json", revision)
    if config is None:
        raise ModelError(
            f"{key}: neither a config.json nor a model_index.json is there; name a folder that save_pretrained wrote, "
            "or a Hub id that can be reached"
        )
    name = (config.get("architectures") or [""])[0]
    found = _family(name, config)
    if not found:
        raise ModelError(
            f"{key}: model=auto knows no family for {name or config.get('model_type', 'an unnamed class')}; choose "
            "model=causal_lm, encoder, seq2seq, vision or diffusers, or give the module to quantlab.evaluate in Python"
        )
    return found


def _family(name: str, config: Mapping[str, Any]) -> str:
    if name.endswith(_TEXT_ENCODERS):
        return "encoder"
    if name.endswith(_VISION) or (name.endswith("Model") and _sees(config)):
        return "vision"
    if config.get("is_encoder_decoder") and name.endswith(("ForConditionalGeneration", "Model", "MTModel")):
        return "seq2seq"
    if name.endswith(_WRITES):
        return "causal_lm"
    if name.endswith("Model") or name.rpartition("For")[2] in HEADS:
        return "encoder"
    return ""


def _sees(config: Mapping[str, Any]) -> bool:
    return any(word in config for word in ("image_size", "patch_size", "vision_config"))


def _read(path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """The JSON file of a local folder or of a Hub id; None where it is not there."""
    folder = Path(path).expanduser()
    file = folder / name
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, name, revision=revision))
        except Exception:  # noqa: BLE001  whatever the Hub's client raises: it is not there
            return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
