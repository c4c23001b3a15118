"""Where a candidate's layers come from changes no number."""

import pytest
import torch

import quantlab
from quantlab.errors import ConfigError, ModelError
from quantlab.planning.plan import plan
from quantlab.running import placement
from quantlab.running.forecast import forecast
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "sweep.floors=false"]


@pytest.fixture
def text_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    save_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    return [
        *("model=causal_lm", f"model.path={tmp_path / 'model'}", "dataset=text", "dataset.path=text.txt"),
        *("evaluation.context_length=32", "evaluation.batch_size=2", "evaluation.floor_batch_size=3", *SMALL),
    ]


def row_of(*words):
    return quantlab.run(overrides=list(words))[-1]


def numbers(report):
    return report.quality, report.memory, report.quantization.layers, report.disk_bytes


SCHEMES = [
    ("bitsandbytes", "nf4"),
    *(pytest.param(*s, marks=pytest.mark.slow) for s in [("torchao", "int8"), ("gguf", "q8_0")]),
]


@pytest.mark.parametrize(("backend", "dtype"), SCHEMES)
def test_a_language_models_row_is_the_same(text_model, backend, dtype):
    words = [*text_model, f"backend={backend}", f"dtype={dtype}"]
    resident = row_of(*words)
    streamed = row_of(*words, "memory.placement=streamed", "sweep.force=true")
    assert numbers(streamed) == numbers(resident)
    assert streamed.quantization.coverage > 0.5
    assert streamed.planned == streamed.memory


@pytest.mark.slow
def test_a_mixtures_row_is_the_same(text_model, tmp_path):
    """Its experts are one weight in the model and lie one by one in the files."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 11}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.3)).save_pretrained(tmp_path / "model")
    words = [*text_model, "backend=quanto", "dtype=int4", "quantization.layer_kinds=[linear,expert]"]
    places = ("resident", "streamed", "group_offload")
    rows = [row_of(*words, f"output_dir={p}", f"memory.placement={p}") for p in places]
    assert rows[0].quantization.coverage > 0.6
    assert numbers(rows[1]) == numbers(rows[0])
    assert numbers(rows[2]) == numbers(rows[0])


def test_what_a_model_keeps_of_its_calls_is_no_weight(text_model, tmp_path):
    """LeViT keeps its attention's biases as they are looked up: a copy of a model that ran has them, a streamed one not."""
    from transformers import LevitConfig, LevitModel

    from tests.models.test_auto import pictures, processor

    sizes = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    LevitModel(LevitConfig(image_size=32, **sizes)).save_pretrained(tmp_path / "levit")
    processor(tmp_path / "levit", "LevitModel")
    data = ["model=vision", "model.path=levit", "dataset=images", f"dataset.path={pictures(tmp_path / 'pictures')}"]
    words = [*text_model[4:], *data, "backend=quanto", "dtype=int8"]
    rows = [row_of(*words, f"output_dir={p}", f"memory.placement={p}") for p in ("resident", "streamed")]
    assert numbers(rows[1]) == numbers(rows[0])
    assert rows[0].planned == rows[0].memory


def test_what_a_model_reads_is_in_the_plan_of_its_run(text_model, tmp_path):
    """A weight that is read is not stored in int8, which has no product of its own then."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    FalconMambaForCausalLM(FalconMambaConfig(**sizes)).save_pretrained(tmp_path / "model")
    report = row_of(*text_model, "backend=bitsandbytes", "dtype=int8")
    assert report.planned == report.memory


@pytest.mark.slow
def test_a_pipelines_row_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = BUILDERS["flux"](tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    words = [
        *("model=diffusers", f"model.path={folder}", "dataset.path=prompts.txt", "backend=quanto", "dtype=int8"),
        *("model.components=[transformer,text_encoder_2]", "evaluation.num_inference_steps=2", "evaluation.height=32"),
        *("evaluation.width=32", "evaluation.num_teacher_forced=1", *SMALL),
    ]
    resident = row_of(*words)
    assert numbers(row_of(*words, "memory.placement=streamed", "sweep.force=true")) == numbers(resident)


def test_a_budget_that_holds_no_copy_streams(text_model, monkeypatch):
    asked = []
    true = placement.component_source
    monkeypatch.setattr(placement, "component_source", lambda *args: asked.append(args[0]) or true(*args))
    words = [*text_model, "backend=quanto", "dtype=int8", "sweep.force=true"]
    row_of(*words, "memory.device_gib=1")
    assert not asked
    phases = forecast(plan([*words, "memory.device_gib=1"]))[0].phases["streamed"]
    row_of(*words, f"memory.device_gib={max(row.device_bytes for row in phases) / 2**30!r}")
    assert asked == ["model"]


@pytest.mark.slow
def test_a_budget_below_the_largest_layer_is_refused(text_model):
    with pytest.raises(ConfigError, match=r"^memory.device_gib=.* alone takes .* GiB"):
        row_of(*text_model, "backend=quanto", "dtype=int8", "memory.device_gib=1e-6")


@pytest.mark.slow
def test_what_has_no_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=digits_dit", "model.num_train_steps=1", "model.train_batch_size=8", "evaluation=quick", *SMALL]
    words += ["evaluation.num_samples=10"]
    with pytest.raises((ConfigError, ModelError), match=r"^memory.placement=streamed: .*trained here"):
        row_of(*words, "backend=quanto", "dtype=int8", "memory.placement=streamed")
