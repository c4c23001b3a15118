"""The Python interface: anyone's own module, and whole requests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import quantlab
from quantlab.modules.layers import state_digest
from quantlab.vocabulary.reports import RunReport
from tests.support.shell import digits_words
from tests.support.stores import ROOT
from tests.support.tables import BACKENDS

torch = pytest.importorskip("torch")
nn = torch.nn

CONFIGS: dict[str, Callable[[], quantlab.QuantizationConfigMixin]] = {
    "bitsandbytes nf4": lambda: quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda: quantlab.TorchAoConfig("int8wo"),
    "quanto int4": lambda: quantlab.QuantoConfig("int4"),
    "gguf q8_0": lambda: quantlab.GGUFQuantizationConfig(gguf_type="q8_0"),
    "modelopt int8": lambda: quantlab.NVIDIAModelOptConfig("INT8", channel_quantize=0),
}
"""Row of each -> its config, as a user writes it."""
LAYERS = {"body.0": (128, 64), "body.3": (64, 128), "head": (32, 64)}
NUM_ROWS = 24
REFERENCE, FLOOR = "reference", "floor_bf16"


class Net(nn.Module):
    """Linear layers, and others that no backend may touch; its dropout would change outputs in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.5), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 32, bias=False)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(x + self.body(x)))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def net() -> Any:
    return Net()


def batches() -> list[Any]:
    return list(torch.randn(NUM_ROWS, 64, generator=torch.Generator().manual_seed(1)).split(16))


# -- quantize


@pytest.mark.parametrize("row", CONFIGS)
def test_quantize_returns_a_copy_and_what_its_layers_became(row: str, net: Any) -> None:
    before = state_digest(net.state_dict())
    quantized, report = quantlab.quantize(net.train(), CONFIGS[row]())
    assert {layer.name: layer.shape for layer in report.layers} == LAYERS
    assert {layer.status for layer in report.layers} == {"quantized"}
    assert {layer.dtype for layer in report.layers} == {row.split()[1]}
    assert all(0 < (layer.weight_rel_error or 0) < 0.15 for layer in report.layers)
    assert not quantized.training
    assert net.training
    assert state_digest(net.state_dict()) == before
    assert type(net.head) is nn.Linear
    x, net = batches()[0], net.eval()
    with torch.no_grad():
        error = (quantized(x) - net(x)).norm() / net(x).norm()
    assert 0 < error < 0.15


def test_exclusions_and_misfits_are_those_of_the_recipes(net: Any) -> None:
    quantized, report = quantlab.quantize(net, quantlab.QuantoConfig("int8", modules_to_not_convert=["head"]))
    assert type(quantized.head) is nn.Linear
    assert {r.name: (r.status, r.reason) for r in report.layers}["head"] == ("excluded", "modules_to_not_convert: head")
    odd = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 8))
    config = quantlab.GGUFQuantizationConfig(gguf_type="q8_0")
    with pytest.raises(quantlab.NotQuantized, match=r"^dtype=q8_0: .*in_features 33 does not divide by 32"):
        quantlab.quantize(odd, config)
    _, skipped = quantlab.quantize(odd, config, on_mismatch="skip")
    assert [r.status for r in skipped.layers] == ["skipped", "quantized"]
    _, fallen = quantlab.quantize(odd, config, on_mismatch="bfloat16")
    assert [(r.status, r.dtype) for r in fallen.layers] == [("fallback", "bfloat16"), ("quantized", "q8_0")]


# -- evaluate


@pytest.fixture(scope="module")
def rows() -> dict[str, RunReport]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reports = quantlab.evaluate(Net(), [make() for make in CONFIGS.values()], batches(), num_bootstrap=100)
    return dict(zip([REFERENCE, FLOOR, *CONFIGS], reports, strict=True))


def test_evaluate_has_a_row_for_the_reference_the_floor_and_each_config(rows: dict[str, RunReport]) -> None:
    assert all(report.name.startswith(row) for row, report in rows.items())
    assert len({report.name for report in rows.values()}) == len(rows)
    assert {r.status for r in rows.values()} == {"FINISHED"}
    assert all(v.n == NUM_ROWS for r in rows.values() for v in r.quality.values())
    assert all(r.floors == {FLOOR: rows[FLOOR].quality} for r in rows.values())


