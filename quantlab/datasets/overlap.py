"""How much two sets of texts have in common: runs of tokens that both hold, wherever the windows were cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.encoder import EncoderInputs
from quantlab.protocols.seq2seq import PairInputs
from quantlab.protocols.table import Inputs
from quantlab.protocols.vision import VisionInputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN_TOKENS = 32
"""Tokens in a row that two texts do not share by chance: the halves of the Wikipedia introductions (520,000 tokens
each) share no run of 32, nine of 24 and some hundred of 16."""
RUN_CHARACTERS = 128
"""The same where a token is a byte or a character: encyclopedias share many a run of 32 of these."""
LARGEST_OF_CHARACTERS = 1000
"""A vocabulary of sub-words has tokens beyond this one."""
FEWEST_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What calibration and evaluation share."""

    run_tokens: int
    """Length of a run that counts."""
    of_calibration: float
    """Share of the calibration's tokens that lie in runs which the evaluation has too, 0 to 1."""
    of_evaluation: float
    """The same of the evaluation's tokens."""
    num_whole: int
    """How many of the calibration's windows, texts or prompts are, as a whole, one of the evaluation's."""


def overlap(calibration: Inputs, evaluation: Inputs) -> Overlap:
    """What two inputs of one protocol share.

    Tokens are those of the model; of prompts they are the words, without case and white space. A run is 32 tokens (128
    where a token is a character), or half of the shorter window (at least 16), so that windows of one text share a run
    however they were cut. A text that is shorter than a run is shared where it is equal as a whole.
    """
    mine, theirs = _sequences(calibration), _sequences(evaluation)
    longest = min(max((len(s) for s in part), default=0) for part in (mine, theirs))
    wanted = RUN_CHARACTERS if _are_characters(calibration) and _are_characters(evaluation) else RUN_TOKENS
    size = max(FEWEST_TOKENS, min(wanted, longest // 2))
    runs = [[_runs(s, size) for s in part] for part in (mine, theirs)]
    wholes = [{s.tobytes() for s in part} for part in (mine, theirs)]
    return Overlap(
        run_tokens=size,
        of_calibration=_share(mine, runs[0], runs[1], size),
        of_evaluation=_share(theirs, runs[1], runs[0], size),
        num_whole=sum(s.tobytes() in wholes[1] for s in mine),
    )


def normalised(prompt: str) -> str:
    """A prompt without what makes no other image: case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _sequences(inputs: Inputs) -> list[NDArray[np.uint64]]:
    """The tokens of each window, text or prompt, as numbers that are spread over 64 bits."""
    import hashlib

    import numpy as np

    if isinstance(inputs, DiffusionInputs):
        prompts = dict.fromkeys(normalised(p) for p in inputs.conditioning.get("prompt", []))

        def number(word: str) -> int:
            return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())

        return [np.array([number(word) for word in prompt.split()], dtype=np.uint64) for prompt in prompts]
    if isinstance(inputs, VisionInputs):
        return []
    if isinstance(inputs, PairInputs):
        texts = [row[row >= 0] for row in inputs.targets]
        if "input_ids" in inputs.source:
            read = zip(inputs.source["input_ids"], inputs.source["attention_mask"].bool(), strict=True)
            texts += [row[kept] for row, kept in read]
        return [_spread(row.numpy().astype(np.uint64)) for row in texts]
    rows = inputs.input_ids.numpy().astype(np.uint64)
    if isinstance(inputs, EncoderInputs):
        kept = inputs.attention_mask.numpy().astype(bool)
        return [_spread(row[keep]) for row, keep in zip(rows, kept, strict=True)]
    return [_spread(row) for row in rows]


def _are_characters(inputs: Inputs) -> bool:
    return (
        not isinstance(inputs, (DiffusionInputs, VisionInputs)) and int(inputs.input_ids.max()) < LARGEST_OF_CHARACTERS
    )


def _spread(tokens: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number of 64 bits for each token (SplitMix64's mixing)."""
    import numpy as np

    x = (tokens + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def _runs(tokens: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A digest of each run of ``size`` tokens, or of all tokens where there are fewer."""
    import numpy as np

    size = min(size, len(tokens))
    if not size:
        return np.empty(0, dtype=np.uint64)
    weights = _spread(np.arange(size, dtype=np.uint64) + np.uint64(size << 32)) | np.uint64(1)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(tokens, size) @ weights, dtype=np.uint64)


def _share(
    sequences: Sequence[NDArray[np.uint64]],
    runs: Sequence[NDArray[np.uint64]],
    others: Sequence[NDArray[np.uint64]],
    size: int,
) -> float:
    """The share of tokens that lie in a run which is also one of ``others``."""
    import numpy as np

    known = np.unique(np.concatenate(others)) if others else np.empty(0, dtype=np.uint64)
    num = sum(len(s) for s in sequences)
    covered = 0
    for tokens, digests in zip(sequences, runs, strict=True):
        starts = np.flatnonzero(np.isin(digests, known))
        inside = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(inside, starts, 1)
        np.add.at(inside, np.minimum(starts + size, len(tokens)), -1)
        covered += int((inside[:-1].cumsum() > 0).sum())
    return covered / num if num else 0.0
