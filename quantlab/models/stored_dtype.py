"""What ``model.dtype=auto`` is for a checkpoint of transformers: decided once for what is planned and loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.models.beforehand import DTYPES, folder_of, read_header, weight_files
from quantlab.models.reading import chosen_dtype
from quantlab.progress import say
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.schema import ModelConfig


def dtype_on(config: ModelConfig, device: str, said: str) -> str:
    """``model.dtype``, with ``auto`` spelled out for a device.

    On a CPU float32: 16 bits are slower there and add an error of their own. Elsewhere what the checkpoint's
    configuration says (``said``; "" where it is silent), or else what most of the weights in its files are of, which
    is told. ConfigError for a dtype that models do not compute in.
    """
    if config.dtype != "auto" or device.startswith("cpu"):
        return chosen_dtype(config, "float32")
    found = said or dtype_of_files(config)
    dtype = found if found in COMPUTE_DTYPES else "float32"
    if not said:
        why = (
            "in which most of its weights are stored"
            if found == dtype
            else f"as its files hold {found or 'nothing known'}"
        )
        say(f"model.path={config.path}: its config.json names no dtype; {dtype} is taken, {why}", "warning")
    return dtype


def dtype_of_files(config: ModelConfig) -> str:
    """The dtype that most floating weights at ``model.path`` are stored in, by the headers of their files; "" where
    these cannot be had."""
    folder = folder_of(config)
    files = set(weight_files(folder, config.variant).values()) if folder is not None else ()
    counts: Counter[str] = Counter()
    if files:
        for file in files:
            for name, entry in read_header(file)[1].items():
                if name != "__metadata__" and entry["dtype"] in DTYPES:
                    counts[DTYPES[entry["dtype"]]] += _num_values(entry["shape"])
    elif folder is not None:
        counts = _pickled(folder)
    elif config.path:
        counts += Counter({DTYPES[name]: num for name, num in _on_the_hub(config).items() if name in DTYPES})
    return counts.most_common(1)[0][0] if counts else ""


def _num_values(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _pickled(folder: Path) -> Counter[str]:
    """Of ``pytorch_model.bin`` and its like, of which no tensor is read."""
    import torch

    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("pytorch_model*.bin")):
        try:
            state: Any = torch.load(file, map_location="meta", weights_only=True)
        except Exception:  # noqa: BLE001  whoever loads it says what is wrong
            continue
        for tensor in state.values() if isinstance(state, dict) else ():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return counts


def _on_the_hub(config: ModelConfig) -> Mapping[str, int]:
    """Name of a dtype in safetensors' spelling -> number of weights, from the headers alone."""
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(config.path or "", revision=config.revision)
    except Exception:  # noqa: BLE001  offline, or none of its files are safetensors
        return {}
    return {str(name): num for name, num in found.parameter_count.items()}
