"""How a pipeline of Diffusers is called: as its users call it, end to end, with a seeded CPU generator a sample.

Nothing here knows a pipeline's class. What its call takes is read from its signature; latents are heard where its
scheduler steps, and what it returns is what is compared.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, MetricUndefined, ModelError, first_line, nearest
from quantlab.models.encoded_prompts import padding_as_loaded, reuse_prompts
from quantlab.models.loaded import Conditioning, LoadedModel, OnStep, Pipeline, Sampled
from quantlab.models.part_by_part import run_part_by_part
from quantlab.models.pipeline_sizes import asked_sizes, check_sides, frames_argument
from quantlab.models.wanting import wanting
from quantlab.modules.residence import says
from quantlab.modules.stepping import heard_steps, in_their_dtypes, paired_draws, seeded
from quantlab.progress import say
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TAKEN_FROM = {
    "prompt": "prompt",
    "class_label": "class_labels",
    "image": "image",
    "mask": "mask_image",
    "control": "control_image",
}
"""Name of a condition -> argument of a pipeline's call that it is given as."""
_PICTURES = ("image", "mask", "control")
_CONTROL = "control_image"
_GUIDES = {"image": _CONTROL, "mask_image": "control_mask"}
"""What a picture and its mask are given as, to a pipeline that starts from none."""
_PLACED = ("gligen_phrases", "gligen_boxes")
"""What is to be seen, and where: GLIGEN needs both."""
_GIVEN = (*TAKEN_FROM.values(), "control_mask")
_OURS = {
    **dict.fromkeys((*_GIVEN, "batch_size"), "the data set gives it"),
    **dict.fromkeys(("generator", "latents"), "dataset.seed gives it"),
    **dict.fromkeys(("num_inference_steps", "guidance_scale", "height", "width"), "set evaluation.{name}"),
    **dict.fromkeys(("output_type", "return_dict", "callback", "callback_on_step_end"), "it is what is heard"),
    **dict.fromkeys(
        ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"), "set evaluation.num_samples"
    ),
}
"""Arguments that the recipe has other keys for, and which."""
_KINDS = {
    "images": "images",
    "image": "images",
    "frames": "frames",
    "videos": "frames",
    "audios": "audio",
    "audio": "audio",
}
"""Field of what a pipeline returns -> kind of medium."""
_OF_SHAPES = re.compile(
    r"shape|must match the (existing )?size|size of tensor|sizes of tensors|invalid for input|Padding size"
)
"""What torch says of tensors that do not fit one another, as where an attention takes a mask of one sample alone."""
_NO_WORDS = re.compile(r"Tensor|Image|ndarray")
"""In the annotation of an argument that no recipe can give."""
_MAKES_MEDIA = re.compile(r"vae|vq|decoder|renderer|unet|transformer")
"""In the names of the parts that a prior's pipeline has not: they denoise, or decode, what it makes."""
_MAP = "prediction"
"""The field of pipelines that find something out about a picture (a depth at each place): an image, where in [0, 1]."""


