"""Pictures of samples: one PNG of all tiles for people, and the array itself for whoever compares runs later."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import TrackingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image as Picture

SAMPLE_GRID = "pictures/reference_quantized_difference.png"
"""One row a sample; three columns: reference, candidate, difference. Not in ``images``, the folder of MLflow's image
grid: its page shows nothing of a run that has another name there than those of :meth:`Run.log_image`."""
SAMPLE_ARRAYS = "pictures/samples.npz"
"""The same as arrays: ``images`` uint8 (samples, 3, height, width, channels), and their ``sample_ids``.

Of videos (samples, 3, frames, height, width, channels)."""
SAMPLE_ANIMATION = "pictures/reference_quantized_difference.webp"
"""Of videos: one row a sample, the same three columns, moving; the grid has their frames side by side instead, three
rows a sample."""
_PLACE_BEFORE = "images"
FRAME_MS = 125
"""How long an animation shows a frame."""
_MIN_TILE_PIXELS = 64
_ALWAYS_UNPACKED, _MAX_RATIO = 2**31, 100
"""Bytes of arrays that are read whatever their file has; above, at most so many times those of the file."""


def kept_picture(read: Callable[[str], bytes | None], name: str) -> bytes | None:
    """One of the files above, of a run of today or of one that kept it where MLflow's own images are.

    ``read``: what a run has under a name; None for nothing."""
    return read(name) or read(f"{_PLACE_BEFORE}/{Path(name).name}")


def shown_tiles(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (rows, columns, ..., height, width, 1 or 3) in RGB, those under 64 pixels enlarged by a whole factor."""
    smallest = min(images.shape[-3:-1])
    scale = -(-_MIN_TILE_PIXELS // smallest) if smallest < _MIN_TILE_PIXELS else 1
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2).repeat(3 // images.shape[-1], axis=-1)


def framed_grid(images: ArrayLike, name: str) -> Picture:
    """A picture of an array (rows, columns, height, width, channels), or of one row without the first axis.

    Every tile has a white frame of one pixel. TrackingError, naming ``name``, for another shape or dtype.
    """
    import numpy as np
    from PIL import Image

    array = np.asarray(images)
    array = array[None] if array.ndim == 4 else array
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise TrackingError(
            f"images {name!r}: {array.dtype} of shape {array.shape}; give uint8 of shape "
            "(rows, columns, height, width, 1 or 3)"
        )
    tiles = shown_tiles(array)
    rows, columns, height, width, _ = tiles.shape
    framed = np.full((rows, columns, height + 2, width + 2, 3), 255, np.uint8)
    framed[:, :, 1:-1, 1:-1] = tiles
    return Image.fromarray(framed.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 2), columns * (width + 2), 3))


def contact_sheet(videos: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Videos (samples, 3, frames, height, width, channels) as rows of frames: (samples * 3, frames, height, ...)."""
    return videos.reshape(-1, *videos.shape[2:])


def save_animation(frames: Sequence[Picture], target: Path | io.BytesIO, *, exact: bool) -> None:
    """Write pictures of one size as an animated WebP that repeats; ``exact``: without loss."""
    settings = {"lossless": True} if exact else {"quality": 82}
    frames[0].save(target, "webp", save_all=True, append_images=list(frames[1:]), duration=FRAME_MS, loop=0, **settings)


def animated_grid(videos: NDArray[np.uint8], name: str) -> list[Picture]:
    """The frames of an animation of all videos (rows, columns, frames, height, width, channels), framed in white."""
    return [framed_grid(videos[:, :, k], name) for k in range(videos.shape[2])]


def write_samples(images: NDArray[np.uint8], sample_ids: Sequence[str], file: Path) -> None:
    """Write ``images`` (samples, 3, height, width, channels), or videos, and their ids to ``file`` (.npz)."""
    import numpy as np

    np.savez_compressed(file, images=images, sample_ids=np.array(sample_ids, dtype=str))


def read_samples(content: bytes) -> tuple[NDArray[np.uint8], list[str]] | None:
    """``images`` and ``sample_ids`` of a file like :data:`SAMPLE_ARRAYS`; None for what is no such file, and for one of
    a few bytes that would fill the memory."""
    import numpy as np

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:  # no more than this is unpacked of them
            if sum(one.file_size for one in members.infolist()) > max(_ALWAYS_UNPACKED, _MAX_RATIO * len(content)):
                return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            images, ids = arrays["images"], arrays["sample_ids"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error):
        return None
    usable = images.dtype == np.uint8 and images.ndim in (5, 6) and images.shape[1] == 3 and images.shape[-1] in (1, 3)
    return (images, [str(i) for i in ids]) if usable and 0 not in images.shape else None
