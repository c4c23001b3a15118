"""What users' files hold: line ends and signs within lines, halves of characters, pictures of other depths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from quantlab.datasets import image_prompts, images, pairs, prompts
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.vocabulary.files import lines_of
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

WITHIN = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")
READERS = {
    "pairs": (pairs.read, lambda text: {"source": text, "target": "b"}, lambda row: row["source"]),
    "image_prompts": (
        image_prompts.read,
        lambda text: {"image": "a.png", "prompt": text},
        lambda row: row.prompt,
    ),
}
RAMP = np.linspace(0, 1, 64)[None].repeat(48, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("sign", WITHIN)
def test_lines_end_where_editors_end_them(tmp_path, sign, end):
    text = f"a{sign}b{end}{end}c{end}"
    assert lines_of(text) == [(1, f"a{sign}b"), (3, "c")]
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert prompts.read_prompts(str(tmp_path / "p.txt")) == [f"a{sign}b", "c"]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"])
def test_a_string_of_json_may_hold_what_divides_lines_elsewhere(tmp_path, name, sign):
    read, line, text_of = READERS[name]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line(f"a{sign}b"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert [text_of(row) for row in read(str(file))] == [f"a{sign}b"]


@pytest.mark.parametrize("name", READERS)
def test_half_a_character_is_no_text(tmp_path, name):
    read, line, _ = READERS[name]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line("fine")) + "\n" + json.dumps(line("\ud83d")))
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*: line 2 is no JSON \(half a character"):
        read(str(file))


def test_a_name_that_is_too_long_is_no_file():
    with pytest.raises(ConfigError, match=r"^dataset\.path=x+: it cannot be read \("):
        image_prompts.read("x" * 5000)


def pixels_of(folder):
    return image_prompts._pixels(next(folder.glob("*.*")), "dataset.path=x", (None, None), "RGB").numpy()


@pytest.mark.parametrize("file", ["a.png", "a.webp", "a.bmp", "a.jpg"])
@pytest.mark.parametrize("made", ["L", "RGB", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_a_picture_is_as_bright_at_any_depth(tmp_path, made, file):
    gray = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    picture = Image.fromarray((RAMP * 65535).round().astype(np.uint16)) if made == "I;16" else gray.convert(made)
    if made == "I;16" and file != "a.png":
        pytest.skip(f"{file} holds no {made}")
    try:
        picture.save(tmp_path / file, **({"quality": 95} if file == "a.jpg" else {}))
    except (OSError, KeyError):
        pytest.skip(f"{file} holds no {made}")
    found = pixels_of(tmp_path)
    assert found.shape == (48, 64, 3)
    assert abs(found.mean() - 127.5) < 3
    assert found[:, 0].max() <= 8
    assert found[:, -1].min() >= 247


def test_a_picture_without_a_known_white_is_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"^dataset\.path=x: a\.png has 32 bits a pixel, and no white; save it with"):
        pixels_of(tmp_path)


CLEAR = {
    "RGBA": lambda gray, alpha: Image.merge("RGBA", (gray, gray, gray, alpha)),
    "LA": lambda gray, alpha: Image.merge("LA", (gray, alpha)),
    "P": lambda gray, alpha: Image.merge("RGBA", (gray, gray, gray, alpha)).quantize(16),
}


@pytest.mark.parametrize("lowest", [255, 254, 0])
@pytest.mark.parametrize("made", CLEAR)
def test_a_picture_that_is_transparent_somewhere_is_told(tmp_path, capsys, made, lowest):
    gray = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    alpha = Image.new("L", gray.size, 255)
    alpha.paste(lowest, (0, 0, gray.width, gray.height // 2))
    CLEAR[made](gray, alpha).save(tmp_path / "a.png")
    gray.save(tmp_path / "b.png")
    image_prompts.tell_transparent(sorted(tmp_path.iterdir()), "dataset.path=x")
    told = capsys.readouterr().err
    assert ("dataset.path=x: 1 of 2 pictures are transparent in places (a.png)" in told) == (lowest < 255)
    (tmp_path / "a.png").rename(tmp_path / "b.mask.png")
    if lowest == 255:
        image_prompts.read(str(tmp_path))
    else:
        with pytest.raises(
            ConfigError, match=r"^dataset\.path=.*: b\.mask\.png is a mask that is transparent in places"
        ):
            image_prompts.read(str(tmp_path))


def test_a_colour_that_stands_for_transparency_is_found(tmp_path):
    Image.fromarray((RAMP * 255).round().astype(np.uint8)).save(tmp_path / "a.png", transparency=0)
    assert image_prompts.is_transparent(tmp_path / "a.png")


def test_a_photograph_that_is_cut_off_is_named_wherever_it_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20_000])
    model = LoadedModel(
        name="tiny", protocol="vision", components={}, parts={"processor": lambda **_: {"pixel_values": torch.ones(1)}}
    )
    config = DatasetConfig(name="images", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*: a\.jpg cannot be read as a picture .*put an intact"):
        images.load(config, EvaluationConfig(num_samples=1), model)
    with pytest.raises(ConfigError, match=r"^dataset\.path=.*: a\.jpg cannot be read as a picture .*put an intact"):
        pixels_of(tmp_path)
