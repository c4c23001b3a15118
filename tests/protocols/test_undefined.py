"""One metric that has no value is undefined, and says why; the others of its row stand. For every protocol."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import shutil

import numpy as np
import pytest
import torch

from quantlab.datasets import digits_classes
from quantlab.errors import MetricUndefined
from quantlab.models import digits_dit
from quantlab.models.loaded import LoadedModel
from quantlab.protocols import diffusion, encoder, language, module
from quantlab.protocols.encoder import encoder_inputs
from quantlab.protocols.language import text_inputs
from quantlab.protocols.media import IMAGE_METRICS
from quantlab.stages.evaluate import evaluate, summarize
from quantlab.vocabulary.schema import DatasetConfig, DigitsModelConfig, EvaluationConfig
from tests.support.shell import TINY, digits_words
from tests.support.tiny_families import FAMILIES, family_model
from tests.support.tiny_text_models import TEXT, load_bert, load_llama, save_bert, save_llama

TEXTS = EvaluationConfig(num_samples=12, batch_size=4, context_length=48, num_bootstrap=20)
IMAGES = EvaluationConfig(num_samples=10, batch_size=5, num_inference_steps=3, num_teacher_forced=4, num_bootstrap=20)
OF_TOKENS = {"kld_mean", "kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max", "kld_min"}
OF_LANGUAGE = OF_TOKENS | {"same_top1", "delta_p_mean", "delta_p_rms", "ln_ppl_ratio", "ppl", "ppl_ref"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return load_llama(save_llama(folder), folder)


def with_head(model: LoadedModel, change) -> LoadedModel:
    """With another output head: ``change(head)`` in place."""
    net = model.copy_of("model")
    with torch.no_grad():
        change(net.lm_head)
    return model.with_components({"model": net})


def excludes(*tokens):
    def change(head):
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        head.bias[list(tokens)] = -math.inf

    return change


def measured(candidate, reference_model, inputs, evaluation, protocol):
    reference = protocol.observe(reference_model, inputs, evaluation)
    found = evaluate(candidate, reference_model, reference, inputs, evaluation)
    return found, summarize(found, evaluation)


def language_row(candidate, reference_model):
    inputs = text_inputs(TEXT, TEXTS, reference_model, "dataset=text")
    found, quality = measured(candidate, reference_model, inputs, TEXTS, language)
    assert set(quality) | set(found.undefined) == OF_LANGUAGE
    assert all(math.isfinite(value.value) for value in quality.values())
    return found.undefined, quality


def test_a_perplexity_beyond_all_numbers_leaves_the_divergence(llama):
    loud = with_head(llama, lambda head: head.weight.mul_(3000.0))
    undefined, quality = language_row(loud, llama)
    assert set(undefined) == {"ppl"}
    assert "beyond float64" in undefined["ppl"]
    assert quality["kld_mean"].value > 100
    undefined, quality = language_row(loud, loud)
    assert set(undefined) == {"ppl", "ppl_ref"}
    assert quality["kld_mean"].value == 0
    assert quality["same_top1"].value == 1


def test_a_token_that_the_candidate_excludes(llama):
    """Its divergence is infinite at every token; what it does to the most probable one is not."""
    unused = 255
    assert unused not in text_inputs(TEXT, TEXTS, llama, "dataset=text").input_ids
    undefined, quality = language_row(with_head(llama, excludes(unused)), llama)
    assert set(undefined) == OF_TOKENS
    assert undefined["kld_mean"].startswith("kld_mean: sample 'window at 0'")
    assert quality["same_top1"].value > 0.5
    assert quality["ppl"].value == pytest.approx(quality["ppl_ref"].value, rel=0.1)


def test_a_scored_token_that_a_model_excludes(llama):
    ids = text_inputs(TEXT, TEXTS, llama, "dataset=text").input_ids
    scored = int(ids[3, 5])
    without = with_head(llama, excludes(scored))
    undefined, quality = language_row(without, llama)
    assert set(undefined) == OF_TOKENS | {"ppl", "ln_ppl_ratio"}
    assert {"same_top1", "delta_p_mean", "delta_p_rms", "ppl_ref"} <= set(quality)
    undefined, quality = language_row(without, without)
    assert set(undefined) == {"ppl", "ppl_ref", "ln_ppl_ratio"}
    assert quality["kld_max"].value == 0


def test_where_all_is_nan_nothing_is_left(llama):
    inputs = text_inputs(TEXT, TEXTS, llama, "dataset=text")
    broken = with_head(llama, lambda head: head.weight[0].fill_(math.nan))
    with pytest.raises(MetricUndefined, match=r"candidate's logits of window at 0 holds NaN"):
        measured(broken, llama, inputs, TEXTS, language)


def test_an_encoder_whose_pooled_output_is_zero(tmp_path):
    model = load_bert(save_bert(tmp_path), tmp_path)
    net = model.copy_of("model")

    def opposite(_module, _args, out):
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden - hidden.mean(1, keepdim=True)
        return out

    net.register_forward_hook(opposite)
    inputs = encoder_inputs(["abcd"] * 3, EvaluationConfig(num_samples=3, context_length=16), model, "text")
    reference = encoder.observe(model, inputs, TEXTS)
    nothing = {**reference, "pooled": torch.zeros_like(reference["pooled"])}
    found = evaluate(model.with_components({"model": net}), model, nothing, inputs, TEXTS)
    assert set(found.undefined) == {"output_cosine"}
    assert "all zeros" in found.undefined["output_cosine"]
    assert (found.samples["output_rel_error"] > 0).all()


def test_a_module_whose_output_is_switched_off():
    net, off = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    torch.nn.init.zeros_(off.weight)
    torch.nn.init.zeros_(off.bias)
    model = LoadedModel(name="m", protocol="module", components={"model": net})
    inputs = module.inputs_of([torch.randn(5, 8)])
    found, quality = measured(model.with_components({"model": off}), model, inputs, TEXTS, module)
    assert set(found.undefined) == {"output_cosine"}
    assert quality["output_rel_error"].value == pytest.approx(1.0)
    with pytest.raises(MetricUndefined, match="all zeros"):
        measured(model, model.with_components({"model": off}), inputs, TEXTS, module)


# -- diffusion


@pytest.fixture(scope="module")
def digits(trained, tmp_path_factory):
    cache = shutil.copytree(trained, tmp_path_factory.mktemp("diffusion") / "cache")
    return digits_dit.load(DigitsModelConfig(**TINY), "cpu", cache)


def digits_inputs(model):
    return digits_classes.load(DatasetConfig(), IMAGES, model)


def test_images_that_are_nan_leave_the_latents(digits):
    inputs = digits_inputs(digits)

    def broken(*arguments):
        sampled = digits.sample(*arguments)
        sampled.media["images"][0, 0, 0] = math.nan
        return sampled

    reference = diffusion.observe(digits, inputs, IMAGES)
    found = evaluate(dataclasses.replace(digits, sample=broken), digits, reference, inputs, IMAGES)
    assert set(found.undefined) == set(IMAGE_METRICS)
    assert "decoded image is NaN" in found.undefined["psnr_db"]
    assert set(found.samples) == {"latent_rel_mse", "latent_cosine"}
    assert set(found.steps) == {"step_sqnr_db", "step_divergence"}
    with pytest.raises(MetricUndefined, match="decoded image"):
        diffusion.observe(dataclasses.replace(digits, sample=broken), inputs, IMAGES)


def test_one_image_has_no_distribution_and_all_else(digits):
    inputs = digits_inputs(digits).subset([0])
    found, quality = measured(digits, digits, inputs, IMAGES, diffusion)
    assert set(found.undefined) == {"frechet_judge"}
    assert quality["latent_rel_mse"].value == 0
    assert quality["judge_agreement"].value == 1


def test_labels_that_the_judge_does_not_know(digits):
    inputs = digits_inputs(digits)
    labels = [10, *inputs.conditioning["class_label"][1:]]  # the null class, which the denoiser knows
    inputs = dataclasses.replace(inputs, conditioning={"class_label": labels})
    found, _ = measured(digits, digits, inputs, IMAGES, diffusion)
    assert set(found.undefined) == {"class_accuracy"}
    assert (found.samples["judge_agreement"] == 1).all()


def test_a_latent_of_zeros_takes_what_is_relative_to_it(digits):
    inputs = digits_inputs(digits)
    reference = diffusion.observe(digits, inputs, IMAGES)
    reference["latents"][2] = 0
    found = evaluate(digits, digits, reference, inputs, IMAGES)
    assert set(found.undefined) == {"latent_rel_mse", "latent_cosine"}
    assert np.isfinite(found.samples["psnr_db"]).all()


# -- a whole run


def test_the_row_is_finished_and_its_record_says_what_is_undefined(llama, shell):
    folder = shell.folder / "loud"
    with_head(llama, lambda head: head.weight.mul_(3000.0)).components["model"].save_pretrained(folder)
    llama.parts["tokenizer"].save_pretrained(folder)
    (shell.folder / "text.txt").write_text(TEXT)
    rows = shell.rows(
        "model=causal_lm",
        "model.path=loud",
        "dataset=text",
        "dataset.path=text.txt",
        "backend=quanto",
        "dtype=int8",
        "evaluation.num_samples=12",
        "evaluation.context_length=48",
        "evaluation.num_bootstrap=20",
    )
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    row = next(row for name, row in rows.items() if name.startswith("quanto"))
    assert set(row["undefined"]) == {"ppl", "ppl_ref"}
    assert "quality/ppl" not in row["metrics"]
    assert row["metrics"]["quality/kld_mean"] >= 0
    run = next(run for name, run in shell.tracked().items() if name.startswith("quanto"))
    assert set(json.loads(run["tags"]["quantlab.undefined"])) == {"ppl", "ppl_ref"}
    assert run["params"]["resolved.logits"] == "head"


def test_a_scheduler_that_a_pipeline_copies_leaves_no_latents_and_that_is_told(tmp_path, monkeypatch):
    model, inputs = family_model("stable_diffusion", tmp_path)
    made = type(model.parts["pipeline"])
    call = made.__call__

    def with_a_copy(self, **arguments):
        self.scheduler = copy.deepcopy(self.scheduler)
        return call(self, **arguments)

    signature = inspect.signature(call)
    monkeypatch.setattr(made, "__call__", with_a_copy)
    with_a_copy.__signature__ = signature
    evaluation = dataclasses.replace(FAMILIES["stable_diffusion"].settings, num_inference_steps=1, num_teacher_forced=1)
    found, _ = measured(model, model, inputs.subset([0]), evaluation, diffusion)
    assert "latent_rel_mse" not in found.samples
    assert found.undefined["latent_rel_mse"].startswith("latent_rel_mse: the model's scheduler was not heard to step")
    assert found.samples["psnr_db"].tolist() == [100]
    assert "step_divergence" not in found.steps


def test_what_several_metrics_lack_is_said_once(shell, monkeypatch):
    def lacking(*given, **more):
        return dataclasses.replace(evaluate(*given, **more), undefined=dict.fromkeys(("ssim", "psnr_db"), "ssim: none"))

    monkeypatch.setattr("quantlab.running.job.evaluate", lacking)
    code, _, err = shell(*digits_words("backend=quanto", "dtype=int8", "sweep.floors=false"))
    assert code == 0
    assert err.count("undefined: quanto int8: ssim: none") == 1, err
