"""One run as it was planned: its typed config, its native config, its name. A plan is several of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import Backend
from quantlab.planning.components import DEFAULT, NO_SCHEME, names_of
from quantlab.planning.recipe import replay_yaml
from quantlab.planning.words import COMPONENTS
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.files import ends_of_paths, leads_to_a_file
from quantlab.vocabulary.native import to_json_data
from quantlab.vocabulary.numbers import FLOOR_ATTENTION, FLOOR_BATCH, FLOOR_BF16, FLOOR_FP32, REFERENCE
from quantlab.vocabulary.schema import EvaluationConfig, ExperimentConfig, ExportConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: its typed config, its schemes (none: the reference, or a cast of it), and how to ask for it again.

    Everything about the schemes is decided here: whoever has a job asks neither ``conf/`` nor the tables again.
    """

    name: str
    config: ExperimentConfig
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    """Component -> its scheme; :data:`DEFAULT`: that of the components which ``model.components`` names, or the family
    quantizes by default."""
    overrides: tuple[str, ...] = ()
    batch_size: int | None = None
    """Another batch size than the reference's: that of the ``floor_batch`` row, and 1 where a scheme makes samples
    depend on what else is in their batch."""
    plain_attention: bool = False
    """Attention by plain matrix products instead of a fused kernel (the ``floor_attention`` row)."""

    pasted_files: Mapping[str, str] = field(default_factory=dict)
    """Key of a ``quantization_config`` -> the file that it was read from."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Option chosen of each config group."""
    point: Mapping[str, str] = field(default_factory=dict)
    """Its place in the grid: swept key -> value as typed."""

    @property
    def evaluation(self) -> EvaluationConfig:
        """The settings by which it is measured: a floor's may be of another batch size."""
        settings = self.config.evaluation
        return settings if self.batch_size is None else replace(settings, batch_size=self.batch_size)

    @property
    def axes(self) -> QuantizationAxes:
        """The axes of the request as a whole, spelled out; without such a scheme those of the reference."""
        return self.schemes[DEFAULT].axes if DEFAULT in self.schemes else self.config.quantization

    def components(self, default: Sequence[str]) -> dict[str, Scheme | None]:
        """Component -> its scheme, None for one that stays as it is (or is cast), of all that the job is about.

        ``default`` are those that the family quantizes, where ``model.components`` names none.
        """
        return {name: self.scheme_of(name) for name in names_of(self.config, default)}

    def scheme_of(self, component: str) -> Scheme | None:
        """The scheme of a component that the job is about: its own, or the whole request's."""
        return self.schemes.get(component if component in self.config.components else DEFAULT)

    def key_of(self, component: str) -> str:
        """How messages about the component's scheme begin; "" where it is the whole request's."""
        return f"{COMPONENTS}.{component}" if component in self.schemes else ""

    @property
    def needs_data(self) -> bool:
        """Whether a scheme is calibrated."""
        return any(scheme.native.needs_data for scheme in self.schemes.values())

    @property
    def comes_along(self) -> bool:
        """Whether it is the unquantized model as it is, of which every sweep with floors has a row."""
        config = self.config
        is_bare = not self.schemes and config.quantization.dtype == "auto" and not config.checkpoint
        return is_bare and config.sweep.floors

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The libraries of its schemes, each once."""
        return tuple({scheme.backend.name: scheme.backend for scheme in self.schemes.values()}.values())

    @property
    def recipe_yaml(self) -> str:
        """The job as a recipe that anyone can run again, wherever they are."""
        return replay_yaml(self.resolved, self.choices)

    @property
    def whole_yaml(self) -> str:
        """The job as a recipe that says also where things go and lie on this machine."""
        return replay_yaml(self.resolved, self.choices, whole=True)

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        """The whole resolved config as plain data."""
        data: dict[str, Any] = to_json_data(asdict(self.config))
        return data


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Points of a grid that are one scheme in other words: it is run once."""

    name: str
    """Of the job that is run."""
    spellings: tuple[str, ...]
    """What they differ in, as typed; first that of the job that is run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The checked jobs of a request. ``invalid`` pairs a combination with the reason why it cannot run."""

    jobs: tuple[Job, ...]
    typed: tuple[str, ...] = ()
    """The words behind ``quantlab``."""
    is_sweep: bool
    recipe: Path | None = None
    recipe_digest: str = ""
    asked_for: Mapping[str, str] = field(default_factory=dict)
    """What a recipe that does not come with quantlab decides and the user must agree to: key -> value."""
    invalid: tuple[tuple[str, str], ...] = ()
    merged: tuple[Merged, ...] = ()
    export: ExportConfig = field(default_factory=ExportConfig)
    """What is exported at the end."""
    dry_run: bool = False

    @property
    def name(self) -> str:
        """Of its run, where it is a sweep."""
        return self.recipe.stem if self.recipe else "sweep"

    @property
    def typed_recipe(self) -> str:
        """The word by which the user named it."""
        return next((word for word in self.typed if word.startswith("recipe=")), "recipe=")


