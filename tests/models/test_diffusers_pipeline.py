"""Text-to-image pipelines: loading, sampling, decoding, candidates, prompts, and what a broken checkpoint says."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import quantlab
from quantlab.backends.exclusions import kept_in_float32
from quantlab.datasets import prompts
from quantlab.errors import ConfigError, ModelError
from quantlab.metrics.trajectory import step_sqnr_db
from quantlab.models import diffusers_pipeline
from quantlab.models.defaults import FAMILY_EXCLUSIONS, default_exclusions
from quantlab.models.loaded import LoadedModel
from quantlab.models.pipeline_call import sample
from quantlab.modules.calls import per_sample, replayed_output
from quantlab.modules.layers import linear_layers, matches, resolve_exclusions, state_digest
from quantlab.planning.places import conf_dir
from quantlab.protocols import diffusion
from quantlab.vocabulary.schema import DatasetConfig, ModelConfig
from tests.support.tiny_pipelines import BUILDERS, SMALL

KINDS = list(BUILDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: build(root / kind) for kind, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {kind: load(folder, cache) for kind, folder in folders.items()}


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of the tiny Flux that a test may damage."""
    return shutil.copytree(folders["flux"], tmp_path / "broken")


def load(folder, cache, **settings):
    return diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(folder), **settings), "cpu", cache)


def inputs_of(model, evaluation=SMALL, **dataset):
    return prompts.load(DatasetConfig(name="prompts", **dataset), evaluation, model)


def made(model, inputs, evaluation=SMALL, on_step=None):
    return sample(model, inputs.noise, inputs.conditioning, evaluation, on_step)


def run(model, inputs, evaluation=SMALL, on_step=None):
    return made(model, inputs, evaluation, on_step).latents


def changed_denoiser(model, scale=1.2):
    name = model.parts["denoisers"][0]
    module = model.copy_of(name)
    with torch.no_grad():
        for layer in linear_layers(module).values():
            layer.weight.mul_(scale)
    return model.with_components({name: module})