def test_the_reference_row_is_exact(rows: dict[str, RunReport]) -> None:
    assert rows[REFERENCE].quality["output_rel_error"].value == 0.0
    assert rows[REFERENCE].quality["output_cosine"].value == pytest.approx(1.0, abs=1e-12)
    num = sum(p.numel() for p in Net().parameters())
    assert rows[REFERENCE].memory["model"].weights_bytes == 4 * num
    assert rows[FLOOR].memory["model"].weights_bytes == 2 * num


@pytest.mark.parametrize("row", CONFIGS)
def test_evaluate_measures_what_quantize_returns(row: str, rows: dict[str, RunReport], net: Any) -> None:
    quantized, report = quantlab.quantize(net, CONFIGS[row]())
    net.eval()
    x = torch.cat(batches())
    with torch.no_grad():
        got, want = quantized(x), net(x)
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    assert rows[row].quality["output_rel_error"].value == pytest.approx(float(errors.mean()), rel=0.02)
    assert rows[row].quantization == report
    assert rows[row].memory["model"].weights_bytes < rows[FLOOR].memory["model"].weights_bytes


def test_fewer_bits_are_a_larger_error(rows: dict[str, RunReport]) -> None:
    error = {name: row.quality["output_rel_error"].value for name, row in rows.items()}
    assert 0 < error["gguf q8_0"] < error["bitsandbytes nf4"]
    assert error["modelopt int8"] < error["quanto int4"]


