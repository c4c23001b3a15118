"""The diffusion protocol on a tiny digits model: exact on itself, worse with every planted fault, loud on NaN."""

from __future__ import annotations

import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch

from quantlab.datasets import digits_classes
from quantlab.errors import ConfigError, MetricUndefined, ModelError
from quantlab.metrics import METRICS
from quantlab.metrics.trajectory import step_sqnr_db
from quantlab.models import digits_dit
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import per_sample, recorded_calls, replayed_output
from quantlab.protocols import diffusion
from quantlab.protocols.teacher_forced import integration_levels
from quantlab.vocabulary.schema import DatasetConfig, DigitsModelConfig, EvaluationConfig
from tests.support.shell import TINY

EVALUATION = EvaluationConfig(
    num_samples=20, batch_size=8, num_inference_steps=4, num_teacher_forced=12, num_bootstrap=50
)
NUM_BATCHES = 3  # 12 traced samples in two batches, 8 others in one


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory) -> LoadedModel:
    cache = shutil.copytree(trained, tmp_path_factory.mktemp("diffusion") / "cache")
    return digits_dit.load(DigitsModelConfig(**TINY), "cpu", cache)


@pytest.fixture(scope="module")
def inputs(model):
    """Class by class, so that the traced samples are not the first ones."""
    loaded = digits_classes.load(DatasetConfig(), EVALUATION, model)
    return loaded.subset(np.argsort(loaded.strata, kind="stable"))


@pytest.fixture(scope="module")
def reference(model, inputs):
    """As it comes back from disk."""
    file = io.BytesIO()
    torch.save(diffusion.observe(model, inputs, EVALUATION), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_changed_weight(model: LoadedModel, change) -> LoadedModel:
    transformer = model.copy_of("transformer")
    weight = transformer.transformer_blocks[0].ff.net[2].weight
    with torch.no_grad():
        change(weight)
    return model.with_components({"transformer": transformer})


def made_of(model: LoadedModel, change):
    """The model's sampler, with its images changed (None: there are none)."""

    def sample(*arguments):
        sampled = model.sample(*arguments)
        images = change(sampled.media["images"])
        return dataclasses.replace(sampled, media={} if images is None else {"images": images})

    return sample


# -- the reference


def test_reference_tree_has_every_sample_and_each_traced_call(model, inputs, reference):
    assert tuple(reference["latents"].shape) == (20, 1, 8, 8)
    assert tuple(reference["images"].shape) == (20, 8, 8, 1)
    assert reference["images"].dtype == torch.uint8
    assert tuple(reference["steps"].shape) == (4, 12, 1, 8, 8)
    traced = reference["step_indices"]
    assert torch.equal(reference["steps"][-1], reference["latents"][traced])
    assert [(c["step"], c["start"], c["stop"]) for c in reference["calls"]] == [
        *((k, 0, 8) for k in range(4)),
        *((k, 8, 12) for k in range(4)),
    ]
    first = reference["calls"][0]
    assert torch.equal(first["args"][0], inputs.noise[traced[:8]].repeat(2, 1, 1, 1))
    labels = [inputs.conditioning["class_label"][i] for i in traced[:8]]
    assert first["kwargs"]["class_labels"].tolist() == labels + [10] * 8
    assert tuple(first["output"].shape) == (16, 1, 8, 8)
    assert reference["timings_ms"]["denoise_step_ms"] > 0


def test_rows_stand_in_the_order_of_the_samples_whatever_the_batches(model, inputs, reference):
    assert reference["step_indices"].tolist() == [0, 1, 2, 4, 6, 8, 10, 11, 12, 14, 16, 18]
    for i in (0, 5, 6, 19):
        one = inputs.subset([i])
        alone = model.sample(model, one.noise, one.conditioning, EVALUATION)
        torch.testing.assert_close(reference["latents"][[i]], alone.latents, atol=1e-4, rtol=1e-4)
        shown = (alone.media["images"] * 255).round()
        torch.testing.assert_close(reference["images"][[i]].float(), shown, atol=1, rtol=0)


def test_equal_inputs_of_following_calls_are_stored_once(reference):
    labels = [c["kwargs"]["class_labels"] for c in reference["calls"][:4]]
    assert len({t.data_ptr() for t in labels}) == 1
    assert len({c["args"][0].data_ptr() for c in reference["calls"][:4]}) == 4


def test_nothing_is_recorded_without_traced_samples(model, inputs):
    config = dataclasses.replace(EVALUATION, num_teacher_forced=0)
    tree = diffusion.observe(model, inputs, config)
    assert {"steps", "calls"}.isdisjoint(tree)
    measured = diffusion.measure(model, inputs, config, tree, model)
    assert measured.steps == {}
    assert "weighted_velocity_mse" not in measured.estimates
    assert (measured.samples["latent_rel_mse"] == 0).all()


@pytest.mark.parametrize(
    ("strata", "clusters", "num", "expected"),
    [
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], None, 5, [0, 1, 3, 4, 6]),
        (None, [0, 0, 1, 1, 2, 2], 3, [0, 2, 4]),
        (None, list(range(8)), 4, [0, 2, 4, 6]),  # as prompts are: each its own cluster, and those alike side by side
        (None, [0, 1, 2, 3, 0, 1, 2, 3], 2, [0, 2]),
        ([0, 1, 2, 3, 0, 1, 2, 3], None, 6, [0, 1, 2, 3, 4, 6]),
        (None, None, 3, [0, 3, 6]),
        (None, None, 99, list(range(9))),
        (None, None, 0, []),
    ],
)
def test_traced_samples_spread_over_the_strata(strata, clusters, num, expected):
    n = len(strata or clusters or range(9))
    inputs = diffusion.DiffusionInputs(
        noise=torch.zeros(n, 1), conditioning={}, sample_ids=tuple("abcdefghi"[:n]), strata=strata, clusters=clusters
    )
    assert diffusion.spread(inputs, num) == expected


