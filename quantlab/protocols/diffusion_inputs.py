"""What a diffusion model is sampled from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantlab.models.loaded import Conditioning

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionInputs:
    """What is sampled: row i of everything is sample i, and none depends on the others."""

    noise: Tensor
    """Initial latents, float32 CPU tensor (n, ...); of a pipeline, which draws by itself, the seeds: int64 (n,)."""
    conditioning: Conditioning
    sample_ids: tuple[str, ...]
    clusters: NDArray[np.int64] | None = None
    """int array (n,): samples of one prompt share a number; None: each its own."""
    strata: NDArray[np.int64] | None = None
    """int array (n,): the class of each sample; None: one stratum."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether samples run alone: to a pipeline, a list of pictures may be many of one sample."""
        return "image" in self.conditioning

    @property
    def seeds(self) -> Tensor | None:
        """Of a pipeline's samples, for ``torch.Generator().manual_seed``; None where the noise itself is given."""
        return None if self.noise.is_floating_point() else self.noise

    @property
    def num_samples(self) -> int:
        """Samples, n."""
        return len(self.sample_ids)

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of noise and conditioning."""
        noise = self.noise.contiguous()
        digest = hashlib.sha256(f"{noise.dtype}|{tuple(noise.shape)}|".encode())
        digest.update(noise.numpy().tobytes())
        digest.update(json.dumps(dict(self.conditioning), sort_keys=True, default=_said).encode())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | slice) -> DiffusionInputs:
        """The samples at ``indices``, in that order."""
        import numpy as np

        rows = np.arange(self.num_samples)[indices if isinstance(indices, slice) else np.asarray(indices, dtype=int)]
        return replace(
            self,
            noise=self.noise[rows],
            sample_ids=tuple(self.sample_ids[i] for i in rows),
            conditioning={name: [values[i] for i in rows] for name, values in self.conditioning.items()},
            clusters=None if self.clusters is None else np.asarray(self.clusters)[rows],
            strata=None if self.strata is None else np.asarray(self.strata)[rows],
        )


def _said(picture: Tensor) -> str:
    raw = picture.contiguous()
    return f"{tuple(raw.shape)}|{hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"