# -- running


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_image_that_diffusers_gives_for_it(models, folders, tmp_path, kind, dtype):
    model = models[kind] if dtype == "float32" else load(folders[kind], tmp_path, dtype=dtype)
    inputs, states = inputs_of(model), []
    assert torch.equal(inputs.seeds, inputs.noise)
    found = made(model, inputs, on_step=lambda k, x: states.append((k, x.float())))
    assert found.latents.dtype == torch.float32
    assert [k for k, _ in states] == [0, 1]
    assert torch.equal(states[-1][1], found.latents)
    arguments = {
        "prompt": inputs.conditioning["prompt"],
        "height": 16,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    }
    for kind_of, expected in (("latent", found.latents), ("np", found.media["images"])):
        draws = [torch.Generator().manual_seed(int(seed)) for seed in inputs.noise]
        output = model.parts["pipeline"](**arguments, generator=draws, output_type=kind_of, return_dict=False)[0]
        assert torch.equal(torch.as_tensor(output).float(), expected)
    images = found.media["images"]
    assert images.shape == (3, 16, 32, 3)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_repeats_itself_and_batches_do_not_matter(models, kind):
    model = models[kind]
    inputs = inputs_of(model)
    whole = run(model, inputs)
    assert torch.equal(whole, run(model, inputs))
    parts = torch.cat([run(model, inputs.subset(rows)) for rows in ([0], [1, 2])])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_differs_and_leaves_the_reference_alone(models, kind):
    model = models[kind]
    inputs = inputs_of(model)
    before, digest = run(model, inputs), state_digest(model.components[model.parts["denoisers"][0]].state_dict())
    config = dict(model.parts["pipeline"].config)
    after = run(changed_denoiser(model), inputs)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert torch.equal(run(model, inputs), before)
    assert state_digest(model.components[model.parts["denoisers"][0]].state_dict()) == digest
    assert dict(model.parts["pipeline"].config) == config


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_16_bit_pipeline_a_wider_denoiser_starts_from_the_references_noise(folders, tmp_path, kind):
    model = load(folders[kind], tmp_path, dtype="bfloat16")
    inputs, name = inputs_of(model), model.parts["denoisers"][0]
    reference = run(model, inputs)
    wider = run(model.with_components({name: model.copy_of(name).float()}), inputs)
    assert 0 < (wider - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_in_bfloat16_runs_beside_float32_text_encoders(models, kind):
    model = models[kind]
    name = model.parts["denoisers"][0]
    inputs = inputs_of(model)
    reference = run(model, inputs)
    error = (run(model.with_components({name: model.copy_of(name).to(torch.bfloat16)}), inputs) - reference).norm()
    assert 1e-5 < error / reference.norm() < 0.1


def test_a_text_encoder_that_is_the_candidate_is_what_runs(folders, tmp_path):
    model = load(folders["flux"], tmp_path, components=["text_encoder_2"])
    assert set(model.components) == {"text_encoder_2", "transformer"}
    kept = kept_in_float32(model.components["text_encoder_2"])
    assert kept
    assert all(name.endswith(".wo") for name in kept)
    inputs = inputs_of(model)
    before = run(model, inputs)
    assert torch.equal(run(changed_denoiser(model, 1.0), inputs), before)
    encoder = model.copy_of("text_encoder_2")
    with torch.no_grad():
        encoder.shared.weight.mul_(2)
    assert not torch.equal(run(model.with_components({"text_encoder_2": encoder}), inputs), before)
    assert torch.equal(run(model, inputs), before)


def test_the_prompt_changes_the_image(models):
    model = models["sd3"]
    inputs = inputs_of(model)
    other = replace(inputs, conditioning={"prompt": ["two blue cubes"] * 3})
    assert not torch.equal(run(model, inputs), run(model, other))


def test_a_sampler_that_adds_noise_is_reproducible_and_independent_of_the_batch(models):
    from diffusers import EulerAncestralDiscreteScheduler

    model = models["sdxl"]
    pipe = copy.copy(model.parts["pipeline"])
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    model = replace(model, parts={**model.parts, "pipeline": pipe, "scheduler": pipe.scheduler})
    inputs = inputs_of(model)
    whole = run(model, inputs)
    assert torch.equal(whole, run(model, inputs))
    alone = run(model, inputs.subset([2]))
    torch.testing.assert_close(alone, whole[2:], rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_diffusion_protocol_compares_a_candidate_with_the_reference(models, kind):
    model = models[kind]
    inputs = inputs_of(model)
    seen = diffusion.observe(model, inputs, SMALL)
    assert seen["images"].shape == (3, 16, 32, 3)
    same = diffusion.measure(model, inputs, SMALL, seen, model)
    assert same.estimates["n_identical"].value == 3
    assert float(np.max(same.samples["latent_rel_mse"])) < 1e-9
    worse = diffusion.measure(changed_denoiser(model), inputs, SMALL, seen, model)
    assert float(np.min(worse.samples["latent_rel_mse"])) > 1e-6
    assert float(np.mean(worse.samples["psnr_db"])) < 99
    assert worse.steps["step_sqnr_db"].shape == worse.steps["step_divergence"].shape == (2,)
    assert worse.estimates["weighted_velocity_mse"].value > 0
    assert same.clusters.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_that_of_the_guided_velocity(models, kind):
    """By hand: Diffusers asks without the condition first, in one batch, and steps along u + s (c - u)."""
    model = models[kind]
    inputs = inputs_of(model)
    reference = diffusion.observe(model, inputs, SMALL)
    candidate = changed_denoiser(model)
    found = diffusion.measure(candidate, inputs, SMALL, reference, model)
    assert found.undefined == {}
    denoiser = candidate.components[candidate.parts["denoisers"][0]]
    for k, value in enumerate(found.steps["step_sqnr_db"]):
        guided = [[], []]
        for call in (c for c in reference["calls"] if c["step"] == k):
            num = call["stop"] - call["start"]
            for whose, answer in zip(guided, (replayed_output(denoiser, call, "cpu"), call["output"]), strict=True):
                parts = per_sample(answer.float(), num)
                u, c = parts[:, 0], parts[:, -1]
                whose.append(u + SMALL.guidance_scale * (c - u) if parts.shape[1] == 2 else u)
        expected = step_sqnr_db(*([torch.cat(part)] for part in guided))[0][0]
        assert value == pytest.approx(expected, abs=1e-3)


# -- sizes and noise


@pytest.mark.parametrize("size", [4, 20, 33])
def test_a_size_that_the_pipeline_would_round_is_refused(models, size):
    with pytest.raises(ConfigError, match=rf"^evaluation\.width={size}: .*multiples of 8; take \d+$"):
        run(models["flux"], inputs_of(models["flux"]), replace(SMALL, width=size))


# -- exclusions


@pytest.mark.parametrize("kind", KINDS)
def test_the_familys_exclusions_leave_the_blocks_to_be_quantized(models, kind):
    model = models[kind]
    name = model.parts["denoisers"][0]
    layers = linear_layers(model.components[name])
    entries = model.default_exclusions[name]
    excluded = resolve_exclusions(layers, entries, optional_entries=entries)
    kept = sum(layers[n].weight.numel() for n in layers if n not in excluded)
    assert excluded
    assert kept > 0.5 * sum(layer.weight.numel() for layer in layers.values())
    assert not [n for n in excluded if ".attn" in n or ".ff." in n]


@pytest.mark.parametrize("name", sorted(FAMILY_EXCLUSIONS))
def test_every_exclusion_names_a_part_of_that_class(name):
    import diffusers

    with torch.device("meta"):
        module = getattr(diffusers, name)(
            **(
                {
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 64,
                }
                if name == "UNet2DConditionModel"
                else {}
            )
        )
    paths = [path for path, _ in module.named_modules()]
    assert not [entry for entry in FAMILY_EXCLUSIONS[name] if not any(matches(entry, path) for path in paths)]


def test_of_another_denoiser_what_stands_outside_of_its_blocks_is_left_out():
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    with torch.device("meta"):
        wan, qwen = WanTransformer3DModel(num_layers=10), QwenImageTransformer2DModel(num_layers=4)
    assert default_exclusions(wan, is_denoiser=True) == ("condition_embedder", "proj_out")
    assert default_exclusions(qwen, ["re:x"], is_denoiser=True) == (
        "time_text_embed",
        "img_in",
        "txt_in",
        "norm_out",
        "proj_out",
        "re:x",
    )
    assert default_exclusions(wan) == ()
    head, blocks = torch.nn.Linear(64, 64), torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    mostly_outside = torch.nn.ModuleDict({"head": head, "blocks": blocks})
    assert default_exclusions(mostly_outside, is_denoiser=True) == ()


# -- identity


def test_the_digest_follows_the_weights_and_the_scheduler_and_not_the_place(folders, broken, tmp_path):
    digest = load(folders["flux"], tmp_path).weights_sha256
    assert load(broken, tmp_path).weights_sha256 == digest
    scheduler = broken / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "shift": 2.0}))
    changed = load(broken, tmp_path).weights_sha256
    assert digest.startswith("sha256:")
    assert changed != digest
    from safetensors.torch import load_file, save_file

    weights = broken / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    first = sorted(state)[0]
    save_file({**state, first: state[first] + 1}, weights, metadata={"format": "pt"})
    assert load(broken, tmp_path).weights_sha256 not in (digest, changed)


