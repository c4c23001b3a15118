"""Tensors in, rows out: what the per-sample metrics share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from quantlab.errors import MetricUndefined

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

Values: TypeAlias = "Tensor | ArrayLike"
"""A torch tensor of any dtype and device, or anything that numpy takes."""


def as_float32(values: Values) -> NDArray[np.float32]:
    """As an fp32 numpy array: numpy knows neither bfloat16 nor other devices."""
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def as_array(values: Values) -> NDArray[Any]:
    """As a numpy array of its own dtype."""
    import numpy as np

    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def paired_rows(candidate: Values, reference: Values, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two tensors of one shape (n, ...) as fp32 arrays of shape (n, d); :class:`MetricUndefined` for other shapes."""
    cand, ref = as_float32(candidate), as_float32(reference)
    if cand.shape != ref.shape or cand.ndim < 2 or not cand.size:
        raise MetricUndefined(
            f"{name}: the candidate has shape {cand.shape}, the reference {ref.shape}; "
            "give both as one non-empty shape (samples, ...), measured on the same inputs"
        )
    return cand.reshape(len(cand), -1), ref.reshape(len(ref), -1)


def row_dots(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scalar products of the rows of two fp32 arrays (n, d), accumulated in float64: (n,)."""
    import numpy as np

    return np.array([np.dot(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)])


def relative(numerator: NDArray[np.float64], denominator: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """``numerator / denominator`` by sample; :class:`MetricUndefined` names the first sample with a zero below."""
    import numpy as np

    zero = np.flatnonzero(denominator == 0)
    if zero.size:
        raise MetricUndefined(
            f"{name}: sample {zero[0]} is all zeros, so nothing can be measured relative to it; "
            "leave that input out, or look for a layer that switches the output off"
        )
    return numerator / denominator


def cosine(candidate: Values, reference: Values, name: str) -> NDArray[np.float64]:
    """Cosine of the angle between the samples of two tensors (n, ...), each taken as one vector: (n,), in [-1, 1]."""
    import numpy as np

    cand, ref = paired_rows(candidate, reference, name)
    norms = np.sqrt(row_dots(cand, cand) * row_dots(ref, ref))  # of equal ones exactly their dot product
    return np.clip(relative(row_dots(cand, ref), norms, name), -1.0, 1.0)
