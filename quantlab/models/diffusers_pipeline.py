"""``model.family=diffusers``: a text-to-image pipeline of Diffusers, from a folder or the Hub.

The reference is the pipeline as stored. A candidate is run by a shallow copy of it that holds the candidate's
components, so that the reference never changes; the scheduler is shared, as each run sets its steps anew. Where the
text encoders are not quantized, prompts are encoded once and shared: what is measured is the quantized component alone.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError, ModelError, nearest
from quantlab.models.checkpoint import file_sha256
from quantlab.models.loaded import Conditioning, LoadedModel, OnStep, Progress, TextToImage
from quantlab.models.pipeline_files import DENOISERS, INDEX, check_choice, check_files, left_out
from quantlab.models.reading import (
    as_model_error,
    chosen_dtype,
    frozen,
    local_folder,
    quiet_loading,
    require_index,
    required_path,
)
from quantlab.modules.compute_dtype import component_dtype, torch_dtype
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor, nn

NEEDS_PATH = ("a pipeline", "black-forest-labs/FLUX.1-schnell")  # what model.path leads to, and an example

_UNET = ("conv_in", "conv_out", "time_embedding", "add_embedding", "*.time_emb_proj")
_MMDIT = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
FAMILY_EXCLUSIONS: dict[str, tuple[str, ...]] = {
    # The way in, the way out and the conditioning on time: every pixel of every step passes them, and they hold below
    # 1 % of a DiT's weights. SVDQuant (arXiv 2411.05007), the GGUF files in circulation and ModelOpt's recipes keep
    # them in 16 bits as well. The modulation layers inside the blocks (a quarter of Flux) are quantized.
    "FluxTransformer2DModel": _MMDIT,
    "ChromaTransformer2DModel": (
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "distilled_guidance_layer",
        "norm_out",
        "proj_out",
    ),
    "SD3Transformer2DModel": ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    "AuraFlowTransformer2DModel": ("pos_embed", "context_embedder", "time_step_proj", "norm_out", "proj_out"),
    "SanaTransformer2DModel": ("patch_embed", "caption_projection", "time_embed", "proj_out"),
    # A UNet's time projections sit in every residual block; ModelOpt's diffusion recipes leave them out.
    "UNet2DConditionModel": _UNET,
}
EMBEDDINGS: dict[str, tuple[str, ...]] = {
    # What encode_prompt of the pipeline returns first, in order, by the name that __call__ takes it.
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusion3Pipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "StableDiffusionXLPipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}
NUM_CACHED_PROMPTS = 256
"""Encoded prompts that are kept on the CPU: about 1 GB for Flux."""
_VAES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
_CALL = (
    "prompt",
    "latents",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "output_type",
    "callback_on_step_end",
)


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The pipeline at ``config.path`` (a local folder or a Hub id) on ``device``.

    ``components`` are those of ``config.components`` and the denoiser, which every run needs; the whole pipeline is in
    ``parts["pipeline"]``, the denoiser's name in ``parts["denoiser"]``. Raises ModelError beginning with
    ``model.path=...`` for what cannot be found, read or run, ConfigError for a component or dtype that is not there.
    """
    path = required_path(config, *NEEDS_PATH)
    key = f"model.path={path}"
    dtype = chosen_dtype(config, "bfloat16" if device.startswith("cuda") else "float32")
    folder = _folder(key, path, config)
    index = check_files(key, folder)
    check_choice(folder, index, config)
    pipe = _read_pipeline(key, folder, dtype, device, config.variant, left_out(config, index))
    denoiser = _check_pipeline(key, pipe)
    components = _components(pipe, [*config.components, denoiser])
    return LoadedModel(
        name=Path(path).name,
        protocol="diffusion",
        components=components,
        parts={"pipeline": pipe, "denoiser": denoiser, "scheduler": pipe.scheduler, "prompt_embeddings": {}},
        dtype=dtype,
        device=device,
        weights_sha256=_pipeline_sha256(pipe, folder, cache_dir, progress),
        default_exclusions={name: _exclusions(part, config.default_exclusions) for name, part in components.items()},
        sample=sample,
        decode=decode,
    )