def test_runs_that_traced_other_samples_are_not_compared():
    """Raise the versions when ``spread`` takes others: runs are comparable by these, and the numbers are of few samples."""
    traced = {name: METRICS[name].version for name in ("step_sqnr_db", "step_divergence", "weighted_velocity_mse")}
    assert traced == {"step_sqnr_db": 3, "step_divergence": 2, "weighted_velocity_mse": 4}, "of evenly spaced samples"


def test_a_model_that_does_not_repeat_itself_is_refused(model, inputs):
    """Noise that no sample's generator gives would count as an error of every candidate."""

    def sample(*arguments):
        sampled = model.sample(*arguments)
        return dataclasses.replace(sampled, latents=sampled.latents + 1e-6 * torch.randn(sampled.latents.shape))

    with pytest.raises(
        ModelError, match=r"^model=digits_dit: run twice .* differs from itself \(latents\), .*take device"
    ):
        diffusion.observe(dataclasses.replace(model, sample=sample), inputs, EVALUATION)


# -- the candidates


@pytest.mark.parametrize("batch_size", [None, 5])
def test_reference_against_itself_is_exact(model, inputs, reference, batch_size):
    measured = diffusion.measure(model, inputs, EVALUATION, reference, model, batch_size=batch_size)
    tolerance = 0 if batch_size is None else 1e-6  # another batch size may round otherwise
    assert measured.samples["latent_rel_mse"].max() <= tolerance
    assert measured.steps["step_divergence"].max() <= tolerance
    assert (measured.steps["step_sqnr_db"] == 100).all()
    assert measured.estimates["weighted_velocity_mse"].value == 0
    np.testing.assert_allclose(measured.samples["latent_cosine"], 1, atol=1e-12)
    if batch_size is None:
        assert (measured.samples["psnr_db"] == 100).all()
        assert measured.estimates["n_identical"].value == 20
        assert measured.estimates["frechet_judge"].value == pytest.approx(0, abs=1e-9)
        assert (measured.samples["judge_agreement"] == 1).all()
        assert not measured.images[:, 2].any()


