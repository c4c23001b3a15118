"""What a plan advises where nothing fits, fits."""

import re
import shlex

import pytest

from quantlab.planning.plan import plan
from quantlab.running.forecast import forecast
from quantlab.vocabulary.amounts import GIB

LANGUAGE = ["model=llama_3_2_1b", "evaluation.batch_size=1"]
FLUX = ["model=flux_dev"]


def prices(*words):
    return forecast(plan(list(words)))


def followed(words, advice):
    """The words with those of an advice in the place of their own."""
    new = shlex.split(re.fullmatch(r"(.*) would fit \(.*\)|(.*) fits", advice)[1] or advice.removesuffix(" fits"))
    keys = {word.partition("=")[0] for word in new}
    old = [word for word in words if word.partition("=")[0].removeprefix("quantization.") not in keys]
    return [*old, *new]


ASKED = [
    [*LANGUAGE, "backend=torchao", "dtype=int8", "group_size=none", "memory.device_gib=2"],
    [*LANGUAGE, "backend=torchao", "dtype=int8", "activation_dtype=int8", "memory.device_gib=2"],
    [*LANGUAGE, "backend=torchao", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant",
     "memory.device_gib=2"],
    [*LANGUAGE, "backend=modelopt", "dtype=int8", "algorithm=svdquant", "memory.device_gib=3"],
    [*LANGUAGE, "backend=quanto", "dtype=int8", "quantization.layer_kinds=[linear,embedding]",
     "quantization.replace_default_exclusions=true", "memory.device_gib=2"],
    [*FLUX, "components.transformer={backend: bitsandbytes, dtype: int8}", "memory.device_gib=12.5"],
    [*FLUX, "backend=bitsandbytes", "dtype=int8", "memory.device_gib=8"],
    [*FLUX, "backend=bitsandbytes", "dtype=int8", "memory.device_gib=24", "memory.placement=resident"],
]  # fmt: skip


@pytest.mark.parametrize("words", ASKED, ids=lambda words: " ".join(words[1:]))
def test_what_is_advised_fits_as_it_is_typed(words):
    [price] = prices(*words)
    assert price.fits is False
    if not price.advice.startswith("nothing found"):
        [better] = prices(*followed(words, price.advice))
        assert better.fits
        assert not better.advice, "it says all that is to be typed"


def test_an_advice_keeps_what_was_typed_beside_the_dtype():
    [price] = prices(*ASKED[0])
    assert price.advice.startswith("dtype=int4 group_size=auto "), "torchao keeps int4 of one scale a row as int8"
    [price] = prices(*ASKED[3])
    assert price.advice.startswith("algorithm=auto would fit "), "what is calibrated wants the whole model"


CALIBRATED = ["model=sdxl", "backend=torchao", "dtype=int8", "algorithm=smoothquant", "evaluation.height=1024"]


def test_what_looks_at_layers_beside_the_plain_algorithm_is_a_phase():
    """The reference, the candidate, and the same bits by the plain algorithm."""
    [price] = prices(*CALIBRATED, "evaluation.width=1024")
    made = sum(part.memory.weights_bytes for part in price.components if part.scheme)
    whole = sum(part.original_bytes for part in price.components)
    for placement, beside in (("resident", whole), ("alone", price.components[0].original_bytes)):
        row = next(row for row in price.phases[placement] if row.name == "evidence")
        assert row.device_bytes - row.activation_bytes == beside + 2 * made, placement
    [without] = prices(*CALIBRATED, "evaluation.width=1024", "calibration.num_evidence_calls=0")
    assert "evidence" not in {row.name for rows in without.phases.values() for row in rows}
    [plain] = prices("model=sdxl", "backend=torchao", "dtype=int8")
    assert "evidence" not in {row.name for rows in plain.phases.values() for row in rows}


def test_over_two_devices_it_lies_where_the_blocks_are():
    spread = ["memory.placement=spread", "memory.devices=2", "evaluation.width=1024"]
    [price] = prices("model=sd35_large", *CALIBRATED[1:], *spread)
    rows = {row.name: [b - row.activation_bytes for b in row.on_each] for row in price.phases["spread"]}
    made = [share.candidate_bytes for share in price.shares]
    assert rows["evidence"] == [share.reference_bytes + 2 * num for share, num in zip(price.shares, made, strict=True)]
    [without] = prices("model=sd35_large", *CALIBRATED[1:], *spread, "calibration.num_evidence_calls=0")
    assert [row.name for row in without.phases["spread"]] == [name for name in rows if name != "evidence"]


@pytest.mark.slow
def test_where_it_is_what_has_no_room_it_is_left_out():
    budget = ["evaluation.width=1024", "memory.placement=alone", "memory.device_gib=10.5"]
    [price] = prices(*CALIBRATED, *budget)
    assert price.advice.startswith("calibration.num_evidence_calls=0 would fit (alone, ")
    assert prices(*CALIBRATED, *budget, "calibration.num_evidence_calls=0")[0].fits


def test_a_model_that_is_trained_here_has_one_placement():
    [price] = prices("model=digits_dit", "backend=quanto", "dtype=int8", "memory.device_gib=0.1")
    assert list(price.phases) == ["resident"]
    assert "alone" not in price.advice


def test_what_is_not_quantized_runs_in_groups_too():
    [price] = prices("model=llama_3_2_1b", "backend=none", "memory.device_gib=2")
    assert (price.fits, price.placement) == (True, "group_offload")
    phases = {phase.name: phase for phase in price.phases["group_offload"]}
    head = 128256 * 2048 * 2
    assert phases["evaluate"].device_bytes == phases["reference"].device_bytes + head


def test_what_is_missing_is_the_most_that_a_run_would_need():
    [price] = prices("model=qwen3_8b", "backend=bitsandbytes", "dtype=nf4", "memory.device_gib=5")
    most = max(phase.device_bytes for phase in price.phases["group_offload"]) / GIB
    assert price.advice.startswith(f"nothing found that fits: group_offload needs {most:.3f} GiB on the device ")
    [enough] = prices("model=qwen3_8b", "backend=bitsandbytes", "dtype=nf4", f"memory.device_gib={most + 0.001}")
    assert enough.fits