def parameters_of(pipeline: type) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes."""
    taken: Any = pipeline
    return {k: v for k, v in inspect.signature(taken.__call__).parameters.items() if k != "self"}


def check_arguments(pipeline: type, call: Mapping[str, object]) -> None:
    """ConfigError ``model.call.NAME: ...`` for an argument that the pipeline's call has not, or that has a key, and for
    several texts where one is for all samples."""
    known = parameters_of(pipeline)
    for name in call:
        if name not in known:
            raise ConfigError(
                f"model.call.{name}: {pipeline.__name__} takes no such argument{nearest(name, known)}; it takes "
                f"{', '.join(known)}"
            )
        if name in _OURS:
            raise ConfigError(
                f"model.call.{name}: a recipe says it elsewhere ({_OURS[name].format(name=name)}); leave it out of "
                "model.call"
            )
        value: Any = call[name]
        if isinstance(value, Sequence) and not isinstance(value, str) and value and _takes_one_text(known[name]):
            raise ConfigError(
                f"model.call.{name}: {pipeline.__name__} gives a list's texts to the samples of a batch by their "
                "places in it, which change with evaluation.batch_size; give one text, for all samples"
            )


def _takes_one_text(parameter: inspect.Parameter) -> bool:
    return bool(re.search(r"\bstr\b", re.sub(r"list\[str\]", "", str(parameter.annotation), flags=re.IGNORECASE)))


def check_conditions(pipeline: type, dataset: str, conditions: Sequence[str], call: Mapping[str, object]) -> None:
    """ConfigError ``dataset=...`` where a pipeline's call takes none of a condition, or needs what is not given.

    ``conditions`` are those that the data set gives, by the name of the argument.
    """
    known = parameters_of(pipeline)
    given = [_argument(name, known) for name in conditions]
    if unknown := _beyond_data_sets(pipeline, known):
        raise ConfigError(
            f"model.path: {pipeline.__name__} starts from {unknown}, which no data set here gives; name a pipeline of "
            "the same parts that makes its samples of prompts or pictures, or give a component and its inputs to "
            "quantlab.evaluate in Python"
        )
    made: Any = pipeline
    parts = inspect.signature(made.__init__).parameters
    if "prior" in parts and not any(_MAKES_MEDIA.search(name) for name in parts):
        raise ConfigError(
            f"model.path: {pipeline.__name__} makes embeddings for another pipeline, and what is compared is one "
            "image, video or sound a sample; name a pipeline that makes these, such as one of both (...Combined...)"
        )
    for name in given:
        if name not in known:
            takes = [own for own in (*_GIVEN, "batch_size") if own in known]
            other = _fitting(known)
            raise ConfigError(
                f"dataset={dataset}: {pipeline.__name__} takes no {name} (of what data sets give it takes "
                f"{', '.join(takes) or 'nothing'}); "
                + (f"take the {name}s out of it" if other == f"dataset={dataset}" else f"choose {other}")
            )
    needed = [n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "image" in known and ("strength" in known or "mask_image" in known):
        needed += [n for n in ("image", "mask_image") if n in known]  # their default is None, and nothing comes of it
    needed += [name for name in (*_GUIDES.values(), *_PLACED) if name in known]  # as above
    for name in needed:
        if name not in (*given, *call):
            beside = ", with control pictures" if name == _CONTROL else ", with masks" if "mask" in name else ""
            other = f"choose {_fitting(known)}{beside}"
            way_out = other if name in _GIVEN else f"give it by model.call.{name}"
            raise ConfigError(f"dataset={dataset}: {pipeline.__name__} needs {name}, which it does not give; {way_out}")


def _beyond_data_sets(pipeline: type, known: Mapping[str, inspect.Parameter]) -> str:
    """What a pipeline's call refuses to go without, although its default is None; "" for one that needs no such thing.

    Those of pictures and words beside it can do without a video: of them these are what they start from.
    """
    if callable(getattr(pipeline, "invert", None)):
        return "the inversion of a picture, made by another call"
    if "conditioning_frames" in known or {"control_video", "control_video_latents"} <= set(known):
        return "a video that guides it"
    if "video" in known:
        edits = not {"image", "mask_video"} & set(known) and ("strength" in known or "prompt" not in known)
        if edits or known["video"].default is inspect.Parameter.empty:
            return "a video"
    if {"image", "original_image"} <= set(known):
        return "a picture in two sizes"
    if {"task_prompt", "content_prompt"} <= set(known):
        return "rows of pictures that show a task"
    if {"audio", "prompt"} <= set(known) and "image" not in known:
        return "sound"
    ours = set(_OURS) - {"latents"}  # noise is ours; who asks for latents starts from another's
    needed = {name: p for name, p in known.items() if p.default is p.empty and name not in ours}
    return next((name for name, parameter in needed.items() if _NO_WORDS.search(str(parameter.annotation))), "")


def _argument(name: str, known: Collection[str]) -> str:
    """What a condition is given as: see :data:`_GUIDES`."""
    guide = _GUIDES.get(name, name)
    return guide if name not in known and guide in known else name


def fitting(pipeline: type) -> str:
    """``dataset=prompts``: the data set that gives what a pipeline's call takes."""
    return _fitting(parameters_of(pipeline))


