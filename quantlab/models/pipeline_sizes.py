"""Which heights, widths and numbers of frames a pipeline makes as they were asked for, known without its weights.

What a pipeline says of itself is looked at (the factors of its decoder, the patches of its denoiser), its decoder's
frames are counted on tensors without values, and its own check of its inputs is asked. None of it knows a class.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, ModelError, first_line
from quantlab.models.architectures import CONFIG, Architecture, Part, class_of
from quantlab.models.loaded import Pipeline
from quantlab.models.outline import build
from quantlab.models.pipeline_files import DENOISER, listed_parts
from quantlab.models.wanting import wanting
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

_DECODER = re.compile(r"vae|vqgan|movq|vqvae")
_FACTOR = re.compile(r"vae_\w*(scale_factor|compression_ratio)\w*")
_GOOD = {"height": 1024, "width": 1024, "num_frames": 49}
"""Sizes that no pipeline refuses: multiples of each power of two in use, a frame and whole groups of 4, 6 and 8."""


def frames_argument(known: Collection[str]) -> str:
    """What the argument is called that says how many frames a video has."""
    return next((name for name in ("num_frames", "frames", "video_length") if name in known), "num_frames")


def asked_sizes(pipeline: type, evaluation: EvaluationConfig, call: Mapping[str, object]) -> dict[str, tuple[str, int]]:
    """Argument of a pipeline's call -> the key that the user set it by, and the size."""
    made: Any = pipeline
    known = inspect.signature(made.__call__).parameters
    found = {}
    for name in ("height", "width", "num_frames"):
        if name in call and isinstance(call[name], int):
            found[name] = (f"model.call.{name}", int(str(call[name])))
        elif (size := getattr(evaluation, name)) is not None and (
            name in known or (name == "num_frames" and frames_argument(known) in known)
        ):
            found[name] = (f"evaluation.{name}", size)
    return found


def check_sides(pipe: Pipeline, denoisers: Sequence[str], sizes: Mapping[str, tuple[str, int]]) -> None:
    """ConfigError ``evaluation.height=...`` for a side that the pipeline would surely round or refuse.

    ``sizes`` are those of :func:`asked_sizes`.
    """
    patch = getattr(pipe, denoisers[0]).config.get("patch_size") if denoisers else None
    unit = _unit(pipe, patch or 1)
    for name in ("height", "width"):
        key, size = sizes.get(name, ("", unit))
        if size < unit or size % unit:
            raise ConfigError(
                f"{key}={size}: {type(pipe).__name__} makes images whose sides are multiples of {unit}; "
                f"take {max(unit, round(size / unit) * unit)}"
            )


def check_frames(pipe: Pipeline, sizes: Mapping[str, tuple[str, int]]) -> None:
    """ConfigError ``evaluation.num_frames=...`` for a number that a pipeline without weights would round."""
    ratio = next((v for k, v in _factors(pipe).items() if "temporal" in k), 1)
    if "num_frames" not in sizes or ratio == 1:
        return
    key, frames = sizes["num_frames"]
    if not _is_made(pipe, frames, ratio):
        near = sorted(range(1, frames + 4 * ratio), key=lambda other: abs(other - frames))
        fitting = next((other for other in near if _is_made(pipe, other, ratio)), 1)
        raise ConfigError(
            f"{key}={frames}: {type(pipe).__name__} makes videos of another number of frames, {ratio} for each latent; "
            f"take {fitting}"
        )


