"""What an export hands to a backend, and what it gets back: the one door between :mod:`quantlab.exporting` and formats.

Most backends need no code for it: their layers stand in the ecosystem's checkpoints as they are, so that
:mod:`quantlab.exporting.checkpoint` lets ``save_pretrained`` write them under the config that ``to_diffusers`` or
``to_transformers`` gives. A backend with a file format of its own (GGUF) offers the optional function

    ``export(part: Part, folder: Path) -> Written``

at module level. It writes into ``folder`` (which is there, is empty, and is renamed as a whole afterwards), touches
nothing else, and raises ConfigError naming what its format cannot hold before it writes the first byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    tokenizer: object | None = None
    """That of a language model, for formats that hold it."""


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
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Further arguments, as JSON has them; ``dtype`` by its name."""
    state: Mapping[str, str] | None = None
    """Name of each tensor as the loaded module has it -> its digest (as ``exporting/check.py`` makes it);
    None: those of the part's own module, as it stands."""