def _fitting(known: Mapping[str, object]) -> str:
    if "image" in known or _CONTROL in known:
        return "dataset=image_prompts"
    return "dataset=prompts" if "prompt" in known else "dataset=classes" if "class_labels" in known else "dataset=none"


# -- one call


def sample(
    model: LoadedModel,
    noise: Tensor,
    conditioning: Conditioning,
    evaluation: EvaluationConfig,
    on_step: OnStep | None = None,
) -> Sampled:
    """What the pipeline makes of n samples. ``noise`` is int64 (n,): the seed of each sample's own CPU generator.

    All that is drawn comes from these generators, as Diffusers draws it for the reference: a seed gives the image that
    Diffusers gives for it, and neither the batch, the device nor a candidate's dtype changes the noise of a sample.
    ``on_step(k, latents)`` follows each step of ``pipeline.scheduler``.
    Raises ConfigError for a size that the pipeline rounds, ModelError where it refuses its inputs.
    """
    import torch

    pipe, num, states = pipeline_of(model), len(noise), 0
    residence = model.parts.get("residence")
    last: Tensor | None = None
    makes_videos = frames_argument(known := parameters_of(type(pipe))) in known
    check_sides(pipe, model.parts["denoisers"], asked_sizes(type(pipe), evaluation, model.parts.get("call", {})))
    arguments = _arguments(model, pipe, noise, conditioning, evaluation)
    reuse_prompts(pipe, model, arguments)

    def told(_: Tensor, after: Tensor) -> None:
        nonlocal last, states
        last = by_sample(after, num, makes_videos)
        if on_step is not None:
            on_step(states, last)
        states += 1

    if "groups" in model.parts or "spread" in model.parts:
        says(pipe, model.device, "device", "_execution_device")
    if evaluation.tiled_decoding:
        decoder: Any = pipe.components["vae"]
        decoder.enable_tiling()
    originals = {name: getattr(model.parts["pipeline"], name) for name in model.components}
    is_reference = all(part is originals[name] for name, part in model.components.items())
    with (
        torch.no_grad(),
        torch.random.fork_rng(_devices(model.device)),
        paired_draws(model.parts.get("draws", ())) as draws,
        in_their_dtypes(model.components, originals, model.dtype),
        heard_steps(pipe.scheduler, told),
        padding_as_loaded(pipe),
        contextlib.nullcontext() if residence is None else run_part_by_part(pipe, model, residence),
        _told_as_ours(model.name, type(pipe).__name__, arguments, num, is_reference),
    ):
        made = _called(pipe, arguments, noise)
    media = _media(pipe, made, num)
    _check_made(pipe, media, arguments)
    are_tokens = last is not None and not last.is_floating_point()  # ids, as Amused's: no distance lies between them
    return Sampled(latents=None if last is None or are_tokens else last.float().cpu(), media=media, draws=draws)


@contextlib.contextmanager
def _told_as_ours(
    model: str, pipeline: str, arguments: Iterable[str], num: int, is_reference: bool = True
) -> Iterator[None]:
    """What a pipeline says of its inputs, in words that name the key to change.

    What only a candidate's layers may have to do with stays what it is where it is no ``is_reference``.
    """
    called = f"it was called with {', '.join(arguments)}: "
    alone = "" if num == 1 else ", or set evaluation.batch_size=1 where it takes one sample at once"
    try:
        yield
    except (ImportError, NameError) as error:
        told = wanting(f"model={model}", pipeline, error)
        if told is None:
            raise
        raise told from error
    except ConfigError:
        raise
    except (TypeError, ValueError, LookupError) as error:
        raise ModelError(
            f"model={model}: {pipeline} refuses what it is given ({first_line(error)}); "
            f"{called}change the data set, evaluation or model.call{alone}"
        ) from error
    except AttributeError as error:
        if not is_reference:
            raise
        raise ModelError(
            f"model={model}: {pipeline} fails by itself ({first_line(error)}), as where releases of diffusers and "
            f"transformers do not go together; {called}leave out of model.call what needs that, or install others"
            f"{alone}"
        ) from error
    except RuntimeError as error:
        if not _OF_SHAPES.search(str(error)) or (num == 1 and not is_reference):
            raise
        several = f"fails on {num} samples at once ({first_line(error)}); set evaluation.batch_size=1"
        one = f"fails by itself ({first_line(error)}); {called}change the data set, evaluation or model.call"
        raise ModelError(f"model={model}: {pipeline} {one if num == 1 else several}") from error


