"""The digits model: training, its cache, its data set."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlab.datasets import digits_classes
from quantlab.errors import ConfigError, ModelError
from quantlab.models import digits_dit
from quantlab.models.digits_training import build_transformer, digits, train_denoiser
from quantlab.models.judge import judge_features_and_logits, train_judge
from quantlab.modules.layers import state_digest
from quantlab.vocabulary.schema import DatasetConfig, DigitsModelConfig, EvaluationConfig

TINY = DigitsModelConfig(num_train_steps=8, train_batch_size=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(cache folder, model, progress calls) of one training through the front door."""
    cache, calls = tmp_path_factory.mktemp("cache"), []
    model = digits_dit.load(TINY, "cpu", cache, lambda *call: calls.append(call))
    return cache, model, calls


@pytest.fixture
def copied_cache(trained, tmp_path):
    """A cache of one's own to damage, and the folder of the tiny model in it."""
    shutil.copytree(trained[0], tmp_path / "cache")
    return tmp_path / "cache", tmp_path / "cache" / "models" / digits_dit.cache_key(TINY)


def inputs_of(model, num_samples=10, seed=0):
    return digits_classes.load(DatasetConfig(seed=seed), EvaluationConfig(num_samples=num_samples), model)


# -- training and cache


@pytest.mark.slow
def test_training_reports_each_step_and_a_cache_hit_reports_none(trained):
    cache, model, calls = trained
    steps = [(done, total) for what, done, total in calls if what == "train digits_dit"]
    assert steps == [(k, 8) for k in range(1, 9)]

    again = digits_dit.load(TINY, "cpu", cache, lambda *call: pytest.fail(f"trained again: {call}"))
    assert again.weights_sha256 == model.weights_sha256


def test_cache_holds_the_three_files_and_nothing_unfinished(trained):
    cache, model, _ = trained
    folders = [p for p in (cache / "models").iterdir() if p.is_dir()]
    assert [p.name for p in folders] == [digits_dit.cache_key(TINY)]
    assert {p.name for p in folders[0].iterdir()} == {"model.safetensors", "judge.safetensors", "meta.json"}
    meta = json.loads((folders[0] / "meta.json").read_text())
    assert meta["weights_sha256"] == model.weights_sha256
    assert meta["judge_accuracy"] > 0.9
    assert meta["seconds"] > 0
    assert set(meta["versions"]) == {"torch", "diffusers", "scikit-learn"}


def test_same_seed_same_weights_and_the_global_random_state_is_untouched():
    images, labels, *_ = digits()
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    with torch.inference_mode():  # a caller's mode must not matter
        first = train_denoiser(images, labels, TINY)
        judge = train_judge(images[:64], labels[:64], seed=0, num_epochs=1)
    assert torch.equal(torch.rand(3), expected)

    torch.manual_seed(7)
    second = train_denoiser(images, labels, TINY)
    other = train_denoiser(images, labels, dataclasses.replace(TINY, train_seed=1))
    assert state_digest(first.state_dict()) == state_digest(second.state_dict())
    assert state_digest(first.state_dict()) != state_digest(other.state_dict())
    assert state_digest(judge.state_dict()) == state_digest(
        train_judge(images[:64], labels[:64], seed=0, num_epochs=1).state_dict()
    )


@pytest.mark.parametrize(
    "change", [{"num_train_steps": 9}, {"train_batch_size": 17}, {"train_seed": 1}, {"num_layers": 2}, {"num_heads": 4}]
)
def test_what_determines_the_weights_changes_the_key(change):
    assert digits_dit.cache_key(dataclasses.replace(TINY, **change)) != digits_dit.cache_key(TINY)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"default_exclusions": ["proj_out_2"]}])
def test_what_does_not_determine_the_weights_keeps_the_key(change):
    assert digits_dit.cache_key(dataclasses.replace(TINY, **change)) == digits_dit.cache_key(TINY)


def test_null_class_is_trained_for_all_blocks_at_once():
    model = build_transformer(num_layers=2, num_heads=2)
    tables = [block.norm1.emb.class_embedder for block in model.transformer_blocks]
    assert [t.embedding_table.num_embeddings for t in tables] == [11, 11]
    assert [t.dropout_prob for t in tables] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["model.safetensors", "judge.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent", "empty"])
def test_damaged_file_is_named_with_the_way_out(copied_cache, name, damage):
    cache, folder = copied_cache
    file = folder / name
    data = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        changed = {"truncated": data[:-100], "flipped": data[:-1] + bytes([data[-1] ^ 0x40]), "empty": b""}
        file.write_bytes(changed[damage])
    with pytest.raises(ModelError, match="^model=digits_dit: .*delete the folder") as caught:
        digits_dit.load(TINY, "cpu", cache)
    assert str(file) in str(caught.value)


