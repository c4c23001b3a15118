"""Which of a job's settings are parameters of its run: those that it used."""

from __future__ import annotations

from collections.abc import Mapping

from quantlab.backends.table import backends
from quantlab.models.table import FAMILIES
from quantlab.vocabulary.capabilities import CUSTOM

OF_A_REQUEST = ("launcher.", "sweep.", "tracking.", "export.", "output_dir", "name")
"""How jobs are run and where they are kept is no setting of one; the recipe among a run's artifacts has all of it."""
UNSET = ("", "null", "{}", "[]")
OF_PROTOCOLS = {
    "num_inference_steps": ("diffusion",),
    "guidance_scale": ("diffusion",),
    "height": ("diffusion",),
    "width": ("diffusion",),
    "num_frames": ("diffusion",),
    "num_teacher_forced": ("diffusion",),
    "tiled_decoding": ("diffusion",),
    "context_length": ("language", "encoder"),
    "perplexity_protocol": ("language",),
    "num_continuations": ("language",),
    "continuation_tokens": ("language",),
}
"""Field of the nodes ``evaluation`` and ``calibration`` -> the protocols that read it; each reads the others."""


def used_params(params: Mapping[str, str], needs_data: bool = True) -> dict[str, str]:
    """Of flat parameters, those that a job used: no unset ones, none of another protocol or of the request.

    ``needs_data``: does its scheme look at calibration data? Run over the parameters of an older run it gives what that
    run would have today.
    """
    family = FAMILIES.get(params.get("model.family", ""))
    protocol = family.protocol if family else ""
    used = {k: v for k, v in params.items() if v not in UNSET and _is_used(k, v, protocol, needs_data)}
    return {k: v for k, v in used.items() if not _is_idle(k, params)}


def _is_idle(key: str, params: Mapping[str, str]) -> bool:
    """Is it a library's own setting that has no influence on a scheme like this one (AWQ's beside plain rounding)?"""
    node, _, name = key.rpartition(".")
    backend = backends().get(params.get(f"{node}.backend", ""))
    axis, values = backend.used_with.get(name, ("", ())) if backend else ("", ())
    return bool(axis) and params.get(f"{node}.{axis}", "auto") not in ("auto", CUSTOM, *values)


def _is_used(key: str, value: str, protocol: str, needs_data: bool) -> bool:
    if key == "sweep.floors":
        return value == "false"  # a repetition has to know
    if key.startswith(OF_A_REQUEST):
        return False
    node, _, name = key.partition(".")
    if node == "memory" or key == "quantization.replace_default_exclusions":
        return value not in ("auto", "false")
    if node == "calibration" and not needs_data:
        return name == "path"  # a repetition has to know it: the recipe leaves a file of the user's own open
    readers = OF_PROTOCOLS.get(name) if node in ("evaluation", "calibration") else None
    return readers is None or not protocol or protocol in readers
