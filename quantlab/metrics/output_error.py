"""How far the output of an encoder or of a plain module moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.metrics.arrays import Values, cosine, paired_rows, relative, row_dots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def output_cosine(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Cosine of the outputs (n, ...), each sample taken as one vector: (n,), 1 for equal directions.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and where an output is all zeros.
    """
    return cosine(candidate, reference, "output_cosine")


def output_rel_error(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """||y_q - y_r|| / ||y_r|| of the outputs (n, ...), Frobenius norm by sample: (n,), 0 for equal outputs.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and for a reference of zeros.
    """
    import numpy as np

    cand, ref = paired_rows(candidate, reference, "output_rel_error")
    error = cand - ref
    return np.sqrt(relative(row_dots(error, error), row_dots(ref, ref), "output_rel_error"))