def _is_made(pipe: Pipeline, frames: int, ratio: int) -> bool:
    """Whether the decoder makes this number of the latents that pipelines take for it; where it cannot be tried,
    whether any decoder may.

    Tried on the fewest latents of the same remainder: some decoders take two at a time.
    """
    spare = max(0, (frames - 2 * ratio - 1) // (2 * ratio)) * 2 * ratio
    short = frames - spare
    for latents in dict.fromkeys(((short - 1) // ratio + 1, short // ratio)):
        made = _decoded(pipe, latents) if latents else 0
        if made == short:
            return True
        if not made and latents:
            return frames % ratio in (0, 1 % ratio)
    return False


def check_refusals(pipe: Pipeline, sizes: Mapping[str, tuple[str, int]]) -> None:
    """ConfigError ``evaluation.height=...`` for a size that the pipeline's own check refuses, all else being good."""
    check: Callable[..., object] | None = getattr(pipe, "check_inputs", None)
    if check is None or _complaint(pipe, check, _GOOD):
        return
    asked = {name: size for name, (_, size) in sizes.items()}
    if said := _complaint(pipe, check, {**_GOOD, **asked}):
        alone = (name for name in asked if _complaint(pipe, check, {**_GOOD, name: asked[name]}))
        name = next(alone, next(iter(asked)))
        raise ConfigError(f"{sizes[name][0]}={asked[name]}: {type(pipe).__name__} refuses it ({said}); take another")


def _unit(pipe: Pipeline, patch: object) -> int:
    """Pixels that every side is a multiple of; 1 where the pipeline does not say."""
    factors = _factors(pipe)
    side = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch
    if isinstance(scale := factors.get("vae_scale_factor"), int) and isinstance(patch, int):
        return math.lcm(8, scale * (2 if hasattr(pipe, "_unpack_latents") else patch))
    if movq := _movq_factor(pipe):
        return movq**2  # rounded up to whole latents of latents
    spatial = next((v for k, v in factors.items() if "temporal" not in k and k != "vae_scale_factor"), 1)
    return spatial * (side if isinstance(side, int) else 1)


def _factors(pipe: Pipeline) -> dict[str, int]:
    """What the pipeline says of its decoder: attributes such as ``vae_scale_factor_temporal``."""
    return {k: v for k, v in vars(pipe).items() if _FACTOR.fullmatch(k) and type(v) is int and v > 0}


def _movq_factor(pipe: Pipeline) -> int:
    """What one side of a MoVQ decoder's latent stands for, of the pipeline or of one that it is made of; 0: none."""
    owners = (pipe, *vars(pipe).values())
    return next((f for o in owners if type(f := getattr(o, "movq_scale_factor", None)) is int), 0)


def _decoded(pipe: Pipeline, num_latents: int) -> int:
    """How many frames the pipeline's decoder makes of some latents, tried without values; 0 where that cannot be."""
    import torch

    vae: Any = getattr(pipe, "vae", None)
    channels = next((c for k in ("z_dim", "latent_channels") if isinstance(c := vae.config.get(k), int)), 0)
    try:
        with torch.no_grad(), torch.device("meta"):
            made = vae.decode(torch.zeros(1, channels, num_latents, 8, 8), return_dict=False)[0]
    except Exception:  # noqa: BLE001 - a decoder that takes more than latents, or looks at values, is not known
        return 0
    return int(made.shape[2]) if made.ndim == 5 else 0


def _complaint(pipe: Pipeline, check: Callable[..., object], sizes: Mapping[str, int]) -> str:
    from PIL import Image

    called: Any = type(pipe)
    defaults = {k: p.default for k, p in inspect.signature(called.__call__).parameters.items()}
    picture = Image.new("RGB", (sizes["width"], sizes["height"]))
    given = {"prompt": "a", "image": picture, **sizes}
    arguments = {}
    for name, parameter in inspect.signature(check).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = defaults.get(name, parameter.default)
        arguments[name] = given.get(name, None if default is inspect.Parameter.empty else default)
    try:
        check(**arguments)
    except Exception as error:  # noqa: BLE001 - whatever a pipeline raises
        return first_line(error)
    return ""


def empty_pipeline(
    key: str, made: type, index: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]], config: ModelConfig
) -> Pipeline | None:
    """A pipeline that can be asked for its sizes: decoder and denoisers without values, a scheduler, and no more.

    None for one that cannot be built of these. MissingPackage for one that needs a package that is not there.
    """
    import diffusers

    known = inspect.signature(made).parameters
    parts: dict[str, Part] = {}
    held: dict[str, object] = {}
    listed = listed_parts(index)
    for name, said in index.items():
        if name not in known:
            continue
        found = listed.get(name)
        held[name] = said if found is None else None
        if found is None or found[0] is None or name in config.without:
            continue
        kind, module = str(found[1]), str(found[0])
        if class_of(kind, module) is not None and (DENOISER.fullmatch(name) or _DECODER.search(name)):
            parts[name] = Part(class_name=kind, module=module, config=read(f"{name}/{CONFIG}"))
        elif name == "scheduler":
            scheduler: Any = getattr(diffusers, str(found[1]), None)
            held[name] = scheduler and scheduler.from_config(read(f"{name}/scheduler_config.json"))
    try:
        modules: dict[str, nn.Module] = build(key, Architecture(path="", parts=parts), "float32")
        pipe: Pipeline = made(**{**held, **modules})
    except (ModelError, TypeError, ValueError, AttributeError, KeyError):
        return None
    except (ImportError, NameError) as error:
        if told := wanting(key, made.__name__, error):
            raise told from error
        return None
    return pipe
