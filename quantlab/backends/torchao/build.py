"""From torchao's configs as data to its objects, without the noise of its import."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.vocabulary.native import to_json_data

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

_SKIP_BINARIES = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
_ELSEWHERE = {
    "NF4WeightOnlyConfig": "torchao.prototype._nf4tensor_api",
    "PrototypeInt4WeightOnlyConfig": "torchao.prototype.quantization.int4",
    "Float8StaticActivationFloat8WeightConfig": "torchao.prototype.quantization.quant_api",
}
"""Config -> its module, which is not among those that the library's own reader looks into."""


def build_form(stored: Mapping[str, Any], sets_inductor: bool = False) -> AOBaseConfig:
    """The ``AOBaseConfig`` object of a stored form.

    Without ``sets_inductor``, ``set_inductor_config`` is switched off: it would change torch's compiler options for the
    whole process. Raises ConfigError for what the installed torchao cannot build.
    """
    form = copy.deepcopy(to_json_data(stored))
    if not sets_inductor:
        _leave_inductor_alone(form)
    with quiet_library():
        core = importlib.import_module("torchao.core.config")
        kind = form["_type"]
        try:
            if kind in _ELSEWHERE:
                fields = {k: core.config_from_dict(v) if isinstance(v, dict) else v for k, v in form["_data"].items()}
                return getattr(importlib.import_module(_ELSEWHERE[kind]), kind)(**fields)
            return core.config_from_dict(form)
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            raise ConfigError(
                f"quant_type={kind}: torchao cannot build it ({error}); check its fields, or "
                "write it again with the installed torchao"
            ) from error


def _leave_inductor_alone(value: object) -> None:
    if isinstance(value, dict):
        if "set_inductor_config" in value:
            value["set_inductor_config"] = False
        for inner in value.values():
            _leave_inductor_alone(inner)
    elif isinstance(value, list):
        for inner in value:
            _leave_inductor_alone(inner)


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Import or call torchao without its compiled extras (no scheme here uses them) and their complaints."""
    before = os.environ.get(_SKIP_BINARIES)
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    os.environ[_SKIP_BINARIES] = "1"
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Stored version is not the same")
            importlib.import_module("torchao.quantization")
            yield
    finally:
        for name, level in levels.items():
            if logging.getLogger(name).level == logging.ERROR:  # else the library chose one while it was imported
                logging.getLogger(name).setLevel(level)
        if before is None:
            del os.environ[_SKIP_BINARIES]
        else:
            os.environ[_SKIP_BINARIES] = before
