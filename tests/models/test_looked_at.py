"""What is known of a pipeline before its weights are there: of a folder, and of a Hub id by its configurations."""

from __future__ import annotations

import json
import shutil

import pytest

from quantlab.datasets.table import check_call
from quantlab.errors import ConfigError, MissingPackage, ModelError
from quantlab.models import diffusers_pipeline
from quantlab.models.architectures import read_architecture
from quantlab.models.beforehand import stored_configs
from quantlab.models.pipeline_files import listed_parts
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ExperimentConfig, ModelConfig
from tests.support import tiny_images, tiny_unets, tiny_videos
from tests.support.hub import local_hub

UNSIZED = EvaluationConfig(height=None, width=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {
        "wan": tiny_videos.wan_2_1(),
        "cogvideox": tiny_videos.cogvideox(),
        "ltx": tiny_videos.ltx(),
        "hunyuan_video": tiny_videos.hunyuan_video(),
        "inpaint": tiny_unets.stable_diffusion_inpaint(),
        "sana": tiny_images.sana(),
        "kandinsky_2_2": tiny_unets.kandinsky_2_2(),
    }
    folder = tmp_path_factory.mktemp("pipelines")
    for name, pipe in made.items():
        pipe.save_pretrained(folder / name)
        for weights in (folder / name).glob("*/*.safetensors"):
            weights.write_bytes(b"none of this is read")
    return {name: folder / name for name in made}


def test_tiles_are_refused_where_no_decoder_makes_them(folders):
    tiled = EvaluationConfig(height=None, width=None, tiled_decoding=True)
    look(folders["wan"], tiled)
    with pytest.raises(ConfigError, match=r"^evaluation\.tiled_decoding=true: KandinskyV22\w+ has no decoder"):
        look(folders["kandinsky_2_2"], tiled)
    with pytest.raises(ConfigError, match=r"^evaluation\.tiled_decoding=true: models of family digits_dit"):
        check_call(ExperimentConfig(evaluation=tiled))


def look(path, evaluation=UNSIZED, **config):
    return diffusers_pipeline.look(ModelConfig(family="diffusers", path=str(path), **config), evaluation)


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("wan", {"num_frames": 7}, "num_frames=7: .* 4 for each latent; take 5"),
        ("wan", {"height": 24}, "height=24: .*multiples of 16"),
        ("ltx", {"width": 40}, "width=40: .*divisible by 32"),
        ("ltx", {"num_frames": 12}, "num_frames=12: .*take 13"),
        ("cogvideox", {"num_frames": 5}, "num_frames=5: .*take"),
        ("hunyuan_video", {"width": 40}, "width=40: .*divisible by 16 but are 32 and 40"),
        ("hunyuan_video", {"num_frames": 8}, "num_frames=8: .*take 9"),
        ("kandinsky_2_2", {"height": 66}, "height=66: .*multiples of "),
        ("sana", {"height": 40}, "height=40: .*divisible by 32"),
    ],
)
def test_a_size_that_a_pipeline_rounds_or_refuses_is_known_of_its_configurations(folders, name, sizes, told):
    with pytest.raises(ConfigError, match=rf"^evaluation\.{told}"):
        look(folders[name], EvaluationConfig(**{"height": 32, "width": 32, **sizes}))


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("wan", 5),
        ("wan", 81),
        ("ltx", 9),
        ("cogvideox", 9),
        ("hunyuan_video", 5),
        ("sana", None),
        ("kandinsky_2_2", None),
    ],
)
def test_a_size_that_it_makes_is_taken(folders, name, frames):
    look(folders[name], EvaluationConfig(height=64, width=96, num_frames=frames))


def test_the_key_is_that_by_which_the_user_said_it(folders):
    with pytest.raises(ConfigError, match=r"^model\.call\.num_frames=6: WanPipeline"):
        look(folders["wan"], call={"num_frames": 6})


def test_files_of_a_variant_alone_name_it(folders, tmp_path):
    """As they are published that are in 16 bits only."""
    folder = shutil.copytree(folders["sana"], tmp_path / "p")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(ConfigError, match=r"^model\.variant: all files .* variant \(fp16\); set model\.variant=fp16$"):
        look(folder)
    look(folder, variant="fp16")


