"""What an export is checked by: a script that knows nothing of quantlab, run in a process that cannot import it.

``python -I check.py REQUEST ANSWER`` loads each component by the class that the ecosystem loads it by, makes a digest
of each tensor, and runs recorded calls. This file imports nothing of quantlab and nothing at module level, so that it
can be run as it is; quantlab takes the same functions for its own side of the comparison.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_NO_GPU = "its check for a GPU was set aside, as this machine has none"


def digests(module: nn.Module) -> dict[str, str]:
    """Name of each tensor of a module's state -> digest of its dtype, shape and bits.

    What a tensor subclass holds (codes, scales) is listed tensor by tensor.
    """
    found: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        for inner, plain in _plain(name, tensor):
            found[inner] = digest(plain)
    return found


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's state."""
    found = (plain for name, tensor in module.state_dict().items() for _, plain in _plain(name, tensor))
    return sum(plain.numel() * plain.element_size() for plain in found)


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bits, the first 32 digits."""
    import torch

    data = tensor.detach().cpu().contiguous()
    data = data.clone(memory_format=torch.contiguous_format) if 0 in data.stride() else data
    made = hashlib.sha256(f"{data.dtype}|{tuple(data.shape)}|".encode())
    if data.numel():
        made.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()[:32]


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor as (name, plain tensor), of a subclass those that it is made of."""
    import torch

    data = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
    if type(data) is torch.Tensor or not hasattr(data, "__tensor_flatten__"):
        yield name, data.as_subclass(torch.Tensor)
        return
    for inner in data.__tensor_flatten__()[0]:
        held = getattr(data, inner)
        if held is not None:
            yield from _plain(f"{name}.{inner}", held)


