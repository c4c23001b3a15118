"""A quantized component as a checkpoint of Diffusers or transformers, written by that library's ``save_pretrained``.

What a loader builds is decided by the quantizer that ``config.json`` names. So a shadow of the component, which shares
its tensors, gets the library's quantizer and config, and is saved; the component itself stays as it is. What the loader
would quantize otherwise than was measured is refused by name before anything is written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.exclusions import express, kept_by_loader, linear_paths
from quantlab.backends.part import LIBRARIES, Beside, Part, Written
from quantlab.backends.table import backend_of, loggers
from quantlab.errors import ConfigError, is_disk_full, is_of_the_machine
from quantlab.models.reading import quiet_loading
from quantlab.modules.packed import stored_at
from quantlab.quiet import quiet_libraries
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.reports import LayerReport

if TYPE_CHECKING:
    from torch import nn

WAY_OUT = "leave it out of the export, or export another scheme"
_EXPORT, _CHECK_EXPORT, _AS_STORED, _BESIDE, _FLATTENED = "export", "check_export", "as_stored", "beside", "flattened"
MAX_SHARD = "5GB"
"""As the libraries themselves cut checkpoints."""


def library_of(module: nn.Module, name: str) -> str:
    """Whose class a component is; ConfigError for one that no library loads."""
    library = type(module).__module__.partition(".")[0]
    if library not in LIBRARIES:
        raise ConfigError(
            f"export.path: {name} is a {type(module).__name__} of {library}, which neither Diffusers nor transformers "
            "loads; save it yourself"
        )
    return library


def check_part(part: Part) -> None:
    """ConfigError for a part that :func:`write_part` would refuse, as far as it is known before writing."""
    module = backend_of(part.config.method()).module
    if hasattr(module, _EXPORT):
        if (check := getattr(module, _CHECK_EXPORT, None)) is not None:
            check(part)
        return
    _check_rows(part)
    if (beside := getattr(module, _BESIDE, None)) is not None:
        beside(part)
    else:
        stored_config(part)


def write_part(part: Part, folder: Path, max_shard: str = MAX_SHARD) -> Written:
    """Write one component into ``folder``, which is there; ConfigError naming what its format cannot hold."""
    module = backend_of(part.config.method()).module
    if (own := getattr(module, _EXPORT, None)) is not None:
        written: Written = own(part, folder)
        return written
    _check_rows(part)
    kind = type(part.module).__name__
    plain = Written(
        loader=f"{part.library} {kind}.from_pretrained",
        target=f"{part.library}:{kind}",
        arguments={"dtype": part.dtype},
        needs_gpu=part.library == "diffusers" and bool(getattr(module, "DIFFUSERS_NEEDS_GPU", False)),
    )
    what = f"{part.config.method()} {part.name}"
    if (beside := getattr(module, _BESIDE, None)) is None:
        save(_shadow(part), folder, max_shard, what)
        return plain
    kept: Beside = beside(part)
    save(part.module, folder, max_shard, what)
    with _cannot_write(what):
        kept.write(folder)
    return dataclasses.replace(
        plain,
        loader=f"{plain.loader} after {kept.before.partition(':')[2]}()",
        arguments={**plain.arguments, **kept.arguments},
        before=kept.before,
    )


def save(module: Any, folder: Path, max_shard: str = MAX_SHARD, what: str = "") -> None:
    """``save_pretrained`` as sharded safetensors; what a library cannot write is a ConfigError."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    quiet_libraries(loggers())
    with _cannot_write(what or type(module).__name__), quiet_loading(logging), quiet_loading(diffusers_logging):
        module.save_pretrained(folder, max_shard_size=max_shard)


