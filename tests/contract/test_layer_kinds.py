"""Every kind of layer: what a backend stores of it, what reads it, and what is said of what stays."""

import copy

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules.packed import stored_at
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.capabilities import LAYER_KINDS
from tests.support.configs import METHODS, config_of
from tests.support.tables import CAPABILITIES, component_memory, native_config

ON_CPU = [
    (backend, dtype, row)
    for backend, rows in CAPABILITIES.items()
    if backend != "none"
    for dtype, row in rows.items()
    if "cpu" in row.devices
]
IDS = [f"{b}-{d}" for b, d, _ in ON_CPU]


class Experts(nn.Module):
    """As transformers writes them: one parameter for all, of which each token's experts are read."""

    def __init__(self, num=4, size=256):
        super().__init__()
        self.up = nn.Parameter(torch.randn(num, size, size) / size**0.5)
        self.down = nn.Parameter(torch.randn(num, size, size) / size**0.5)

    def forward(self, x, which):
        hidden = torch.relu(nn.functional.linear(x, self.up[which]))
        return nn.functional.linear(hidden, self.down[which])


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 256)
        self.conv = nn.Conv2d(256, 256, 1)
        self.linear = nn.Linear(256, 256)
        self.experts = Experts()
        self.cell = nn.GRU(256, 256, batch_first=True)
        self.table = nn.Parameter(torch.randn(1, 64, 256))
        self.norm = nn.LayerNorm(256)
        self.eval().requires_grad_(False)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        x = x + self.conv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        x = x + self.experts(self.norm(self.linear(x)), int(ids[0, 0]) % 4) + self.table[0, :8]
        return self.cell(x)[0]


IDS_IN = torch.arange(24).reshape(3, 8)
HOLDERS = {
    "embedding": ("embedding", 256 * 256),
    "conv": ("conv", 256 * 256),
    "linear": ("linear", 256 * 256),
    "experts.up": ("expert", 4 * 256 * 256),
    "experts.down": ("expert", 4 * 256 * 256),
    "cell.weight_ih_l0": ("recurrent", 3 * 256 * 256),
    "cell.weight_hh_l0": ("recurrent", 3 * 256 * 256),
    "table": ("parameter", 64 * 256),
}


def error(found, expected):
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def compute(row):
    return getattr(torch, row.compute_dtypes[0])


@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=IDS)
def test_the_table_tells_which_kinds_are_stored(backend, dtype, row):
    model = Kinds().to(compute(row))
    config = native_config(QuantizationAxes(backend=backend, dtype=dtype))
    made, report = quantlab.quantize(model, config, layer_kinds=list(row.layer_kinds))
    rows = {r.name: r for r in report.layers}
    assert {n: r.kind for n, r in rows.items()} == {n: kind for n, (kind, _) in HOLDERS.items()}
    taken = {n for n, r in rows.items() if r.status == "quantized"}
    assert taken == {n for n, (kind, _) in HOLDERS.items() if kind in row.layer_kinds}
    assert {r.status for n, r in rows.items() if n not in taken} <= {"left"}
    assert all(r.reason for n, r in rows.items() if n not in taken)
    assert {rows[n].dtype for n in taken} == {dtype}
    total = sum(p.numel() for p in model.parameters())
    assert report.coverage == pytest.approx(sum(HOLDERS[n][1] for n in taken) / total)
    ledger = component_memory(made, [stored_at(made, n) for n in taken], model)
    bits = sum(8 * (r.weight_bytes + r.scale_bytes) for r in rows.values() if r.bits_per_weight) / sum(
        HOLDERS[n][1] for n in taken
    )
    assert ledger.quantized_bytes + ledger.scale_bytes == sum(r.weight_bytes + r.scale_bytes for r in rows.values())
    assert bits < 8 * model.table.element_size()
    if len(taken) > 1:
        assert ledger.weights_bytes < 0.6 * sum(p.numel() * p.element_size() for p in model.parameters())
    found = made(IDS_IN).float()
    worst = max(r.weight_rel_error for r in rows.values() if r.weight_rel_error)
    assert 0 < error(found, model(IDS_IN).float()) < 6 * worst + 0.01
    again = copy.deepcopy(made)(IDS_IN).float() if backend in ("bitsandbytes", "gguf") else found
    assert torch.equal(again, found)


@pytest.mark.parametrize(("backend", "dtype", "row"), [r for r in ON_CPU if "conv" not in r[2].layer_kinds])
def test_what_rounds_the_inputs_takes_linear_layers_only(backend, dtype, row):
    config = native_config(QuantizationAxes(backend=backend, dtype=dtype))
    with pytest.raises(ConfigError, match=r"^layer_kinds=conv: .* rounds inputs to .*layer_kinds=\[linear\]$"):
        quantlab.quantize(Kinds().to(compute(row)), config, layer_kinds=["linear", "conv"])


@pytest.mark.parametrize("method", METHODS)
def test_by_default_only_linear_layers_are_taken_and_the_others_have_rows(method):
    model = Kinds()
    made, report = quantlab.quantize(model, config_of(method))
    rows = {r.name: r for r in report.layers}
    assert set(rows) == set(HOLDERS)
    assert [n for n, r in rows.items() if r.status == "quantized"] == ["linear"]
    assert rows["experts.up"].reason == "layer_kinds: expert is not among them"
    assert rows["cell.weight_hh_l0"].reason == "layer_kinds: recurrent is not among them"
    assert torch.equal(made.experts.up, model.experts.up)