def test_every_sample_metric_has_one_finite_value_a_sample(model, inputs, reference):
    candidate = model.with_components({"transformer": model.copy_of("transformer").to(torch.bfloat16)})
    measured = diffusion.measure(candidate, inputs, EVALUATION, reference, model)
    images = {"psnr_db", "image_mse", "class_accuracy", "judge_agreement"}
    assert set(measured.samples) == images | {"latent_rel_mse", "latent_cosine"}
    for values in measured.samples.values():
        assert values.shape == (20,)
        assert np.isfinite(values).all()
    assert measured.samples["latent_rel_mse"].min() > 0
    assert {k: v.shape for k, v in measured.steps.items()} == {"step_sqnr_db": (4,), "step_divergence": (4,)}
    assert measured.estimates["weighted_velocity_mse"].n == 12
    assert (measured.images.shape, measured.images.dtype) == ((8, 3, 8, 8, 1), np.uint8)
    assert measured.sample_ids == inputs.sample_ids
    assert measured.image_ids == tuple(inputs.sample_ids[i] for i in diffusion.spread(inputs, 8))


def test_larger_perturbation_of_one_weight_is_worse_in_every_view(model, inputs, reference):
    found = [
        diffusion.measure(
            with_changed_weight(model, lambda w, s=scale: w.add_(s * torch.eye(*w.shape))),
            inputs,
            EVALUATION,
            reference,
            model,
        )
        for scale in (0.01, 0.1, 1.0)
    ]
    errors = [m.samples["latent_rel_mse"].mean() for m in found]
    assert 0 < errors[0] < errors[1] < errors[2]
    signal = np.array([m.steps["step_sqnr_db"] for m in found])
    assert (signal[0] < 100).all()
    assert (np.diff(signal, axis=0) < 0).all()
    velocity = [m.estimates["weighted_velocity_mse"].value for m in found]
    assert 0 < velocity[0] < velocity[1] < velocity[2]
    drift = np.array([m.steps["step_divergence"] for m in found])
    assert (np.diff(drift, axis=0) > 0).all()


def test_difference_image_is_four_times_the_difference(model, inputs, reference):
    candidate = with_changed_weight(model, lambda w: w.mul_(1.5))
    shown = diffusion.measure(candidate, inputs, EVALUATION, reference, model).images.astype(int)
    assert (shown[:, 2] == np.minimum(4 * abs(shown[:, 1] - shown[:, 0]), 255)).all()
    assert shown[:, 2].any()


def test_nan_weight_names_sample_and_step(model, inputs, reference):
    broken = with_changed_weight(model, lambda w: w.fill_(float("nan")))
    expected = "^sample digit 0 replica 0: the latent after step 0 of 4 is NaN"
    with pytest.raises(MetricUndefined, match=expected) as caught:
        diffusion.measure(broken, inputs, EVALUATION, reference, model)
    said = str(caught.value)  # of the reference and of casts: what a scheme overflows in is told by its own message
    assert "model.dtype=bfloat16" in said
    assert "compute_dtype" not in said


def test_nan_that_only_the_replay_meets_names_sample_and_step(model, inputs, reference):
    calls = [dict(c) for c in reference["calls"]]
    spoiled = calls[5]["args"][0].clone()  # step 1 of the second traced batch
    spoiled[2] = float("inf")
    calls[5]["args"] = [spoiled]
    name = inputs.sample_ids[int(reference["step_indices"][8 + 2])]
    found = diffusion.measure(model, inputs, EVALUATION, {**reference, "calls": calls}, model)
    assert set(found.undefined) == {"step_sqnr_db", "weighted_velocity_mse"}
    for said in found.undefined.values():
        assert said.endswith("or a wider dtype")
        assert f"sample {name}: the denoiser's output at step 1 is NaN" in said
    assert set(found.steps) == {"step_divergence"}
    assert (found.samples["latent_rel_mse"] == 0).all()