def test_a_hub_id_is_looked_at_by_its_configurations_alone(folders, tmp_path, monkeypatch):
    def check(evaluation=UNSIZED, dataset="prompts", **config):
        model = ModelConfig(family="diffusers", path="some/wan", **config)
        check_call(ExperimentConfig(model=model, dataset=DatasetConfig(name=dataset), evaluation=evaluation))

    with local_hub({"some/wan": folders["wan"]}, tmp_path, monkeypatch) as fetched:
        check()
        with pytest.raises(ConfigError, match="^dataset=classes: WanPipeline takes no class_labels"):
            check(dataset="classes")
        with pytest.raises(ConfigError, match=r"^model\.call\.negative_promt: .*did you mean negative_prompt"):
            check(call={"negative_promt": ""})
        with pytest.raises(ConfigError, match=r"^model\.components=unet: WanPipeline has"):
            check(components=["unet"])
        with pytest.raises(ConfigError, match=r"^model\.variant=fp16: no weight file"):
            check(variant="fp16")
        with pytest.raises(ConfigError, match=r"^evaluation\.num_frames=7: WanPipeline"):
            check(EvaluationConfig(height=32, width=32, num_frames=7))
        with pytest.raises(
            ModelError, match=r"^model\.path=some/other: it cannot be had from the Hub .*check the name"
        ):
            look("some/other")
    assert fetched
    assert all(name.endswith(".json") for name in fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert look("some/nothing") is None  # loading says so


def test_a_part_whose_class_wants_a_package_is_told_before_weights(folders, tmp_path, monkeypatch):
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer", "processor")
    write_index(tmp_path, "QwenImageEditPipeline", parts, {"processor": ["transformers", "Qwen2VLProcessor"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage) as caught:
        look(tmp_path)
    assert str(caught.value).startswith(f"model.path={tmp_path}: its processor, a Qwen2VLProcessor, needs the package")
    assert "pip install torchvision" in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert look(tmp_path).__name__ == "QwenImageEditPipeline"


def test_a_setting_that_is_a_list_is_no_part():
    said = {
        "_class_name": "SomePipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "select_layers": [2, 5],
        "taps": [1, 2, 3],
        "names": ["a", "b", "c"],
        "nothing": [],
    }
    assert listed_parts(said) == {"vae": ("diffusers", "AutoencoderKL"), "image_encoder": (None, None)}


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("Krea2Pipeline", {"text_encoder_select_layers": [1, 2]}),
        ("Krea2Pipeline", {"text_encoder_select_layers": [2, 5, 8]}),
        ("LongCatAudioDiTPipeline", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}),
    ],
)
def test_what_diffusers_keeps_as_a_setting_is_in_no_folder_of_its_own(tmp_path, name, index):
    parts = [part for part in ("vae", "text_encoder", "tokenizer", "transformer", "scheduler") if part not in index]
    write_index(tmp_path, name, parts, index)
    assert look(tmp_path, EvaluationConfig(height=64, width=64)).__name__ == name
    read_architecture(ModelConfig(family="diffusers", path=str(tmp_path)))
    stored_configs(ModelConfig(family="diffusers", path=str(tmp_path)))


def test_a_pipeline_without_steps_is_told_before_weights(tmp_path):
    write_index(tmp_path, "LTXLatentUpsamplePipeline", ["vae", "latent_upsampler"])
    with pytest.raises(ModelError, match=r"^model\.path=.*: LTXLatentUpsamplePipeline has no scheduler.* name a pipe"):
        look(tmp_path, EvaluationConfig(height=64, width=64))


def write_index(folder, name, parts, index=()):
    for part in parts:
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    said = (
        {"_class_name": name} | {part: ["diffusers", "FlowMatchEulerDiscreteScheduler"] for part in parts} | dict(index)
    )
    (folder / "model_index.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("wuerstchen", r"PaellaVQModel of wuerstchen, .*diffusers\.pipelines\.deprecated\.wuerstchen.*"),
        ("diffusers", r"PaellaVQModel of diffusers, and .* does not have it"),
    ],
)
def test_a_part_that_diffusers_ships_and_does_not_find_is_told_before_weights(folders, tmp_path, module, told):
    """Of Stable Cascade and Wuerstchen: as the Hub has them, and as Diffusers itself saves them now."""
    folder = shutil.copytree(folders["kandinsky_2_2"], tmp_path / "cascade")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "movq": [module, "PaellaVQModel"]}))
    told = rf"^model\.path={folder}: model_index\.json names the class {told}.*quantlab\.evaluate in Python$"
    with pytest.raises(ModelError, match=told):
        look(folder)
    with pytest.raises(ModelError, match=told):
        read_architecture(ModelConfig(family="diffusers", path=str(folder)))
