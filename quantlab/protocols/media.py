"""What is measured of images, videos and sound, and what is shown of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.metrics.audio import audio_rel_mse, audio_snr_db, log_spectral_distance_db
from quantlab.metrics.psnr import image_mse, psnr_db
from quantlab.metrics.ssim import WINDOW, ssim
from quantlab.metrics.video import frame_mse, frame_psnr_db, frame_ssim, temporal_rel_error
from quantlab.progress import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_METRICS = (
    "psnr_db",
    "psnr_pooled_db",
    "image_mse",
    "ssim",
    "n_identical",
    "class_accuracy",
    "judge_agreement",
    "frechet_judge",
)
METRICS_OF: dict[str, tuple[str, ...]] = {
    "images": IMAGE_METRICS,
    "frames": ("frame_psnr_db", "frame_mse", "frame_ssim", "temporal_rel_error"),
    "audio": ("audio_snr_db", "audio_rel_mse", "log_spectral_distance_db"),
}
"""Kind of medium -> what is measured of it."""
SAID_OF = {"images": "decoded image", "frames": "decoded video", "audio": "decoded sound"}
DIFFERENCE_GAIN = 4
NUM_FRAMES_SHOWN = 16


def image_metrics(candidate: NDArray[np.uint8], reference: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """The metrics of images (n, height, width, channels) that are one value a sample."""
    found = {"psnr_db": psnr_db(candidate, reference), "image_mse": image_mse(candidate, reference)}
    if min(reference.shape[1:3]) >= WINDOW:
        found["ssim"] = ssim(candidate, reference)
    return found


def moving_metrics(
    outputs: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, Callable[[], NDArray[np.float64]]]:
    """The metrics of videos and of sound, of those that both trees have: name -> how it is measured, one a sample."""
    found: dict[str, Callable[[], NDArray[np.float64]]] = {}
    if "frames" in outputs and "frames" in reference:
        frames = outputs["frames"].numpy(), reference["frames"].numpy()
        found["frame_psnr_db"] = lambda: frame_psnr_db(*frames)
        found["frame_mse"] = lambda: frame_mse(*frames)
        if min(frames[1].shape[2:4]) >= WINDOW:
            found["frame_ssim"] = lambda: frame_ssim(*frames)
        if frames[1].shape[1] > 1:
            found["temporal_rel_error"] = lambda: temporal_rel_error(*frames)
    if "audio" in outputs and "audio" in reference:
        sound = outputs["audio"].numpy(), reference["audio"].numpy()
        found["audio_snr_db"] = lambda: audio_snr_db(*sound)
        found["audio_rel_mse"] = lambda: audio_rel_mse(*sound)
        found["log_spectral_distance_db"] = lambda: log_spectral_distance_db(*sound)
    return found


def shown_images(
    outputs: Mapping[str, Any], reference: Mapping[str, Any], rows: Sequence[int]
) -> NDArray[np.uint8] | None:
    """uint8 (k, 3, height, width, channels): reference, candidate, 4 * |difference| cut off at 255; None without.

    Of videos (k, 3, frames, height, width, channels), of at most :data:`NUM_FRAMES_SHOWN` frames, evenly spread.
    """
    import numpy as np

    kind = "frames" if "frames" in reference else "images"
    if kind not in outputs or kind not in reference:
        return None
    ref, cand = (tree[kind].numpy()[list(rows)] for tree in (reference, outputs))
    if kind == "frames":
        num = min(ref.shape[1], NUM_FRAMES_SHOWN)
        shown = [i * ref.shape[1] // num for i in range(num)]
        ref, cand = ref[:, shown], cand[:, shown]
    difference = np.abs(cand.astype(np.int32) - ref) * DIFFERENCE_GAIN
    return np.stack([ref, cand, np.minimum(difference, 255).astype(np.uint8)], axis=1)


def tell_of_one_colour(outputs: Mapping[str, Any], sample_ids: Sequence[str]) -> None:
    """Tell of the reference's images and videos that are of one colour or silent: every candidate that makes the same
    would look perfect. A safety checker's black image is one, and what a decoder gives at a size that it cannot do."""
    for kind in ("images", "frames", "audio"):
        if kind not in outputs:
            continue
        rows = outputs[kind].flatten(1)
        empty = [name for name, row in zip(sample_ids, rows, strict=True) if bool((row == row[0]).all())]
        if empty:
            say(
                f"{len(empty)} of {len(rows)} samples of the reference ({kind}) are of one value throughout, such as "
                f"{empty[0]}: a candidate that gives the same seems perfect there. Look at the pictures, at the size "
                "that was asked for, and at a safety checker (model.without=[safety_checker])",
                "warning",
            )
