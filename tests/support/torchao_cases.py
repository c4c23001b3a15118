"""The combinations of axes that torchao runs on a CPU, without those that are calibrated."""

from __future__ import annotations

import itertools

from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["torchao"]


def cpu_cases():
    for dtype, row in ROWS.items():
        groups = ("auto", *row.group_sizes)
        algorithms = [a for a in row.algorithms if a in ("max", "hqq")]  # the others: test_calibrate.py
        for group, act, algorithm in itertools.product(groups, row.activation_dtypes, algorithms):
            is_cuda_only = act == "float8_e4m3"
            is_refused = dtype == act == "int8" and isinstance(group, int)
            if not is_cuda_only and not is_refused:
                yield dtype, group, act, algorithm


CASES = list(cpu_cases())


def axes(dtype="int8", group_size="auto", activation_dtype="auto", algorithm="auto", **more):
    return QuantizationAxes(
        backend="torchao",
        dtype=dtype,
        group_size=group_size,
        activation_dtype=activation_dtype,
        algorithm=algorithm,
        **more,
    )
