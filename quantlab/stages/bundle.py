"""A reference that was made elsewhere: a folder with its outputs, what they are of, and what made them.

``reference.json`` says model, inputs, settings (:func:`quantlab.stages.observe.asked_of`), the machine, and the digest
of ``outputs.safetensors``. Nothing in it is code. It is believed only where all that it is of is what this run asks
for; the device, the libraries and the kernels that made it may be others, which is what it is for, and is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.datasets.table import DATASETS
from quantlab.datasets.text import read_text
from quantlab.errors import ConfigError
from quantlab.models.beforehand import differing, sampled_weights, stored_configs
from quantlab.models.loaded import LoadedModel
from quantlab.models.table import family_of
from quantlab.modules.device import kind_of
from quantlab.modules.kept import Damaged, read_json, read_tree, write_json, write_tree
from quantlab.stages.observe import FORMAT, asked_of, made_by, observed_settings
from quantlab.tracking.provenance import hardware
from quantlab.vocabulary.files import sha256_of
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import EvaluationConfig, ExperimentConfig

SAID, OUTPUTS = "reference.json", "outputs.safetensors"
KEY = "reference.path"
_AGAIN = "copy it again, or make it anew with quantlab reference export DIR ..."
_OF = {
    "model": "another model",
    "inputs": "other inputs",
    "protocol": "another kind of model",
    "dtype": "another dtype",
    "evaluation": "other settings",
    "metrics": "another version of the metrics",
    "format": "another version of quantlab",
}
"""What a reference is of -> what is said where it differs."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A reference that was brought along."""

    folder: Path
    asked: Mapping[str, Any]
    made: Mapping[str, Any]
    digest: str
    """Of the file of outputs."""
    outputs: Mapping[str, Any]

    @property
    def made_on(self) -> str:
        """``NVIDIA H100 80GB HBM3 (cuda), bfloat16, torch 2.11.0``."""
        made, hardware = self.made, self.made["hardware"]
        names = [gpu["name"] for gpu in hardware["gpus"]]
        name = made["arithmetic"].get("name") or (names[0] if made["device"] != "cpu" and names else "")
        machine = f"{name or hardware['machine']} ({made['device']})"
        return f"{machine}, {self.asked['dtype']}, torch {made['libraries'].get('torch')}"

    def key(self, here: str) -> str:
        """What numbers against it are known by; ``here`` is what they would be known by without it."""
        said = canonical_json([here, self.digest, dict(self.asked), dict(self.made)])
        return hashlib.sha256(said.encode()).hexdigest()[:32]


