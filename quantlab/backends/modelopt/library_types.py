"""What is read of ModelOpt's objects, whose package has no types; for type checkers, empty at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor, nn

    class TensorQuantizer(nn.Module):
        """Rounds what passes, by settings and by maxima that calibration found."""

        is_enabled: bool
        num_bits: int | tuple[int, int]
        """Bits, or (exponent bits, mantissa bits)."""
        block_sizes: dict[Any, Any] | None
        """Axis -> block size; and ``type`` and ``scale_bits``."""
        amax: Tensor | None
        pre_quant_scale: Tensor | None
        _amax: Tensor
        _scale: Tensor
        """Of a packed weight."""
        _axis: int | tuple[int, ...] | None
        _calibrator: object
        _dequantize: bool
        _dynamic: bool
        _num_bits: int | tuple[int, int]
        _unsigned: bool

        def enable(self) -> None: ...
        def disable(self) -> None: ...
        def _set_buffer(self, key: str, value: Tensor) -> None: ...

    class QuantLinear(nn.Linear):
        """A layer that has, or is about to get, quantizers: the library changes a layer's class in place."""

        weight_quantizer: TensorQuantizer
        input_quantizer: TensorQuantizer
        calibrated_by: object
        """quantlab's: the config that its scales are for, until it is packed."""

    class BaseQuantizedTensor:
        """Codes and what they mean; handed on, never read."""
