"""Models that read images: how far each tensor that they return moves from the reference's; the worst one counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.protocols import module
from quantlab.protocols.tried import check_runs
from quantlab.protocols.unchanged import same_memory
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    from torch import Tensor

HEADLINE = module.HEADLINE


@dataclass(frozen=True, eq=False)
class VisionInputs:
    """Images as the model's processor makes them."""

    pixel_values: Tensor
    """fp32 (images, channels, height, width); or (images, patches, values), of a processor that cuts them."""
    sample_ids: tuple[str, ...]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the processor makes and the model takes, (images, ...): masks, and how many patches an image has."""

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.sample_ids)

    @property
    def sha256(self) -> str:
        """Digest of all that the model is given."""
        digest = hashlib.sha256(repr(tuple(self.pixel_values.shape)).encode())
        digest.update(self.pixel_values.contiguous().numpy().tobytes())
        for name, tensor in sorted(self.others.items()):
            digest.update(repr((name, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | slice) -> VisionInputs:
        """The images with these numbers, in this order."""
        rows = list(range(self.num_samples)[indices] if isinstance(indices, slice) else map(int, indices))
        others = {name: tensor[rows] for name, tensor in self.others.items()}
        ids = tuple(self.sample_ids[i] for i in rows)
        return replace(self, pixel_values=self.pixel_values[rows], sample_ids=ids, others=others)


def check(model: LoadedModel, inputs: VisionInputs) -> None:
    """ModelError for a model that cannot be run or measured, see :mod:`quantlab.protocols.tried`."""
    with same_memory(model.components["model"]):  # what it keeps of its weights (LeViT's biases) is not its copies'
        check_runs(model, lambda: module.observe(model, _batches(model, inputs.subset([0]), 1), EvaluationConfig()))


def observe(
    model: LoadedModel,
    inputs: VisionInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """``outputs``: name of each tensor that the model returns -> fp32 (images, ...)."""
    import torch

    given = _batches(model, inputs, batch_size or evaluation.batch_size)
    with same_memory(model.components["model"]):
        found = module.observe(model, given, evaluation, progress)
    return {"outputs": {name: torch.cat(parts) for name, parts in found["outputs"].items()}}


def calls(
    model: LoadedModel,
    inputs: VisionInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The model's calls on the images, ``evaluation.batch_size`` at once."""
    given = _batches(model, inputs, evaluation.batch_size)
    with same_memory(model.components["model"]):  # until the last call was taken, and replayed
        yield from module.calls(model, given, evaluation, components, progress)


def measure(
    model: LoadedModel,
    inputs: VisionInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """By image: ``output_cosine`` and ``output_rel_error`` of the tensor that moves most."""
    whole = {name: [tensor] for name, tensor in reference["outputs"].items()}
    given = _batches(model, inputs, batch_size or evaluation.batch_size)
    with same_memory(model.components["model"]):
        found = module.measure(model, given, evaluation, {"outputs": whole}, reference_model, progress)
    return replace(found, sample_ids=inputs.sample_ids)


def _batches(model: LoadedModel, inputs: VisionInputs, batch_size: int) -> module.ModuleInputs:
    import torch

    given = {"pixel_values": inputs.pixel_values, **inputs.others}
    parts = {name: torch.split(tensor, batch_size) for name, tensor in given.items()}
    num_parts = len(parts["pixel_values"])
    return module.inputs_of([{name: parts[name][i] for name in given} for i in range(num_parts)], model.dtype)