def test_progress_counts_steps_over_batches_and_replayed_calls(model, inputs, reference):
    seen: list[tuple[int, int]] = []
    diffusion.observe(model, inputs, EVALUATION, lambda *p: seen.append(p))
    assert seen == [(k, 4 * NUM_BATCHES) for k in range(1, 4 * NUM_BATCHES + 1)]
    seen.clear()
    diffusion.measure(model, inputs, EVALUATION, reference, model, lambda *p: seen.append(p))
    total = 4 * NUM_BATCHES + len(reference["calls"])
    assert seen == [(k, total) for k in range(1, total + 1)]


def test_model_without_decoder_or_judge_has_latent_metrics_only(model, inputs):
    parts = {k: v for k, v in model.parts.items() if k != "judge"}
    bare = dataclasses.replace(model, sample=made_of(model, lambda images: None), parts=parts)
    tree = diffusion.observe(bare, inputs, EVALUATION)
    assert "images" not in tree
    measured = diffusion.measure(bare, inputs, EVALUATION, tree, bare)
    assert set(measured.samples) == {"latent_rel_mse", "latent_cosine"}
    assert measured.images is None


def test_structural_similarity_from_eleven_pixels_on(model, inputs):
    large = dataclasses.replace(model, sample=made_of(model, lambda images: images.repeat(1, 2, 2, 1)))
    tree = diffusion.observe(large, inputs, EVALUATION)
    no_judge = dataclasses.replace(large, parts={k: v for k, v in model.parts.items() if k != "judge"})
    assert diffusion.measure(large, inputs, EVALUATION, tree, no_judge).samples["ssim"] == pytest.approx(1)


# -- recording and replay