def modules_of(pipe: TextToImage) -> dict[str, nn.Module]:
    """Name -> module, for the components of a pipeline that are modules (not tokenizers or schedulers)."""
    from torch import nn

    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# -- running it


def sample(
    model: LoadedModel,
    noise: Tensor,
    conditioning: Conditioning,
    evaluation: EvaluationConfig,
    on_step: OnStep | None = None,
) -> Tensor:
    """Final latents, float32 on the CPU, (n, channels, height, width) in the VAE's layout.

    ``noise`` is (n, *:func:`noise_shape`), ``conditioning["prompt"]`` n texts. ``on_step(k, latents)`` follows each
    step with the latents in the layout of the result. A scheduler that adds noise on the way draws it, sample by
    sample, from a generator seeded by that sample's noise, so that a sample does not depend on its batch.
    """
    pipe = pipeline_of(model)
    height, width = image_size(model, evaluation)
    dtype = component_dtype(getattr(pipe, model.parts["denoiser"]), model.dtype)

    def follow(_pipe: TextToImage, step: int, _timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if on_step is not None:
            on_step(step, unpacked(pipe, values["latents"], height, width))
        return {}

    extra = {"use_resolution_binning": False} if "use_resolution_binning" in _parameters(pipe) else {}
    latents = pipe(
        **_prompt_arguments(model, pipe, list(conditioning["prompt"]), dtype),
        **extra,
        latents=noise.to(model.device, dtype),
        height=height,
        width=width,
        num_inference_steps=evaluation.num_inference_steps,
        guidance_scale=evaluation.guidance_scale,
        generator=_generators(noise),
        output_type="latent",
        callback_on_step_end=follow,
        return_dict=False,
    )[0]
    return unpacked(pipe, latents, height, width).float().cpu()


def decode(model: LoadedModel, latents: Tensor) -> Tensor:
    """Latents as :func:`sample` returns them -> images, float32 on the CPU, (n, height, width, 3) in [0, 1].

    One image at a time: the result does not depend on the batch, and the VAE is the part that needs the most memory.
    """
    import torch

    part = model.components.get("vae", model.parts["pipeline"].vae)
    vae, dtype = cast("AutoencoderKL", part), component_dtype(part, model.dtype)  # or one of its relatives
    if dtype == torch.float16 and vae.config.get("force_upcast"):  # SDXL's VAE overflows in float16
        vae, dtype = cast("AutoencoderKL", copy.deepcopy(part).float()), torch.float32
    images = []
    with torch.no_grad():
        for latent in torch.split(latents, 1):
            scaled = _unscaled(latent.to(model.device, dtype), vae.config)
            image = vae.decode(scaled, return_dict=False)[0].float()
            images.append((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu())
    return torch.cat(images)


def image_size(model: LoadedModel, evaluation: EvaluationConfig) -> tuple[int, int]:
    """Height and width in pixels; the pipeline's own where ``evaluation`` leaves them open.

    ConfigError ``evaluation.height=...`` for a size that the pipeline would round or refuse.
    """
    pipe = model.parts["pipeline"]
    scale = pipe.vae_scale_factor
    side = getattr(pipe, "default_sample_size", None) or getattr(pipe, model.parts["denoiser"]).config.sample_size
    unit = math.lcm(8, scale * (2 if _packs(pipe) else getattr(pipe, "patch_size", 1)))
    sizes = {"height": evaluation.height or side * scale, "width": evaluation.width or side * scale}
    for name, size in sizes.items():
        if size < unit or size % unit:
            raise ConfigError(
                f"evaluation.{name}={size}: {type(pipe).__name__} makes images whose sides are multiples "
                f"of {unit}; take {max(unit, round(size / unit) * unit)}"
            )
    return sizes["height"], sizes["width"]


def noise_shape(model: LoadedModel, evaluation: EvaluationConfig) -> tuple[int, ...]:
    """Shape of one sample's initial noise in the pipeline's own layout.

    (channels, height, width) of the latents, or (tokens, channels) for pipelines that pack 2x2 patches (Flux).
    """
    pipe = model.parts["pipeline"]
    rows, columns = (size // pipe.vae_scale_factor for size in image_size(model, evaluation))
    channels = getattr(pipe, model.parts["denoiser"]).config.in_channels
    return ((rows // 2) * (columns // 2), channels) if _packs(pipe) else (channels, rows, columns)


def unpacked(pipe: TextToImage, latents: Tensor, height: int, width: int) -> Tensor:
    """(n, tokens, 4 c) of a packing pipeline -> (n, c, height, width) of the latents; others stay as they are."""
    if not _packs(pipe):
        return latents
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    patches = latents.reshape(len(latents), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, 2 * rows, 2 * columns)


def pipeline_of(model: LoadedModel) -> TextToImage:
    """A shallow copy of the reference's pipeline with the model's components in it."""
    reference = model.parts["pipeline"]
    pipe = copy.copy(reference)
    for name, module in model.components.items():
        if module is not getattr(reference, name):
            setattr(pipe, name, module)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _packs(pipe: TextToImage) -> bool:
    return hasattr(pipe, "_unpack_latents")


def _parameters(pipe: TextToImage) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def _unscaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    import torch

    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
        return latents * std / config["scaling_factor"] + mean
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def _generators(noise: Tensor) -> list[torch.Generator]:
    import torch

    digests = [hashlib.sha256(one.contiguous().float().numpy().tobytes()).hexdigest() for one in noise.cpu()]
    return [torch.Generator().manual_seed(int(digest[:8], 16)) for digest in digests]


# -- prompts


def _prompt_arguments(
    model: LoadedModel, pipe: TextToImage, prompts: list[str], dtype: torch.dtype
) -> dict[str, list[str] | Tensor]:
    """The prompts as the pipeline's call takes them: encoded, in the denoiser's dtype, where we know how.

    The pipeline then loses its text encoders: SDXL would cast the embeddings to their dtype, which need not be the
    denoiser's.
    """
    import torch

    names = EMBEDDINGS.get(type(pipe).__name__)
    if names is None:
        return {"prompt": prompts}
    columns = zip(*(_encoded(model, pipe, prompt, len(names)) for prompt in prompts), strict=True)
    embeddings: dict[str, list[str] | Tensor] = {
        name: torch.cat(rows).to(model.device, dtype) for name, rows in zip(names, columns, strict=True)
    }
    for name in modules_of(pipe):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)
    return embeddings


def _encoded(model: LoadedModel, pipe: TextToImage, prompt: str, num: int) -> tuple[Tensor, ...]:
    """One prompt's embeddings on the CPU, each (1, ...); remembered while the text encoders are the reference's."""
    import torch

    own = any(
        name.startswith("text_encoder") and module is not getattr(model.parts["pipeline"], name)
        for name, module in model.components.items()
    )
    known: dict[str, tuple[Tensor, ...]] = {} if own else model.parts["prompt_embeddings"]
    if prompt not in known:
        settings = {
            "prompt": prompt,
            "prompt_2": None,
            "prompt_3": None,
            "device": torch.device(model.device),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
        }
        accepted = inspect.signature(pipe.encode_prompt).parameters
        with torch.no_grad():
            encoded = pipe.encode_prompt(**{k: v for k, v in settings.items() if k in accepted})[:num]
        while len(known) >= NUM_CACHED_PROMPTS:
            known.pop(next(iter(known)))
        known[prompt] = tuple(tensor.cpu() for tensor in encoded)
    return known[prompt]


# -- reading it


def _folder(key: str, path: str, config: ModelConfig) -> Path:
    """The local folder, or the Hub's snapshot of it (downloaded unless offline)."""
    said = (INDEX, "a Diffusers pipeline", "the pipeline's save_pretrained")
    local = local_folder(key, path, *said)
    if local is not None:
        return local
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    way_out = "check the name and the network; without a network only what is in the local Hub cache can be named by id"
    with as_model_error(key, way_out):
        snapshot = Path(DiffusionPipeline.download(path, revision=config.revision, variant=config.variant))
    require_index(key, snapshot, *said)
    return snapshot


def _read_pipeline(
    key: str, folder: Path, dtype: str, device: str, variant: str | None, without: Mapping[str, None]
) -> TextToImage:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    with (
        as_model_error(key, "check that the folder is complete and was written by this or an older Diffusers"),
        quiet_loading(logging),
        quiet_loading(diffusers_logging),
    ):
        made = DiffusionPipeline.from_pretrained(folder, dtype=torch_dtype(dtype), variant=variant, **without)
        pipe = cast(TextToImage, made)
    for name, module in modules_of(pipe).items():
        if getattr(module, "hf_quantizer", None) is not None or getattr(module.config, "quantization_config", None):
            raise ModelError(
                f"{key}: {name} is already quantized; the reference must not be: name the unquantized checkpoint"
            )
        if any(p.device.type == "meta" for p in module.parameters()):
            raise ModelError(f"{key}: weights of {name} are missing from its files; copy or download it again")
        frozen(module)
    return pipe.to(device)


def _check_pipeline(key: str, pipe: TextToImage) -> str:
    """The denoiser's name; ModelError for a pipeline that is not text to image, or whose latents we cannot decode."""
    name, parameters, modules = type(pipe).__name__, _parameters(pipe), modules_of(pipe)
    missing = [p for p in _CALL if p not in parameters]
    denoiser = next((d for d in DENOISERS if d in modules), None)
    if missing or "strength" in parameters or denoiser is None:
        why = (
            f"its call has no {missing[0]}"
            if missing
            else "it has no denoiser"
            if denoiser is None
            else "it starts from an image"
        )
        raise ModelError(
            f"{key}: {name} is not a text-to-image pipeline that can be run from given noise ({why}); "
            "name one such as FluxPipeline, StableDiffusion3Pipeline or StableDiffusionXLPipeline"
        )
    vae = type(modules.get("vae")).__name__
    if vae not in _VAES:
        raise ModelError(
            f"{key}: {name} decodes its latents with {vae}; what can be decoded is {', '.join(_VAES)}: "
            "name another pipeline"
        )
    return denoiser


def _components(pipe: TextToImage, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = modules_of(pipe)
    for name in names:
        if name not in modules:
            raise ConfigError(
                f"model.components={name}: {type(pipe).__name__} has {', '.join(sorted(modules))}"
                f"{nearest(name, modules)}"
            )
    return {name: modules[name] for name in names}


def _exclusions(module: nn.Module, own: Sequence[str]) -> tuple[str, ...]:
    """Entries of ``modules_to_not_convert``: the family's, ``own``."""
    return tuple(dict.fromkeys((*FAMILY_EXCLUSIONS.get(type(module).__name__, ()), *own)))


def _pipeline_sha256(pipe: TextToImage, folder: Path, cache_dir: Path, progress: Progress | None) -> str:
    """sha256 over the names and bytes of all files of the pipeline's parts: weights, configs, scheduler, tokenizers.

    The digest of a file is remembered by what it is known by.
    """
    files = [file for name, part in pipe.components.items() if part is not None for file in _files_of(folder / name)]
    total = hashlib.sha256()
    for done, file in enumerate(sorted(files)):
        total.update(f"{file.relative_to(folder).as_posix()}|{file_sha256(file, cache_dir)}\n".encode())
        if progress is not None:
            progress("hash weights", done + 1, len(files))
    return "sha256:" + total.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return weights + [file for file in folder.glob("*") if file.suffix in (".json", ".txt", ".model")]
