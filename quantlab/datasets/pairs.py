"""``dataset=pairs dataset.path=FILE``: what a model reads and what it should write, as JSON lines of the user's own.

A line is ``{"source": "A text.", "target": "Another."}``, or for models of sound ``{"audio": "a.wav", "target": "A
text."}`` with WAV files below the file's folder, at the rate that the model hears.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError, ModelError
from quantlab.models.loaded import LoadedModel
from quantlab.progress import say
from quantlab.protocols.seq2seq import PairInputs
from quantlab.vocabulary.files import MAX_TEXT_BYTES, read_json_lines
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_WAY_OUT = 'give a file of JSON lines, each {"source": "...", "target": "..."} or {"audio": "a.wav", "target": "..."}'
Pair = dict[str, str]


def read(path: str | None) -> list[Pair]:
    """The lines; ConfigError beginning with ``dataset.path=...`` for what is missing or is none."""
    key = f"dataset.path={path}"
    if path is None:
        raise ConfigError(f"dataset.path=null: pairs are of your own; {_WAY_OUT}")
    rows: list[Pair] = []
    for number, found in read_json_lines(path, key, _WAY_OUT, MAX_TEXT_BYTES):
        is_pair = isinstance(found, dict) and set(found) in ({"source", "target"}, {"audio", "target"})
        if not is_pair or not all(isinstance(v, str) and v.strip() for v in found.values()):
            raise ConfigError(f"{key}: line {number} is no pair of texts; {_WAY_OUT}")
        if rows and set(found) != set(rows[0]):
            raise ConfigError(f"{key}: line {number} has {', '.join(found)} and line 1 has {', '.join(rows[0])}")
        rows.append(found)
    if not rows:
        raise ConfigError(f"{key}: no pair is in it; {_WAY_OUT}")
    return rows


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> PairInputs:
    """``evaluation.num_samples`` pairs, evenly spaced; see :func:`pair_inputs`."""
    key, rows = f"dataset.path={config.path}", read(config.path)
    hears = "processor" in model.parts
    if hears != ("audio" in rows[0]):
        raise ConfigError(
            f"{key}: {model.name} reads {'sound' if hears else 'text'}, and the lines have {min(rows[0])}"
        )
    chosen = spaced(rows, evaluation.num_samples, key)
    sounds = [_sound(Path(str(config.path)).expanduser().parent, row["audio"], key, model) for row in chosen if hears]
    texts, written = [row.get("source", "") for row in chosen], [row["target"] for row in chosen]
    inputs = pair_inputs(texts, written, sounds, evaluation, model)
    lengths = (inputs.targets >= 0).sum(1)
    if "input_ids" in inputs.source:
        lengths = lengths.maximum(inputs.source["attention_mask"].sum(1))
    if num := int((lengths >= evaluation.context_length).sum()):
        limit = f"evaluation.context_length={evaluation.context_length}"
        say(f"{key}: {num} of {len(chosen)} pairs reach {limit} tokens, where both sides are cut", "warning")
    return inputs


def spaced(rows: Sequence[Any], wanted: int, key: str) -> list[Any]:
    """``wanted`` of the rows, evenly spaced; ConfigError where there are fewer."""
    check_number(rows, wanted, key)
    return [rows[i * len(rows) // wanted] for i in range(wanted)]


def check_number(rows: Sequence[object], wanted: int, key: str) -> None:
    """ConfigError where there are fewer pairs than samples."""
    if len(rows) < wanted:
        raise ConfigError(
            f"{key}: there are {len(rows)} pairs and not evaluation.num_samples={wanted}; give more pairs or fewer "
            "samples"
        )


def pair_inputs(
    sources: Sequence[str],
    targets: Sequence[str],
    sounds: Sequence[NDArray[np.float32]],
    evaluation: EvaluationConfig,
    model: LoadedModel,
    is_one_language: bool = False,
) -> PairInputs:
    """Pairs as the model's tokenizer makes them, both sides cut at ``evaluation.context_length`` tokens.

    The decoder begins with the token that its configuration names, and is given each target but the last. Targets are
    made as what is written, by the vocabulary and with the language mark of that side (Marian, NLLB, mBART), unless
    the pairs are of ``is_one_language``. Raises ModelError for a tokenizer with languages that does not know that one.
    """
    import torch

    parts: Any = model.parts
    tokenizer, length = parts["tokenizer"], evaluation.context_length
    if sounds:
        processor, name = parts["processor"], cast(Any, model.components["model"]).main_input_name
        to_longest = {} if hasattr(processor, "chunk_length") else {"padding": True}  # Whisper hears 30 s, whatever
        made = processor(list(sounds), sampling_rate=processor.sampling_rate, return_tensors="pt", **to_longest)
        masks = {"attention_mask": made["attention_mask"]} if "attention_mask" in made else {}
        source: dict[str, Tensor] = {name: made[name].float(), **masks}
    else:
        made = tokenizer(list(sources), padding=True, truncation=True, max_length=length, return_tensors="pt")
        source = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    start = _start(model.components["model"], tokenizer.pad_token_id)
    if not is_one_language and getattr(tokenizer, "tgt_lang", "") is None:  # it would take the language that is read
        raise ModelError(
            f"model.path: {model.name}: its tokenizer marks languages and does not know which one is written; give "
            "tgt_lang (and src_lang) in its tokenizer_config.json"
        )
    side = "text" if is_one_language else "text_target"
    written = [list(ids) for ids in tokenizer(**{side: list(targets)}, truncation=True, max_length=length)["input_ids"]]
    written = [ids[1:] if len(ids) > 1 and ids[0] == start else ids for ids in written]
    longest = max(len(ids) for ids in written)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    outs = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in written])
    ins = torch.tensor([[start, *ids[:-1]] + [pad] * (longest - len(ids)) for ids in written])
    said = hashlib.sha256("\0".join([*sources, *targets]).encode("utf-8", "surrogatepass")).hexdigest()
    record = {"protocol": "seq2seq/v1", "ctx": length, "text_sha256": said, "n_tokens": int((outs >= 0).sum())}
    return PairInputs(source, ins, outs, tuple(f"pair {i}" for i in range(len(written))), record)


def _start(module: Any, otherwise: int) -> int:
    """The token that a decoder begins with, wherever a class keeps it."""
    decoder = getattr(module.config, "decoder", None)  # T5Gemma has a configuration for each half
    said = [(place, "decoder_start_token_id") for place in (module.config, module.generation_config)]
    said += [] if decoder is None else [(decoder, "bos_token_id")]
    found = [token for place, name in said if (token := getattr(place, name, None)) is not None]
    return int(found[0]) if found else otherwise


def _sound(folder: Path, name: str, key: str, model: LoadedModel) -> NDArray[np.float32]:
    """The samples of a WAV file, mono, in [-1, 1]."""
    import numpy as np
    from scipy.io import wavfile

    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name:
        raise ConfigError(f"{key}: {name!r} is not below the file's folder; move it there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of text that editors add
            rate, samples = wavfile.read(folder / place)
    except Exception as error:  # noqa: BLE001  a header that lies fails in whatever it is used for
        raise ConfigError(f"{key}: {name} cannot be read as a WAV file ({error}); put an intact one there") from error
    wanted = cast(Any, model.parts)["processor"].sampling_rate
    if rate != wanted:
        raise ConfigError(f"{key}: {name} has {rate} samples a second and {model.name} hears {wanted}; resample it")
    if samples.dtype == np.uint8:  # silence is 128 there
        samples = samples.astype(np.int16) - 128
        whole = 127
    else:
        whole = np.iinfo(samples.dtype).max if np.issubdtype(samples.dtype, np.integer) else 1
    mono = samples.astype(np.float32) / whole
    return mono if mono.ndim == 1 else mono.mean(1)