def write_bundle(
    folder: Path, model: LoadedModel, inputs: Any, config: ExperimentConfig, outputs: Mapping[str, Any]
) -> None:
    """Write what :func:`quantlab.stages.observe.observe` gave. Raises ConfigError where the folder cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted(f.name for f in folder.iterdir() if f.name not in (SAID, OUTPUTS)):
            raise ConfigError(f"reference export {folder}: holds other files ({others[0]}); name a new folder")
        (folder / SAID).unlink(missing_ok=True)  # never beside outputs that are not its own
        write_tree(outputs, folder / OUTPUTS)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ConfigError(f"reference export {folder}: cannot be written ({error.strerror}); name a folder") from error
    made = {**made_by(model), "hardware": hardware()}
    said = {
        "asked": asked_of(model, inputs, config.evaluation),
        "before": {
            "tensors": sampled_weights(config.model, model.dtype),
            "configs": stored_configs(config.model),
            "text_sha256": _text_sha256(config),
        },
        "made": made,
        "outputs_sha256": sha256_of(folder / OUTPUTS),
    }
    write_json(said, folder / SAID)


def read_bundle(config: ExperimentConfig) -> Bundle | None:
    """The reference at ``reference.path``, whole and of these settings; None where none is named.

    What can be known of a request by its files is checked here, before weights load; the rest by :func:`check_bundle`.
    Raises ConfigError, beginning with ``reference.path:``.
    """
    found = check_settings(config)
    if found is None:
        return None
    try:
        return replace(found, outputs=read_tree(found.folder / OUTPUTS))
    except Damaged as error:
        raise ConfigError(f"{KEY}: {found.folder / OUTPUTS} is damaged ({error}); {_AGAIN}") from error


def check_settings(config: ExperimentConfig) -> Bundle | None:
    """As :func:`read_bundle`, of which the outputs are not read: their file is the one that was written."""
    if config.reference.path is None:
        return None
    folder = Path(config.reference.path).expanduser()
    for name in (SAID, OUTPUTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{KEY}: {folder} holds no {name}; make it with quantlab reference export DIR ...")
    try:
        said = read_json(folder / SAID)
        asked, made, digest = dict(said["asked"]), dict(said["made"]), str(said["outputs_sha256"])
        found = Bundle(folder=folder, asked=asked, made=made, digest=digest, outputs={})
        said_by = found.made_on
    except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{KEY}: {folder / SAID} is damaged ({error}); {_AGAIN}") from error
    if asked.get("format") != FORMAT:
        raise _other(folder, "format", f"its form is {asked.get('format')}, and here it is {FORMAT}")
    settings = observed_settings(config.evaluation)
    if differing := _first_difference(asked.get("evaluation", {}), settings):
        name, there, here = differing
        raise _other(folder, "evaluation", f"evaluation.{name}={there} there and {here} here, made on {said_by}")
    if config.model.dtype not in ("auto", asked["dtype"]):
        raise _other(folder, "dtype", f"{asked['dtype']} there and {config.model.dtype} here")
    _check_files(found, dict(said.get("before", {})), config)
    if sha256_of(folder / OUTPUTS) != digest:
        raise ConfigError(f"{KEY}: {folder / OUTPUTS} is damaged (it is not the file that was written); {_AGAIN}")
    return found


def _check_files(bundle: Bundle, before: Mapping[str, Any], config: ExperimentConfig) -> None:
    """ConfigError where the files of this request are surely of another model, or of other inputs."""
    there = before.get("tensors") or {}
    here = sampled_weights(config.model, bundle.asked["dtype"]) if there else {}
    said, own = before.get("configs") or {}, stored_configs(config.model)
    for a, b in ((there, here), (said, own)):
        if name := differing(a, b):
            raise _other(bundle.folder, "model", f"{name}: {_short(a[name])} there and {_short(b[name])} here")
    text = _text_sha256(config)
    if text and before.get("text_sha256") and text != before["text_sha256"]:
        raise _other(bundle.folder, "inputs", f"text {before['text_sha256'][:16]} there and {text[:16]} here")
    inputs = _prompts_sha256(config)
    if inputs and inputs != bundle.asked["inputs"]:
        raise _other(bundle.folder, "inputs", f"{_short(bundle.asked['inputs'])} there and {_short(inputs)} here")


def _text_sha256(config: ExperimentConfig) -> str:
    """Digest of a text of which all counts; "" for other inputs."""
    if config.dataset.name != "text" or family_of(config.model).protocol != "language":
        return ""
    return hashlib.sha256(read_text(config.dataset.path).encode("utf-8", "surrogatepass")).hexdigest()


def _prompts_sha256(config: ExperimentConfig) -> str:
    """Digest of the inputs of a pipeline, where these follow from its class and the data set; "" for other models."""
    look, row = family_of(config.model).look, DATASETS[config.dataset.name]
    if look is None or row.read_file is None:
        return ""
    made = look(config.model_with(), config.evaluation)
    if made is None:
        return ""
    empty: Any = object.__new__(made)
    family = family_of(config.model)
    of_its_class = LoadedModel(name="", protocol=family.protocol, components={}, parts={"pipeline": empty})
    found: str = row.load(config.dataset, config.evaluation, of_its_class).sha256
    return found


def check_bundle(bundle: Bundle, model: LoadedModel, inputs: Any, evaluation: EvaluationConfig) -> None:
    """ConfigError, beginning with ``reference.path:``, for one of another model, other inputs or other settings."""
    for part, here in asked_of(model, inputs, evaluation).items():
        there = bundle.asked.get(part)
        if there == here:
            continue
        if part == "dtype":
            raise _other(bundle.folder, part, f"{there} there and {here} here; pass model.dtype={there}")
        detail = "; ".join(f"{n}: {a} there and {b} here" for n, a, b in _differences(there, here)[:2])
        raise _other(bundle.folder, part, detail or f"{there} there and {here} here")


def is_of_here(bundle: Bundle, model: LoadedModel) -> bool:
    """Whether the same kind of device, with the same libraries and kernels, made it."""
    here = made_by(model)
    return canonical_json({k: bundle.made.get(k) for k in here}) == canonical_json(here)


def differs(bundle: Bundle, model: LoadedModel) -> str:
    """What is said of a reference that another machine made."""
    return (
        f"{KEY}: made on {bundle.made_on}; this run is on {kind_of(model.device)}. What the other device and its "
        "libraries alone change is measured as floor_device: this machine's unquantized model against it"
    )


def _other(folder: Path, part: str, detail: str) -> ConfigError:
    return ConfigError(
        f"{KEY}: {folder} is of {_OF[part]} ({detail}); give the same request as where it was exported, or export anew"
    )


def _differences(there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return []
    names = [*here, *(n for n in there if n not in here)]
    return [(n, _short(there.get(n)), _short(here.get(n))) for n in names if there.get(n) != here.get(n)]


def _first_difference(there: Any, here: Any) -> tuple[str, Any, Any] | None:
    return next(iter(_differences(there, here)), None)


def _short(value: Any) -> str:
    return str(value).removeprefix("sha256:")[:40]
