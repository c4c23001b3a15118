"""What a pipeline is given: classes, noise alone, pictures with prompts; and what of it is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from quantlab.datasets import image_prompts, prompts, unprompted
from quantlab.datasets.calibration import calibration_inputs, check_calibration
from quantlab.datasets.table import check_file
from quantlab.errors import ConfigError
from quantlab.models import pipeline_call
from quantlab.models.loaded import LoadedModel
from quantlab.models.pipeline_call import check_conditions
from quantlab.vocabulary.schema import (
    CalibrationConfig,
    DatasetConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
)
from tests.support.tiny_families import write_pictures

FOUR = EvaluationConfig(num_samples=4, height=32, width=48)


class Editing:
    def __call__(self, image=None, prompt=None, generator=None): ...


class Inpainting:
    def __call__(self, prompt=None, image=None, mask_image=None, strength=0.8, generator=None): ...


class Guided:
    def __call__(self, prompt=None, control_image=None, generator=None): ...


class GuidedInpainting:
    def __call__(self, prompt=None, control_image=None, control_mask=None, generator=None): ...


class GuidedEditing:
    def __call__(self, prompt=None, image=None, control_image=None, strength=0.6, generator=None): ...


class Seeing:
    def __call__(self, image, generator=None): ...


class OfVideo:
    def __call__(self, video=None, prompt=None, strength=0.8, generator=None): ...


class OfItsVideo:
    def __call__(self, video, prompt=None, image=None, generator=None): ...


class Enlarging:
    def __call__(self, video=None, latents=None, generator=None): ...


class OfFrames:
    def __call__(self, prompt=None, conditioning_frames=None, generator=None): ...


class OfGuidingVideo:
    def __call__(self, prompt=None, control_video=None, control_video_latents=None, generator=None): ...


class OfSound:
    def __call__(self, prompt=None, audio=None, generator=None): ...


class Inverting:
    def __call__(self, editing_prompt=None, generator=None): ...
    def invert(self, image): ...


class WithOrWithoutVideo:
    def __call__(self, prompt=None, image=None, video=None, generator=None): ...


class OfClasses:
    def __call__(self, class_labels, generator=None): ...


class OfNoise:
    def __call__(self, batch_size=1, generator=None): ...


def model_of(pipeline, **config):
    denoiser = SimpleNamespace(config=config)
    return LoadedModel(
        name="tiny",
        protocol="diffusion",
        components={"unet": denoiser},
        parts={"pipeline": pipeline(), "denoisers": ("unet",)},
    )


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", mask=False)


def load(path, model=None, evaluation=FOUR):
    return image_prompts.load(
        DatasetConfig(name="image_prompts", path=None if path is None else str(path)),
        evaluation,
        model or model_of(Editing),
    )


def test_pictures_and_their_prompts(folder):
    inputs = load(folder)
    assert inputs.conditioning["prompt"] == ["the astronaut in red", "the coffee in red"] * 2
    assert inputs.sample_ids[2] == "astronaut.png replica 1"
    assert inputs.clusters.tolist() == [0, 1, 0, 1]
    assert {tuple(p.shape) for p in inputs.conditioning["image"]} == {(32, 48, 3)}
    assert inputs.conditioning["image"][0].dtype == torch.uint8
    assert inputs.one_at_a_time
    assert len(set(inputs.noise.tolist())) == 4
    assert inputs.sha256 == load(folder).sha256
    other = {**inputs.conditioning, "image": [p + 1 for p in inputs.conditioning["image"]]}
    assert replace(inputs, conditioning=other).sha256 != inputs.sha256
    assert inputs.subset([3]).conditioning["prompt"] == ["the coffee in red"]


def test_a_picture_is_cut_around_its_middle_and_stands_upright(tmp_path):
    tmp_path.joinpath("set").mkdir()
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    upright = Image.fromarray(wide)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    upright.save(tmp_path / "set" / "a.jpg", exif=exif)
    found = load(tmp_path / "set", evaluation=replace(FOUR, num_samples=1, height=40, width=40))
    assert "prompt" not in found.conditioning
    assert abs(found.conditioning["image"][0].float().mean() - 200) < 5
    open_size = load(tmp_path / "set", evaluation=replace(FOUR, num_samples=1, height=None, width=None))
    assert tuple(open_size.conditioning["image"][0].shape) == (120, 40, 3)


def test_lines_name_pictures_prompts_and_masks(folder):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(folder / "all.png")
    lines = [{"image": "coffee.png", "prompt": "a cup", "mask": "all.png"}]
    file = folder / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    inputs = load(file, model_of(Inpainting), replace(FOUR, num_samples=2))
    assert inputs.conditioning["prompt"] == ["a cup"] * 2
    assert tuple(inputs.conditioning["mask"][0].shape) == (32, 48, 1)
    assert image_prompts.conditions(str(file)) == ("image", "prompt", "mask_image")


def test_masks_beside_pictures(tmp_path):
    inputs = load(write_pictures(tmp_path / "p", mask=True), model_of(Inpainting))
    assert set(inputs.conditioning) == {"image", "prompt", "mask"}
    assert inputs.conditioning["mask"][0].unique().tolist() == [0, 255] or inputs.conditioning["mask"][0].max() == 255


def test_a_picture_guides_where_a_pipeline_starts_from_none(folder):
    assert set(load(folder, model_of(Guided)).conditioning) == {"image", "prompt"}
    with pytest.raises(ConfigError, match=r"^dataset=image_prompts: .*needs control_image.*with control pictures$"):
        load(folder, model_of(GuidedEditing))
    for name in ("astronaut", "coffee"):
        Image.new("RGB", (64, 48), "red").save(folder / f"{name}.control.PNG")
    inputs = load(folder, model_of(GuidedEditing))
    assert set(inputs.conditioning) == {"image", "prompt", "control"}
    assert inputs.num_samples == 4
    assert inputs.conditioning["control"][3][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ConfigError, match=r"^dataset=image_prompts: .*takes no control_image .*take the control_ima"):
        load(folder)
    (folder / "coffee.control.PNG").unlink()
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*coffee\.png has no control, and 1 of 2 have one"):
        load(folder, model_of(GuidedEditing))
    file = folder / "mine.jsonl"
    file.write_text(json.dumps({"image": "coffee.png", "prompt": "a", "control": "astronaut.control.PNG"}))
    assert image_prompts.conditions(str(file)) == ("image", "prompt", "control_image")


def test_a_mask_guides_where_a_pipeline_starts_from_no_picture(folder, tmp_path):
    for pipeline, name in ((GuidedInpainting, "control_mask"), (Inpainting, "mask_image")):
        with pytest.raises(ConfigError, match=rf"^dataset=image_prompts: .* needs {name}, .*image_prompts, with masks"):
            load(folder, model_of(pipeline))
    inputs = load(write_pictures(tmp_path / "p", mask=True), model_of(GuidedInpainting))
    known = pipeline_call.parameters_of(GuidedInpainting)
    model = SimpleNamespace(parts={})
    given = pipeline_call._arguments(model, GuidedInpainting(), inputs.noise[:1], inputs.subset([0]).conditioning, FOUR)
    assert {"control_image", "control_mask"} <= set(given) <= set(known)


@pytest.mark.parametrize("pipeline", [Guided, GuidedEditing])
def test_a_pipeline_that_is_guided_by_a_picture_is_given_one(pipeline):
    with pytest.raises(ConfigError, match=r"^dataset=prompts: \w+ needs \w*image, .*choose dataset=image_prompts"):
        prompts.load(DatasetConfig(name="prompts"), FOUR, model_of(pipeline))


def test_prompts_are_taken_out_where_none_is_taken(folder):
    with pytest.raises(ConfigError, match=r"^dataset=image_prompts: Seeing takes no prompt .*take the prompts out"):
        load(folder, model_of(Seeing))


def broken(folder, how):
    if how == "empty":
        return folder.parent
    if how == "not a picture":
        (folder / "coffee.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    elif how == "cut off":
        file = folder / "coffee.png"
        file.write_bytes(file.read_bytes()[:300])
    elif how == "a prompt is missing":
        (folder / "coffee.txt").unlink()
    elif how == "no text":
        (folder / "coffee.txt").write_bytes(b"\xff\xfe\x00")
    else:
        file = folder / "mine.jsonl"
        file.write_text(
            {
                "no JSON": "{",
                "a list": "[1]",
                "no image": '{"prompt": "a"}',
                "another key": '{"image": "coffee.png", "promt": "a"}',
                "outside": '{"image": "../coffee.png"}',
                "absolute": '{"image": "/coffee.png"}',
                "nowhere": '{"image": "tea.png"}',
                "no line": "\n",
            }[how]
        )
        return file
    return folder


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("empty", "no picture is in it"),
        ("not a picture", "coffee.png cannot be read as a picture"),
        ("cut off", "coffee.png cannot be read as a picture"),
        ("a prompt is missing", "coffee.png has no prompt, and 1 of 2 have one; give each"),
        ("no text", "NUL|not UTF-8"),
        ("no JSON", "line 1 is no JSON"),
        ("a list", "line 1 is not like"),
        ("no image", "line 1 is not like"),
        ("another key", "line 1 has promt; did you mean prompt"),
        ("outside", "not below the file's folder"),
        ("absolute", "not below the file's folder"),
        ("nowhere", "tea.png cannot be read"),
        ("no line", "no picture is in it"),
    ],
)
def test_what_cannot_be_used_is_named(folder, how, told):
    path = broken(folder, how)
    with pytest.raises(ConfigError, match=rf"^dataset\.path=.*({told})"):
        image_prompts.read(str(path))


def test_no_path_and_pictures_of_two_sizes(folder):
    with pytest.raises(ConfigError, match=r"^dataset\.path=null: the pictures are of your own; name a folder"):
        load(None)
    Image.new("RGB", (20, 20)).save(folder / "coffee.png")
    with pytest.raises(ConfigError, match=r"of 2 sizes, .*; set evaluation\.height and evaluation\.width$"):
        load(folder, evaluation=replace(FOUR, height=None, width=None))


# -- classes and noise alone


def test_classes_are_spread_over_those_that_the_model_knows():
    config = DatasetConfig(name="classes")
    few = unprompted.load_classes(config, FOUR, model_of(OfClasses, num_embeds_ada_norm=1000))
    assert few.conditioning == {"class_label": [0, 250, 500, 750]}
    many = unprompted.load_classes(config, replace(FOUR, num_samples=7), model_of(OfClasses, num_class_embeds=3))
    assert many.conditioning["class_label"] == [0, 1, 2, 0, 1, 2, 0]
    assert many.clusters.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert many.sample_ids[3] == "class 0 replica 1"
    assert len(set(many.noise.tolist())) == 7
    with pytest.raises(ConfigError, match=r"^dataset=classes: .* does not say how many classes"):
        unprompted.load_classes(config, FOUR, model_of(OfClasses))


def test_noise_alone():
    inputs = unprompted.load_none(DatasetConfig(name="none"), FOUR, model_of(OfNoise))
    assert inputs.conditioning == {}
    assert inputs.clusters is None
    assert len(set(inputs.noise.tolist())) == 4
    other = unprompted.load_none(DatasetConfig(name="none", seed=1), FOUR, model_of(OfNoise))
    assert not set(other.noise.tolist()) & set(inputs.noise.tolist())


# -- what fits what


@pytest.mark.parametrize(
    ("make", "pipeline", "told"),
    [
        (unprompted.load_none, OfClasses, "dataset=none: OfClasses needs class_labels, .*; choose dataset=classes$"),
        (unprompted.load_none, Inpainting, "dataset=none: Inpainting needs image, .*; choose dataset=image_prompts$"),
        (unprompted.load_classes, OfNoise, "dataset=classes: OfNoise takes no class_labels .* choose dataset=none$"),
        (unprompted.load_classes, Editing, "dataset=classes: Editing takes no class_labels .*dataset=image_prompts$"),
    ],
)
def test_a_data_set_that_a_pipeline_cannot_use(make, pipeline, told):
    name = told.split(":")[0].removeprefix("dataset=")
    with pytest.raises(ConfigError, match=f"^{told}"):
        make(DatasetConfig(name=name), FOUR, model_of(pipeline, num_classes=3))


def test_calibration_may_not_look_at_the_evaluations_pictures(folder, tmp_path):
    model, seen = model_of(Editing), load(folder)
    config = CalibrationConfig(source="image_prompts", path=str(folder), num_samples=2, seed=5)
    for name in ("astronaut", "coffee"):
        (folder / f"{name}.txt").write_text(f"another prompt for the {name}")
    with pytest.raises(
        ConfigError, match=r"^calibration\.source=image_prompts: it shares pictures with the evaluation"
    ):
        calibration_inputs(config, FOUR, model, seen)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (40, 40), (10, 200, 30)).save(other / "green.png")
    (other / "green.txt").write_text("paint it blue")
    found = calibration_inputs(replace(config, path=str(other)), FOUR, model, seen)
    assert found.num_samples == 2


@pytest.mark.parametrize(
    ("lines", "num", "told"),
    [
        ("a fox\na hen\n", 8, "8 samples of 2 different prompts: .*of 2 different prompts there is no interval"),
        ("a fox\na fox\n", 2, "2 samples of 1 different prompt: .*set evaluation.num_samples=1$"),
        ("\n".join(map(str, range(6))), 12, "12 samples of 6 different prompts: .*intervals are over the 6 different"),
        ("a fox\na hen\n", 2, ""),
    ],
)
def test_samples_beyond_the_prompts_are_told_before_anything_is_loaded(tmp_path, capsys, lines, num, told):
    (tmp_path / "prompts.txt").write_text(lines)
    config = ExperimentConfig(
        model=ModelConfig(family="diffusers", path="nowhere"),
        dataset=DatasetConfig(name="prompts", path=str(tmp_path / "prompts.txt")),
        evaluation=EvaluationConfig(num_samples=num),
    )
    check_file(config)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"dataset.path=\S+: {told}", said) if told else not said


def test_one_prompt_on_two_lines_is_one_cluster_and_so_is_one_picture(tmp_path, folder):
    (tmp_path / "prompts.txt").write_text("a fox\na hen\na fox\n")
    config = DatasetConfig(name="prompts", path=str(tmp_path / "prompts.txt"))
    inputs = prompts.load(config, EvaluationConfig(num_samples=6), model_of(Editing))
    assert inputs.clusters.tolist() == [0, 1, 0, 0, 1, 0]
    assert len(set(inputs.noise.tolist())) == 6
    lines = [{"image": "coffee.png", "prompt": p} for p in ("red", "blue")]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load(folder / "set.jsonl").clusters.tolist() == [0, 0, 0, 0]


def test_too_few_pictures_or_pairs_are_refused_before_anything_is_loaded(tmp_path, folder):
    def check(name, path, num):
        model = ModelConfig(family="vision", path="nowhere")
        dataset = DatasetConfig(name=name, path=str(path))
        check_file(ExperimentConfig(model=model, dataset=dataset, evaluation=EvaluationConfig(num_samples=num)))

    check("images", folder, 2)
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*: there are 2 pictures and not evaluation.num_samples=3"):
        check("images", folder, 3)
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}')
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*: there are 1 pairs and not evaluation.num_samples=3"):
        check("pairs", tmp_path / "pairs.jsonl", 3)
    calibration = CalibrationConfig(source="images", path=str(folder), num_samples=16)
    with pytest.raises(
        ConfigError, match=r"^calibration\.path=.*: there are 2 pictures and not calibration.num_samples"
    ):
        check_calibration(ExperimentConfig(model=ModelConfig(family="vision", path="nowhere"), calibration=calibration))


@pytest.mark.parametrize("dataset", [(), ("prompt",), ("image", "prompt")])
@pytest.mark.parametrize(
    ("pipeline", "needs"),
    [
        (OfVideo, "a video"),
        (Enlarging, "a video"),
        (OfItsVideo, "a video"),
        (OfFrames, "a video that guides it"),
        (OfGuidingVideo, "a video that guides it"),
        (OfSound, "sound"),
        (Inverting, "the inversion of a picture"),
    ],
)
def test_what_no_data_set_gives_is_refused_before_weights(pipeline, needs, dataset):
    with pytest.raises(ConfigError, match=f"^model.path: {pipeline.__name__} starts from {needs}.*quantlab.evaluate"):
        check_conditions(pipeline, "prompts", dataset, {})


def test_what_can_do_without_a_video_is_run():
    check_conditions(WithOrWithoutVideo, "prompts", ("prompt",), {})
    check_conditions(WithOrWithoutVideo, "image_prompts", ("image", "prompt"), {})


@pytest.mark.parametrize(
    ("name", "is_run"),
    [
        *dict.fromkeys(
            ("WanVideoToVideoPipeline", "VideoToVideoSDPipeline", "LTXLatentUpsamplePipeline"), False
        ).items(),
        *dict.fromkeys(("LEditsPPPipelineStableDiffusion", "AnimateDiffControlNetPipeline"), False).items(),
        *dict.fromkeys(("KandinskyV22Pipeline", "StableCascadeDecoderPipeline", "WanAnimatePipeline"), False).items(),
        *dict.fromkeys(("PaintByExamplePipeline", "KandinskyV22ControlnetPipeline"), False).items(),
        *dict.fromkeys(("VisualClozePipeline", "VisualClozeGenerationPipeline"), False).items(),
        *dict.fromkeys(("LTX2VideoDiffusionDecodePipeline", "IFImg2ImgSuperResolutionPipeline"), False).items(),
        *dict.fromkeys(
            ("WanPipeline", "HeliosPipeline", "CosmosVideoToWorldPipeline", "AnyFlowPipeline"), True
        ).items(),
        *dict.fromkeys(
            ("EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline", "StableAudioPipeline"), True
        ).items(),
    ],
)
def test_the_pipelines_of_diffusers_are_told_apart(name, is_run):
    import diffusers

    pipeline = getattr(diffusers, name)
    if is_run:
        return check_conditions(pipeline, "prompts", ("prompt",), {})
    with pytest.raises(ConfigError, match=r"^model\.path: .* starts from"):
        check_conditions(pipeline, "prompts", (), {})


@pytest.mark.parametrize("name", ["StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline"])
def test_what_its_call_needs_beside_a_prompt_is_asked_for_before_weights(name):
    import diffusers

    pipeline, given = getattr(diffusers, name), {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    with pytest.raises(ConfigError, match=r"needs gligen_boxes, which .*; give it by model\.call\.gligen_boxes$"):
        check_conditions(pipeline, "prompts", ("prompt",), {"gligen_phrases": ["a cat"]})
    check_conditions(pipeline, "prompts", ("prompt",), given)


@pytest.mark.parametrize(
    ("name", "is_run"),
    [
        *dict.fromkeys(
            ("StableCascadePriorPipeline", "KandinskyPriorPipeline", "KandinskyV22PriorPipeline"), False
        ).items(),
        *dict.fromkeys(("StableCascadeCombinedPipeline", "ShapEPipeline", "UnCLIPPipeline"), True).items(),
        *dict.fromkeys(("KandinskyV22CombinedPipeline", "StableUnCLIPPipeline", "DDPMPipeline"), True).items(),
    ],
)
def test_pipelines_that_make_what_others_start_from_are_refused_before_weights(name, is_run):
    import diffusers

    pipeline, given = getattr(diffusers, name), () if name == "DDPMPipeline" else ("prompt",)
    if is_run:
        return check_conditions(pipeline, "prompts", given, {})
    with pytest.raises(ConfigError, match=rf"^model\.path: {name} makes embeddings .*; name a pipeline that"):
        check_conditions(pipeline, "prompts", given, {})