def scheme_name(axes: QuantizationAxes, scheme: Scheme | None = None, settings: Mapping[str, Any] | None = None) -> str:
    """A short name of what is asked for: ``torchao int4 g64``, ``bitsandbytes nf4 bnb_4bit_use_double_quant``.

    ``axes`` are those of the request without a scheme (the reference), ``settings`` the backend's own keys.
    """
    if scheme is None:
        return REFERENCE if axes.dtype == "auto" else f"none {axes.dtype}"
    axes, row = scheme.axes, scheme.row
    words = [axes.backend, axes.dtype]
    if axes.group_size != "auto":
        words.append(f"g{axes.group_size}" if isinstance(axes.group_size, int) else "per-row")
    if axes.activation_dtype != row.activation_dtypes[0]:
        words.append(f"a-{axes.activation_dtype} {scheme.native.activation_granularity}")
    if axes.algorithm != row.algorithms[0]:
        words.append(axes.algorithm)
    if axes.compute_dtype != "auto":
        words.append(axes.compute_dtype)
    if axes.on_mismatch not in ("error", "skip"):  # what was skipped is the coverage
        words.append(axes.on_mismatch)
    words += [f"+{kind}" for kind in axes.layer_kinds if kind != "linear"]
    if "linear" not in axes.layer_kinds:
        words.append("-linear")
    for name, own in scheme.backend.settings.items():
        value = (settings or {}).get(name, own.default)
        if value != own.default and name != "activation_scales":  # the activations' words have it
            words.append(_setting_words(name, value))
    return " ".join(words)


def joined_name(default: str, own: Mapping[str, str]) -> str:
    """The name of a job with schemes of single components (name -> that of its scheme) beside the whole request's, if
    any: ``transformer: bitsandbytes nf4 + text_encoder_2: quanto int8``."""
    parts = [*([default] if default else []), *(f"{name}: {said}" for name, said in own.items())]
    return " + ".join(parts) or REFERENCE


def checkpoint_name(checkpoint: str) -> str:
    """A short name of a checkpoint: a file's or folder's own, with its parent's where that says only which part it is;
    a Hub id whole."""
    parts = [part for part in checkpoint.rstrip("/").split("/") if part not in ("", ".", "..", "~")]
    is_id = not checkpoint.startswith(("/", ".", "~")) and not Path(checkpoint).exists() and len(parts) < 4
    if is_id or not parts:
        return checkpoint
    return "/".join(
        parts[-2:] if re.fullmatch(r"(transformer|unet|text_encoder|model|prior)(_\d+)?", parts[-1]) else parts[-1:]
    )


def _setting_words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return name if value is True else f"{name}={ends_of_paths([value])[value] if leads_to_a_file(name) else value}"


def floor_jobs(config: ExperimentConfig, dtype: str, names: Sequence[str]) -> list[Job]:
    """The rows that every comparison needs: the reference through the candidates' path, and its noise floors.

    A floor is another execution of the same weights that nobody would call wrong. One of ``dtype`` float32 is cast to
    bfloat16; one of 16 bits, whose cast would be itself, is computed by another attention kernel and in float32.
    ``names`` are the components that the jobs quantize.
    """
    own = {name: dict(NO_SCHEME) for name in names} if config.components else {}
    bare = replace(config, quantization=QuantizationAxes(), components=own, name="", checkpoint=None)
    batch = Job(name=FLOOR_BATCH, config=bare, batch_size=config.evaluation.floor_batch_size)
    reference = Job(name=REFERENCE, config=bare)
    if dtype == "float32":
        return [reference, Job(name=FLOOR_BF16, config=_cast(bare, "bfloat16")), batch]
    attention = Job(name=FLOOR_ATTENTION, config=bare, plain_attention=True)
    return [reference, batch, attention, Job(name=FLOOR_FP32, config=_cast(bare, "float32"))]


def _cast(config: ExperimentConfig, dtype: str) -> ExperimentConfig:
    return replace(config, quantization=QuantizationAxes(dtype=dtype))
