"""What a process that only plans does without: it is half of the time that one plan takes.

Diffusers and transformers import, with the first model class, what serves adapters, quantized checkpoints, training
over several machines and the compiler, where it is installed. A model on the meta device needs none of it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from quantlab.backends.table import held_packages

PACKAGES = ("peft", "psutil", "scipy", "trio")
"""Each optional where it is imported, as those of the backends are: without it the libraries take the way of an
installation that lacks it."""
COMPILER = "torch._dynamo"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Inside, the libraries find none of :data:`PACKAGES` and of the backends' packages, no compiler, and a torch that
    is built for one machine.

    On the way out all of it is there again, but what was imported inside has settled on doing without: this is for a
    process that ends with its plan, and that asks another one where a model cannot be built so. What is imported
    already stays.
    """
    import torch.distributed as distributed

    put: dict[str, Any] = dict.fromkeys((*PACKAGES, *held_packages()))  # None: as if it were not installed
    put[COMPILER] = _no_compiler()
    put = {name: module for name, module in put.items() if name not in sys.modules}
    is_available, distributions = distributed.is_available, metadata.packages_distributions
    sys.modules.update(put)
    distributed.is_available = lambda: False
    metadata.packages_distributions = lambda: _WhenAsked(distributions)
    try:
        with _listed_once():
            yield
    finally:
        distributed.is_available = is_available
        metadata.packages_distributions = distributions
        for name, module in put.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _WhenAsked(Mapping[str, list[str]]):
    """Package -> its distributions. Diffusers asks for it as it is imported, which reads what is told of each installed
    package, and looks into it for three that are seldom there."""

    def __init__(self, distributions: Callable[[], Mapping[str, list[str]]]) -> None:
        self._found = functools.cache(distributions)

    def __getitem__(self, package: str) -> list[str]:
        return self._found()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


@contextlib.contextmanager
def _listed_once() -> Iterator[None]:
    """Inside, transformers looks for names in its model files once: it does as it is imported, by their folder, and
    again as ``transformers.models`` is, by a file in it, which means the same to it."""
    from transformers.utils import import_utils

    name = "create_import_structure_from_path"
    own = getattr(import_utils, name, None)
    if own is None:
        yield
        return
    setattr(import_utils, name, lambda path: own(Path(path).parent if Path(path).is_file() else Path(path)))
    try:
        yield
    finally:
        setattr(import_utils, name, own)


def _no_compiler() -> ModuleType:
    """In the place of the compiler: functions that are marked for it stay as they are, and its parts are its own."""
    import torch

    made = ModuleType(COMPILER)
    made.__spec__ = ModuleSpec(COMPILER, None, is_package=True)
    made.__path__ = [str(Path(torch.__path__[0]) / COMPILER.rpartition(".")[2])]
    for name in _MARKS:
        setattr(made, name, _as_it_is)
    return made


def _as_it_is(function: Any = None, *_: object, **__: object) -> Any:
    return _as_it_is if function is None else function