def test_a_module_that_is_quantized_already_is_told(net: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def told(module: Any) -> str:
        quantlab.evaluate(module, [CONFIGS["quanto int4"]()], [torch.randn(4, 64)], floors=False)
        return capsys.readouterr().err

    assert "looks already quantized" not in told(net)
    stored, _ = quantlab.quantize(net, CONFIGS["gguf q8_0"]())
    net.body[0].weight.data = BACKENDS["gguf"].read_back(stored.body[0]).dense
    assert "looks already quantized: its weights are integers of 6 to 8 bits" in told(net)


@pytest.mark.parametrize("is_training", [True, False])
def test_evaluate_leaves_the_module_as_it_was(is_training: bool, net: Any) -> None:
    net.train(is_training)
    before = state_digest(net.state_dict())
    quantlab.evaluate(net, [quantlab.QuantoConfig("int8")], batches(), num_bootstrap=10)
    assert net.training is net.body.training is is_training
    unknown = quantlab.QuantoConfig("int8", modules_to_not_convert=["nothing"])
    with pytest.raises(quantlab.ConfigError, match=r"^modules_to_not_convert=nothing: matches none of the 3 layers"):
        quantlab.evaluate(net, [unknown], batches())
    assert net.training is net.body.training is is_training
    assert state_digest(net.state_dict()) == before


def test_evaluate_leaves_a_frozen_part_frozen(net: Any) -> None:
    net.train()
    net.norm.eval()
    quantlab.evaluate(net, [], batches(), num_bootstrap=10)
    assert (net.training, net.norm.training) == (True, False)


class Wide(nn.Module):
    """Takes two tensors, returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Any, shift: Any) -> dict[str, Any]:
        return {"y": self.inner(x) + shift, "other": x}


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_batches_of_several_tensors(kind: type) -> None:
    tensors = (batches()[0], torch.ones(64))
    batch = {"x": tensors[0], "shift": tensors[1]} if kind is dict else kind(tensors)
    reports = quantlab.evaluate(Wide(), [quantlab.QuantoConfig("int8")], [batch], num_bootstrap=10)
    assert 0 < reports[-1].quality["output_rel_error"].value < 0.02


def test_a_config_that_fails_among_others_is_a_row_and_alone_an_error(capsys: Any) -> None:
    odd, batch = nn.Sequential(nn.Linear(60, 64), nn.Linear(64, 32)), [torch.randn(8, 60)]
    fits_not = quantlab.GGUFQuantizationConfig(gguf_type="q8_0")
    rows = quantlab.evaluate(odd, [fits_not, INT8], batch, num_bootstrap=10, floors=False)
    assert [r.status for r in rows] == ["FINISHED", "FAILED", "FINISHED"]
    failed = rows["gguf q8_0"]
    assert failed.failed_stage == "quantize"
    assert failed.error.startswith("dtype=q8_0: 1 layer of model cannot be")
    assert "failed: gguf q8_0 at quantize: dtype=q8_0" in capsys.readouterr().err
    assert "failed: gguf q8_0 at quantize" in rows._repr_html_()
    with pytest.raises(quantlab.NotQuantized, match="^dtype=q8_0: .*on_mismatch='skip'"):
        quantlab.evaluate(odd, [fits_not], batch, num_bootstrap=10, floors=False)


def test_a_config_with_which_the_module_does_not_run_fails_at_evaluate() -> None:
    class Reading(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert type(self[1].weight) is nn.Parameter, "stays as it is"
            return super().forward(x)

    left_out = quantlab.QuantoConfig("int8", modules_to_not_convert=["1"])
    module = Reading(nn.Linear(64, 64), nn.Linear(64, 32))
    rows = quantlab.evaluate(module, [INT8, left_out], batches(), num_bootstrap=10, floors=False)
    assert [(r.status, r.failed_stage) for r in rows[1:]] == [("FAILED", "evaluate"), ("FINISHED", "")]


@pytest.mark.parametrize(("taken", "status"), [("skip", "skipped"), ("bfloat16", "fallback")])
def test_evaluate_takes_what_the_error_of_a_layer_that_does_not_fit_advises(taken: str, status: str) -> None:
    odd, config = nn.Sequential(nn.Linear(60, 64), nn.Linear(64, 32)), quantlab.GGUFQuantizationConfig(gguf_type="q8_0")
    batch = [torch.randn(8, 60)]
    _, row = quantlab.evaluate(odd, [config], batch, on_mismatch=taken, num_bootstrap=10, floors=False)
    assert row.quantization is not None
    assert [layer.status for layer in row.quantization.layers] == [status, "quantized"]


# -- bad input


def with_nan() -> Any:
    net = Net()
    net.head.weight.data[3, 5] = float("nan")
    return net


INT8 = quantlab.QuantoConfig("int8")
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a bare Linear": (
        lambda: quantlab.quantize(nn.Linear(64, 8), INT8),
        quantlab.ConfigError,
        r"^module: a bare Linear .*torch\.nn\.Sequential\(linear\)$",
    ),
    "a bare Linear to evaluate": (
        lambda: quantlab.evaluate(nn.Linear(64, 8), [INT8], batches()),
        quantlab.ConfigError,
        r"^module: a bare Linear ",
    ),
    "a word for a config": (
        lambda: quantlab.quantize(Net(), "int8"),  # type: ignore[arg-type]
        quantlab.ConfigError,
        r"^config=str: one of quantlab's configs is wanted, e\.g\. QuantoConfig",
    ),
    "a dict for a config": (
        lambda: quantlab.evaluate(Net(), [{"quant_method": "quanto"}], batches()),  # type: ignore[list-item]
        quantlab.ConfigError,
        r"^config=dict: one of quantlab's configs",
    ),
    "no inputs": (
        lambda: quantlab.evaluate(Net(), [INT8], []),
        quantlab.ConfigError,
        r"^inputs: at least one batch is wanted",
    ),
    "a batch of no rows": (
        lambda: quantlab.evaluate(Net(), [INT8], [torch.empty(0, 64)]),
        quantlab.MetricUndefined,
        r"non-empty shape",
    ),
    "NaN weights": (
        lambda: quantlab.quantize(with_nan(), INT8),
        quantlab.ModelError,
        r"^module: 1 of 2048 values of head\.weight are NaN or infinite",
    ),
    "NaN weights to evaluate": (
        lambda: quantlab.evaluate(with_nan(), [INT8], batches()),
        quantlab.QuantlabError,
        r"NaN or inf.*weights",
    ),
    "NaN inputs": (
        lambda: quantlab.evaluate(Net(), [INT8], [torch.full((4, 64), float("nan"))]),
        quantlab.MetricUndefined,
        r"^inputs: the output of batch 0 holds NaN or infinity",
    ),
    "no Linear layers": (
        lambda: quantlab.quantize(nn.Sequential(nn.Conv1d(3, 3, 3)), INT8),
        quantlab.ConfigError,
        r"^module: it has no Linear layer",
    ),
    "all layers excluded": (
        lambda: quantlab.quantize(Net(), quantlab.QuantoConfig("int8", modules_to_not_convert=["body", "head"])),
        quantlab.ConfigError,
        r"^modules_to_not_convert: all 3 Linear layers of model are excluded",
    ),
    "no parameters": (
        lambda: quantlab.evaluate(nn.Sequential(nn.ReLU()), [INT8], batches()),
        quantlab.ConfigError,
        r"^module: it has no parameters",
    ),
    "a config instead of a list": (
        lambda: quantlab.evaluate(Net(), INT8, batches()),
        quantlab.ConfigError,
        r"^configs=QuantoConfig: a list",
    ),
    "a tensor instead of batches": (
        lambda: quantlab.evaluate(Net(), [INT8], batches()[0]),
        quantlab.ConfigError,
        r"^inputs=Tensor: a list",
    ),
    "a name instead of a module": (
        lambda: quantlab.quantize("model", INT8),
        quantlab.ConfigError,
        r"^module=str: a torch.nn.Module is wanted",
    ),
    "an already quantized module": (
        lambda: quantlab.quantize(quantlab.quantize(Net(), INT8)[0], INT8),
        quantlab.ConfigError,
        r"^module: .*pass the unquantized one",
    ),
    "an unknown fallback": (
        lambda: quantlab.quantize(Net(), INT8, on_mismatch="int5"),
        quantlab.ConfigError,
        r"^on_mismatch=int5: quanto offers error, skip, ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# -- whole requests


def test_compose_imports_no_torch_and_names_its_jobs() -> None:
    code = (
        "import sys, quantlab\n"
        "plan = quantlab.compose(['backend=quanto', 'dtype=int8,int4'])\n"
        "print([job.name for job in plan.jobs], plan.is_sweep, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "['quanto int8', 'quanto int4'] True False"


def test_compose_gives_the_typed_config() -> None:
    (job,) = quantlab.compose(["backend=torchao", "dtype=int4", "group_size=64", "evaluation.num_samples=30"]).jobs
    assert job.name == "torchao int4 g64"
    assert job.config.evaluation.num_samples == 30
    assert isinstance(job.schemes[""].native, quantlab.TorchAoConfig)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backend=quantoo"], r"^backend=quantoo: .*did you mean quanto\?"),
        (["backend=quanto", "dtype=nf4"], r"^dtype=nf4: quanto offers .*nf4 is offered by bitsandbytes"),
        (["evaluation.num_sample=3"], r"^evaluation\.num_sample: no such key; did you mean num_samples\?"),
        (["backend=gguf,quanto", "dtype=q8_0"], r"^1 of 2 combinations are impossible; no job was started"),
    ],
)
def test_compose_refuses(words: list[str], message: str) -> None:
    with pytest.raises(quantlab.ConfigError, match=message):
        quantlab.compose(words)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("digits_backends", "evaluation=quick device=cpu",
         "overrides='evaluation=quick device=cpu': several words are a list: ['evaluation=quick', 'device=cpu']"),
        ("digits_backends", {"evaluation": "quick"}, "a list of words is wanted, as ['evaluation=quick']"),
        ("digits_backends", 3, "overrides=3: a list of words is wanted, as ['evaluation=quick', 'device=cpu']"),
        (None, [("dtype", "int4")], "a list of words is wanted"),
        ("evaluation=quick", (), "recipe='evaluation=quick': is no name of a recipe; words go elsewhere: "
         "overrides=['evaluation=quick']"),
        (["evaluation=quick"], (), "is no name of a recipe; words go elsewhere: overrides=['evaluation=quick']"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_words_is_told_what_one_is(recipe: Any, overrides: Any, message: str) -> None:
    with pytest.raises(quantlab.ConfigError) as told:
        quantlab.run(recipe, overrides)
    assert message in str(told.value)


def test_one_word_may_stand_alone_and_a_recipe_may_be_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - override /backend: quanto\n")
    (job,) = quantlab.compose("dtype=int4").jobs
    assert job.config.quantization.dtype == "int4"
    (job,) = quantlab.compose("components.transformer={backend: quanto, dtype: int8}").jobs
    assert list(job.schemes) == ["transformer"]
    (job,) = quantlab.compose([], file).jobs
    assert job.name == "quanto int8"


def test_compose_refuses_an_unknown_recipe() -> None:
    with pytest.raises(quantlab.ConfigError, match=r"^recipe=nowhere: no such recipe; quantlab list recipes"):
        quantlab.compose(recipe="nowhere")


def test_run_returns_the_rows_and_tracks_them(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "outputs" / "cache")
    reports = quantlab.run(overrides=digits_words("backend=quanto", "dtype=int8"), quiet=True)
    assert [r.name for r in reports] == ["reference", "floor_bf16", "floor_batch", "quanto int8"]
    rows = {r.name: r for r in reports}
    assert rows["reference"].quality["latent_rel_mse"].value == 0.0
    assert 0 < rows["quanto int8"].quality["latent_rel_mse"].value < 1e-3
    assert rows["quanto int8"].run_id
    assert (tmp_path / "outputs" / "mlflow.db").is_file()


def test_run_raises_for_a_single_bad_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(quantlab.ConfigError, match=r"^dtype=nf4: quanto offers"):
        quantlab.run(overrides=["backend=quanto", "dtype=nf4"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_mismatch", ["skip", "bfloat16", "q8_0"])
def test_a_scheme_that_fits_nowhere_is_refused(on_mismatch):
    narrow = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    message = r"^dtype=q4_k: fits none of the 2 layers of model .* 0 \[64, 64\]: in_features 64 .*256"
    with pytest.raises(quantlab.NotQuantized, match=message) as caught:
        quantlab.quantize(narrow, quantlab.GGUFQuantizationConfig(gguf_type="q4_k"), on_mismatch=on_mismatch)
    assert ("dtype=q8_0 fits them" in str(caught.value)) == (on_mismatch == "q8_0")
    wide = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Linear(64, 32))
    config = quantlab.GGUFQuantizationConfig(gguf_type="q4_k")
    _, report = quantlab.quantize(wide, config, on_mismatch=on_mismatch)
    assert {r.status for r in report.layers} == {"quantized", "skipped" if on_mismatch == "skip" else "fallback"}


@pytest.mark.parametrize(
    "config", [quantlab.QuantoConfig("int8"), quantlab.NVIDIAModelOptConfig("INT8", channel_quantize=0)]
)
def test_a_layer_with_one_input_is_stored_exactly_and_that_is_no_fault(config):
    torch.manual_seed(0)
    thin = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.ReLU())
    _, report = quantlab.quantize(thin, config)
    assert [r.status for r in report.layers] == ["quantized"]
    assert report.layers[0].weight_rel_error < 1e-6
    rounded = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        rounded[0].weight.copy_(torch.randint(-127, 128, (64, 64)).float())
        rounded[0].weight[:, 0] = 127.0
    with pytest.raises(quantlab.NotQuantized, match="no weight changed at all"):
        quantlab.quantize(rounded, config)


def test_what_runs_is_imported_when_it_is_asked_for():
    script = (
        "import sys, quantlab\n"
        "early = 'quantlab.api' in sys.modules\n"
        "assert set(quantlab.__all__) <= set(dir(quantlab))\n"
        "assert all(hasattr(quantlab, name) for name in quantlab.__all__)\n"
        "print(early, quantlab.run is quantlab.api.run, hasattr(quantlab, 'no_such_name'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