def test_progress_and_dtype(folders, tmp_path):
    seen = []
    config = ModelConfig(family="diffusers", path=str(folders["sd3"]), dtype="bfloat16", default_exclusions=["re:x"])
    model = diffusers_pipeline.load(config, "cpu", tmp_path, lambda *step: seen.append(step))
    assert seen[-1] == ("hash weights", len(seen), len(seen))
    assert model.dtype == "bfloat16"
    assert {p.dtype for p in model.components["transformer"].parameters()} == {torch.bfloat16}
    assert model.default_exclusions["transformer"][-1] == "re:x"
    images = made(model, inputs_of(model)).media["images"]
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


# -- what can be wrong


def test_a_loader_that_does_not_hear_the_dtype_is_told_from_the_weights(folders, tmp_path, monkeypatch):
    """Diffusers before 0.40 passed over ``dtype`` without a word, and gave float32."""
    from diffusers import DiffusionPipeline

    real = DiffusionPipeline.from_pretrained.__func__
    deaf = classmethod(lambda cls, folder, dtype, **more: real(cls, folder, **more))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", deaf)
    assert load(folders["sd3"], tmp_path).dtype == "float32"
    config = ModelConfig(family="diffusers", path=str(folders["sd3"]), dtype="bfloat16")
    message = r"^model\.dtype=bfloat16: Diffusers \S+ loaded \S+ in float32, .*; install diffusers>=0\.40"
    with pytest.raises(ModelError, match=message):
        diffusers_pipeline.load(config, "cpu", tmp_path)


