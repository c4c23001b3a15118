"""The reference's next-token distributions, made once for all candidates as far as memory is at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from quantlab.metrics.kl import Distributions, distributions
from quantlab.modules.device import free_bytes
from quantlab.protocols.finite import require_finite_rows
from quantlab.protocols.output_head import LogitsByParts

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 2**30
"""Most that is kept of one reference; and at most an eighth of the memory that is free."""


class Windows(Protocol):
    """What is asked of the inputs."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def sample_ids(self) -> tuple[str, ...]: ...
    @property
    def sha256(self) -> str: ...


Distributed = Callable[["Tensor", Windows, Sequence[slice]], Iterator[Distributions]]
"""(hidden states (chunks, length, width), inputs, parts of the positions) -> of each chunk, its parts in order."""


@functools.cache
def _kept() -> MutableMapping[Tensor, dict[tuple[Any, ...], Distributions]]:
    """Hidden states that are in memory -> what was made of them; gone with them."""
    from torch.utils.weak import WeakTensorKeyDictionary

    kept: MutableMapping[Tensor, dict[tuple[Any, ...], Distributions]] = WeakTensorKeyDictionary()
    return kept


def reference_distributions(of_reference: LogitsByParts) -> Distributed:
    """Distributions of ``of_reference``'s logits: known ones where the same hidden states were asked before.

    On a CPU, where making them takes as long as a small model's forward; a GPU makes them anew.
    Raises NotFinite naming the chunk whose logits are NaN or infinite.
    """

    def made(hidden: Tensor, inputs: Windows, parts: Sequence[slice]) -> Iterator[Distributions]:
        known = _kept().setdefault(hidden, {})
        left = min(KEPT_BYTES, free_bytes("cpu") // 8) - sum(one.log_p.nbytes for one in known.values())
        for i, sample_id in enumerate(inputs.sample_ids):
            keys = [(inputs.sha256, i, part.start, part.stop) for part in parts]
            if all(key in known for key in keys):
                yield from (known[key] for key in keys)
                continue
            for key, logits in zip(keys, of_reference(inputs.input_ids[i], hidden[i], parts), strict=True):
                require_finite_rows(logits.amax(-1).reshape(1, -1), [sample_id], "reference's logits")
                one = distributions(logits)
                if one.log_p.device.type == "cpu" and one.log_p.nbytes <= left:
                    known[key] = one
                    left -= one.log_p.nbytes
                yield one

    return made
