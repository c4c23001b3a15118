"""Calibration that sees the evaluation's text, prompts or images is refused, however it was cut; a little is told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from quantlab.datasets.calibration import calibration_inputs
from quantlab.datasets.overlap import overlap
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.encoder import encoder_inputs
from quantlab.protocols.language import text_inputs
from quantlab.protocols.module import samples_of
from quantlab.vocabulary.schema import CalibrationConfig, EvaluationConfig
from tests.support.tiny_text_models import byte_tokenizer

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "s", "l")]


def prose(num_words, seed):
    """Text that repeats nothing for long."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words))


def model_of(adds_bos=True, protocol="language"):
    config = type("Config", (), {"max_position_embeddings": 4096, "get_text_config": lambda self: self})()
    net = type("M", (), {"config": config})()
    parts = {"tokenizer": byte_tokenizer(adds_bos)}
    return LoadedModel(name="fake", protocol=protocol, components={"model": net}, parts=parts)


SEEN = prose(3000, seed=0)
EVALUATION = EvaluationConfig(num_samples=20, context_length=128)


def calibrate(text, tmp_path, num_samples=20, context_length=128, model=None, seen=EVALUATION):
    (tmp_path / "mine.txt").write_text(text)
    asked = CalibrationConfig(
        source="text", path=str(tmp_path / "mine.txt"), num_samples=num_samples, context_length=context_length
    )
    model = model or model_of()
    return calibration_inputs(asked, seen, model, text_inputs(SEEN, seen, model, "dataset=text"))


CUTS = {
    "another length": (SEEN + " and the end", {"context_length": 96}),
    "a header": ("Title, author, date\n\n" + SEEN, {}),
    "half of it": (SEEN[len(SEEN) // 2 :] + prose(2000, seed=1), {"num_samples": 80}),
    "one window of many": (prose(4000, seed=1) + SEEN[:1500] + prose(4000, seed=2), {"num_samples": 150}),
    "very short windows": ("A header. " + SEEN, {"context_length": 40, "num_samples": 200}),
    "other line ends": (SEEN.replace(" ba ", "\r\nba "), {}),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_evaluations_text_is_found_however_it_is_cut(case, adds_bos, tmp_path):
    text, settings = CUTS[case]
    with pytest.raises(ConfigError, match=r"^calibration.source=text: \d.*% of its tokens and .*would flatter; take "):
        calibrate(text, tmp_path, model=model_of(adds_bos), **settings)


def test_other_text_of_the_same_language_passes_without_a_word(tmp_path, capsys):
    calibrate(prose(3000, seed=5), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_little_is_told_and_measured(tmp_path, capsys):
    """70 characters, which one window of the evaluation has, in the middle of another one of a hundred."""
    mine = prose(4000, seed=3)[: 127 * 100]
    mine = mine[:290] + SEEN[30:100] + mine[360:]
    settings = dataclasses.replace(EVALUATION, num_samples=60)
    inputs = calibrate(mine, tmp_path, num_samples=100, seen=settings)
    said = " ".join(capsys.readouterr().err.split())
    found = overlap(inputs, text_inputs(SEEN, settings, model_of(), "dataset=text"))
    assert found.num_whole == 0
    assert found.of_calibration == pytest.approx(70 / (100 * 128), rel=0.1)  # and a letter that fits by chance
    assert found.of_evaluation == pytest.approx(70 / (60 * 128), rel=0.1)
    assert f"{found.of_calibration:.2%} of its tokens and {found.of_evaluation:.2%} of the evaluation's lie in" in said


def test_shares_are_of_tokens_in_shared_runs():
    """By hand: 40 tokens of 2 x 100 stand in 300 others too, at other places; runs of 31 do not count."""
    generator = np.random.default_rng(0)
    rows = generator.permutation(10_000)[:500].reshape(5, 100)
    mine, theirs = rows[:2].copy(), rows[2:].copy()
    theirs[1, 3:43] = mine[0, 50:90]
    theirs[2, 0:31] = mine[1, 0:31]
    inputs = text_inputs(SEEN, EVALUATION, model_of(), "dataset=text")
    found = overlap(*(dataclasses.replace(inputs, input_ids=torch.from_numpy(part)) for part in (mine, theirs)))
    assert (found.run_tokens, found.num_whole) == (32, 0)
    assert found.of_calibration == pytest.approx(40 / 200)
    assert found.of_evaluation == pytest.approx(40 / 300)


def test_texts_of_an_encoder():
    model, settings = model_of(protocol="encoder"), EvaluationConfig(num_samples=3, context_length=100)
    seen = encoder_inputs(["a short one", prose(40, 0), prose(40, 1)], settings, model, "text")
    padded = encoder_inputs(["a short one", prose(60, 2), prose(60, 3)], settings, model, "text")
    found = overlap(padded, seen)
    assert found.num_whole == 1  # whatever the padding
    assert 0 < found.of_calibration < 0.1
    part = encoder_inputs([prose(40, 0)[20:], "xy", "a short"], settings, model, "text")
    found = overlap(part, seen)
    assert found.num_whole == 0
    assert found.of_calibration > 0.7


def prompts_of(*prompts):
    return DiffusionInputs(
        noise=torch.randn(len(prompts), 2),
        conditioning={"prompt": list(prompts)},
        sample_ids=tuple(str(i) for i in range(len(prompts))),
    )


def test_prompts_are_compared_without_case_and_space_and_long_ones_by_their_words():
    long_one = " ".join(f"word{i}" for i in range(60))
    seen = prompts_of("A red fox in  the snow", long_one)
    found = overlap(prompts_of("a RED fox in the\tsnow", "another"), seen)
    assert found.num_whole == 1
    assert overlap(prompts_of("a red fox in the snow at night"), seen).of_calibration == 0
    changed = prompts_of("in the style of nobody, " + long_one.replace("word3 ", "word3, "))
    found = overlap(changed, seen)
    assert found.num_whole == 0
    assert found.of_calibration > 0.8


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images[[3]],
        lambda images: torch.cat([torch.rand(2, 3, 8, 8), images[5:]]),
        lambda images: images.double(),
        lambda images: {"pixels": images[1:2], "label": torch.tensor([7])},
        lambda images: (images[1:2], torch.tensor(3)),
    ],
)
def test_images_are_known_by_their_pixels(change):
    images = torch.rand(6, 3, 8, 8)
    images[0] = 0.5  # of one colour: it tells nothing
    seen = samples_of([images, (torch.rand(2, 3, 8, 8), torch.tensor([1, 2]))])
    assert len(seen) == 7
    assert samples_of([change(images)]) & seen
    assert not samples_of([torch.rand(4, 3, 8, 8), images[:1], images[1:2] + 1e-3]) & seen