def test_a_missing_path_says_where_to_look(tmp_path):
    for path in (str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(ModelError, match=r"^model\.path=.*nowhere: there is no such folder; name a local"):
            load(path, tmp_path)
    with pytest.raises(ModelError, match=r"^model\.path=null: .*give a local folder or a Hub id"):
        diffusers_pipeline.load(ModelConfig(family="diffusers"), "cpu", tmp_path)


def test_an_uncached_hub_id_offline_is_one_clear_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^model\.path=nobody/no-such-pipeline: it cannot be loaded .*Hub cache"):
        load("nobody/no-such-pipeline", tmp_path)


def test_a_folder_or_file_that_is_no_pipeline(folders, tmp_path):
    with pytest.raises(ModelError, match=r"^model\.path=.*has no model_index\.json.*save_pretrained wrote$"):
        load(folders["flux"] / "transformer", tmp_path)
    with pytest.raises(ModelError, match=r"^model\.path=.*this is a file; name the folder"):
        load(folders["flux"] / "model_index.json", tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"_class_name": 3}'])
def test_an_index_that_names_no_class_of_diffusers(broken, tmp_path, index):
    (broken / "model_index.json").write_text(index)
    with pytest.raises(ModelError, match=r"^model\.path=.*model_index\.json (cannot be read|names no pipeline class)"):
        load(broken, tmp_path)


def test_a_pipeline_class_that_does_not_exist(broken, tmp_path):
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelError, match=r"^model\.path=.*it cannot be loaded .*; check that the folder is complete"):
        load(broken, tmp_path)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_truncated_safetensors_file_is_named(broken, tmp_path, part):
    file = next((broken / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=rf"^model\.path=.*{part}/{file.name} is damaged or cut off .*again$"):
        load(broken, tmp_path)


def test_missing_weights_are_an_error_and_not_random(broken, tmp_path):
    from safetensors.torch import load_file, save_file

    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^model\.path=.*; .*(again|Diffusers)$"):
        load(broken, tmp_path)
    shutil.rmtree(broken / "vae")
    with pytest.raises(ModelError, match=r"^model\.path="):
        load(broken, tmp_path)


def test_an_unknown_component_or_dtype_names_what_there_is(folders, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^model\.components=transformers: FluxPipeline has text_encoder, "
        r"text_encoder_2, transformer, vae; did you mean transformer\?$",
    ):
        load(folders["flux"], tmp_path, components=["transformers"])
    with pytest.raises(ConfigError, match=r"^model\.dtype=bfloat: .*did you mean bfloat16\?$"):
        load(folders["flux"], tmp_path, dtype="bfloat")


# -- prompts


def test_the_shipped_prompts_are_64_different_lines():
    lines = prompts.read_prompts()
    assert len(lines) == len(set(lines)) == 64


def test_further_samples_are_replicas_and_noise_belongs_to_the_sample(models, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a red cube\n\n  a blue ball  \n")
    evaluation = replace(SMALL, num_samples=5)
    inputs = inputs_of(models["sd3"], evaluation, path=str(file))
    assert inputs.conditioning["prompt"] == ["a red cube", "a blue ball"] * 2 + ["a red cube"]
    assert inputs.clusters.tolist() == [0, 1, 0, 1, 0]
    assert inputs.sample_ids[4] == "prompt 0 replica 2"
    assert inputs.noise.dtype == torch.int64
    assert len(set(inputs.noise.tolist())) == 5
    file.write_text("a red cube\na blue ball\na third one\n")
    more = inputs_of(models["sd3"], replace(SMALL, num_samples=2), path=str(file))
    assert torch.equal(more.noise, inputs.noise[:2])
    other = inputs_of(models["sd3"], evaluation, path=str(file), seed=1)
    assert not torch.equal(other.noise[0], inputs.noise[0])
    assert int(inputs.noise[1]) == prompts.seed_of("mine", 1, 0, 0)


def test_files_without_prompts_and_models_without_them(models, tmp_path):
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*nowhere.txt: the file cannot be read .*shipped prompts$"):
        inputs_of(models["sd3"], path=str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*empty.txt: the file holds no prompt; write one"):
        inputs_of(models["sd3"], path=str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*not UTF-8"):
        inputs_of(models["sd3"], path=str(tmp_path / "latin.txt"))
    with pytest.raises(ConfigError, match=r"^evaluation\.num_samples=0: at least one"):
        inputs_of(models["sd3"], replace(SMALL, num_samples=0))
    with pytest.raises(ConfigError, match=r"^dataset=prompts: it is for pipelines of Diffusers, and digits is none"):
        inputs_of(LoadedModel(name="digits", protocol="diffusion", components={}))


# -- options


def composed(*words):
    return quantlab.compose(["backend=torchao", "dtype=int8", *words]).jobs[-1].config


@pytest.mark.parametrize("option", ["diffusers", "flux_dev", "flux_schnell", "sd35_medium", "sdxl"])
def test_the_model_options_compose(option):
    config = composed(f"model={option}")
    assert type(config.model) is ModelConfig
    assert config.model.family == "diffusers"
    assert (config.model.path is None) == (option == "diffusers")
    assert config.dataset.name == "prompts"
    assert config.evaluation.batch_size == 1
    assert (conf_dir() / "model" / f"{option}.yaml").read_text().startswith("# @package _global_\n# ")


def test_the_command_line_wins_over_a_models_option():
    config = composed("model=flux_dev", "evaluation.num_inference_steps=3", "model.path=mine", "dataset.path=my.txt")
    assert (config.evaluation.num_inference_steps, config.model.path, config.dataset.path) == (3, "mine", "my.txt")
