"""Pictures of samples: the array comes back as it was, whatever the images show, and nothing but an array does."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from quantlab.errors import TrackingError
from quantlab.tracking.pictures import (
    SAMPLE_ARRAYS,
    SAMPLE_GRID,
    animated_grid,
    contact_sheet,
    framed_grid,
    kept_picture,
    read_samples,
    save_animation,
    shown_tiles,
    write_samples,
)

SHAPES = [(4, 3, 8, 8, 1), (3, 3, 70, 100, 3), (1, 3, 90, 64, 3)]
VIDEOS = (2, 3, 5, 16, 24, 3)


@pytest.mark.parametrize("shape", [*SHAPES, VIDEOS])
@pytest.mark.parametrize("white", [False, True])
def test_arrays_come_back(tmp_path: Path, shape: tuple[int, ...], white: bool) -> None:
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    if white:  # rows that look like the frames of a picture
        images[:, :, :: shape[2] // 4] = 255
    write_samples(images, [f"s{i}" for i in range(len(images))], tmp_path / "samples.npz")
    found = read_samples((tmp_path / "samples.npz").read_bytes())
    assert found is not None
    assert np.array_equal(found[0], images)
    assert found[1] == [f"s{i}" for i in range(len(images))]


def test_the_same_samples_are_the_same_file(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8, 1), np.uint8)
    for name in ("a.npz", "b.npz"):
        write_samples(images, ("x", "y"), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def _file(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        pickle.dumps({"images": 1}),
        _file(images=np.zeros((2, 3, 8, 8, 1), np.uint8)),
        _file(images=np.zeros((2, 3, 8, 8, 1), np.float32), sample_ids=["a", "b"]),
        _file(images=np.zeros((2, 2, 8, 8, 1), np.uint8), sample_ids=["a", "b"]),
        _file(images=np.zeros((0, 3, 8, 8, 1), np.uint8), sample_ids=[]),
        _file(images=np.array([{"a": 1}], dtype=object), sample_ids=["a"]),
        _file(images=np.zeros((2, 3, 8, 8, 1), np.uint8), sample_ids=["a", "b"])[:200],
    ],
)
def test_what_is_no_such_file_is_no_picture(content: bytes) -> None:
    assert read_samples(content) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_is_in_the_framed_grid(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tiles = shown_tiles(images)
    scale = tiles.shape[2] // shape[2]
    assert (tiles[:, :, ::scale, ::scale, :1] == images[..., :1]).all()
    picture = np.asarray(framed_grid(images, "x"))
    height, width = tiles.shape[2] + 2, tiles.shape[3] + 2
    assert picture.shape == (shape[0] * height, 3 * width, 3)
    last = picture[-height:, -width:]
    assert (last[1:-1, 1:-1] == tiles[-1, -1]).all()
    assert (last[[0, -1]] == 255).all()
    assert (last[:, [0, -1]] == 255).all()


def test_other_arrays_are_refused() -> None:
    with pytest.raises(TrackingError, match=r"images 'x': float32 of shape .* uint8 of shape \(rows"):
        framed_grid(np.zeros((1, 1, 2, 2, 3), np.float32), "x")


def test_videos_are_shown_frame_by_frame_and_moving(tmp_path: Path) -> None:
    from PIL import Image

    videos = np.random.default_rng(0).integers(0, 255, VIDEOS, dtype=np.uint8)
    sheet = contact_sheet(videos)
    assert np.array_equal(sheet[4, 3], videos[1, 1, 3])
    frames = animated_grid(videos, "x")
    save_animation(frames, tmp_path / "a.webp", exact=True)
    with Image.open(tmp_path / "a.webp") as found:
        assert found.n_frames == 5
        for k, frame in enumerate(frames):
            found.seek(k)
            assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(frame))
            assert np.array_equal(np.asarray(frame), np.asarray(framed_grid(videos[:, :, k], "x")))


def test_pictures_of_earlier_runs_are_found_where_they_are():
    earlier = {"images/samples.npz": b"earlier", "images/epoch.png": b"another"}
    assert kept_picture(earlier.get, SAMPLE_ARRAYS) == b"earlier"
    assert kept_picture({**earlier, SAMPLE_ARRAYS: b"now"}.get, SAMPLE_ARRAYS) == b"now"
    assert kept_picture(earlier.get, SAMPLE_GRID) is None