def answer(module: nn.Module, call: Mapping[str, Any], device: str) -> Tensor:
    """The first tensor of what ``module`` returns for the arguments of a recorded call, on the CPU."""
    import torch

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device=device, copy=True)
        if isinstance(value, Mapping):
            return {k: placed(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(placed(v) for v in value)
        return value

    with torch.no_grad():
        made = module(*placed(call["args"]), **placed(call["kwargs"]))
    while not isinstance(made, torch.Tensor):
        made = next(iter(made.values())) if isinstance(made, Mapping) else made[0]
    return made.detach().cpu()


def difference(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float32, 0.0 for equal bits, infinite where one is not finite or has another
    shape."""
    import torch

    if found.dtype == wanted.dtype and found.shape == wanted.shape and digest(found) == digest(wanted):
        return 0.0
    if found.shape != wanted.shape:
        return float("inf")
    norm = float(torch.linalg.vector_norm(wanted.float())) or 1.0
    error = float(torch.linalg.vector_norm(found.float() - wanted.float())) / norm
    return error if error == error else float("inf")


def other_settings(module: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings, ``rope_parameters.rope_theta``, that a model of transformers has otherwise."""
    said = json.loads(module.config.to_json_string(use_diff=False)) if settings else {}  # type: ignore[union-attr, operator]
    found = dict(_flat("", said))
    return sorted(k for k, v in settings.items() if k in found and not _is_same(found[k], v))


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _is_same(one: Any, other: Any) -> bool:
    """Equal, where a file has numbers in 32 bits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


# -- the other process


def load(part: Mapping[str, Any], folder: str) -> tuple[Any, str]:
    """One component as ``part`` says that it is loaded, and what had to be set aside for it."""
    import torch

    if before := part.get("before"):
        joined, _, call = before.partition(":")
        getattr(importlib.import_module(joined), call)()
    module, _, name = part["target"].partition(":")
    kind = getattr(importlib.import_module(module), name)
    arguments = dict(part["arguments"])
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if "compute_dtype" in arguments:
        library = importlib.import_module(module)
        compute = getattr(torch, arguments.pop("compute_dtype"))
        arguments["quantization_config"] = library.GGUFQuantizationConfig(compute_dtype=compute)
    if "config" in arguments:  # it lies beside the file
        arguments["config"] = folder
    if part["method"] == "from_single_file":
        return kind.from_single_file(f"{folder}/{part['file']}", **arguments), ""
    with _without_a_gpu(part.get("needs_gpu", False)) as told:
        made = kind.from_pretrained(folder, **arguments)
    return made, told


@contextlib.contextmanager
def _without_a_gpu(needs_gpu: bool) -> Iterator[str]:
    """Diffusers refuses bitsandbytes without a GPU, though the library itself runs; set that one check aside."""
    import torch

    if not needs_gpu or torch.cuda.is_available():
        yield ""
        return
    module = importlib.import_module("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    kinds = [module.BnB4BitDiffusersQuantizer, module.BnB8BitDiffusersQuantizer]
    kept = [(kind, kind.validate_environment, kind.update_device_map) for kind in kinds]
    for kind in kinds:
        kind.validate_environment = lambda self, *args, **kwargs: None
        kind.update_device_map = lambda self, device_map: {"": "cpu"}
    try:
        yield _NO_GPU
    finally:
        for kind, check, device_map in kept:
            kind.validate_environment, kind.update_device_map = check, device_map


def compare(request: Mapping[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Load what ``request`` names and compare; ``write`` is told of the bits first: a kernel may crash."""
    import torch

    torch.set_num_threads(request["num_threads"])
    torch.backends.mha.set_fastpath_enabled(False)
    answers: dict[str, Any] = {}
    modules = dict(_loaded(request))
    for name, part in request["parts"].items():
        module, told = modules[name]
        found, wanted = digests(module.eval()), part["state"]
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        answers[name] = {"other": other, "told": told}
    write({"parts": answers})
    for name, part in request["parts"].items():
        module = modules[name][0]
        if request["device"] != "cpu":
            module.to(request["device"])
        calls = torch.load(part["calls"], weights_only=True)
        errors = [difference(answer(module, call, request["device"]), call["output"]) for call in calls]
        changed = any(errors) and digests(module) != part["state"]
        answers[name] |= {
            "errors": errors,
            "kernels": _kernels(module, calls[:1], request["device"]),
            "changed": changed,
            "settings": other_settings(module, part.get("settings", {})) if any(errors) else [],
        }
    write({"parts": answers})


def _loaded(request: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(name, (module, what was set aside)): alone, and where there is a pipeline, out of it."""
    alone = {
        name: load(part, f"{request['folder']}/{part['subfolder']}".rstrip("/"))
        for name, part in request["parts"].items()
        if not part["in_pipeline"]
    }
    yield from alone.items()
    if whole := request["pipeline"]:
        given = {name: alone[name][0] for name in whole["without"]}
        pipeline, told = load({**whole, "arguments": {**whole["arguments"], **given}}, request["folder"])
        yield from ((n, (getattr(pipeline, n), told)) for n, part in request["parts"].items() if part["in_pipeline"])


def _kernels(module: nn.Module, calls: Sequence[Mapping[str, Any]], device: str) -> list[str]:
    """The operators of one call that multiply."""
    profile: Any = importlib.import_module("torch.autograd.profiler_legacy").profile

    with profile() as profiled:
        for call in calls:
            answer(module, call, device)
    words = ("mm", "linear", "gemm", "gemv", "matmul")
    names = {event.name for event in profiled.function_events}
    return sorted(n for n in names if any(word in n for word in words) and n not in ("aten::matmul", "aten::linear"))


class _Barrier:
    """Lets nobody import quantlab, wherever it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Called for each import."""
        if name.partition(".")[0] == "quantlab":
            raise ImportError("quantlab is not to be had here: an export is checked without it")


def main(words: Sequence[str]) -> None:
    """Read the request, write the answer."""
    sys.meta_path.insert(0, _Barrier())
    with open(words[0], encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:] = [*sys.path, *(p for p in request["path"] if p not in sys.path)]

    def write(answer: dict[str, Any]) -> None:
        with open(words[1], "w", encoding="utf-8") as file:
            json.dump(answer, file)

    compare(request, write)


if __name__ == "__main__":
    main(sys.argv[1:])
