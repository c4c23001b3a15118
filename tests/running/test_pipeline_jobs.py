"""Whole jobs on pipelines that are not text to image: from words to tracked numbers, and what is refused before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from quantlab.tracking import find_runs
from tests.support.shell import Shell
from tests.support.stores import artifact
from tests.support.tiny_unets import ddpm, stable_diffusion_inpaint
from tests.support.tiny_videos import wan_2_2

SMALL = [
    "model=diffusers",
    "device=cpu",
    "backend=torchao",
    "evaluation.num_samples=2",
    "evaluation.num_inference_steps=3",
    "evaluation.num_teacher_forced=1",
    "evaluation.num_bootstrap=20",
    "sweep.floors=false",
]
WAN = [*SMALL, "model.path=wan", "evaluation.height=32", "evaluation.width=32", "evaluation.num_frames=5"]


def finished(rows):
    assert [row["status"] for row in rows.values()] == ["FINISHED"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline, which nobody writes into."""
    folder = tmp_path_factory.mktemp("weights") / "wan"
    wan_2_2().save_pretrained(folder)
    return folder


@pytest.fixture
def wan(shell: Shell, weights: Path) -> Shell:
    shutil.copytree(weights, shell.folder / "wan")
    return shell


@pytest.mark.slow
def test_two_denoisers_each_and_both_with_arguments_of_the_users(wan):
    both = [*WAN, "dtype=int8", "model.call.negative_prompt=ugly"]
    wan.rows(*both)
    first = wan.tracked()["torchao int8"]
    params, metrics = first["params"], first["metrics"]
    assert params["model.call.negative_prompt"] == "ugly"
    assert 40 < metrics["quality/frame_psnr_db"] < 100
    assert 0 < metrics["quality/temporal_rel_error"] < 0.1
    assert {"quality/step_sqnr_db", "quality/step_divergence"} <= set(metrics)
    layers = json.loads(artifact(wan.store, first["run_id"], "layers.json"))
    column = layers["columns"].index("component")
    assert {row[column] for row in layers["data"]} == {"transformer", "transformer_2"}
    finished(wan.rows(*WAN, "dtype=int8", "model.components=[transformer_2]", "model.call.negative_prompt=ugly"))
    wan.rows(*WAN, "dtype=int8", "model.call.negative_prompt=blurred")
    keys = [run["tags"]["quantlab.reference_key"] for run in find_runs(wan.store, status="FINISHED")]
    assert (len(keys), len(set(keys))) == (3, 2)  # which component is quantized does not change the reference


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.call.nagative_prompt=x"], "model.call.nagative_prompt: WanPipeline takes no such argument; did you"),
        (["model.call.height=64"], "model.call.height: a recipe says it elsewhere (set evaluation.height)"),
        (["model.call={generator: 3}"], "model.call.generator: a recipe says it elsewhere (dataset.seed gives it)"),
        (["dataset=classes"], "dataset=classes: WanPipeline takes no class_labels"),
        (["dataset=none", "model.components=[unet]"], "model.components=unet: WanPipeline has text_encoder, "),
        (["dataset=image_prompts"], "dataset.path=null: the pictures are of your own"),
    ],
)
def test_what_a_pipeline_has_not_is_refused_before_its_weights(wan, words, told):
    code, _, err = wan(*WAN, "dtype=int8", *words)
    assert code == 2
    assert f"quantlab: {told}" in err
    assert not list((wan.folder / "outputs").glob("runs/*"))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("evaluation.num_frames=7", "makes videos of another number of frames, 4 for each latent; take 5"),
        ("evaluation.num_frames=8", "makes videos of another number of frames, 4 for each latent; take 9"),
        ("model.call.num_frames=6", "makes videos of another number of frames, 4 for each latent; take 5"),
        ("evaluation.height=24", "makes images whose sides are multiples of 16; take 32"),
    ],
)
def test_a_size_that_is_rounded_is_refused_before_weights(wan, word, told):
    for file in wan.folder.glob("wan/*/*.safetensors"):
        file.write_bytes(b"")  # none of them is read
    key, _, value = word.partition("=")
    words = [w for w in WAN if not (key.startswith("model.call") and w.startswith("evaluation.num_frames"))]
    code, _, err = wan(*words, "dtype=int8", word)
    assert code == 2
    assert f"{key}={value}: WanPipeline {told}" in err


def test_a_folder_with_a_part_too_many_or_too_few(wan):
    index = wan.folder / "wan" / "model_index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({**whole, "unet": ["diffusers", "UNet2DModel"]}))
    assert "lists unet, which WanPipeline does not have" in wan(*WAN, "dtype=int8")[2]
    index.write_text(json.dumps({k: v for k, v in whole.items() if k != "vae"}))
    assert "WanPipeline needs vae, and model_index.json does not list it" in wan(*WAN, "dtype=int8")[2]
    index.write_text(json.dumps({**whole, "transformer_2": [None, None], "boundary_ratio": None}))
    finished(wan.rows(*WAN, "dtype=int8"))


@pytest.mark.slow
def test_noise_alone_and_pictures_with_masks(shell):
    ddpm().save_pretrained(shell.folder / "ddpm")
    code, _, err = shell(*SMALL, "model.path=ddpm", "dtype=int8")
    assert code == 2
    assert "dataset=prompts: DDPMPipeline takes no prompt" in err
    finished(shell.rows(*SMALL, "model.path=ddpm", "dataset=none", "dtype=int8"))
    stable_diffusion_inpaint().save_pretrained(shell.folder / "sd")
    (shell.folder / "set").mkdir()
    Image.new("RGB", (32, 32), (200, 90, 10)).save(shell.folder / "set" / "a.png")
    words = [*SMALL, "model.path=sd", "dataset=image_prompts", "dataset.path=set", "dtype=int8"]
    code, _, err = shell(*words)
    assert code == 2
    assert "dataset=image_prompts: StableDiffusionInpaintPipeline needs mask_image, which it does not give" in err
    Image.new("L", (32, 32), 255).save(shell.folder / "set" / "a.mask.png")
    (shell.folder / "set" / "a.txt").write_text("a field")
    finished(shell.rows(*words))
