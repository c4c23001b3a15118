"""The one table of backends: a row says all that the rest of the code needs to know of a library.

The five rows of quantlab stand below. Another package adds its own through an entry point of the group
``quantlab.backends`` that names a :class:`Backend`; the table is read at first use, so that such a package may import
this module. ``README.md`` beside this file says how a backend is written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from quantlab.backends import bitsandbytes, gguf, modelopt, quanto, torchao
from quantlab.errors import ConfigError, nearest
from quantlab.progress import say
from quantlab.vocabulary.capabilities import CALLED, OFFERS, Offer, Offers
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import StoredWeight
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes

if TYPE_CHECKING:
    from torch import nn

    from quantlab.modules.feed import CalibrationFeed

ENTRY_POINTS = "quantlab.backends"
"""Group of the entry points by which other packages add their rows; the name of the point is that of the backend."""
_FUNCTIONS = ("resolve", "layer_bytes", "quantize", "read_back", "save", "load")
_MAY_BE_EMPTY = ("holds", "loggers", "same_bits", "input_algorithms", "elsewhere", "used_with")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_Native = TypeVar("_Native", bound=QuantizationConfigMixin)
"""The native config class of a backend."""
_Found = TypeVar("_Found")
"""What calibration hands to quantization: the table does not look into it."""


class BackendModule(Protocol[_Native]):
    """What a backend's module offers; see the package's docstring."""

    @property
    def Config(self) -> type[_Native]: ...

    def resolve(self, config: _Native, device: str, compute_dtype: str) -> _Native: ...
    def layer_bytes(
        self, config: _Native, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
    ) -> StoredBytes: ...
    def quantize(self, model: nn.Module, layers: Sequence[str], config: _Native, compute_dtype: str) -> None: ...
    def read_back(self, layer: nn.Module) -> StoredWeight: ...
    def save(self, model: nn.Module, folder: Path) -> None: ...
    def load(self, model: nn.Module, layers: Sequence[str], config: _Native, folder: Path) -> None: ...


class CalibratedModule(BackendModule[_Native], Protocol[_Native, _Found]):
    """A backend that uses data."""

    def calibrate(
        self, model: nn.Module, layers: Sequence[str], config: _Native, compute_dtype: str, feed: CalibrationFeed
    ) -> _Found: ...
    def quantize(
        self,
        model: nn.Module,
        layers: Sequence[str],
        config: _Native,
        compute_dtype: str,
        calibrated: _Found | None = None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One library. Nothing has a default: what does not apply is said to be empty."""

    name: str
    """The word behind ``backend=``."""
    module: BackendModule[Any]
    """What it does: see the package's docstring."""
    imports: tuple[str, ...]
    """Import names that must be there before it can run."""
    distributions: tuple[str, ...]
    """Installed packages that its numbers depend on: they are in a job's key, in ``quantlab list`` and in documents;
    the first is the library itself."""
    install: str
    """What brings it, as pip takes it: ``quantlab-recipes[torchao]``."""
    holds: tuple[str, ...]
    """Top-level packages whose plain objects hold tensors: the byte walker looks into them."""
    loggers: tuple[str, ...]
    """Loggers that talk of parts that are not used; raised to ERROR."""
    saves: str
    """What the files of ``save`` hold: the ``model``, or its quantized ``layers`` alone."""
    colour: str
    """``#rrggbb`` of its points in figures."""
    same_bits: tuple[str, ...]
    """Its own settings in which two configs of the same stored format agree, whatever their algorithm."""
    input_algorithms: tuple[str, ...]
    """Algorithms whose statistics are of a layer's inputs alone, and so serve another dtype as well."""
    elsewhere: tuple[str, ...]
    """What the programs that run its files of language models do otherwise than quantlab, a sentence each: said beside
    its rows of such. Those for files of denoisers (Diffusers, ComfyUI-GGUF) compute as the rows do."""
    offer: Offer
    """Its rows of the capability table, and why other dtypes are not offered."""
    used_with: Mapping[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    """One of its own settings -> an axis, and its values with which the setting has influence; others always have."""

    def __post_init__(self) -> None:
        """ConfigError naming the field that is missing or is not what it says."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type.startswith("tuple") and not (
                isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
            ):
                raise self._wrong(field.name, "a tuple of words is wanted")
            if not value and field.name not in _MAY_BE_EMPTY:
                raise self._wrong(field.name, "it is missing")
        if not _NAME.fullmatch(self.name):
            raise self._wrong("name", "a lower-case word is wanted, as it is typed behind backend=")
        if self.saves not in ("model", "layers"):
            raise self._wrong("saves", "model or layers is wanted")
        if not _COLOUR.fullmatch(self.colour):
            raise self._wrong("colour", "#rrggbb is wanted")
        if missing := [name for name in ("Config", *_FUNCTIONS) if not hasattr(self.module, name)]:
            raise self._wrong("module", f"it has no {missing[0]}")
        if self.module.Config.method() != self.name:
            raise self._wrong("module", f"the quant_method of its Config is {self.module.Config.method()}")
        if not self.offer.rows:
            raise self._wrong("offer", "it has no row")
        if unknown := [s for s in self.same_bits if s not in self.settings]:
            raise self._wrong(
                "same_bits", f"its Config has no setting {unknown[0]}{nearest(unknown[0], self.settings)}"
            )
        if unknown := [s for s in self.used_with if s not in self.settings]:
            raise self._wrong(
                "used_with", f"its Config has no setting {unknown[0]}{nearest(unknown[0], self.settings)}"
            )
        every = {a for row in self.offer.rows.values() for a in row.algorithms}
        if unknown := [a for a in self.input_algorithms if a not in every]:
            raise self._wrong("input_algorithms", f"no dtype is offered with {unknown[0]}{nearest(unknown[0], every)}")
        needing = [d for d, row in self.offer.rows.items() if len(row.algorithms) > 1]
        if self.input_algorithms and not hasattr(self.module, "calibrate"):
            raise self._wrong("module", f"it has no calibrate, which algorithms of {needing[0]} need")

    def _wrong(self, field: str, why: str) -> ConfigError:
        return ConfigError(f"backend {self.name or '(without a name)'}: {field}: {why}; correct its row")

    @property
    def settings(self) -> dict[str, dataclasses.Field[Any]]:
        """The backend's own keys of the ``quantization`` node: name -> field of the native config."""
        every = dataclasses.fields(self.module.Config)
        return {f.name: f for f in every if f.metadata["node"]}

    @property
    def calibrated(self) -> CalibratedModule[Any, Any]:
        """The module, for a config whose ``needs_data`` is true."""
        return cast("CalibratedModule[Any, Any]", self.module)


_ROUNDED = {a for offer in OFFERS.values() for row in offer.rows.values() for a in row.activation_dtypes} - {"none"}
_OF_ACTIVATIONS = ("activation_dtype", tuple(sorted(_ROUNDED)))
_SHIPPED = (
    Backend(
        name="bitsandbytes",
        module=bitsandbytes,
        imports=("bitsandbytes",),
        distributions=("bitsandbytes",),
        install="quantlab-recipes[bitsandbytes]",
        holds=("bitsandbytes",),
        loggers=("bitsandbytes",),
        saves="model",
        colour="#4269d0",
        same_bits=("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
        input_algorithms=(),
        elsewhere=(),
        offer=OFFERS["bitsandbytes"],
        used_with={
            "llm_int8_threshold": ("dtype", ("int8",)),
            "bnb_4bit_use_double_quant": ("dtype", ("nf4", "fp4")),
            "bnb_4bit_quant_storage": ("dtype", ("nf4", "fp4")),
        },
    ),
    Backend(
        name="torchao",
        module=torchao,
        imports=("torchao",),
        distributions=("torchao",),
        install="quantlab-recipes[torchao]",
        holds=("torchao",),
        loggers=("torchao",),
        saves="layers",
        colour="#e5883a",
        same_bits=("activation_scales", "int4_packing_format", "mapping_type"),
        input_algorithms=(),
        elsewhere=(),
        offer=OFFERS["torchao"],
        used_with={
            "int4_packing_format": ("dtype", ("int4",)),
            "mapping_type": ("dtype", ("int4", "int3", "int2")),
            "smoothquant_alpha": ("algorithm", ("smoothquant",)),
            "calibration_layers_at_once": ("algorithm", ("awq",)),
            "activation_scales": _OF_ACTIVATIONS,
        },
    ),
    Backend(
        name="quanto",
        module=quanto,
        imports=("optimum.quanto",),
        distributions=("optimum-quanto",),
        install="quantlab-recipes[quanto]",
        holds=("optimum",),
        loggers=("optimum",),
        saves="layers",
        colour="#3ca951",
        same_bits=(),
        input_algorithms=(),
        elsewhere=(),
        offer=OFFERS["quanto"],
    ),
    Backend(
        name="gguf",
        module=gguf,
        imports=("gguf",),
        distributions=("gguf", "libgguf"),
        install="quantlab-recipes[gguf]",
        holds=("gguf",),
        loggers=("gguf",),
        saves="model",
        colour="#a463f2",
        same_bits=("tensor_types", "file_type"),
        input_algorithms=("imatrix",),
        elsewhere=("gguf: weights only; llama.cpp's own kernels round activations too, which costs more",),
        offer=OFFERS["gguf"],
    ),
    Backend(
        name="modelopt",
        module=modelopt,
        imports=("modelopt",),
        distributions=("nvidia-modelopt",),
        install="quantlab-recipes[modelopt]",
        holds=("modelopt",),
        loggers=("modelopt",),
        saves="layers",
        colour="#c2362b",
        same_bits=("activation_scales", "compress"),
        input_algorithms=(),
        elsewhere=(),
        offer=OFFERS["modelopt"],
        used_with={"activation_scales": _OF_ACTIVATIONS},
    ),
)


@functools.cache
def backends() -> Mapping[str, Backend]:
    """Every backend by name: quantlab's own, then those of other packages.

    Raises ConfigError for a row of another package that is incomplete, that cannot be loaded, or whose name is taken.
    """
    found = {row.name: row for row in _SHIPPED}
    for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        row = _loaded(point)
        if row.name in found or row.name == "none":
            raise ConfigError(
                f"backend {row.name}: {_origin(point)} brings one of this name, which is taken; remove it"
            )
        found[row.name] = row
    return found


def _loaded(point: metadata.EntryPoint) -> Backend:
    try:
        row = point.load()
    except ConfigError as error:
        raise ConfigError(f"{error} (it comes from {_origin(point)})") from error
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise ConfigError(
            f"backend {point.name}: {_origin(point)} cannot be loaded ({type(error).__name__}: {error}); repair or "
            "remove that package"
        ) from error
    if not isinstance(row, Backend):
        raise ConfigError(f"backend {point.name}: {_origin(point)} names a {type(row).__name__}, not a Backend")
    if row.name != point.name:
        raise ConfigError(f"backend {point.name}: {_origin(point)} names the row of {row.name}; make them agree")
    return row


def _origin(point: metadata.EntryPoint) -> str:
    return f"{point.value} of {point.dist.name if point.dist else 'an unknown package'}"


def backend_of(name: str) -> Backend:
    """The row of a backend; ConfigError where there is none."""
    if name not in backends():
        raise ConfigError(f"backend={name}: there are {', '.join(offers())}{nearest(CALLED.get(name, name), offers())}")
    return backends()[name]


@functools.cache
def offers() -> Offers:
    """What each backend offers, ``none`` included: what :func:`~quantlab.vocabulary.axes.resolve_axes` is given."""
    return {"none": OFFERS["none"], **{name: row.offer for name, row in backends().items()}}


def own_settings(backend: str) -> dict[str, dataclasses.Field[Any]]:
    """The own keys of a backend's ``quantization`` node; none for ``none`` and for what is no backend."""
    return backends()[backend].settings if backend in backends() else {}


def said_of(names: Iterable[str], protocol: str) -> list[str]:
    """What must be said beside rows of these backends, by how their models run: see :attr:`Backend.elsewhere`."""
    asked = set(names) if protocol == "language" else ()
    return [text for name, row in backends().items() if name in asked for text in row.elsewhere]


def distributions() -> tuple[str, ...]:
    """Every installed package that a backend's numbers depend on."""
    return tuple(name for row in backends().values() for name in row.distributions)


@functools.cache
def unprobed(backend: str) -> str:
    """The packages of a backend that are installed in another version than its rows were probed on; "" for none."""
    found = []
    for name, probed in offers()[backend].probed.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.partition("+")[0] != probed:
            found.append(f"{name} {installed} (probed: {probed})")
    return ", ".join(found)


@functools.cache
def warn_unprobed(backend: str) -> None:
    """Say once in a process that a backend's packages are not those that its rows were probed on."""
    if other := unprobed(backend):
        say(f"backend={backend}: {other}; it may do less than quantlab list says, or otherwise", "warning")


def held_packages() -> frozenset[str]:
    """Packages whose plain objects hold tensors, of all backends: what the byte walker is told."""
    return frozenset(name for row in backends().values() for name in row.holds)


def loggers() -> tuple[str, ...]:
    """Loggers of all backends that are kept quiet."""
    return tuple(name for row in backends().values() for name in row.loggers)
