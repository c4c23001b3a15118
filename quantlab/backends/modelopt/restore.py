"""ModelOpt's own checkpoints: ``modelopt_state.pth`` beside the weights says where its quantizers were."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from quantlab.backends.modelopt.library import quiet_library

STATE = "modelopt_state.pth"
FOR_DIFFUSERS = {"low_cpu_mem_usage": False}
"""What Diffusers' ``from_pretrained`` is told of packed weights: by its other way each is made anew, as none can be."""


def loading_arguments(made: type, folder: Path) -> dict[str, bool]:
    """What ``made.from_pretrained(folder)`` is to be told besides; a class with parts in float32 knows one way only."""
    is_of_diffusers = any(c.__module__.startswith("diffusers.") for c in made.__mro__)
    is_free = getattr(made, "_keep_in_fp32_modules", None) is None
    return dict(FOR_DIFFUSERS) if is_of_diffusers and is_free and (folder / STATE).is_file() else {}


@contextlib.contextmanager
def restoring(made: type, folder: Path) -> Iterator[None]:
    """Inside, ``made.from_pretrained(folder)`` puts the quantizers in that the folder's state tells of; nothing for a
    folder without one.

    This is what ``enable_huggingface_checkpointing`` does, for one class and one call: that would change how each
    model of the process is loaded and saved. The state is read as tensors and plain data alone (``weights_only``).
    """
    if not (folder / STATE).is_file():
        yield
        return
    with quiet_library():
        plugin = importlib.import_module("modelopt.torch.opt.plugins.huggingface")
        of_transformers = any(c.__module__.startswith("transformers.") for c in made.__mro__)
        more = None
        if of_transformers:
            others = importlib.import_module("modelopt.torch.opt.plugins.transformers")
            more = others._undo_torch_init_override_by_transformers
        with plugin._patch_model_init_for_modelopt(made, str(folder), more):
            yield


def rewrap(module: object, folder: Path) -> None:
    """Give packed weights of a model of transformers their wrappers back, which its loader drops."""
    if not (folder / STATE).is_file() or not any(
        c.__module__.startswith("transformers.") for c in type(module).__mro__
    ):
        return
    with quiet_library():
        others = importlib.import_module("modelopt.torch.opt.plugins.transformers")
        others._restore_qtensor_wrappers(module, str(folder))
