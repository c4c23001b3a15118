"""Calibration data as a forward loop: the calls of one component, replayed on whatever stands in its place.

A backend that needs data gets a :class:`CalibrationFeed` and calls it with the module; what runs inside (observers,
quantizers, hooks) is the backend's. The calls are recorded once on the reference, or given by the user as batches, and
are read one at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from quantlab.errors import ConfigError
from quantlab.modules.calls import Call, Progress, replay
from quantlab.modules.kept import SUFFIX, Damaged, read_tree, write_tree
from quantlab.modules.trees import Batch, add_to_digest, arguments_of, in_order, replaced
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationFeed:
    """Runs a module over the calibration calls: ``feed(module)``, as often as an algorithm needs."""

    calls: Sequence[Call]
    """One forward call each; may be read from disk item by item, so iterate and do not collect."""
    num_samples: int
    """Distinct samples (images, windows of text, rows) in the calls."""
    batch_size: int
    """Samples a call."""
    device: str = "cpu"
    dtype: str = "float32"
    """Compute dtype of a module whose own cannot be told from its parameters."""
    sha256: str = ""
    on_call: Progress | None = None
    """Told (calls done, calls of this pass) after each call: the progress bar."""

    def __call__(self, module: torch.nn.Module) -> None:
        """Replay every call on ``module`` without gradients; outputs are dropped."""
        for i in range(len(self.calls)):
            self.step(module, i)

    def step(self, module: torch.nn.Module, i: int) -> int:
        """Replay call ``i`` alone and return its denoising step."""
        call = self.calls[i]
        replay(module, call, self.device, self.dtype)
        if self.on_call is not None:
            self.on_call(i + 1, len(self.calls))
        return int(call.get("step", 0))


def feed_of_batches(batches: Sequence[Batch], device: str = "cpu", dtype: str = "float32") -> CalibrationFeed:
    """A feed of the user's own batches: tensors, or tuples or mappings of them, as the module's forward takes them.

    Raises ConfigError where there are none, or where one holds NaN or infinity.
    """
    import torch

    if not isinstance(batches, (list, tuple)) or not batches:
        raise ConfigError(
            "calibration: at least one batch is wanted: calibration=[batch] (a tensor, or a tuple or "
            "mapping of tensors)"
        )
    calls: list[Call] = []
    digest, rows = hashlib.sha256(), []
    for i, batch in enumerate(batches):
        args, kwargs = arguments_of(batch)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if not tensors:
            raise ConfigError(f"calibration: batch {i} holds no tensor; give what the module's forward takes")
        for tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"calibration: batch {i} holds NaN or infinity; clean the data")
            add_to_digest(digest, tensor)
        rows.append(len(tensors[0]) if tensors[0].ndim else 1)
        floating = next((t.dtype for t in tensors if t.is_floating_point()), None)
        recorded = dtype if floating is None else dtype_name(floating)
        calls.append({"args": args, "kwargs": kwargs, "dtype": recorded, "step": 0})
    return CalibrationFeed(
        calls=calls, num_samples=sum(rows), batch_size=max(rows), device=device, dtype=dtype, sha256=digest.hexdigest()
    )


# -- calls on disk


class StoredCalls(Sequence[Call]):
    """Calls in a folder, read one at a time; a tensor that several calls share (prompt embeddings) is stored once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = sorted(folder.glob(f"call-*{SUFFIX}"))
        self._kept: dict[str, Tensor] = {}  # tensors of the last call read

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, i: int) -> Call: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Call]: ...
    def __getitem__(self, i: int | slice) -> Call | Sequence[Call]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        stored = read_tree(self._files[i])
        known, self._kept = self._kept, {}

        def tensor(name: str) -> Tensor:
            if name not in self._kept:
                found = known.get(name)
                self._kept[name] = read_tree(self.folder / name) if found is None else found
            return self._kept[name]

        call: Call = replaced(stored, lambda v: tensor(v[TENSOR]) if isinstance(v, dict) and TENSOR in v else None)
        return call

    def write(self, call: Call) -> None:
        """Append a call; its ``output``, if it has one, is left out."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)

        def stored(value: object) -> dict[str, str] | None:
            if not isinstance(value, torch.Tensor):
                return None
            raw = in_order(value.detach().cpu())
            digest = hashlib.sha256(f"{raw.dtype}|{tuple(raw.shape)}|".encode())
            digest.update(raw.flatten().view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
            name = f"tensor-{digest.hexdigest()[:40]}{SUFFIX}"
            if not (self.folder / name).exists():
                write_tree(raw, self.folder / name)
            return {TENSOR: name}

        file = self.folder / f"call-{len(self):06d}{SUFFIX}"
        write_tree({k: replaced(v, stored) for k, v in call.items() if k != "output"}, file)
        self._files.append(file)

    def sha256(self) -> str:
        """Digest of all calls in their order: which tensors, as which arguments, at which step."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(repr(read_tree(file)).encode())
        return digest.hexdigest()

    def check(self) -> None:
        """Read every file; :class:`~quantlab.modules.kept.Damaged` for one that is not what was written."""
        for file in self.folder.glob(f"*{SUFFIX}"):
            try:
                read_tree(file)
            except Damaged as error:
                raise Damaged(f"{file.name}: {error}") from error


TENSOR = "quantlab.tensor"
"""In a stored call, ``{TENSOR: file name}`` stands for a tensor."""