def _called(pipe: Pipeline, arguments: Mapping[str, Any], noise: Tensor) -> Mapping[str, object]:
    """What the pipeline returns; in tiles where its decoder knows no other way, as its users set it."""
    import torch

    def run(given: Mapping[str, Any]) -> Mapping[str, object]:
        torch.manual_seed(int(noise[0]))  # of what a pipeline draws without a generator
        with seeded(int(noise[0])):
            return pipe(**given)

    try:
        return run(arguments)
    except NotImplementedError as error:
        decoder: Any = getattr(pipe, "vae", None)
        if "tiling" not in str(error) or getattr(decoder, "use_tiling", True):
            raise
        decoder.enable_tiling()
        say(f"{type(pipe).__name__}: its decoder works in tiles alone ({error}); tiling is on", "warning")
    fresh: Any = [torch.Generator().manual_seed(int(seed)) for seed in noise]
    again = {"generator": fresh if isinstance(arguments["generator"], list) else fresh[0]}
    return run({**arguments, **again})


def pipeline_of(model: LoadedModel) -> Pipeline:
    """The reference's pipeline with the model's components in it, built anew: some hold others that share them."""
    reference = model.parts["pipeline"]
    made: Any = type(reference)
    held = {**reference.config, **reference.components, **model.components}
    pipe: Pipeline = made(**{name: held[name] for name in inspect.signature(made.__init__).parameters if name in held})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_sample(state: Tensor, num: int, makes_videos: bool = False) -> Tensor:
    """The scheduler's (k * n, ...) as (n, ...), or (n, k, ...) where k conditions of the samples follow one another.

    Where videos are made and rows are pictures, k frames follow one another in each sample.
    """
    if len(state) == num:
        return state
    if len(state) % num:
        raise MetricUndefined(
            f"latent_rel_mse: the scheduler steps {len(state)} rows for {num} samples, so that a row belongs to no "
            "known sample; set evaluation.batch_size=1"
        )
    if makes_videos and state.ndim == 4:
        return state.reshape(num, -1, *state.shape[1:])
    return state.reshape(len(state) // num, num, *state.shape[1:]).transpose(0, 1)


def _arguments(
    model: LoadedModel, pipe: Pipeline, noise: Tensor, conditioning: Conditioning, evaluation: EvaluationConfig
) -> dict[str, Any]:
    """The call's arguments: what the pipeline has names for, and what the user chose."""
    import torch

    known, num, call = parameters_of(type(pipe)), len(noise), dict(model.parts.get("call", {}))
    frames = frames_argument(known)
    asked = {
        "height": evaluation.height,
        "width": evaluation.width,
        frames: evaluation.num_frames,
        "num_inference_steps": evaluation.num_inference_steps,
        "guidance_scale": evaluation.guidance_scale,
        "output_type": "np",
        "batch_size": num,
    }
    generators = [torch.Generator().manual_seed(int(seed)) for seed in noise]
    one = num == 1  # as a user calls it, where some pipelines take no lists
    given = {_argument(TAKEN_FROM[name], known): _given(name, values, one) for name, values in conditioning.items()}
    if "batch_size" in known and given:
        known = {name: parameter for name, parameter in known.items() if name != "batch_size" or "image" not in given}
    several = {k for k, v in call.items() if isinstance(v, str) and not one and _is_one_each(known[k])}
    chosen = {k: [v] * num if k in several else v for k, v in call.items()}
    found = {name: value for name, value in asked.items() if name in known and value is not None}
    return {**found, "generator": generators[0] if one else generators, **given, **chosen}


def _is_one_each(parameter: inspect.Parameter) -> bool:
    """Whether several samples get a list of an argument's words: where it takes one, and of what is like a prompt."""
    takes_list = "list[str]" in str(parameter.annotation).lower()
    return takes_list or ("prompt" in parameter.name and not parameter.name.startswith("system"))


def _given(name: str, values: Sequence[Any], one: bool) -> object:
    from PIL import Image

    if name in _PICTURES:
        values = [Image.fromarray(v.squeeze(-1).numpy() if v.shape[-1] == 1 else v.numpy()) for v in values]
    return values[0] if one and name != "class_label" else list(values)


UNUSED = ("num_inference_steps", "guidance_scale", "height", "width")
"""Settings of the evaluation that not every pipeline has an argument for."""


def tell_unused(pipeline: type, evaluation: EvaluationConfig, names: Collection[str] = UNUSED) -> None:
    """Tell which of these settings of the evaluation a pipeline has no argument for."""
    known = parameters_of(pipeline)
    for name in names:
        if name not in known and getattr(evaluation, name) is not None:
            value = getattr(evaluation, name)
            say(f"evaluation.{name}={value}: {pipeline.__name__} takes no such argument; it is not used", "warning")


def _devices(device: str) -> list[int]:
    import torch

    if not device.startswith("cuda"):
        return []
    index = torch.device(device).index
    return [torch.cuda.current_device() if index is None else index]


# -- what it returns


def _media(pipe: Pipeline, made: Mapping[str, object], num: int) -> dict[str, Tensor]:
    """Images, frames and sound of what a pipeline returned, one row a sample."""
    import numpy as np
    import torch

    found: dict[str, Tensor] = {}
    for name, value in made.items():
        if name not in (*_KINDS, _MAP) or value is None:
            continue
        array = _as_array(value)
        if name == _MAP and (array.ndim != 4 or array.min() < 0 or array.max() > 1):
            continue
        kind = "frames" if array.ndim == 5 else _KINDS.get(name, "images")
        if kind == "audio":
            array = array.reshape(num, -1, array.shape[-1])
        elif kind == "frames" and array.ndim == 4:
            array = array.reshape(num, -1, *array.shape[1:])
        if np.issubdtype(array.dtype, np.integer):
            array = array / 255.0
        found[kind] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not found or any(len(value) != num for value in found.values()):
        shapes = {name: tuple(value.shape) for name, value in found.items()} or list(made)
        samples = "1 sample" if num == 1 else f"{num} samples"
        way_out = ", or set evaluation.batch_size=1" if found and num > 1 else ""
        raise ModelError(
            f"model.path: {type(pipe).__name__} returns {shapes} for {samples}, and what is compared is one image, "
            f"video or sound a sample; name a pipeline that makes these{way_out}"
        )
    return found


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    """Tensors, arrays, pictures, and lists of them, as one array."""
    import numpy as np

    if hasattr(value, "detach"):
        return np.asarray(value.detach().float().cpu().numpy())
    if isinstance(value, (list, tuple)):
        return np.stack([_as_array(item) for item in value])
    array = np.asarray(value)
    return array[..., None] if array.ndim == 2 and hasattr(value, "mode") else array  # a grey picture


def _check_made(pipe: Pipeline, media: Mapping[str, Tensor], arguments: Mapping[str, object]) -> None:
    """ConfigError for a size or number of frames that was asked for and not made; fewer frames are told.

    Some drop those that stand for the picture they start from: no number of frames is made as it is asked for.
    """
    shown = media.get("frames", media.get("images"))
    if shown is None:
        return
    frames = frames_argument(arguments)
    made = {"height": shown.shape[-3], "width": shown.shape[-2], frames: shown.shape[1] if shown.ndim == 5 else None}
    for name, size in made.items():
        asked: Any = arguments.get(name, size)
        if name == frames and size is not None and size < asked:
            _tell_dropped(type(pipe).__name__, asked, size)
        elif size is not None and asked != size:
            key, more = ("num_frames", ", or null, where it makes more of each") if name == frames else (name, "")
            raise ConfigError(f"evaluation.{key}={asked}: {type(pipe).__name__} made {size} of it; take {size}{more}")


@functools.cache
def _tell_dropped(pipeline: str, asked: int, made: int) -> None:
    """Tell it once, whatever the number of batches and candidates."""
    say(f"evaluation.num_frames={asked}: {pipeline} made {made} of it, which are what is compared", "warning")
