"""A candidate as ``torch.compile`` makes it, for as long as it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantlab.errors import QuantlabError
from quantlab.models.loaded import LoadedModel

BACKEND = "inductor"
MAX_COMPILED = 128
"""So often is a function compiled: for batches, windows, prompts and single tokens, with and without a cache. That is 9
times for a Llama that is measured and generates, where torch allows 8. Where a layer breaks the graph (GGUF's,
bitsandbytes' on a CPU), each part is compiled by itself, and a decorator that all of them have more than 32 times."""
_FOR_TORCHS_DEVELOPERS = ("Set TORCHDYNAMO_VERBOSE", "For even more developer context")
"""How the lines begin with which torch ends each message of its compiler."""


class CompileError(QuantlabError):
    """torch.compile could not compile the model, or compiled nothing of it."""


@contextmanager
def compiled(model: LoadedModel) -> Iterator[None]:
    """While open, the denoisers (of other models: all components) run as ``torch.compile`` compiles them.

    What it would only tell in a log is an error here: a function that is compiled too often and then runs as it is.
    Nothing that was compiled is left, so that the next candidate is compiled by itself.
    Raises CompileError with the compiler's own reason.
    """
    import torch
    import torch._dynamo as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    names = model.parts.get("denoisers") or tuple(model.components)
    modules: list[Any] = [model.components[name] for name in names]
    settings: Any = dynamo.config
    dynamo.reset()
    mine = {"fail_on_recompile_limit_hit": True, "recompile_limit": MAX_COMPILED, "skip_nnmodule_hook_guards": False}
    with settings.patch(mine):
        try:
            for module in modules:
                torch.nn.Module.compile(module, backend=BACKEND)
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith(_FOR_TORCHS_DEVELOPERS)] or [type(error).__name__]
            if isinstance(error, FailOnRecompileLimitHit):  # whose own words are of a setting of ours
                lines = [f"a function of it would be compiled more than {MAX_COMPILED} times"]
            raise CompileError(
                f"evaluation.compile=true: torch.compile failed with {type(error).__name__} "
                f"({' '.join(lines[:2])[:300].rstrip('.:')}); evaluation.compile=false measures the scheme as it is"
            ) from error
        finally:
            for module in modules:
                module._compiled_call_impl = None
            dynamo.reset()


@contextmanager
def first_run() -> Iterator[dict[str, float]]:
    """While open a compiled model is first run; then ``compiled_graphs`` and ``graph_breaks`` are filled in.

    Raises CompileError where nothing was compiled.
    """
    from torch._dynamo.utils import counters

    counters.clear()
    found: dict[str, float] = {}
    yield found
    found["compiled_graphs"] = float(counters["stats"]["unique_graphs"])
    found["graph_breaks"] = float(sum(counters["graph_break"].values()))
    if not found["compiled_graphs"]:
        raise CompileError(
            "evaluation.compile=true: torch.compile made no graph of the model; evaluation.compile=false measures the "
            "scheme as it is"
        )