def test_weights_of_another_shape_are_refused(copied_cache):
    cache, folder = copied_cache
    shutil.copy(folder / "judge.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match="model.safetensors"):
        digits_dit.load(TINY, "cpu", cache)


def test_two_files_restore_the_model_elsewhere(trained, tmp_path):
    cache, model, _ = trained
    for name in ("model.safetensors", "judge.safetensors"):
        shutil.copy(cache / "models" / digits_dit.cache_key(TINY) / name, tmp_path / name)
    restored = digits_dit.load_cached(tmp_path)
    assert restored.weights_sha256 == model.weights_sha256

    by_path = DigitsModelConfig(path=str(tmp_path), revision=model.weights_sha256)
    assert digits_dit.load(by_path, "cpu", tmp_path / "unused").weights_sha256 == model.weights_sha256
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ModelError, match="^model.revision=sha256:0: "):
        digits_dit.load(dataclasses.replace(by_path, revision="sha256:0"), "cpu", tmp_path)


def test_loaded_model_in_bfloat16_takes_and_keeps_its_own_dtype(trained):
    cache, model, _ = trained
    half = digits_dit.load(dataclasses.replace(TINY, dtype="bfloat16", default_exclusions=["proj_out_2"]), "cpu", cache)
    assert {p.dtype for p in half.components["transformer"].parameters()} == {torch.bfloat16}
    assert half.weights_sha256 != model.weights_sha256
    assert half.default_exclusions == {"transformer": ("proj_out_2",)}
    inputs = inputs_of(half)
    latents = half.sample(half, inputs.noise, inputs.conditioning, EvaluationConfig(num_inference_steps=2)).latents
    assert (latents.dtype, tuple(latents.shape)) == (torch.float32, (10, 1, 8, 8))


def test_unknown_dtype_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"^model.dtype=bfloat: .*did you mean bfloat16\?"):
        digits_dit.load(dataclasses.replace(TINY, dtype="bfloat"), "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_at_once_train_once(trained, tmp_path, monkeypatch):
    trained_folder = trained[0] / "models" / digits_dit.cache_key(TINY)
    trainings = []

    def slow_training(folder, config, progress):
        trainings.append(folder)
        time.sleep(0.3)
        shutil.copytree(trained_folder, folder)

    monkeypatch.setattr(digits_dit, "_train_into", slow_training)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: digits_dit.load(TINY, "cpu", tmp_path), range(2)))
    assert len(trainings) == 1
    assert [m.weights_sha256 for m in models] == [trained[1].weights_sha256] * 2


def test_killed_training_is_no_cache_hit_and_leaves_no_rest(trained, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "models" / digits_dit.cache_key(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(digits_dit, "_write_weights", killed)
        patch.setattr(digits_dit, "train_judge", lambda *_, **__: trained[1].parts["judge"])
        with pytest.raises(KeyboardInterrupt):
            digits_dit.load(TINY, "cpu", tmp_path)
        assert not folder.exists()
    monkeypatch.setattr(digits_dit, "train_judge", lambda *_, **__: trained[1].parts["judge"])
    assert digits_dit.load(TINY, "cpu", tmp_path).weights_sha256 == trained[1].weights_sha256
    assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]


# -- sampling


def test_sampling_calls_the_denoiser_with_labels_and_null_labels(trained):
    _, model, _ = trained
    seen, steps = [], []
    handle = model.components["transformer"].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(args[0]), kwargs["class_labels"].tolist())), with_kwargs=True
    )
    inputs = inputs_of(model)
    try:
        for scale in (1.5, 1.0):
            config = EvaluationConfig(num_inference_steps=3, guidance_scale=scale)
            model.sample(model, inputs.noise, inputs.conditioning, config, lambda *step: steps.append(step))
    finally:
        handle.remove()
    labels = list(range(10))
    assert seen == [(20, labels + [10] * 10)] * 3 + [(10, labels)] * 3
    assert [(k, tuple(latents.shape)) for k, latents in steps] == [(k, (10, 1, 8, 8)) for k in (0, 1, 2, 0, 1, 2)]


