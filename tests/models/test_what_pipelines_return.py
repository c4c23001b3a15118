"""What a pipeline returns, whatever it calls it; and decoders that work in tiles alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantlab.errors import ConfigError, ModelError
from quantlab.models import pipeline_call
from quantlab.models.pipeline_sizes import asked_sizes, frames_argument
from quantlab.protocols.media import tell_of_one_colour
from quantlab.vocabulary.schema import EvaluationConfig


def test_a_map_of_depths_is_an_image_and_one_of_directions_is_none():
    depths = np.random.default_rng(0).random((2, 8, 8, 1)).astype(np.float32)
    assert pipeline_call._media(SimpleNamespace(), {"prediction": depths}, 2)["images"].shape == (2, 8, 8, 1)
    with pytest.raises(ModelError, match=r"^model.path: SimpleNamespace returns \['prediction'\] for .* makes these$"):
        pipeline_call._media(SimpleNamespace(), {"prediction": depths * 2 - 1}, 2)


def test_one_field_may_be_called_in_the_singular():
    """As of Kandinsky 5."""
    made = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    assert pipeline_call._media(SimpleNamespace(), {"image": made}, 2)["images"].shape == (2, 8, 8, 3)


def test_several_pictures_a_sample_are_refused_without_a_way_out_that_is_none():
    two = {"images": np.zeros((2, 8, 8, 3), np.float32)}
    with pytest.raises(ModelError, match=r"^model.path: .* for 1 sample, .*; name a pipeline that makes these$"):
        pipeline_call._media(SimpleNamespace(), two, 1)
    with pytest.raises(ModelError, match=r"for 4 samples, .* or set evaluation\.batch_size=1$"):
        pipeline_call._media(SimpleNamespace(), two, 4)


@pytest.mark.parametrize(("num", "told"), [(1, r"model\.call$"), (2, r", or set evaluation\.batch_size=1 where")])
@pytest.mark.parametrize("kind", [ValueError, IndexError])
def test_one_sample_alone_is_a_way_out_where_there_are_more(num, told, kind):
    with (
        pytest.raises(ModelError, match=rf"^model=a: B refuses what it is given \(no lists yet\); .*{told}"),
        pipeline_call._told_as_ours("a", "B", ["prompt"], num),
    ):
        raise kind("no lists yet")


class Song:
    """As ACE-Step and Lumina 2 take words of their own."""

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        lyrics: List[str] | str = "",  # noqa: F821, UP006  as some write it
        system_prompt: str | None = None,
        mood: str = "",
        parts: list[str] | None = None,
        sigmas: list[float] | None = None,
    ): ...


@pytest.mark.parametrize("num", [1, 2])
def test_words_for_each_sample_are_a_list_where_they_may_be_one(num):
    words = {name: "la" for name in ("negative_prompt", "lyrics", "system_prompt", "mood")}
    model = SimpleNamespace(parts={"call": words})
    given = pipeline_call._arguments(model, Song(), torch.arange(num), {"prompt": ["a"] * num}, EvaluationConfig())
    lists = {name for name, value in given.items() if value == ["la"] * num}
    assert lists == (set() if num == 1 else {"negative_prompt", "lyrics"})
    assert {name for name, value in given.items() if value == "la"} == set(words) - lists


def test_a_text_for_each_sample_is_refused_where_its_place_in_a_batch_would_choose_it():
    for name in ("negative_prompt", "lyrics", "system_prompt", "mood"):
        pipeline_call.check_arguments(Song, {name: "la"})
        with pytest.raises(ConfigError, match=rf"^model\.call\.{name}: Song gives a list's .*; give one text, for all"):
            pipeline_call.check_arguments(Song, {name: ["la", "lo"]})
    pipeline_call.check_arguments(
        Song, {"parts": ["verse", "chorus"], "sigmas": [1.0, 0.5]}
    )  # one value of all samples


class Video:
    def __call__(self, prompt, video_length=16, height=64): ...


def test_frames_by_any_name():
    assert frames_argument({"video_length", "prompt"}) == "video_length"
    assert frames_argument({"frames"}) == "frames"
    sizes = asked_sizes(Video, EvaluationConfig(num_frames=9, height=None, width=32), {})
    assert sizes == {"num_frames": ("evaluation.num_frames", 9)}


def test_frames_that_a_pipeline_drops_are_told_once_and_a_size_that_it_rounds_is_refused(capsys):
    """As HunyuanVideo's image to video, which drops four frames whatever is asked for."""
    made = {"frames": torch.zeros(1, 5, 8, 8, 3)}
    for _ in range(2):
        pipeline_call._check_made(Video(), made, {"video_length": 9, "height": 8})
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("evaluation.num_frames=9: Video made 5 of it, which are what is compared") == 1
    with pytest.raises(ConfigError, match=r"^evaluation\.num_frames=3: Video made 5 of it; take 5, or null, where"):
        pipeline_call._check_made(Video(), made, {"video_length": 3})
    with pytest.raises(ConfigError, match=r"^evaluation\.height=9: Video made 8 of it; take 8$"):
        pipeline_call._check_made(Video(), made, {"height": 9})