@contextlib.contextmanager
def _cannot_write(what: str) -> Iterator[None]:
    """What a library raises over a component that it cannot write, as one ConfigError."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error) or is_of_the_machine(error) or isinstance(error, OSError | ConfigError):
            raise
        raise ConfigError(
            f"export.path: {what}: the library cannot write it "
            f"({type(error).__name__}: {str(error)[:300]}); export another scheme"
        ) from error


# -- what a loader would do otherwise


def _check_rows(part: Part) -> None:
    """ConfigError naming the layers that stand in no checkpoint as they are stored here."""
    packed = [r for r in part.layers if r.is_stored_quantized and r.kind != "linear"]
    if packed:
        raise ConfigError(
            f"quantization.layer_kinds: {_some(packed)} of {part.name}: loaders quantize Linear layers alone, so no "
            "checkpoint holds these; export with layer_kinds=[linear]"
        )
    read = [r for r in part.layers if r.is_stored_quantized and stored_at(part.module, r.name) != r.name]
    if read:
        raise ConfigError(
            f"export.path: {_some(read)} of {part.name}: the model reads their weights, so that quantlab "
            "keeps them packed, which no loader does; exclude them with modules_to_not_convert"
        )
    turned = [r for r in part.layers if r.is_stored_quantized and not _is_linear(part.original, r.name)]
    if turned:
        raise ConfigError(
            f"export.path: {_some(turned)} of {part.name}: quantlab puts its own layers there "
            f"({type(part.original.get_submodule(turned[0].name)).__name__}), which no loader does; exclude them with "
            "modules_to_not_convert"
        )
    other = [r for r in part.layers if r.status == "fallback"]
    if other:
        raise ConfigError(
            f"quantization.on_mismatch={other[0].dtype}: {_some(other)} of {part.name} fell back to it, and a "
            "checkpoint has one scheme; set on_mismatch=skip, or exclude them"
        )
    if tied := _tied(part):
        raise ConfigError(
            f"export.path: {_some(tied)} of {part.name}: several places share this layer, and transformers ties no "
            "quantized weights when it loads a checkpoint; exclude them with modules_to_not_convert"
        )
    if not part.quantized:
        raise ConfigError(f"export.path: nothing of {part.name} is quantized; {WAY_OUT}")


def _tied(part: Part) -> list[LayerReport]:
    """The quantized layers whose weights transformers ties after loading (the shared blocks of Zamba), by name."""
    names = getattr(part.original, "all_tied_weights_keys", None) or {}
    places = {name.rpartition(".")[0] for pair in names.items() for name in pair}
    return [row for name, row in part.quantized.items() if name in places]


def _is_linear(original: nn.Module, name: str) -> bool:
    from torch import nn

    with contextlib.suppress(AttributeError):
        return isinstance(original.get_submodule(name), nn.Linear)
    return False


def _some(rows: Sequence[LayerReport]) -> str:
    return some_of((r.name for r in rows), 4)


def stored_config(part: Part) -> Any:
    """The library's config object for the checkpoint: what is in it, and which layers are left out."""
    module = backend_of(part.config.method()).module
    as_stored = getattr(module, _AS_STORED, None)
    if as_stored is None:
        raise ConfigError(
            f"backend={part.config.method()}: neither Diffusers nor transformers loads what it quantizes, so there is "
            "no checkpoint of it; choose another backend"
        )
    native = as_stored(part)
    paths = linear_paths(part.original)
    taken = {id(part.original.get_submodule(name)) for name in part.quantized}
    left = {path for path in paths if id(part.original.get_submodule(path)) not in taken}
    if kept := [path for path in kept_by_loader(native, part.library, part.original, paths) if path not in left]:
        raise ConfigError(
            f"quantization.replace_default_exclusions: {part.library} keeps {some_of(kept)} of {part.name} in "
            "float32 whatever a checkpoint says; leave the default exclusions as they are"
        )
    names = tuple(express(native, part.library, left, paths))
    said: dict[str, Any] = {native._exclusions_field: names, "exclusion_rule": part.library}
    if not names and part.library != "transformers":
        said = {native._exclusions_field: None}
    native = dataclasses.replace(native, **said)
    return native.to_diffusers(part.original) if part.library == "diffusers" else native.to_transformers(part.original)


def _shadow(part: Part) -> Any:
    """A second object of the component's class with the same tensors, which the library's quantizer is set on."""
    made = _with_quantizer(part)
    flatten = getattr(backend_of(part.config.method()).module, _FLATTENED, None)
    if flatten is not None:  # transformers hands over the module, Diffusers its state
        made.hf_quantizer.get_state_dict_and_metadata = lambda given, *_, **__: flatten(
            given if isinstance(given, Mapping) else given.state_dict(), part.library
        )
    return made


def _with_quantizer(part: Part) -> Any:
    config = stored_config(part)
    shadow = copy.copy(part.module)
    vars(shadow).update(vars(part.module))
    made: Any = shadow
    if part.library == "transformers":
        from transformers.quantizers.auto import AutoHfQuantizer

        made.config = copy.deepcopy(made.config)
        made.config.quantization_config = config
        made.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        if not made.hf_quantizer.is_serializable():
            raise ConfigError(f"backend={part.config.method()}: transformers saves no checkpoint of it; {WAY_OUT}")
        return made
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    made.hf_quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    vars(made.hf_quantizer).setdefault("offload", False)  # what its check of the environment would set
    made._internal_dict = type(made._internal_dict)({**made._internal_dict, "quantization_config": config})
    return made