def test_each_step_derives_the_noise_from_the_clipped_image(trained):
    """DDIM by hand, with guidance so strong that images leave [-1, 1] and are clipped."""
    _, model, _ = trained
    inputs, scale = inputs_of(model), 40.0
    config = EvaluationConfig(num_inference_steps=5, guidance_scale=scale)
    kept = model.parts["scheduler"].alphas_cumprod
    labels = torch.tensor(inputs.conditioning["class_label"])
    x, num_clipped = inputs.noise, 0
    with torch.no_grad():
        for t in (999, 799, 599, 399, 199):
            v, null_v = (
                model.components["transformer"](x, timestep=torch.full((10,), t), class_labels=c).sample
                for c in (labels, torch.full((10,), 10))
            )
            image = kept[t].sqrt() * x - (1 - kept[t]).sqrt() * (null_v + scale * (v - null_v))
            num_clipped += int((image.abs() > 1).sum())
            image = image.clamp(-1, 1)
            noise = (x - kept[t].sqrt() * image) / (1 - kept[t]).sqrt()
            then = kept[t - 200] if t > 200 else torch.tensor(1.0)
            x = then.sqrt() * image + (1 - then).sqrt() * noise
    assert num_clipped > 100
    sampled = model.sample(model, inputs.noise, inputs.conditioning, config).latents
    torch.testing.assert_close(sampled, x, atol=1e-3, rtol=0)


def test_decode_gives_images_in_the_unit_range():
    latents = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).repeat(64)[: 2 * 64].reshape(2, 1, 8, 8)
    images = digits_dit.decode(latents)
    assert tuple(images.shape) == (2, 8, 8, 1)
    assert images.flatten()[:5].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


# -- the data set


@pytest.mark.parametrize(("num", "near"), [(15, "10 or 20"), (199, "190 or 200"), (5, "10"), (0, "10")])
def test_uneven_number_of_samples_is_refused(trained, num, near):
    with pytest.raises(ConfigError, match=f"^evaluation.num_samples={num}: .*such as {near}$"):
        inputs_of(trained[1], num)


def test_model_that_draws_no_digits_is_refused(trained):
    with pytest.raises(ConfigError, match="^dataset=digits_classes: .*use model=digits_dit"):
        inputs_of(dataclasses.replace(trained[1], name="diffusers"))


def test_noise_of_a_sample_depends_on_class_replica_and_seed_alone(trained):
    few, many, other = inputs_of(trained[1], 10), inputs_of(trained[1], 30), inputs_of(trained[1], 30, seed=1)
    assert torch.equal(many.noise[:10], few.noise)
    assert many.sample_ids[:10] == few.sample_ids
    assert not torch.equal(many.noise, other.noise)
    assert len({n.numpy().tobytes() for n in many.noise}) == 30
    assert many.noise.dtype == torch.float32
    assert abs(float(many.noise.std()) - 1) < 0.1


def test_classes_are_even_and_are_the_strata(trained):
    inputs = inputs_of(trained[1], 30)
    assert [inputs.conditioning["class_label"].count(c) for c in range(10)] == [3] * 10
    assert inputs.strata.tolist() == inputs.conditioning["class_label"]
    assert inputs.clusters is None
    assert len(set(inputs.sample_ids)) == 30


def test_digest_sees_noise_and_conditions(trained):
    inputs = inputs_of(trained[1], 20)
    assert inputs.sha256 == inputs_of(trained[1], 20).sha256
    assert inputs.subset(slice(0, 10)).sha256 == inputs_of(trained[1], 10).sha256
    relabelled = dataclasses.replace(inputs, conditioning={"class_label": [0] * 20})
    assert len({inputs.sha256, relabelled.sha256, inputs_of(trained[1], 20, seed=1).sha256}) == 3


# -- the judge


def test_judge_reads_held_out_digits(trained):
    *_, held_out, labels = digits()
    features, logits = judge_features_and_logits(trained[1].parts["judge"], held_out)
    assert features.shape == (360, 64)
    assert logits.shape == (360, 10)
    assert (logits.argmax(1) == labels.numpy()).mean() > 0.9


@pytest.mark.slow
def test_full_training_draws_the_digits_that_are_asked_for(tmp_path_factory):
    """The shipped recipe: 500 steps, then 200 samples with 20 steps at guidance 1.5 (about two minutes on one core)."""
    model = digits_dit.load(DigitsModelConfig(), "cpu", tmp_path_factory.mktemp("cache"))
    evaluation = EvaluationConfig(num_samples=200, num_inference_steps=20, guidance_scale=1.5)
    inputs = digits_classes.load(DatasetConfig(), evaluation, model)
    images = model.sample(model, inputs.noise, inputs.conditioning, evaluation).media["images"]
    _, logits = judge_features_and_logits(model.parts["judge"], images)
    accuracy = (logits.argmax(1) == torch.tensor(inputs.conditioning["class_label"]).numpy()).mean()
    assert accuracy >= 0.95