class InTiles:
    """Draws from each sample's generator before its decoder refuses."""

    def __init__(self):
        self.vae = SimpleNamespace(use_tiling=False, enable_tiling=lambda: setattr(self.vae, "use_tiling", True))

    def __call__(self, generator):
        drawn = [torch.rand(3, generator=g) for g in (generator if isinstance(generator, list) else [generator])]
        if not self.vae.use_tiling:
            raise NotImplementedError("Decoding without tiling has not been implemented yet.")
        return torch.stack(drawn)


def test_a_decoder_that_knows_tiles_alone_gets_tiles_and_the_same_noise(capsys):
    seeds = torch.tensor([3, 4])

    def given():
        return {"generator": [torch.Generator().manual_seed(int(s)) for s in seeds]}

    pipe = InTiles()
    first = pipeline_call._called(pipe, given(), seeds)
    assert "its decoder works in tiles alone" in capsys.readouterr().err
    assert torch.equal(first, pipeline_call._called(pipe, given(), seeds))
    one = {"generator": torch.Generator().manual_seed(3)}
    assert torch.equal(pipeline_call._called(InTiles(), one, seeds[:1])[0], first[0])
    other = SimpleNamespace(use_tiling=True)
    pipe.vae = other
    with pytest.raises(NotImplementedError):
        pipeline_call._called(lambda **_: (_ for _ in ()).throw(NotImplementedError("x")), given(), seeds)


def test_pictures_of_one_colour_are_told(capsys):
    frames = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    frames[1, 0, 0] = 7
    tell_of_one_colour({"frames": frames}, ("prompt 0", "prompt 1"))
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 samples of the reference (frames) are of one value throughout, such as prompt 0" in told
    tell_of_one_colour({"images": torch.arange(48).reshape(1, 4, 4, 3)}, ("a",))
    assert capsys.readouterr().err == ""


OF_SHAPES = "output with shape [2, 1, 80, 80] doesn't match the broadcast shape [2, 2, 80, 80]"


def test_a_pipeline_that_takes_one_sample_alone_says_so():
    with (
        pytest.raises(ModelError, match=r"^model=a: B fails on 2 samples at once .*; set evaluation.batch_size=1$"),
        pipeline_call._told_as_ours("a", "B", ["prompt"], 2),
    ):
        raise RuntimeError(OF_SHAPES)


def test_a_pipeline_that_cannot_do_what_it_is_asked_names_what_it_was_asked():
    """As of a T2I adapter of another width: one sample alone is no way out."""
    told = r"^model=a: B fails by itself \(output with shape .*\); it was called with prompt: change the data set, "
    with pytest.raises(ModelError, match=told), pipeline_call._told_as_ours("a", "B", ["prompt"], 1):
        raise RuntimeError(OF_SHAPES)


@pytest.mark.parametrize("num", [1, 2])
def test_a_pipeline_that_its_libraries_left_behind_says_so(num):
    """As clip_skip, which Diffusers reads from where transformers 5 has nothing; or it takes one generator, as Amused."""
    told = r"^model=a: B fails by itself \('C' object has no attribute 'd'\), as where releases of diffusers and trans"
    told += r".* or install others" + ("$" if num == 1 else r", or set evaluation\.batch_size=1 where")
    with pytest.raises(ModelError, match=told), pipeline_call._told_as_ours("a", "B", ["prompt", "clip_skip"], num):
        raise AttributeError("'C' object has no attribute 'd'")


@pytest.mark.parametrize(
    ("num", "error"),
    [(1, RuntimeError(OF_SHAPES)), (2, RuntimeError("CUDA error: an illegal memory access")), (2, AttributeError("d"))],
)
def test_what_a_candidates_layers_may_have_done_stays_what_it_is(num, error):
    with (
        pytest.raises(type(error)) as caught,
        pipeline_call._told_as_ours("a", "B", ["prompt"], num, is_reference=False),
    ):
        raise error
    assert caught.value is error
