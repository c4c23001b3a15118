"""What is read of torchao's tensor classes, whose package has no types; for type checkers, empty at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    class TorchAOBaseTensor(Tensor):
        """A quantized weight; what only some classes have is said where they stand below."""

        act_pre_scale: Tensor | None
        """(in_features,), which the layer's input is multiplied by."""
        act_quant_scale: Tensor | None
        """The step of static activations, in as many dimensions as the input has."""

    class Int8Tensor(TorchAOBaseTensor):
        qdata: Tensor
        scale: Tensor
        act_quant_kwargs: object | None
        """How the activations are rounded; None: they are not."""

    class Float8Tensor(TorchAOBaseTensor):
        """And ``PrototypeFloat8Tensor``, which is read alike."""

        qdata: Tensor
        scale: Tensor
        act_quant_kwargs: object | None

        def __init__(self, qdata: Tensor, scale: Tensor, **settings: object) -> None: ...

    class IntxUnpackedToInt8Tensor(TorchAOBaseTensor):
        scale: Tensor
        target_dtype: torch.dtype
        activation_quantization: object | None

    class Int4TilePackedTo4dTensor(TorchAOBaseTensor):
        qdata: Tensor
        scale_and_zero: Tensor

    class Int4OpaqueTensor(TorchAOBaseTensor):
        qdata: Tensor
        scale_and_zero: Tensor
        block_size: list[int]

    class NF4Tensor(Tensor):
        quantized_scalers: Tensor
        block_size: int
        scaler_block_size: int

        def get_original_weight(self) -> Tensor: ...

    class NVFP4Tensor(TorchAOBaseTensor):
        scale: Tensor
        per_tensor_scale: Tensor | None
        block_size: int
        act_quant_kwargs: object | None

    class MXTensor(TorchAOBaseTensor):
        scale: Tensor
        elem_dtype: torch.dtype | str
        block_size: int
        act_quant_kwargs: object | None
