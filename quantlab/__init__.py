"""quantlab: declarative recipes for model quantization.

    import quantlab
    results = quantlab.run("digits_backends", ["evaluation=quick"])     # results.rows, .layers, .samples, .compare()
    results = quantlab.load("latest")
    module, report = quantlab.quantize(my_module, quantlab.QuantoConfig(weights_dtype="int8"))
    model = quantlab.load("an/export")
    rows = quantlab.evaluate(my_module, [quantlab.QuantoConfig("int4")], inputs=[x1, x2])

Importing this package imports neither torch nor any backend's library.
"""

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from quantlab.backends.bitsandbytes import BitsAndBytesConfig
from quantlab.backends.gguf import GGUFQuantizationConfig
from quantlab.backends.modelopt import NVIDIAModelOptConfig
from quantlab.backends.pipelines import from_pipeline_config
from quantlab.backends.quanto import QuantoConfig
from quantlab.backends.stored import config_from_dict, from_pretrained_config
from quantlab.backends.torchao import TorchAoConfig
from quantlab.errors import (
    ConfigError,
    MetricUndefined,
    MissingPackage,
    ModelError,
    NotQuantized,
    QuantlabError,
    TrackingError,
)
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.native import QuantizationConfigMixin, QuantizationMethod
from quantlab.vocabulary.reports import (
    CalibrationReport,
    LayerReport,
    Measurements,
    MemoryReport,
    MetricValue,
    QuantizationReport,
    RunReport,
    StageReport,
)

if TYPE_CHECKING:
    from quantlab.api import compose, load, run
    from quantlab.report.results import Results
    from quantlab.stages.own_module import evaluate, quantize
    from quantlab.stages.own_pipeline import to_pipeline_config

# On some processors MKL's float32 products depend on where in memory their operands begin, and so on the way in which a
# model was loaded. This makes them the same, at no cost to speak of; it has to be said before the first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_LATER = {
    **dict.fromkeys(("compose", "load", "run"), "quantlab.api"),
    **dict.fromkeys(("evaluate", "quantize"), "quantlab.stages.own_module"),
    "to_pipeline_config": "quantlab.stages.own_pipeline",
    "Results": "quantlab.report.results",
}
"""Name -> its module, a hundred others with it, which most commands of the command line do without."""

try:
    __version__ = metadata.version("quantlab-recipes")
except metadata.PackageNotFoundError:
    __version__ = "0+sources"

__all__ = [
    "__version__",
    "Results",
    "StageReport",
    "RunReport",
    "QuantizationReport",
    "MetricValue",
    "MemoryReport",
    "Measurements",
    "LayerReport",
    "CalibrationReport",
    "BitsAndBytesConfig",
    "ConfigError",
    "GGUFQuantizationConfig",
    "MetricUndefined",
    "MissingPackage",
    "ModelError",
    "NVIDIAModelOptConfig",
    "NotQuantized",
    "QuantizationAxes",
    "QuantizationConfigMixin",
    "QuantizationMethod",
    "QuantlabError",
    "QuantoConfig",
    "TorchAoConfig",
    "TrackingError",
    "compose",
    "config_from_dict",
    "evaluate",
    "from_pipeline_config",
    "from_pretrained_config",
    "load",
    "quantize",
    "run",
    "to_pipeline_config",
]


if not TYPE_CHECKING:  # where types are checked, a name that is nowhere is an error

    def __getattr__(name: str) -> object:
        """What is imported when it is asked for; called by Python for names that are not here yet."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_LATER[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
