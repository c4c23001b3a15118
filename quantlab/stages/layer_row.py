"""The row of one layer that was read back, whoever quantized it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantlab.backends.table import held_packages
from quantlab.modules.holders import Holder
from quantlab.modules.memory import layer_memory
from quantlab.stages.products import Product
from quantlab.stages.weight_errors import WeightErrors
from quantlab.vocabulary.reports import LayerReport, StoredWeight

if TYPE_CHECKING:
    from torch import nn


def layer_row(
    component: str,
    holder: Holder,
    layer: nn.Module,
    shape: tuple[int, int],
    stored: StoredWeight,
    found: WeightErrors,
    answered: Product | None,
    status: str,
    reason: str,
) -> LayerReport:
    """``shape`` is (out_features, in_features); the bytes are those that the layer's tensors hold now."""
    weight_bytes, scale_bytes = layer_memory(layer, held_packages())
    return LayerReport(
        component=component,
        name=holder.name,
        kind=holder.kind,
        shape=shape,
        status=status,
        dtype=stored.dtype,
        group_size=stored.group_size,
        activation_dtype=stored.activation_dtype,
        activation_granularity=stored.activation_granularity,
        bits_per_weight=8 * (weight_bytes + scale_bytes) / math.prod(shape),
        weight_bytes=weight_bytes,
        scale_bytes=scale_bytes,
        weight_rel_error=found.layer,
        worst_row_rel_error=found.worst_row,
        product_rel_error=None if answered is None else answered.rel_error,
        kernel="" if answered is None else answered.kernel,
        is_simulated=stored.is_simulated,
        reason=reason,
    )
