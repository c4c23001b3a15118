"""Videos: how near each frame is to the reference's, and how near what changes from frame to frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_array, relative
from quantlab.metrics.psnr import image_mse, psnr_db
from quantlab.metrics.ssim import ssim

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def frame_psnr_db(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Mean over a video's frames of :func:`~quantlab.metrics.psnr.psnr_db`, in dB, of 8-bit videos
    (n, frames, height, width, channels): (n,). A frame that is identical counts 100.

    Raises :class:`~quantlab.errors.MetricUndefined` for videos that are not 8-bit and for shapes that differ.
    """
    cand, ref = paired_videos(candidate, reference, "frame_psnr_db")
    return psnr_db(_frames(cand), _frames(ref)).reshape(ref.shape[:2]).mean(axis=1)


def frame_mse(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Mean squared error over a video, full scale 1, of 8-bit videos (n, frames, height, width, channels): (n,)."""
    cand, ref = paired_videos(candidate, reference, "frame_mse")
    return image_mse(_frames(cand), _frames(ref)).reshape(ref.shape[:2]).mean(axis=1)


def frame_ssim(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Mean over a video's frames of :func:`~quantlab.metrics.ssim.ssim`, of 8-bit videos
    (n, frames, height, width, channels): (n,), 1 for equal videos.

    Raises :class:`~quantlab.errors.MetricUndefined` for frames smaller than the window, not 8-bit, or of two shapes.
    """
    cand, ref = paired_videos(candidate, reference, "frame_ssim")
    return ssim(_frames(cand), _frames(ref)).reshape(ref.shape[:2]).mean(axis=1)


def temporal_rel_error(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """sum |(c[t+1] - c[t]) - (r[t+1] - r[t])|^2 / sum |r[t+1] - r[t]|^2 over a video's frames, of 8-bit videos
    (n, frames, height, width, channels): (n,), 0 where what changes from frame to frame is the reference's.

    It sees flicker and motion that went another way, and no error that stands still; 1 is what a still picture has.
    The difference of frame differences stands in reviews of video quality as temporal error or "flicker" (Winkler,
    "Digital Video Quality", 2005, section 3.3); here it is relative to the reference's own change.
    Raises :class:`~quantlab.errors.MetricUndefined` for videos of one frame, or that do not move, and as above.
    """
    import numpy as np

    cand, ref = paired_videos(candidate, reference, "temporal_rel_error")
    if ref.shape[1] < 2:
        raise MetricUndefined("temporal_rel_error: a video of one frame has no change; make more frames")
    changes = [np.diff(video.astype(np.float64), axis=1).reshape(len(video), -1) for video in (cand, ref)]
    error = ((changes[0] - changes[1]) ** 2).sum(axis=1)
    return relative(error, (changes[1] ** 2).sum(axis=1), "temporal_rel_error")


def paired_videos(candidate: Values, reference: Values, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two arrays or tensors of 8-bit videos (n, frames, height, width, channels), checked."""
    import numpy as np

    cand, ref = as_array(candidate), as_array(reference)
    if cand.dtype != np.uint8 or ref.dtype != np.uint8 or cand.shape != ref.shape or cand.ndim != 5 or not cand.size:
        raise MetricUndefined(
            f"{name}: the candidate's videos are {cand.dtype} of shape {cand.shape}, the reference's {ref.dtype} of "
            f"{ref.shape}; give both as 8-bit and one shape (n, frames, height, width, channels)"
        )
    return cand, ref


def _frames(videos: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return videos.reshape(-1, *videos.shape[2:])
