"""``model=auto``: which family a checkpoint is of, from its own configuration. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, ModelError, first_line
from quantlab.models.reading import no_checkpoint
from quantlab.vocabulary.fields import checked_path
from quantlab.vocabulary.files import read_json

AUTO = "auto"
_OFFLINE = "check the name and the network; without a network name a local folder"
HEADS = ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering")
"""What stands behind ``For`` in the class of an encoder with a head."""
_TEXT_ENCODERS = ("EncoderModel", "TextModel", "TextModelWithProjection")
_VISION = (
    *("VisionModel", "VisionModelWithProjection", "ForImageClassification", "ForMaskedImageModeling"),
    *("ForSemanticSegmentation", "ForUniversalSegmentation", "ForImageSegmentation", "ForInstanceSegmentation"),
    *("ForObjectDetection", "ForDepthEstimation"),
)
_WRITES = ("ForConditionalGeneration", "LMHeadModel", "ForCausalLM")


def family_of_checkpoint(path: str | None, revision: str | None = None) -> str:
    """``diffusers``, ``causal_lm``, ``encoder``, ``seq2seq`` or ``vision``.

    Raises ModelError, beginning with ``model.path=...``, for what is no checkpoint or cannot be had, and for an
    architecture of another kind; ConfigError for a damaged configuration.
    """
    key = f"model.path={path}"
    if not path:
        raise ModelError(f"{key.replace('None', 'null')}: model=auto looks at a checkpoint; give model.path=FOLDER")
    if _read(path, "model_index.json", revision) is not None:
        return "diffusers"
    config = _read(path, "config.json", revision)
    if config is None:
        raise no_checkpoint(key, path)
    name = (config.get("architectures") or [""])[0]
    found = _family(name, config)
    if not found:
        raise ModelError(
            f"{key}: model=auto knows no family for {name or config.get('model_type', 'an unnamed class')}; choose "
            "model=causal_lm, encoder, seq2seq, vision or diffusers, or give the module to quantlab.evaluate in Python"
        )
    return found


def another_family(architecture: str, config: Mapping[str, Any], family: str) -> str:
    """What to do with a checkpoint that ``family`` does not measure whole: the family that does, or what is left."""
    found = _family(architecture, config)
    if found and found != family:
        return f"model.family={found} loads all of it"
    return "no other family does; give the module and its inputs to quantlab.evaluate in Python"


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
    """The JSON file of a local folder or of a Hub id; None where the folder or the repository has no such file.

    Raises ConfigError for a file that is damaged, ModelError for a Hub that cannot be asked.
    """
    key, folder = f"model.path={path}", checked_path("model.path", path)
    file = folder / name
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(path, name, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub was not asked
                raise ModelError(f"{key}: {name} is not here and the Hub cannot be reached; {_OFFLINE}") from error
            return None
        except (OSError, ValueError) as error:
            raise ModelError(f"{key}: {name} cannot be had from the Hub ({first_line(error)}); {_OFFLINE}") from error
    if not file.exists():
        return None
    data = read_json(file, f"{key}: {name}", "copy or download it again")
    if not isinstance(data, dict):
        raise ConfigError(f"{key}: {name}: a mapping is wanted, not {type(data).__name__}; copy or download it again")
    return data
