"""Every calibrated algorithm as a scheme, on a net of two layers whose sides all formats take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantlab.backends.scheme import scheme_of_config
from quantlab.modules.feed import CalibrationFeed, feed_of_batches
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.schemes import Scheme, schemes_on_cpu
from tests.support.tables import BACKENDS, CAPABILITIES


def calibrated_schemes(device: str = "cpu") -> list[Scheme]:
    """One scheme of each calibrated algorithm, and of static activations, of each backend; on a GPU in bfloat16."""
    found: dict[tuple[str, str, str], Scheme] = {}
    for scheme in schemes_on_cpu():
        if scheme.native.needs_data:
            static = getattr(scheme.native, "activation_scales", "")
            found.setdefault((scheme.backend, scheme.algorithm, static), scheme)
    if device == "cpu":
        return list(found.values())
    schemes = [*found.values(), *_on_cuda_alone()]
    return [
        replace(scheme, compute_dtype="bfloat16")
        if "bfloat16" in CAPABILITIES[scheme.backend][scheme.dtype].compute_dtypes
        else scheme
        for scheme in schemes
    ]


def _on_cuda_alone() -> Iterator[Scheme]:
    for backend, rows in CAPABILITIES.items():
        for dtype, row in rows.items():
            for algorithm in row.cuda_algorithms:
                axes = QuantizationAxes(backend=backend, dtype=dtype, algorithm=algorithm)
                yield Scheme(
                    backend=backend,
                    dtype=dtype,
                    activation_dtype="none",
                    algorithm=algorithm,
                    native=BACKENDS[backend].Config.from_axes(axes),
                    compute_dtype=row.compute_dtypes[0],
                )


def net(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    return layers.to(getattr(torch, dtype)).eval().requires_grad_(False)


def request_of(scheme: Scheme, device: str = "cpu") -> QuantizationRequest:
    return QuantizationRequest(
        component="model",
        scheme=scheme_of_config(scheme.native),
        compute_dtype=scheme.compute_dtype,
        device=device,
    )


def data(scheme: Scheme, device: str = "cpu", num: int = 3, rows: int = 4) -> CalibrationFeed:
    torch.manual_seed(1)
    batches: list[Any] = [torch.randn(rows, 256).to(getattr(torch, scheme.compute_dtype)) for _ in range(num)]
    return feed_of_batches(batches, device, scheme.compute_dtype)
