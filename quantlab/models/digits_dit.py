"""``model=digits_dit``: a small class-conditional diffusion transformer, trained on first use and cached by content.

The data are the 8x8 digits that come with scikit-learn, the network is Diffusers' ``DiTTransformer2DModel`` with
256-wide blocks. One minute or two of training on a CPU make a model whose samples a classifier reads correctly, so that
every quantization scheme can be judged without downloading anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError, ModelError, is_of_the_machine
from quantlab.models.digits_training import (
    IMAGE_SIZE,
    NUM_CLASSES,
    NUM_NOISE_LEVELS,
    RECIPE_VERSION,
    build_transformer,
    digits,
    train_denoiser,
)
from quantlab.models.judge import build_judge, judge_features_and_logits, train_judge
from quantlab.models.loaded import Conditioning, LoadedModel, OnStep, Progress, Sampled
from quantlab.models.outline import cast_as_loaded
from quantlab.models.reading import chosen_dtype, frozen
from quantlab.modules.compute_dtype import component_dtype
from quantlab.modules.layers import state_digest
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import DigitsModelConfig, EvaluationConfig, ModelConfig

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from torch import Tensor, nn

MODEL_FILE, JUDGE_FILE, META_FILE = "model.safetensors", "judge.safetensors", "meta.json"


class DamagedWeights(ModelError):
    """A file of weights that cannot be read or is not what it says; ``reason`` is without the way out."""

    reason = ""


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The model, from ``model.path`` where that is set, else from the cache, else trained now (on the CPU).

    ``progress`` is called as ``progress(what, done, total)`` while training, and not at all on a cache hit.
    Raises ModelError for files that cannot be read or are not what they say, ConfigError for a dtype that is not there.
    """
    from filelock import FileLock

    config = _digits_config(config)
    dtype = chosen_dtype(config, "float32")
    if config.path is not None:
        check_folder(config.path)
        folder = Path(config.path).expanduser()
    else:
        folder = Path(cache_dir) / "models" / cache_key(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _train_into(folder, config, progress)
    try:
        model = load_cached(folder, dtype=dtype, device=device, default_exclusions=config.default_exclusions)
    except DamagedWeights as error:
        if config.path is None:
            raise
        raise ModelError(
            f"model.path={config.path}: {error.reason}; put intact copies of {MODEL_FILE} and "
            f"{JUDGE_FILE} there, or leave model.path out to train the model"
        ) from error
    if config.revision is not None and config.revision != model.parts["trained_sha256"]:
        raise ModelError(
            f"model.revision={config.revision}: the weights in {folder} are "
            f"{model.parts['trained_sha256']}; put the wanted {MODEL_FILE} and {JUDGE_FILE} into a folder "
            "and name it with model.path, or leave model.revision out"
        )
    return model


def check_folder(path: str) -> None:
    """ModelError for a folder in which no trained weights lie."""
    if not (Path(path).expanduser() / MODEL_FILE).is_file():
        raise ModelError(
            f"model.path={path}: no {MODEL_FILE} is in it; name a folder with {MODEL_FILE} and {JUDGE_FILE}, or leave "
            "model.path out to train the model"
        )


def _digits_config(config: ModelConfig) -> DigitsModelConfig:
    """The config, which is this model's only where ``model=digits_dit`` chose its schema."""
    if not isinstance(config, DigitsModelConfig):
        raise ConfigError("model.family=digits_dit: it has settings of its own; choose it by model=digits_dit")
    return config


def cache_key(config: ModelConfig) -> str:
    """SHA-256 of what determines the trained weights, up to the rounding that the number of threads decides."""
    data = {**_trained_fields(_digits_config(config)), "recipe_version": RECIPE_VERSION, "versions": _versions()}
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def own_files(config: ModelConfig, cache_dir: Path) -> list[Path]:
    """The files of the trained weights; none before they are."""
    return sorted((Path(cache_dir) / "models" / cache_key(config)).glob("*.safetensors"))


def load_cached(
    folder: Path, *, dtype: str = "float32", device: str = "cpu", default_exclusions: Sequence[str] = ()
) -> LoadedModel:
    """The model from a folder with ``model.safetensors`` and ``judge.safetensors``, wherever they were trained.

    Each file carries in its header what network it belongs to and the digest of its weights, which is checked.
    ``parts["trained_sha256"]`` is the digest as trained, ``weights_sha256`` that of the weights in ``dtype``.
    """
    import torch

    state, header = _read_weights(folder / MODEL_FILE)
    if not {"num_layers", "num_heads"} <= header.keys():
        raise _broken(folder / MODEL_FILE, "its header does not say how many layers and heads the network has")
    transformer = build_transformer(num_layers=int(header["num_layers"]), num_heads=int(header["num_heads"]))
    _load_state(transformer, state, folder / MODEL_FILE)
    judge_state, _ = _read_weights(folder / JUDGE_FILE)
    judge = build_judge(IMAGE_SIZE, NUM_CLASSES)
    _load_state(judge, judge_state, folder / JUDGE_FILE)
    # Diffusers' own ``to`` warns of modules to keep in float32 even where the list of them is empty, as here.
    cast_as_loaded(transformer, dtype)
    transformer = torch.nn.Module.to(transformer, device=device)
    return LoadedModel(
        name="digits_dit",
        protocol="diffusion",
        components={"transformer": frozen(transformer)},
        parts={
            "denoisers": ("transformer",),
            "scheduler": sampling_scheduler(),
            "judge": frozen(judge),
            "folder": str(folder),
            "trained_sha256": header["weights_sha256"],
        },
        dtype=dtype,
        device=device,
        default_exclusions={"transformer": tuple(default_exclusions)},
        weights_sha256=state_digest(transformer.state_dict()),
        sample=sample,
    )


# -- sampling


def sampling_scheduler() -> DDIMScheduler:
    """DDIM over the same levels, starting at the last one (trailing spacing, arXiv 2305.08891)."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        NUM_NOISE_LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def sample(
    model: LoadedModel,
    noise: Tensor,
    conditioning: Conditioning,
    evaluation: EvaluationConfig,
    on_step: OnStep | None = None,
) -> Sampled:
    """DDIM with classifier-free guidance from ``noise`` (n, 1, 8, 8): the final latents, and images of them.

    The denoiser gets the labelled samples and then the same with the null label as one batch, in its own dtype (no null
    half at ``guidance_scale`` 1); latents and guidance stay in float32. ``on_step(k, latents)`` follows each step.
    """
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    transformer, scheduler = model.components["transformer"], model.parts["scheduler"]
    assert isinstance(scheduler, DDIMScheduler), "load puts it there"
    dtype, scale = component_dtype(transformer, model.dtype), evaluation.guidance_scale
    labels = torch.tensor(conditioning["class_label"], device=model.device)
    latents = noise.to(model.device, torch.float32)
    guided = scale != 1.0
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])
    scheduler.set_timesteps(evaluation.num_inference_steps, device=model.device)
    with torch.no_grad():
        for k, timestep in enumerate(scheduler.timesteps):
            batch = torch.cat([latents, latents]) if guided else latents
            timesteps = timestep.expand(len(batch))
            velocity = transformer(batch.to(dtype), timestep=timesteps, class_labels=labels).sample.float()
            if guided:
                with_label, without = velocity.chunk(2)
                velocity = without + scale * (with_label - without)
            # Guidance pushes the predicted image out of [-1, 1]; after clipping it the noise must be derived anew,
            # or each step adds an error and the samples fall apart.
            latents = scheduler.step(velocity, timestep, latents, use_clipped_model_output=True).prev_sample
            if on_step is not None:
                on_step(k, latents)
    latents = latents.cpu()
    return Sampled(latents=latents, media={"images": decode(latents)})


def decode(latents: Tensor) -> Tensor:
    """Latents (n, 1, 8, 8) in [-1, 1] -> images, float tensor (n, 8, 8, 1) in [0, 1]."""
    return ((latents.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


# -- the cache


def _trained_fields(config: DigitsModelConfig) -> dict[str, int]:
    names = ("num_train_steps", "train_batch_size", "train_seed", "num_layers", "num_heads")
    return {name: int(getattr(config, name)) for name in names}


def _train_into(folder: Path, config: DigitsModelConfig, progress: Progress | None) -> None:
    """Train both networks and put them into ``folder`` in one move; the caller holds the folder's lock."""
    import torch

    began = time.perf_counter()
    images, labels, held_out, held_out_labels = digits()
    denoiser = train_denoiser(images, labels, config, progress)
    report = None if progress is None else lambda done, total: progress("train digits judge", done, total)
    judge = train_judge(images, labels, seed=config.train_seed, progress=report)
    _, logits = judge_features_and_logits(judge, held_out)
    accuracy = float((logits.argmax(1) == held_out_labels.numpy()).mean())
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    sha256 = _write_weights(unfinished / MODEL_FILE, denoiser, _trained_fields(config))
    _write_weights(unfinished / JUDGE_FILE, judge, {})
    meta = {
        "judge_accuracy": accuracy,
        "seconds": time.perf_counter() - began,
        "weights_sha256": sha256,
        "num_threads": torch.get_num_threads(),
        "recipe_version": RECIPE_VERSION,
        **_trained_fields(config),
        "versions": _versions(),
    }
    (unfinished / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder)


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in ("torch", "diffusers", "scikit-learn")}


def _write_weights(path: Path, module: nn.Module, header: Mapping[str, int]) -> str:
    """Write a module's weights with their digest in the file's header; returns the digest."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    sha256 = state_digest(state)
    save_file(state, path, metadata={**{k: str(v) for k, v in header.items()}, "weights_sha256": sha256})
    return sha256


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file that :func:`_write_weights` wrote; ModelError where it is not that any more."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as error:
        raise _broken(path, str(error)) from error
    if state_digest(state) != header.get("weights_sha256"):
        raise _broken(path, "its weights are not those that its header names")
    return state, header


def _load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        if is_of_the_machine(error):
            raise
        raise _broken(path, str(error)) from error


def _broken(path: Path, reason: str) -> DamagedWeights:
    what = f"{path} cannot be used ({reason})"
    error = DamagedWeights(
        f"model=digits_dit: {what}; delete the folder {path.parent} and run again to train the "
        "model anew, or put an intact copy of the file there"
    )
    error.reason = what
    return error
