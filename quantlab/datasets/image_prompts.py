"""``dataset=image_prompts``: pictures of the user's, with or without prompts, for pipelines that start from one.

``dataset.path`` is a folder or a file of JSON lines. A folder holds pictures, beside each ``NAME.txt`` with its prompt
(or no such file at all, for pipelines that take none) ``NAME.mask.png`` where a pipeline takes a mask (white is made
anew), and ``NAME.control.png`` where a picture guides it beside the one it starts from (one that starts from none is
guided by the picture itself). A line of a file is ``{"image": "a.png", "prompt": "...", "mask": "b.png", "control":
"c.png"}``, with paths below its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from quantlab.datasets.prompts import require_pipeline, require_samples, seed_of, tell_fewer
from quantlab.errors import ConfigError, nearest
from quantlab.models.loaded import LoadedModel
from quantlab.progress import say
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.files import read_json_lines, read_text
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

if TYPE_CHECKING:
    from PIL.Image import Image as PictureFile
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BESIDE = ("mask", "control")
_KEYS = ("image", "prompt", *_BESIDE)
_WAY_OUT = (
    "name a folder of pictures (where prompts are wanted, each with its own in a .txt file of the same name), or a "
    "file of JSON lines"
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One row of the data set."""

    image: Path
    prompt: str | None
    mask: Path | None
    control: Path | None


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """``evaluation.num_samples`` samples: each picture once, then each again with other noise, and so on.

    Pictures are cut to the shape of ``evaluation.height`` and ``width``, around their middle, and resized to it; left
    open, they must be of one size. The samples of one picture are a cluster, whatever is said of it.
    Raises ConfigError for what cannot be read.
    """
    import numpy as np
    import torch

    rows = read(config.path)
    require_pipeline(config, model, conditions(config.path))
    num, key = require_samples(evaluation), f"dataset.path={config.path}"
    size = (evaluation.width, evaluation.height)
    used = rows[:num]
    tell_transparent([f for row in used for f in (row.image, row.control) if f is not None], key)
    pictures = [_pixels(row.image, key, size, "RGB") for row in used]
    shapes = {tuple(picture.shape[:2]) for picture in pictures}
    if len(shapes) > 1:
        raise ConfigError(
            f"{key}: the pictures are of {len(shapes)} sizes, and samples are compared at one; set evaluation.height "
            "and evaluation.width"
        )
    files = [row.image for row in rows]
    order = [(i % len(rows), i // len(rows)) for i in range(num)]
    given: dict[str, list[object]] = {"image": [pictures[row] for row, _ in order]}
    if used[0].prompt is not None:
        given["prompt"] = [rows[row].prompt for row, _ in order]
    for name, mode in (("mask", "L"), ("control", "RGB")):
        beside = [_pixels(file, key, size, mode) for row in used if (file := getattr(row, name)) is not None]
        if beside:
            given[name] = [beside[row] for row, _ in order]
    return DiffusionInputs(
        noise=torch.tensor([seed_of(config.name, row, replica, config.seed) for row, replica in order]),
        conditioning=given,
        sample_ids=tuple(f"{rows[row].image.name} replica {replica}" for row, replica in order),
        clusters=np.array([files.index(files[row]) for row, _ in order]),
    )


def tell_replicas(rows: Sequence[Picture], num_samples: int, key: str) -> None:
    """Tell where several samples are of one picture: the uncertainty is over pictures."""
    tell_fewer(len({row.image for row in rows}), num_samples, key, "picture")


def conditions(path: str | None) -> tuple[str, ...]:
    """What the rows give to a pipeline, by the names of its arguments."""
    first = read(path)[0]
    found = {"image": first.image, "prompt": first.prompt, "mask_image": first.mask, "control_image": first.control}
    return tuple(name for name, value in found.items() if value is not None)


def read(path: str | None) -> list[Picture]:
    """The rows, their pictures looked at; ConfigError ``dataset.path=...`` for what is missing or cannot be read."""
    key = f"dataset.path={path}"
    if path is None:
        raise ConfigError(f"dataset.path=null: the pictures are of your own; {_WAY_OUT}")
    place = Path(path).expanduser()
    try:
        rows = _of_folder(place, key) if place.is_dir() else _of_lines(place, key)
    except OSError as error:
        raise ConfigError(f"{key}: it cannot be read ({error.strerror}); {_WAY_OUT}") from error
    if not rows:
        raise ConfigError(f"{key}: no picture is in it ({', '.join(PICTURES)}); {_WAY_OUT}")
    for what in ("prompt", *_BESIDE):
        have = [row for row in rows if getattr(row, what) is not None]
        if have and len(have) < len(rows):
            without = next(row for row in rows if getattr(row, what) is None)
            raise ConfigError(
                f"{key}: {without.image.name} has no {what}, and {len(have)} of {len(rows)} have one; "
                "give each picture one, or none"
            )
    for row in rows:
        for file in (row.image, row.mask, row.control):
            if file is not None:
                _looked_at(file, key)
        if row.mask is not None and is_transparent(row.mask):
            raise ConfigError(
                f"{key}: {row.mask.name} is a mask that is transparent in places, and may be meant by its transparency "
                "or by its grey; save it in grey alone, white where the picture is made anew"
            )
    return rows


def _of_folder(folder: Path, key: str) -> list[Picture]:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES and f.is_file())
    beside = {
        what: {f.stem.removesuffix(f".{what}"): f for f in files if f.stem.endswith(f".{what}")} for what in _BESIDE
    }
    named = {file for found in beside.values() for file in found.values()}
    return [
        Picture(
            image=file,
            prompt=_prompt(file.with_suffix(".txt"), key),
            mask=beside["mask"].get(file.stem),
            control=beside["control"].get(file.stem),
        )
        for file in files
        if file not in named
    ]


def _prompt(file: Path, key: str) -> str | None:
    return " ".join(read_text(file, key, _WAY_OUT).split()) if file.exists() else None


def _of_lines(file: Path, key: str) -> list[Picture]:
    rows = []
    for number, found in read_json_lines(file, key, _WAY_OUT):
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()) or "image" not in found:
            raise ConfigError(f'{key}: line {number} is not like {{"image": "a.png", "prompt": "a fox"}}; {_WAY_OUT}')
        if unknown := [name for name in found if name not in _KEYS]:
            raise ConfigError(
                f"{key}: line {number} has {unknown[0]}{nearest(unknown[0], _KEYS)}; a line has {', '.join(_KEYS)}"
            )
        places = {name: _below(file.parent, found[name], key, number) for name in ("image", *_BESIDE) if name in found}
        rows.append(
            Picture(
                image=places["image"],
                prompt=found.get("prompt"),
                mask=places.get("mask"),
                control=places.get("control"),
            )
        )
    return rows


