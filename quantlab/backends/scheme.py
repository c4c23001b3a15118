"""From axes, a pasted dictionary or a native config to a scheme: the one place where a request is decided.

A scheme holds all that the stages need to know of a request. What comes after planning takes it as it is, and asks
neither the capability table nor ``conf/`` again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantlab.backends.stored import block_of, config_from_dict
from quantlab.backends.table import Backend, backend_of, offers, own_settings
from quantlab.errors import ConfigError, nearest, require_package
from quantlab.vocabulary.axes import QuantizationAxes, capability, resolve_axes
from quantlab.vocabulary.capabilities import CUSTOM, CUSTOM_ROW, Capability
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.native import QuantizationConfigMixin, plain, to_json_data

_CONF_BACKEND = "torchao"
"""What ``conf/config.yaml`` chooses where nobody does."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a layer is stored as: axes spelled out, and the table's row of them."""

    axes: QuantizationAxes
    row: Capability

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a weight of ``shape`` (out_features, in_features) cannot be stored so; "" where it can."""
        axes, row = self.axes, self.row
        out_features, in_features = shape
        group = axes.group_size
        if isinstance(group, int) and row.grouping == "row" and in_features % group:
            return f"in_features {in_features} does not divide by group_size {group}"
        if in_features % row.in_features_multiple:
            return f"in_features {in_features} does not divide by {row.in_features_multiple}, the block of {axes.dtype}"
        if in_features < row.min_in_features:
            return f"in_features {in_features} is below {row.min_in_features}"
        if out_features < row.min_out_features:
            return f"out_features {out_features} is below {row.min_out_features}"
        if out_features % row.out_features_multiple:
            return f"out_features {out_features} does not divide by {row.out_features_multiple}"
        if (out_features * in_features) % row.numel_multiple:
            return f"{out_features} x {in_features} weights do not divide by {row.numel_multiple}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A request, decided."""

    backend: Backend
    axes: QuantizationAxes
    """Spelled out."""
    row: Capability
    native: QuantizationConfigMixin
    exclusions: tuple[str, ...] = ()
    """Entries by quantlab's matcher: the config's own, or those that come on top of a library's rule."""
    shipped_exclusions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of these, the lists of ``conf/modules_to_not_convert`` by name, which may match nothing."""
    other_formats: Mapping[str, Format] = field(default_factory=dict)
    """dtype -> format, for the dtypes that the config gives single layers."""
    fallback: Scheme | None = None
    """How layers that do not fit are stored, where ``on_mismatch`` is a dtype of the backend."""

    @property
    def format(self) -> Format:
        """What all layers are stored as that get no other dtype."""
        return Format(axes=self.axes, row=self.row)

    def spelled_out(self, device: str = "auto", dtype: str = "auto", widths: Collection[int] = ()) -> dict[str, Any]:
        """Plain data that two schemes have in common where they are one in other words.

        ``device`` and ``dtype`` (of the model) are the request's, as far as it says them; for ``cpu`` no torch is
        needed. A group size that the library chose, and lowers for layers that it does not divide, is the same as that
        number where other sizes are errors: the number gives the same bits or fails. Where it divides each of
        ``widths``, the lengths of all rows that the scheme may take, they are the same whatever becomes of misfits; and
        where it fits them all, nothing becomes of misfits.
        """
        known = self.native if device == "auto" else self.backend.module.resolve(self.native, device, dtype)
        native = known.spelled_out()
        if self.axes.on_mismatch == "error" or self._divides(widths):
            native.pop("fit_group_size", None)
        fits = self._fits(widths)
        is_own = self.axes.compute_dtype == "auto" and dtype == "float32"  # no layer of such a model has another
        data: dict[str, Any] = to_json_data(
            {
                "backend": self.backend.name,
                "native": native,
                "compute_dtype": "float32" if is_own else self.axes.compute_dtype,
                "exclusions": sorted(set(self.exclusions)),
                "fallback": None if fits else self.fallback and self.fallback.spelled_out(device, dtype),
                "on_mismatch": "" if fits else self.axes.on_mismatch,
            }
        )
        kept = ("dtype", "activation_dtype", "algorithm", "replace_default_exclusions")
        kinds = sorted(set(self.axes.layer_kinds))
        return {**data, **{name: getattr(self.axes, name) for name in kept}, "layer_kinds": kinds}

    def _fits(self, widths: Collection[int]) -> bool:
        """Does it store rows of each of these lengths, however many there are? False for none."""
        return bool(widths) and not self.other_formats and not any(self.format.misfit((1, width)) for width in widths)

    def _divides(self, widths: Collection[int]) -> bool:
        """Does the one group size of all layers divide each of these? False for none, and for what has no such size."""
        native: Any = self.native
        if not widths or not hasattr(native, "fit_group_size"):
            return False
        group = replace(native, fit_group_size=False).axes().group_size
        return isinstance(group, int) and not any(width % group for width in widths)

    @property
    def why_not_packed(self) -> str:
        """Why a weight that is read, and in no layer that is called, cannot be stored by this scheme; "" if it can."""
        if self.axes.dtype == CUSTOM:
            return "a config that no axes spell is of layers that are called"
        if self.axes.activation_dtype != "none":
            return f"activation_dtype={self.axes.activation_dtype} rounds the inputs of layers that are called"
        if self.native.needs_data:
            return f"algorithm={self.axes.algorithm} looks at the inputs of layers that are called"
        return ""

    @property
    def num_forgiven(self) -> int:
        """How much of it may miss: of schemes that are one in other words, the one with most never fails alone."""
        shipped = {entry for entries in self.shipped_exclusions.values() for entry in entries}
        return len(shipped) + bool(getattr(self.native, "fit_group_size", False))

    def without_data(self) -> Scheme | None:
        """The same bits by the plain algorithm that needs no data; None where there is none."""
        native = self.native.without_data()
        if native is None:
            return None
        said = native.axes()
        axes = replace(self.axes, algorithm=said.algorithm, activation_dtype=said.activation_dtype)
        fallback = self.fallback and (self.fallback.without_data() or self.fallback)
        return replace(self, axes=axes, native=native, fallback=fallback)


def scheme_of(
    axes: QuantizationAxes, settings: Mapping[str, Any] | None = None, shipped: Collection[str] = ()
) -> Scheme | None:
    """Axes and the backend's own settings -> the scheme; None for ``backend=none``. Torch-free.

    ``shipped`` are the names of the lists of exclusions that come with quantlab. Raises ConfigError where the
    combination is impossible and MissingPackage where its library is not installed.
    """
    axes = resolve_axes(axes, offers())
    if axes.backend == "none":
        return None
    own = own_settings(axes.backend)
    for key in settings or {}:
        if key not in own:
            raise ConfigError(f"quantization.{key}: {axes.backend} has no such setting{nearest(key, own)}")
    backend = backend_of(axes.backend)
    try:
        native = backend.module.Config.from_resolved(axes, dict(settings or {}))
    except ConfigError as error:
        first = re.match(r"\w+", str(error))
        if first is None or first[0] not in (settings or {}):
            raise
        raise ConfigError(f"quantization.{error}") from error  # the key as it is typed
    return _made(backend, axes, native, shipped)


def scheme_of_config(native: QuantizationConfigMixin, **more: Any) -> Scheme:
    """The scheme of a native config; ``more`` are axes that a config does not say (``on_mismatch``).

    The axes of a config that no axes express read ``custom``. Raises ConfigError as :func:`scheme_of`.
    """
    axes = _resolved(replace(native.axes(), **more))
    return _made(backend_of(axes.backend), axes, native)


def pasted_scheme(
    axes: QuantizationAxes, settings: Mapping[str, Any], typed: Collection[str] = (), shipped: Collection[str] = ()
) -> Scheme:
    """The scheme of the node's ``quantization_config``; its axes are the node's, filled in with what that says.

    The exclusions of the node itself come on top, by quantlab's matcher. ``typed`` are the keys that the user typed:
    the backend that ``conf`` chooses for everyone is no contradiction. Raises ConfigError for an axis or setting of the
    node that says otherwise than the dictionary.
    """
    key = "quantization.quantization_config"
    try:
        block = block_of(axes.quantization_config)
        native: QuantizationConfigMixin = config_from_dict(block)
        said = _resolved(native.axes())
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if said.backend == "gguf" and "gguf_type" not in native.extra_settings():
        raise ConfigError(
            f"{key}: gguf_type: Diffusers takes the format from the file, so its dictionary says none; "
            "add gguf_type, the format to write"
        )
    default = QuantizationAxes(backend=_CONF_BACKEND if "backend" not in typed else "none")
    for name in ("backend", "dtype", "group_size", "activation_dtype", "compute_dtype", "algorithm"):
        asked, found = str(getattr(axes, name)), str(getattr(said, name))
        if asked not in (getattr(default, name), found):
            raise ConfigError(f"{name}={asked}: the {key} says {found}; leave {name} out")
    for name, value in settings.items():
        if plain(value) not in (own_settings(axes.backend)[name].default, getattr(native, name, None)):
            raise ConfigError(f"quantization.{name}={value}: the {key} decides it; leave {name} out")
    kept = {
        name: getattr(axes, name)
        for name in ("modules_to_not_convert", "replace_default_exclusions", "on_mismatch", "layer_kinds")
    }
    return _made(backend_of(said.backend), replace(said, quantization_config=block, **kept), native, shipped)


def _resolved(said: QuantizationAxes) -> QuantizationAxes:
    return said if said.dtype == CUSTOM else resolve_axes(said, offers())


def _made(
    backend: Backend, axes: QuantizationAxes, native: QuantizationConfigMixin, shipped: Collection[str] = ()
) -> Scheme:
    row = CUSTOM_ROW if axes.dtype == CUSTOM else capability(axes.backend, axes.dtype, offers())
    for package in (*backend.imports, *row.packages):
        require_package(package, f"backend={backend.name}", backend.install)
    groups = {g: tuple(entries) for g, entries in axes.modules_to_not_convert.items() if g in shipped}
    return Scheme(
        backend=backend,
        axes=axes,
        row=row,
        native=native,
        exclusions=(native.exclusions or ()) if native.exclusion_rule == "quantlab" else axes.exclusions(),
        shipped_exclusions=groups,
        other_formats={dtype: _other(axes, dtype) for dtype in native.other_dtypes},
        fallback=_fallback(backend, axes, native),
    )


def _other(axes: QuantizationAxes, dtype: str) -> Format:
    """The axes with another dtype; an algorithm that does nothing for it does not apply."""
    row = capability(axes.backend, dtype, offers())
    algorithm = axes.algorithm if axes.algorithm in row.algorithms else "auto"
    other = replace(axes, dtype=dtype, group_size="auto", algorithm=algorithm)
    return Format(axes=resolve_axes(other, offers()), row=row)


def _fallback(backend: Backend, axes: QuantizationAxes, native: QuantizationConfigMixin) -> Scheme | None:
    """How misfits are stored where ``on_mismatch`` is a dtype of the backend; None where it is no dtype, or a cast."""
    dtype = axes.on_mismatch
    if dtype in ("error", "skip", *COMPUTE_DTYPES):
        return None
    row = capability(axes.backend, dtype, offers())
    is_shared = axes.algorithm in backend.input_algorithms and axes.algorithm in row.algorithms
    asked = QuantizationAxes(
        backend=axes.backend,
        dtype=dtype,
        compute_dtype=axes.compute_dtype,
        algorithm=axes.algorithm if is_shared else "auto",
    )
    other = resolve_axes(asked, offers())
    file = getattr(native, "imatrix_file", None) if is_shared else None
    config = backend.module.Config.from_resolved(other, {"imatrix_file": file} if file else None)
    return _made(backend, other, config)
