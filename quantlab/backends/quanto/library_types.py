"""What is read of optimum-quanto's objects, whose package has no types; for type checkers, empty at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    class qtype(Protocol):
        """A stored format."""

        name: str
        bits: int

    class QTensor(Tensor):
        """A quantized weight."""

        qtype: qtype
        _scale: Tensor

    class QLinear(nn.Linear):
        """A layer that has, or is about to get, a :class:`QTensor` for its weight."""

        frozen: bool
        weight_qtype: qtype
        weight_group_size: int | None
        activation_qtype: qtype | None
        optimizer: Any
        """From a weight to its scales: called for 8 bits; below, its ``optimize`` gives shifts too."""
        input_scale: Tensor
        output_scale: Tensor
        _quantize_hooks: dict[str, RemovableHandle]
        quantize_input: Callable[[nn.Module, tuple[Any, ...]], Tensor]

        def disable_output_quantization(self) -> None: ...
