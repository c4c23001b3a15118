"""What stays unquantized is said before any number, wherever it is more than a tenth."""

import json

import pytest
import torch
from torch import nn

import quantlab
from quantlab.backends.scheme import scheme_of_config
from quantlab.errors import ConfigError
from quantlab.modules.holders import holders
from quantlab.progress import in_markdown
from quantlab.report.said_first import said_first
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from tests.support.tiny_text_models import TEXT, save_llama


def model(num_embeddings=4096, num_experts=0):
    torch.manual_seed(0)
    parts = {"embed": nn.Embedding(num_embeddings, 256), "mid": nn.Linear(256, 256), "head": nn.Linear(256, 256)}
    made = nn.ModuleDict(parts)
    if num_experts:
        made.bank = nn.Parameter(torch.randn(num_experts, 256, 256))
    return made.eval().requires_grad_(False)


def told(net, config, **more):
    return quantlab.quantize(net, config, **more)[1].unquantized


def test_share_holders_and_way_out_are_named():
    (sentence,) = told(model(num_experts=16), quantlab.QuantoConfig("int8"))
    assert sentence == (
        "model: 94 % of its weights stay unquantized; the largest are bank (expert, 47 %), embed (embedding, 47 %); "
        "layer_kinds=['linear', 'expert', 'embedding'] takes expert and embedding"
    )
    kinds = ["linear", "embedding", "expert"]
    assert told(model(num_experts=16), quantlab.QuantoConfig("int8"), layer_kinds=kinds) == ()


def test_a_tied_weight_is_named_once_with_all_its_places():
    net = model(num_embeddings=4096)
    net["head"] = nn.Linear(256, 4096, bias=False)
    net["head"].weight = net["embed"].weight
    config = quantlab.QuantoConfig("int8", modules_to_not_convert=["head"])
    _, report = quantlab.quantize(net, config)
    assert report.unquantized == (
        "model: 94 % of its weights stay unquantized; the largest are embed, which is also head (embedding, 94 %); "
        "layer_kinds=['linear', 'embedding'] without modules_to_not_convert=head takes embedding, as "
        "embed is tied to head",
    )
    assert {r.name: r.shares for r in report.layers} == {"embed": "", "mid": "", "head": "embed"}


class Tied(nn.Module):
    """A head that a model of its class leaves out by default, tied to the embedding (or after it, or not at all)."""

    def __init__(self, is_first=False, is_tied=True):
        super().__init__()
        torch.manual_seed(0)
        names = ["lm_head", "embed"] if is_first else ["embed", "lm_head"]
        parts = {"embed": nn.Embedding(4096, 256), "lm_head": nn.Linear(256, 4096, bias=False)}
        for name in names:
            self.add_module(name, parts[name])
        self.mid = nn.Linear(256, 256)
        if is_tied:
            self.lm_head.weight = self.embed.weight
        self.requires_grad_(False)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("is_first", [False, True])
def test_what_takes_a_tied_weight_does_take_it(is_first):
    config = quantlab.QuantoConfig("int8")
    (sentence,) = told(Tied(is_first), config)
    assert sentence.endswith(
        "; layer_kinds=['linear', 'embedding'] replace_default_exclusions=True takes embedding, "
        "as embed is tied to lm_head"
    )
    (sentence,) = told(Tied(is_first), config, layer_kinds=["linear", "embedding"])
    assert sentence.endswith(
        "; lm_head is left out (modules_to_not_convert: lm_head): replace_default_exclusions=True takes it"
    )
    (sentence,) = told(Tied(is_first), config, replace_default_exclusions=True)
    assert "; layer_kinds=['linear', 'embedding'] takes embedding" in sentence
    followed = {"layer_kinds": ["linear", "embedding"], "replace_default_exclusions": True}
    assert told(Tied(is_first), config, **followed) == ()
    both = quantlab.QuantoConfig("int8", modules_to_not_convert=["lm_head"])
    (sentence,) = told(Tied(is_first), both)
    assert "replace_default_exclusions=True without modules_to_not_convert=lm_head takes" in sentence