@pytest.mark.parametrize("kinds", [["convolution"], ["linear", "norm"], []])
def test_a_kind_that_does_not_exist_is_refused(kinds):
    with pytest.raises(ConfigError, match=r"^layer_kinds.*linear, conv, embedding, expert, recurrent"):
        quantlab.quantize(Kinds(), quantlab.QuantoConfig("int8"), layer_kinds=kinds)


def test_the_kinds_of_the_table_are_those_of_the_key():
    every = {kind for rows in CAPABILITIES.values() for row in rows.values() for kind in row.layer_kinds}
    assert every == set(LAYER_KINDS)


@pytest.mark.parametrize("method", METHODS)
def test_exclusions_are_of_paths_whatever_the_kind(method):
    names = ["experts.up", "re:.*emb[a-z]+", "c*v"]
    _, report = (
        quantlab.quantize(
            Kinds(),
            config_of(method, names, exclusion_rule="quantlab"),
            layer_kinds=list(LAYER_KINDS),
            on_mismatch="skip",
        )
        if config_of(method).axes().activation_dtype == "none"
        else (None, None)
    )
    if report is not None:
        taken = {"linear", "experts.down", "cell.weight_ih_l0", "cell.weight_hh_l0", "table"}
        assert {r.name for r in report.layers if r.status == "quantized"} == taken
        assert {r.name for r in report.layers if r.status == "excluded"} == {"experts.up", "embedding", "conv"}


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_embedding_and_head_are_stored_once_where_both_are_taken(method):
    config = config_of(method)
    if config.axes().activation_dtype != "none":
        pytest.skip("it rounds inputs")
    model = nn.ModuleDict({"embed": nn.Embedding(256, 256), "mid": nn.Linear(256, 256), "head": nn.Linear(256, 256)})
    model["head"].weight = model["embed"].weight
    model = nn.Sequential(model["embed"], model["mid"], model["head"]).eval().requires_grad_(False)
    made, report = quantlab.quantize(model, config, layer_kinds=["linear", "embedding"])
    rows = {r.name: r for r in report.layers}
    assert {r.status for r in rows.values()} == {"quantized"}
    assert rows["2"].shares == "0"
    assert report.coverage > 0.99
    assert torch.equal(made[2].weight, made[0].weight)
    two = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    separate, _ = quantlab.quantize(two, config)
    ledger = component_memory(made, [stored_at(made, n) for n in rows], model)
    assert ledger.quantized_bytes == component_memory(separate, ["0", "1"], two).quantized_bytes
    assert error(made(IDS_IN), model(IDS_IN)) < 0.3


RECURRENT = {
    "lstm": lambda: nn.LSTM(64, 32, num_layers=2, bidirectional=True, proj_size=16),
    "gru": lambda: nn.GRU(64, 64, bias=False),
    "rnn": lambda: nn.RNN(64, 64, batch_first=True),
    "cell": lambda: nn.LSTMCell(64, 32),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_part_multiplies_by_what_its_packed_codes_say(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": RECURRENT[name]()}).eval().requires_grad_(False)
    config, kinds = quantlab.QuantoConfig("int8"), ["recurrent"]
    made, report = quantlab.quantize(model, config, layer_kinds=kinds)
    assert {(r.kind, r.status) for r in report.layers} == {("recurrent", "quantized")}
    dense = copy.deepcopy(model)
    for row in report.layers:
        part, _, leaf = row.name.rpartition(".")
        dense.get_submodule(part).register_parameter(
            leaf, nn.Parameter(made.get_submodule(part).__getattribute__(leaf))
        )
    x = torch.randn(5, 3, 64) if name != "cell" else torch.randn(5, 64)
    found, expected = made["net"](x)[0], dense["net"](x)[0]
    assert torch.equal(found, expected)
    assert 0 < error(found, model["net"](x)[0]) < 0.05
    held = [
        v for v in vars(made["net"]).values() if isinstance(v, list) and any(isinstance(w, torch.Tensor) for w in v)
    ]
    assert held == []  # no list keeps what was packed
    assert torch.equal(made.to(torch.float32)["net"](x)[0], expected)


def test_types_of_tensors_are_said_of_holders_that_are_packed(tmp_path):
    model = Kinds()
    types = {"embedding": "q8_0", "*.down": "q5_0", "re:cell.*": "q6_k", "table": "q4_1"}
    config = quantlab.GGUFQuantizationConfig(gguf_type="q4_0", tensor_types=types)
    made, report = quantlab.quantize(model, config, layer_kinds=list(LAYER_KINDS))
    assert {r.name: r.dtype for r in report.layers} == {
        "embedding": "q8_0",
        "conv": "q4_0",
        "linear": "q4_0",
        "experts.up": "q4_0",
        "experts.down": "q5_0",
        "cell.weight_ih_l0": "q6_k",
        "cell.weight_hh_l0": "q6_k",
        "table": "q4_1",
    }
    assert error(made(IDS_IN), model(IDS_IN)) < 0.3
    bad = quantlab.GGUFQuantizationConfig(tensor_types={"tabel": "q8_0"})
    with pytest.raises(ConfigError, match="^tensor_types=tabel: matches none"):
        quantlab.quantize(Kinds(), bad, layer_kinds=list(LAYER_KINDS))
