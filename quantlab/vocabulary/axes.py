"""The axes: the backend-neutral choices that people sweep, and the check of a combination. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.capabilities import CUSTOM, LAYER_KINDS, OFFERS, Capability, Offers
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES

ON_MISMATCH = ("error", "skip", *COMPUTE_DTYPES)


@dataclass
class QuantizationAxes:
    """The ``quantization`` node's common part; each backend's node adds that library's own settings."""

    backend: str = "none"
    dtype: str = "auto"
    """The stored weight format; ``auto``: the backend's first (``quantlab list dtypes``)."""
    group_size: int | str = "auto"
    """``auto``: the library's own choice, read back; ``none``: one scale a row; a number: met exactly or refused."""
    activation_dtype: str = "auto"
    compute_dtype: str = "auto"
    """Dtype of the matrix products; ``auto``: the reference's."""
    algorithm: str = "auto"
    modules_to_not_convert: dict[str, list[str]] = field(default_factory=dict)
    """Name of a list -> its entries (module path, glob, or ``re:`` regex); all lists add up."""
    replace_default_exclusions: bool = False
    """True: the model family's own exclusions do not apply."""
    on_mismatch: str = "error"
    """What happens to a layer that the backend cannot take: ``error``, ``skip``, or a dtype to fall back to
    (float32, bfloat16, float16, or another dtype of the backend)."""
    layer_kinds: list[str] = field(default_factory=lambda: ["linear"])
    """Kinds of layers that are quantized: ``linear``, ``conv``, ``embedding``, ``expert``."""
    quantization_config: Any = field(default_factory=dict)
    """A whole dictionary of Diffusers, transformers or ModelOpt, as in a model's config.json (a mapping, JSON text, or
    the path of the file): it takes the place of the axes above, which then show what it says. Its exclusions keep that
    library's rule."""

    def exclusions(self) -> tuple[str, ...]:
        """All entries of ``modules_to_not_convert``, in order, each once."""
        return tuple(dict.fromkeys(entry for entries in self.modules_to_not_convert.values() for entry in entries))


def custom_axes(backend: str, exclusions: dict[str, list[str]]) -> QuantizationAxes:
    """The axes of a library's config that no axes spell."""
    return QuantizationAxes(
        backend=backend,
        dtype=CUSTOM,
        activation_dtype=CUSTOM,
        algorithm=CUSTOM,
        modules_to_not_convert=exclusions,
    )


def _words(options: Iterable[Any]) -> str:
    return ", ".join(str(o) for o in options)


def _others(backend: str, dtype: str, offers: Offers) -> str:
    names = [b for b, offer in offers.items() if dtype in offer.rows and b != backend]
    if not names:
        return nearest(dtype, offers[backend].rows)
    return f"; {dtype} is offered by {' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)}"


def _check_choice(key: str, value: Any, accepted: Iterable[Any], who: str, hint: str = "") -> None:
    if value not in (accepted := tuple(accepted)):
        raise ConfigError(
            f"{key}={value}: {who} offers {_words(accepted)}{hint or nearest(str(value), map(str, accepted))}"
        )


def capability(backend: str, dtype: str, offers: Offers = OFFERS) -> Capability:
    """The table's row; ConfigError naming what the backend offers, and who offers this dtype, where there is none."""
    if backend not in offers:
        raise ConfigError(f"backend={backend}: there are {_words(offers)}{nearest(backend, offers)}")
    rows, why = offers[backend].rows, offers[backend].refusal(dtype)
    if dtype not in rows:
        told = f"{backend} offers {_words(rows)}{_others(backend, dtype, offers)}"
        raise ConfigError(f"dtype={dtype}: {told}{f' ({why})' if why else ''}")
    return rows[dtype]


def resolve_axes(axes: QuantizationAxes, offers: Offers = OFFERS) -> QuantizationAxes:
    """The axes with ``dtype``, ``activation_dtype`` and ``algorithm`` spelled out, checked against the table.

    ``group_size=auto`` and ``compute_dtype=auto`` stay: the library and the reference decide them later. ``offers``
    are those of all backends that are installed (:func:`quantlab.backends.table.offers`), by default quantlab's own.
    Raises ConfigError for a combination that the backend does not offer, naming what is offered instead.
    """
    if axes.backend not in offers:
        capability(axes.backend, axes.dtype, offers)
    rows = offers[axes.backend].rows
    if axes.backend == "none" and axes.dtype == "auto":
        return axes  # the reference in its own dtype
    dtype = next(iter(rows)) if axes.dtype == "auto" else axes.dtype
    row = capability(axes.backend, dtype, offers)
    who = f"{axes.backend} {dtype}"
    group = axes.group_size
    if isinstance(group, str) and group.isdigit():
        group = int(group)
    if group != "auto" and not row.group_sizes:
        raise ConfigError(
            f"group_size={group}: {axes.backend} chooses its own group size; leave group_size=auto "
            "(what it chose is read back and reported)"
        )
    _check_choice("group_size", group, ("auto", *row.group_sizes), who)
    _check_choice("activation_dtype", axes.activation_dtype, ("auto", *row.activation_dtypes), who)
    _check_choice(
        "algorithm", axes.algorithm, ("auto", *row.algorithms), who, _who_has(axes.algorithm, axes.backend, offers)
    )
    _check_choice(
        "compute_dtype", axes.compute_dtype, ("auto", *(d for d in row.compute_dtypes if d in COMPUTE_DTYPES)), who
    )
    _check_choice("quantization.on_mismatch", axes.on_mismatch, (*ON_MISMATCH, *rows), axes.backend)
    _check_kinds(axes, row, who)
    return dataclasses.replace(
        axes,
        dtype=dtype,
        group_size=group,
        activation_dtype=row.activation_dtypes[0] if axes.activation_dtype == "auto" else axes.activation_dtype,
        algorithm=row.algorithms[0] if axes.algorithm == "auto" else axes.algorithm,
    )


def _check_kinds(axes: QuantizationAxes, row: Capability, who: str) -> None:
    if not axes.layer_kinds:
        raise ConfigError(f"quantization.layer_kinds=[]: nothing would be quantized; choose of {_words(LAYER_KINDS)}")
    for kind in axes.layer_kinds:
        if kind not in LAYER_KINDS:
            raise ConfigError(
                f"quantization.layer_kinds={kind}: there are {_words(LAYER_KINDS)}{nearest(kind, LAYER_KINDS)}"
            )
        activations = row.activation_dtypes[0] if axes.activation_dtype == "auto" else axes.activation_dtype
        if kind != "linear" and activations != "none":
            raise ConfigError(
                f"quantization.layer_kinds={kind}: {who} rounds inputs to {activations}, which only linear "
                "layers have; choose a dtype with activation_dtype=none, or layer_kinds=[linear]"
            )


def _who_has(algorithm: str, backend: str, offers: Offers) -> str:
    """Who offers an algorithm: backends, and for this one its dtypes."""
    having = {b: [d for d, r in offer.rows.items() if algorithm in r.algorithms] for b, offer in offers.items()}
    names = [f"{b} ({_words(dtypes)})" if b == backend else b for b, dtypes in having.items() if dtypes]
    return f"; {algorithm} is offered by {_words(names)}" if names else ""