def test_a_head_of_its_own_that_is_left_out_by_default_names_what_takes_it():
    (sentence,) = told(Tied(is_tied=False), quantlab.QuantoConfig("int8"), layer_kinds=["linear", "embedding"])
    assert sentence.endswith(
        "; lm_head is left out (modules_to_not_convert: lm_head): replace_default_exclusions=True takes it"
    )


def test_little_is_not_worth_a_sentence():
    assert told(model(num_embeddings=50), quantlab.QuantoConfig("int8")) == ()


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (quantlab.BitsAndBytesConfig(load_in_8bit=True), "with dtype=nf4 (activation_dtype=int8 rounds"),
        (quantlab.TorchAoConfig("int8dq"), "with activation_dtype=none (activation_dtype=int8 rounds"),
    ],
)
def test_a_scheme_that_rounds_inputs_names_one_that_takes_them(config, way):
    (sentence,) = told(model(), config)
    assert f"layer_kinds=['linear', 'embedding'] takes embedding {way}" in sentence


def test_what_is_left_out_or_does_not_fit_is_told_with_its_reason():
    (sentence,) = told(model(50), quantlab.GGUFQuantizationConfig(gguf_type="q8_0", modules_to_not_convert=["mid"]))
    assert sentence.endswith("mid is left out (modules_to_not_convert: mid)")
    odd = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 32))
    (sentence,) = told(odd, quantlab.GGUFQuantizationConfig(gguf_type="q8_0"), on_mismatch="skip")
    assert "0 does not fit (in_features 33 does not divide by 32, the block of q8_0)" in sentence
    cell = nn.ModuleDict({"cell": nn.LSTM(256, 256), "head": nn.Linear(256, 256)})
    (sentence,) = told(cell, quantlab.QuantoConfig("int8"))
    assert sentence.endswith("layer_kinds=['linear', 'recurrent'] takes recurrent")


def test_schemes_that_leave_the_same_are_told_together():
    rows = [("a", ["x"]), ("b", ["x", "y"]), ("c", []), ("d", ["x"]), ("e", ["x"])]
    assert said_first(rows) == ["a, b, d and 1 more: x", "b: y"]
    assert said_first([(name, ["x"]) for name in "abcd"]) == ["all 4 schemes: x"]


def test_names_do_not_bury_what_is_said_of_them():
    long = [f"transformer: bitsandbytes nf4 + text_encoder_3: quanto {dtype}" for dtype in ("int8", "int4", "int2")]
    assert said_first([(name, ["x"]) for name in long]) == ["all 3 schemes: x"]
    assert said_first([(name, ["x"]) for name in long[:2]]) == ["both schemes: x"]
    assert said_first([(name, ["x"]) for name in long[:1]]) == [f"{long[0]}: x"]
    some = [(name, ["x"]) for name in long] + [("a", ())]
    assert said_first(some) == [f"{long[0]} and 2 more: x"]


