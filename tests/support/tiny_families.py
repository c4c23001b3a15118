"""The table of pipelines that the contract is tried on: how each is built, called and fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.datasets.table import DATASETS
from quantlab.models import diffusers_pipeline
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ModelConfig
from tests.support import tiny_images as images
from tests.support import tiny_unets as unets
from tests.support import tiny_videos as videos
from tests.support.tiny_ideogram import ideogram_4

SETTINGS = EvaluationConfig(
    num_samples=2,
    batch_size=2,
    num_inference_steps=3,
    guidance_scale=3.0,
    height=32,
    width=32,
    num_teacher_forced=2,
    num_bootstrap=20,
)
UNSIZED = {"height": None, "width": None}


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """One row: what its users say to the pipeline, and what comes out."""

    build: Callable[[], Any]
    dataset: str = "prompts"
    mask: bool = False
    """The pipeline takes a mask with its picture."""
    prompt: bool = True
    call: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    exclusions: tuple[str, ...] = ()
    """Layers that are not quantized: a parent reads their weights."""
    pads: bool = False
    """Prompts are padded to the longest of their batch, and attended to with it: the batch is part of the result."""
    medium: str = "images"

    @property
    def settings(self) -> EvaluationConfig:
        return replace(SETTINGS, **self.evaluation)


NO_BINS = {"use_resolution_binning": False}
FAMILIES: dict[str, TinyFamily] = {
    "stable_diffusion": TinyFamily(build=unets.stable_diffusion, call={"negative_prompt": "blurred"}),
    "sdxl": TinyFamily(build=unets.sdxl),
    "sd3": TinyFamily(build=images.sd3),
    "flux": TinyFamily(build=images.flux),
    "flux_kontext": TinyFamily(
        build=images.flux_kontext, dataset="image_prompts", call={"max_area": 32 * 32, "_auto_resize": False}
    ),
    "flux_fill": TinyFamily(build=images.flux_fill, dataset="image_prompts", mask=True),
    "flux_control": TinyFamily(build=images.flux_control, dataset="image_prompts"),
    "flux2_klein": TinyFamily(
        build=images.flux2_klein, call={"max_sequence_length": 32, "text_encoder_out_layers": [1]}
    ),
    "flux2_klein_edit": TinyFamily(
        build=images.flux2_klein,
        dataset="image_prompts",
        call={"max_sequence_length": 32, "text_encoder_out_layers": [1]},
        evaluation={"height": 64, "width": 64},
    ),
    "qwen_image": TinyFamily(build=images.qwen_image, call={"negative_prompt": "", "true_cfg_scale": 4.0}),
    "qwen_image_edit": TinyFamily(
        build=images.qwen_image_edit,
        dataset="image_prompts",
        call={"negative_prompt": "", "true_cfg_scale": 4.0},
        evaluation={"num_samples": 1, "batch_size": 1},
    ),
    "z_image": TinyFamily(build=images.z_image),
    "pixart_sigma": TinyFamily(build=images.pixart_sigma, call=NO_BINS),
    "sana": TinyFamily(build=images.sana, call={**NO_BINS, "complex_human_instruction": None}),
    "lumina2": TinyFamily(build=images.lumina2, evaluation={"width": 128}),  # its guidance has a norm for each row
    "hunyuan_dit": TinyFamily(build=images.hunyuan_dit, call=NO_BINS, exclusions=("time_extra_emb",)),
    "cogview4": TinyFamily(build=images.cogview4, pads=True),
    "chroma": TinyFamily(build=images.chroma),
    "aura_flow": TinyFamily(build=images.aura_flow),
    "ideogram_4": TinyFamily(build=ideogram_4, call={"guidance_schedule": None, "max_sequence_length": 128}),
    "kandinsky_2_2": TinyFamily(build=unets.kandinsky_2_2, evaluation={"height": 64, "width": 64}),
    "stable_diffusion_pag": TinyFamily(build=unets.stable_diffusion_pag, call={"pag_scale": 2.0}),
    "text_to_video": TinyFamily(build=unets.text_to_video, evaluation={"num_frames": 3}, medium="frames"),
    "stable_diffusion_img2img": TinyFamily(
        build=unets.stable_diffusion_img2img, dataset="image_prompts", call={"strength": 0.7}
    ),
    "stable_diffusion_inpaint": TinyFamily(build=unets.stable_diffusion_inpaint, dataset="image_prompts", mask=True),
    "instruct_pix2pix": TinyFamily(
        build=unets.instruct_pix2pix, dataset="image_prompts", call={"image_guidance_scale": 1.5}
    ),
    "ddpm": TinyFamily(build=unets.ddpm, dataset="none", evaluation=UNSIZED),
    "dit": TinyFamily(build=images.dit, dataset="classes", evaluation=UNSIZED),
    "wan_2_1": TinyFamily(build=videos.wan_2_1, evaluation={"num_frames": 5}, medium="frames"),
    "wan_2_2": TinyFamily(build=videos.wan_2_2, evaluation={"num_frames": 5}, medium="frames"),
    "wan_image_to_video": TinyFamily(
        build=videos.wan_image_to_video, dataset="image_prompts", evaluation={"num_frames": 5}, medium="frames"
    ),
    "ltx": TinyFamily(build=videos.ltx, evaluation={"num_frames": 9}, medium="frames"),
    "ltx_image_to_video": TinyFamily(
        build=videos.ltx_image_to_video, dataset="image_prompts", evaluation={"num_frames": 9}, medium="frames"
    ),
    "cogvideox": TinyFamily(
        build=videos.cogvideox,
        call={"max_sequence_length": 16},
        evaluation={"num_frames": 9, "height": 16, "width": 16},
        medium="frames",
    ),
    "hunyuan_video": TinyFamily(
        build=videos.hunyuan_video,
        call={"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16},
        evaluation={"num_frames": 5},
        medium="frames",
    ),
    "stable_audio": TinyFamily(
        build=videos.stable_audio, call={"audio_end_in_s": 0.2}, evaluation=UNSIZED, medium="audio"
    ),
}
QUICK = ("stable_diffusion", "wan_2_2", "dit", "stable_audio")
"""What the default tier tries: a UNet, two denoisers, a class, sound."""


def write_pictures(folder: Path, mask: bool, prompt: bool = True) -> Path:
    """Two photographs of scikit-image, with prompts and masks where they are wanted."""
    import numpy as np
    from PIL import Image
    from skimage import data

    folder.mkdir()
    for name, pixels in (("astronaut", data.astronaut()), ("coffee", data.coffee())):
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"{name}.png")
        if prompt:
            (folder / f"{name}.txt").write_text(f"the {name} in red\n")
        if mask:
            half = np.zeros((48, 64), np.uint8)
            half[:, 32:] = 255
            Image.fromarray(half).save(folder / f"{name}.mask.png")
    return folder


def family_model(name: str, folder: Path, dtype: str = "auto") -> tuple[LoadedModel, DiffusionInputs]:
    """The family's tiny pipeline, written to ``folder`` and loaded as a checkpoint is, and what it is sampled from."""
    row = FAMILIES[name]
    pipe = row.build()
    pipe.save_pretrained(folder / name)
    config = ModelConfig(
        family="diffusers",
        path=str(folder / name),
        dtype=dtype,
        call=dict(row.call),
        default_exclusions=list(row.exclusions),
    )
    assert diffusers_pipeline.look(config, row.settings) is type(pipe)
    model = diffusers_pipeline.load(config, "cpu", folder / "cache")
    pictures = row.dataset == "image_prompts"
    path = str(write_pictures(folder / "pictures", row.mask, row.prompt)) if pictures else None
    return model, DATASETS[row.dataset].load(DatasetConfig(name=row.dataset, path=path), row.settings, model)
