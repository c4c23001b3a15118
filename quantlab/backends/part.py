"""What an export hands to a backend, and what it gets back: the one door between :mod:`quantlab.exporting` and formats.

Most backends' layers stand in the ecosystem's checkpoints as they are: :mod:`quantlab.exporting.checkpoint` lets
``save_pretrained`` write them, under the config that the backend's ``as_stored`` makes for the library's loader.

A backend with a file format of its own (GGUF) offers the optional function

    ``export(part: Part, folder: Path) -> Written``

at module level. It writes into ``folder`` (which is there, is empty, and is renamed as a whole afterwards), touches
nothing else, and raises ConfigError naming what its format cannot hold before it writes the first byte. What of that is
known before the model is measured, ``check_export(part: Part) -> None`` refuses then (optional).

A backend whose library restores a model from a file of its own beside the checkpoint (ModelOpt) offers, in the place of
``as_stored``,

    ``beside(part: Part) -> Beside``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import LayerReport

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One quantized component of a model, as an exporter gets it."""

    name: str
    """Its name in the model: ``transformer``, ``text_encoder``, ``model``."""
    module: nn.Module
    """Quantized, in eval mode, on its device; not to be changed."""
    original: nn.Module
    """The unquantized component that it was made from; not to be changed."""
    library: str
    """Whose class it is, and so who loads it: one of :data:`LIBRARIES`."""
    config: QuantizationConfigMixin
    """What it was quantized by, with each ``auto`` made concrete."""
    layers: Sequence[LayerReport]
    """The rows that were read back of this component, excluded and left ones included."""
    dtype: str
    """What it computes in: ``float32``, ``bfloat16``, ``float16``."""
    compute_dtype: str
    """The same of its quantized layers, where the scheme says another; else the part's."""
    tokenizer: object | None = None
    """That of a language model, for formats that hold it."""

    @property
    def quantized(self) -> dict[str, LayerReport]:
        """Path -> row of the layers that are stored as the scheme says."""
        return {row.name: row for row in self.layers if row.status == "quantized"}

    def require_own_compute_dtype(self) -> None:
        """ConfigError where the layers compute in another dtype than the model, which loaders do not let them."""
        if self.compute_dtype != self.dtype:
            raise ConfigError(
                f"compute_dtype={self.compute_dtype}: a loaded checkpoint of {self.config.method()} computes in the "
                f"dtype of its model, {self.dtype}; leave compute_dtype at auto, or set model.dtype"
            )


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, and by what it is loaded again without quantlab."""

    loader: str
    """In words, for the tag ``export/loads_with``: ``diffusers FluxTransformer2DModel.from_single_file``."""
    target: str
    """The class that loads it: ``diffusers:FluxTransformer2DModel``, ``transformers:LlamaForCausalLM``."""
    method: str = "from_pretrained"
    """Its class method: ``from_pretrained`` or ``from_single_file``."""
    file: str = ""
    """For ``from_single_file``: the file's name in the folder. Else the folder is loaded."""
    needs_gpu: bool = False
    """The loader refuses machines without one; where this is such a machine, that one check is set aside."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Further arguments, as JSON has them; ``dtype`` by its name."""
    before: str = ""
    """What is called once before it is loaded, by which its library joins in: ``modelopt.torch.opt:enable_...``."""
    state: Mapping[str, str] | None = None
    """Name of each tensor as the loaded module has it -> its digest (as ``exporting/check.py`` makes it);
    None: those of the part's own module, as it stands."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a library keeps beside a checkpoint that ``save_pretrained`` wrote, and how it is loaded with it."""

    write: Callable[[Path], None]
    """Puts its file into the folder."""
    before: str
    """As in :class:`Written`."""
    arguments: Mapping[str, object]
    """What ``from_pretrained`` is told beside the dtype."""