class Denoiser(torch.nn.Module):
    """Takes and returns what pipelines' denoisers do, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x, *, timestep, extra=None):
        x.mul_(self.scale)
        return (x + timestep.to(x.dtype).reshape(-1, 1), extra)


def test_record_is_the_input_before_the_call_and_survives_replays():
    denoiser, x = Denoiser(), torch.ones(2, 3)
    with recorded_calls(denoiser) as calls, torch.no_grad():
        output, _ = denoiser(x, timestep=torch.tensor([5.0, 7.0]), extra={"ids": (torch.zeros(2), None, "a", 1, True)})
    assert torch.equal(calls[0]["args"][0], torch.ones(2, 3))
    for _ in range(2):
        assert torch.equal(replayed_output(denoiser, calls[0], "cpu"), output)
    denoiser(torch.ones(1, 3), timestep=torch.tensor([1.0]))
    assert len(calls) == 1


def test_a_list_is_one_tensor_a_sample_and_a_controlnets_one_a_level():
    class Levels(torch.nn.Linear):
        def forward(self, x, sizes):
            return {"down": [torch.full((size,), float(size)) for size in sizes], "mid": x}

    network, x = Levels(1, 1), torch.ones(1)
    with recorded_calls(network) as calls:
        network(x, [2, 2])
        network(x, [4, 2])
    assert [call["output"].tolist() for call in calls] == [[[2, 2], [2, 2]], [4, 4, 4, 4]]


def test_replay_casts_inputs_of_the_compute_dtype_but_no_timesteps():
    denoiser, seen = Denoiser(), {}
    with recorded_calls(denoiser) as calls, torch.no_grad():
        denoiser(torch.ones(2, 3), timestep=torch.tensor([999.0, 981.0]), extra=torch.ones(2, 3, dtype=torch.float64))
    half = Denoiser().to(torch.bfloat16)
    half.register_forward_pre_hook(
        lambda _, a, k: seen.update(x=a[0].dtype, **{n: v.dtype for n, v in k.items()}), with_kwargs=True
    )
    assert replayed_output(half, calls[0], "cpu").dtype == torch.float32
    assert seen == {"x": torch.bfloat16, "timestep": torch.float32, "extra": torch.float64}


def test_input_that_cannot_be_stored_is_refused_and_the_hooks_are_gone_after():
    denoiser = Denoiser()
    with pytest.raises(ConfigError, match="takes a object.*num_teacher_forced=0"), recorded_calls(denoiser):
        denoiser(torch.ones(1, 3), timestep=torch.tensor([1.0]), extra=object())
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks


def test_guided_outputs_belong_to_their_samples():
    output = torch.arange(6.0).reshape(6, 1)  # two conditions of three samples
    assert per_sample(output, 3)[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(MetricUndefined, match="6 rows for 4 samples.*num_teacher_forced=0"):
        per_sample(output, 4)


def test_two_calls_a_step_count_as_one_prediction(model, inputs, reference):
    """Pipelines that call the denoiser once with and once without the condition give the same numbers."""
    apart = []
    for call in reference["calls"]:
        for half in (0, 1):
            rows = slice(half * len(call["output"]) // 2, (half + 1) * len(call["output"]) // 2)
            kwargs = {k: v[rows] for k, v in call["kwargs"].items()}
            apart.append({**call, "args": [call["args"][0][rows]], "kwargs": kwargs, "output": call["output"][rows]})
    candidate = with_changed_weight(model, lambda w: w.mul_(1.5))
    together, split = (
        diffusion.measure(candidate, inputs, EVALUATION, tree, model).steps["step_sqnr_db"]
        for tree in (reference, {**reference, "calls": apart})
    )
    np.testing.assert_allclose(split, together, rtol=1e-4)


def test_teacher_forced_curve_is_that_of_the_denoiser_by_hand(model, inputs, reference):
    candidate = with_changed_weight(model, lambda w: w.mul_(1.5))
    measured = diffusion.measure(candidate, inputs, EVALUATION, reference, model)
    call = [c for c in reference["calls"] if c["step"] == 2]
    with torch.no_grad():
        rows = [candidate.components["transformer"](c["args"][0], **c["kwargs"]).sample for c in call]
    guided = [[], []]
    for answers in zip(rows, (c["output"] for c in call), strict=True):
        for whose, answer in zip(guided, answers, strict=True):
            labelled, null = answer.chunk(2)
            whose.append(null + EVALUATION.guidance_scale * (labelled - null))
    expected = step_sqnr_db(*([torch.cat(part)] for part in guided))[0][0]
    assert measured.steps["step_sqnr_db"][2] == pytest.approx(expected, abs=1e-4)
    apart = step_sqnr_db([torch.cat(rows)], [torch.cat([c["output"] for c in call])])[0][0]
    assert abs(measured.steps["step_sqnr_db"][2] - apart) > 0.1  # dB: it is not that of the two predictions


# -- the weights of the velocity error


def test_levels_predict_the_effect_of_a_velocity_error_on_a_ddim_step(model):
    """For v-prediction a step turns an error e of the velocity into sin(angle step) * e of the latent."""
    scheduler = digits_dit.sampling_scheduler()
    scheduler.set_timesteps(50)
    scheduler.register_to_config(clip_sample=False)
    levels = integration_levels(scheduler, 50)
    assert levels.shape == (51,)
    assert levels[0] == pytest.approx(np.pi / 2, abs=1e-3)
    assert levels[-1] == 0
    draw = torch.Generator().manual_seed(0)
    x, v, e = (torch.randn(1, 1, 8, 8, generator=draw) for _ in range(3))
    for k in (0, 20, 49):
        t = scheduler.timesteps[k]
        moved = scheduler.step(v + e, t, x).prev_sample - scheduler.step(v, t, x).prev_sample
        assert float(moved.norm() / e.norm()) == pytest.approx(abs(levels[k + 1] - levels[k]), rel=1e-2)


def test_levels_of_flow_matching_and_noise_prediction():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    np.testing.assert_allclose(integration_levels(flow, 5), flow.sigmas.numpy())
    euler = EulerDiscreteScheduler(timestep_spacing="trailing")
    ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    for scheduler in (euler, ddim):
        scheduler.set_timesteps(5)
    np.testing.assert_allclose(integration_levels(euler, 5), integration_levels(ddim, 5), rtol=1e-4)
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(5)
    assert integration_levels(heun, 5) is None
    assert integration_levels(None, 5) is None