def test_terminal_store_and_page_say_it_first(shell):
    folder = save_llama(shell.folder / "model", hidden_size=64, intermediate_size=64)
    (shell.folder / "text.txt").write_text(TEXT)
    words = ["model=causal_lm", f"model.path={folder}", "dataset=text", "dataset.path=text.txt", "device=cpu"]
    words += ["evaluation.num_samples=4", "evaluation.context_length=32", "evaluation.num_bootstrap=50"]
    words += ["sweep.floors=false", "backend=quanto", "dtype=int8,int4", "-m"]
    code, out, err = shell(*words)
    assert code == 0, err
    sentence = "model: 44 % of its weights stay unquantized; the largest are"
    assert out.startswith("quanto int8, quanto int4: model: ")
    assert err.count("stay unquantized") == 1
    runs = shell.tracked()
    stored = json.loads(runs["quanto int8"]["tags"]["quantlab.unquantized"])
    assert in_markdown(stored[0], 2000) in runs["quanto int8"]["tags"]["mlflow.note.content"]
    assert "quantization.layer_kinds=[linear,embedding] takes embedding" in stored[0]
    assert "lm_head): quantization.replace_default_exclusions=true takes it" in stored[0]
    assert stored[0].startswith("model: ")
    assert sentence.split(";")[0].partition("%")[2] in stored[0]
    _, again, _ = shell(*words)
    assert again.startswith("quanto int8, quanto int4: model: ")
    code, compared, err = shell("compare", "sweep=latest", "--html", "page.html")
    assert code == 0, err
    assert compared.lstrip().startswith("quanto int8, quanto int4: model: ")
    assert stored[0] in (shell.folder / "page.html").read_text()
    kinds = "quantization.layer_kinds=[linear,embedding]"
    (row,) = [r for r in shell.rows(*words[:-3], "backend=quanto", "dtype=int8", kinds).values()]
    assert row["name"] == "quanto int8 +embedding"
    assert row["metrics"]["quantization/coverage"] > 0.7


def test_a_component_with_a_scheme_of_its_own_is_told_its_own_keys():
    """``quantization.layer_kinds`` says nothing of it."""
    scheme = scheme_of_config(quantlab.QuantoConfig("int8"))
    request = {"component": "vae", "scheme": scheme, "compute_dtype": "float32", "device": "cpu"}
    asked = QuantizationRequest(**request, typed="components.vae")
    net = model(num_experts=16)
    (sentence,) = quantize_component(asked, net, model(num_experts=16))[1].unquantized
    assert sentence.endswith("; components.vae.layer_kinds=[linear,expert,embedding] takes expert and embedding")
    alone = nn.Sequential(nn.Conv2d(3, 3, 3))
    for typed, way in (
        ("components.vae", r"^components\.vae: it has no Linear layer.* components\.vae\.layer_kinds=\[conv\] takes"),
        ("", r"^model.components=vae: it has no Linear layer.* quantization\.layer_kinds=\[conv\] takes"),
    ):
        with pytest.raises(ConfigError, match=way):
            select_layers(QuantizationRequest(**request, typed=typed), alone)


def test_what_a_config_leaves_is_told_to_whoever_measures_a_module_of_their_own(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 320, 3))
    inputs = [torch.randn(2, 64) for _ in range(4)]
    found = quantlab.evaluate(net, [quantlab.QuantoConfig("int8")], inputs, quiet=True)
    (row,) = [one for one in found if one.quantization]
    (sentence,) = row.unquantized
    assert sentence.endswith("layer_kinds=['linear', 'conv'] takes conv")
    assert f"quanto int8: {sentence}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_weight_that_is_computed_has_a_row_and_is_named(kind):
    """Weight norm, as EnCodec's convolutions and the positions of Wav2Vec2 have it: no vectors, and of no kind that
    another key would take."""
    normed = nn.Conv1d(16, 16, 3) if kind == "conv" else nn.Linear(48, 16)
    net = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(normed))
    _, report = quantlab.quantize(net, quantlab.QuantoConfig(weights_dtype="int8"))
    rows = {row.name: row for row in report.layers}
    assert (rows["1"].kind, rows["1"].num_weights) == (kind, 768)
    assert rows["1"].reason.startswith("computed from other parameters at each call")
    (told,) = report.unquantized
    assert f"the largest are 1 ({kind}, " in told
    assert "remove the parametrization" in told
    assert "layer_kinds" not in told


def test_looking_at_a_weight_that_is_computed_changes_nothing_in_it():
    """Spectral norm goes on with its power iteration whenever its weight is read while it trains."""
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv1d(16, 16, 3)).train()
    net = nn.Sequential(nn.Linear(16, 16), normed)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    holders(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(part.training for part in net.modules())
