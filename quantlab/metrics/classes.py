"""What a fixed classifier (the judge) sees in the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_array, as_float32, paired_rows
from quantlab.metrics.statistics import require_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def class_accuracy(logits: Values, labels: Values) -> NDArray[np.float64]:
    """1 where the judge's class is the one that was asked for, else 0: (n,), from logits (n, classes), labels (n,).

    Raises :class:`~quantlab.errors.MetricUndefined` for NaN in the logits and for labels of another number or range.
    """
    import numpy as np

    scores = as_float32(logits)
    asked = as_array(labels)
    if scores.ndim != 2 or asked.shape != scores.shape[:1]:
        raise MetricUndefined(
            f"class_accuracy: logits of shape {scores.shape} and labels of shape {asked.shape}; "
            "give (n, classes) and (n,)"
        )
    if asked.size and not (asked.min() >= 0 and asked.max() < scores.shape[1]):
        raise MetricUndefined(
            f"class_accuracy: labels from {asked.min()} to {asked.max()} for a judge of {scores.shape[1]} classes; "
            "use the judge that was trained on these classes"
        )
    require_finite(scores.sum(axis=1), "class_accuracy")
    return (scores.argmax(axis=1) == asked).astype(np.float64)


def judge_agreement(candidate_logits: Values, reference_logits: Values) -> NDArray[np.float64]:
    """1 where the judge puts the candidate's image in the class of the reference's, else 0: (n,), from (n, classes).

    Raises :class:`~quantlab.errors.MetricUndefined` for NaN in the logits and for shapes that differ.
    """
    import numpy as np

    cand, ref = paired_rows(candidate_logits, reference_logits, "judge_agreement")
    require_finite(cand.sum(axis=1) + ref.sum(axis=1), "judge_agreement")
    return (cand.argmax(axis=1) == ref.argmax(axis=1)).astype(np.float64)