def _below(folder: Path, name: str, key: str, line: int) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise ConfigError(f"{key}: line {line} names {name!r}, which is not below the file's folder; move it there")
    return folder / parts


def _looked_at(file: Path, key: str) -> None:
    """ConfigError unless ``file`` is a picture by its first bytes and its structure."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{key}: {file.name} cannot be read as a picture ({error}); put an intact one there, or take it out"
        ) from error


def opened(file: Path, key: str, mode: str) -> PictureFile:
    """A picture as it is looked at: upright, 8 bits a channel.

    Of one that is transparent somewhere the colours that are stored there, as ``load_image`` of Diffusers and of
    transformers gives them to their models. ConfigError for one that cannot be read, and for one of 32 bits a pixel,
    whose white nobody knows.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as found:
            picture = ImageOps.exif_transpose(found)
            if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).round().astype(np.uint8))
            if picture.mode not in ("I", "F"):
                return picture.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{key}: {file.name} cannot be read as a picture ({error}); put an intact one there, or take it out"
        ) from error
    raise ConfigError(f"{key}: {file.name} has 32 bits a pixel, and no white; save it with 8 or 16")


def is_transparent(file: Path) -> bool:
    """Whether a picture that was looked at is transparent somewhere."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as found:
        return found.has_transparency_data and bool((np.asarray(found.convert("RGBA"))[..., 3] < 255).any())


def tell_transparent(files: Sequence[Path], key: str) -> None:
    """Tell of pictures that are transparent somewhere: what is taken of them is what Diffusers takes."""
    if found := [file.name for file in files if is_transparent(file)]:
        say(
            f"{key}: {len(found)} of {len(files)} pictures are transparent in places ({found[0]}); the colours that "
            "are stored there are taken, as load_image of Diffusers does; put them on a background for others",
            "warning",
        )


def _pixels(file: Path, key: str, size: tuple[int | None, int | None], mode: str) -> Tensor:
    """A picture as uint8 (height, width, 3 or 1), cut and resized where ``size`` (width, height) is given."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    picture = opened(file, key, mode)
    width, height = size[0] or picture.width, size[1] or picture.height
    if (width, height) != picture.size:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = np.array(picture)
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels)
