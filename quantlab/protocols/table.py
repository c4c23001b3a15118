"""The protocols: how a kind of model is run on its inputs and compared with the reference; a protocol is one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.protocols import diffusion, encoder, language, module, seq2seq, vision
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.encoder import EncoderInputs
from quantlab.protocols.language import TextInputs
from quantlab.protocols.seq2seq import PairInputs
from quantlab.protocols.vision import VisionInputs
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

Inputs = DiffusionInputs | TextInputs | EncoderInputs | PairInputs | VisionInputs
"""What a data set becomes: the inputs of a model's protocol."""
InputsT = TypeVar("InputsT", contravariant=True)


class EvaluationProtocol(Protocol[InputsT]):
    """What the file of a protocol holds; ``InputsT`` is what its models are run on.

    ``progress(done, total)`` is told after each part of the work; ``batch_size`` stands in for the evaluation's.
    """

    @property
    def HEADLINE(self) -> tuple[str, ...]:
        """The metrics that the terminal's table shows, of those that a run has; schemes are judged by the first."""

    def check(self, model: LoadedModel, inputs: InputsT) -> None:
        """ModelError for a model whose numbers would mean nothing; tried before the reference is taken or made."""

    def observe(
        self,
        model: LoadedModel,
        inputs: InputsT,
        evaluation: EvaluationConfig,
        progress: Progress | None = None,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """The model's outputs, a tree that :mod:`quantlab.modules.kept` stores."""

    def measure(
        self,
        model: LoadedModel,
        inputs: InputsT,
        evaluation: EvaluationConfig,
        reference: Mapping[str, Any],
        reference_model: LoadedModel,
        progress: Progress | None = None,
        batch_size: int | None = None,
    ) -> Measurements:
        """A candidate run the same way, compared with what ``observe`` returned of the reference."""

    def calls(
        self,
        model: LoadedModel,
        inputs: InputsT,
        evaluation: EvaluationConfig,
        components: Sequence[str],
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Call]]:
        """(component, call): the forward calls that ``components`` get while the model runs on the inputs."""


PROTOCOLS: dict[str, EvaluationProtocol[Any]] = {
    "diffusion": diffusion,
    "language": language,
    "encoder": encoder,
    "seq2seq": seq2seq,
    "vision": vision,
    "module": module,
}
