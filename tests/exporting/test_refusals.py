"""What no loader of the ecosystem would read as it was measured is refused by name, before anything is written."""

from __future__ import annotations

import json

import pytest
import torch

from quantlab.errors import ConfigError, NotQuantized
from quantlab.exporting import check, verify
from quantlab.exporting.whole import check_exportable
from tests.support.exports import candidate_of, checker, exported, job_on, loaded


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return loaded("llama", folder, folder / "cache"), folder


@pytest.fixture(scope="module")
def one():
    with checker() as found:
        yield found


REFUSED = [
    (["backend=quanto", "dtype=int8"], "backend=quanto: transformers"),
    (["backend=modelopt", "dtype=int8", "compute_dtype=bfloat16"], "compute_dtype=bfloat16: "),
    (["backend=modelopt", "dtype=int8", "quantization.layer_kinds=[linear,embedding]"], "quantization.layer_kinds: "),
    (["backend=modelopt", "dtype=int4", "algorithm=svdquant", "quantization.algorithm_settings={lowrank: 4}"],
     "algorithm=svdquant: packed layers"),
    (["backend=torchao", "dtype=int8", "quantization.layer_kinds=[linear,embedding]"], "quantization.layer_kinds: "),
    (["backend=torchao", "dtype=int8", "compute_dtype=bfloat16"], "compute_dtype=bfloat16: "),
    (["backend=bitsandbytes", "dtype=int8", "compute_dtype=bfloat16"], "compute_dtype=bfloat16: "),
    (["backend=none", "dtype=bfloat16"], "export.path: none bfloat16 is not quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_it_is_refused_by_the_key_that_was_typed(llama, tmp_path, words, said):
    found, folder = llama
    words = [w if "compute_dtype" not in w else f"quantization.{w}" for w in words]
    job = job_on(found, *words)
    made = candidate_of(found, job, folder / "cache")
    with pytest.raises(ConfigError) as refused:
        check_exportable(str(tmp_path / "x"), job, found.model, made.model, made.quantization)
    assert str(refused.value).startswith(said)
    assert not (tmp_path / "x").exists()


def test_layers_that_a_user_leaves_out_are_left_out_by_the_loader_too(llama, tmp_path, one, monkeypatch):
    found, folder = llama
    monkeypatch.setattr(verify, "_fresh_process", one)
    mine = "quantization.modules_to_not_convert.mine=['model.layers.0.mlp.*','*.q_proj']"
    done, _, _ = exported(found, tmp_path / "x", folder / "cache", "backend=bitsandbytes", "dtype=int8", mine)
    assert done.verified.outputs_identical, done.verified.reason
    said = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["llm_int8_skip_modules"]


def test_shards_are_the_librarys_own(llama, tmp_path, one, monkeypatch):
    found, folder = llama
    monkeypatch.setattr(verify, "_fresh_process", one)
    monkeypatch.setattr("quantlab.exporting.checkpoint.MAX_SHARD", "50KB")
    monkeypatch.setattr("quantlab.exporting.checkpoint.save.__defaults__", ("50KB", ""))
    monkeypatch.setattr("quantlab.exporting.checkpoint.write_part.__defaults__", ("50KB",))
    done, _, _ = exported(found, tmp_path / "x", folder / "cache", "backend=torchao", "dtype=int8")
    assert done.verified.outputs_identical, done.verified.reason
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize("fault", ["bits", "crash", "outputs"])
def test_a_loader_that_gives_back_something_else_is_found(llama, tmp_path, monkeypatch, fault):
    """Planted faults in what the other process finds: no folder for other bits, a reason for other outputs."""
    found, folder = llama

    def compare(request, scratch):
        answers = []
        check.compare(request, answers.append)
        answer = json.loads(json.dumps(answers[0 if fault == "crash" else 1]))
        part = answer["parts"]["model"]
        if fault == "bits":
            part["other"] = ["model.layers.0.mlp.up_proj.weight.qdata"]
        if fault == "outputs":
            part["errors"] = [0.25]
        return answer, "the process was ended by SIGSEGV" if fault == "crash" else ""

    monkeypatch.setattr(verify, "_fresh_process", compare)
    words = ("backend=torchao", "dtype=int8")
    if fault == "bits":
        with pytest.raises(
            NotQuantized, match=r"gives back other bits .* model\.layers\.0\.mlp\.up_proj\.weight\.qdata"
        ):
            exported(found, tmp_path / "x", folder / "cache", *words)
        assert list(tmp_path.iterdir()) == []
        return
    done, _, _ = exported(found, tmp_path / "x", folder / "cache", *words)
    assert not done.verified.outputs_identical
    assert done.metrics["export/outputs_identical"] == 0
    assert ("SIGSEGV" if fault == "crash" else "0.25 of their norm off") in done.tags["export/outputs_identical"]
    assert ("export/output_rel_error" in done.metrics) == (fault == "outputs")


def test_digests_tell_bits_apart_and_nothing_else():
    a = torch.tensor([1.0, 2.0])
    assert check.digest(a) == check.digest(a.clone().requires_grad_(False))
    assert check.digest(a) != check.digest(a.to(torch.float64))
    assert check.digest(a) != check.digest(a.reshape(1, 2))
    assert check.digest(torch.tensor([0.0])) != check.digest(torch.tensor([-0.0]))
    assert check.difference(torch.tensor([float("nan")]), a[:1]) == float("inf")
    assert check.difference(a, a[:1]) == float("inf")


@pytest.mark.slow
def test_an_encoder_is_exported_too(tmp_path, one, monkeypatch):
    monkeypatch.setattr(verify, "_fresh_process", one)
    found = loaded("bert", tmp_path, tmp_path / "cache")
    done, _, _ = exported(found, tmp_path / "x", tmp_path / "cache", "backend=torchao", "dtype=int8")
    assert done.verified.loads_with == "transformers BertModel.from_pretrained"
    assert done.verified.outputs_identical, done.verified.reason


@pytest.mark.parametrize("backend", ["modelopt", "torchao"])
def test_a_weight_that_is_read_stands_in_no_checkpoint(llama, tmp_path, backend):
    """What quantlab packed and dequantizes when it is read: Llama 4's routers, the experts of Switch Transformers."""
    found, folder = llama
    job = job_on(found, f"backend={backend}", "dtype=int8")
    made = candidate_of(found, job, folder / "cache", reads=("model.layers.0.mlp.up_proj",))
    with pytest.raises(ConfigError, match=r"^export.path: model.layers.0.mlp.up_proj of model: the model reads"):
        check_exportable(str(tmp_path / "x"), job, found.model, made.model, made.quantization)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("olmo2", "export.path: llama.cpp's names are known here for"), ("llama", "export.path: query_pre_attn_scalar=7")],
)
def test_what_no_gguf_file_holds_is_refused_before_the_model_is_measured(llama, tmp_path, monkeypatch, kind, said):
    """Not by the writer, which comes after the evaluation."""
    found, folder = llama
    job = job_on(found, "backend=gguf", "dtype=q8_0")
    made = candidate_of(found, job, folder / "cache")
    check_exportable(str(tmp_path / "x"), job, found.model, made.model, made.quantization)
    config = found.model.components["model"].config
    monkeypatch.setattr(config, "model_type", kind, raising=False)
    monkeypatch.setattr(config, "query_pre_attn_scalar", 7, raising=False)
    with pytest.raises(ConfigError) as refused:
        check_exportable(str(tmp_path / "x"), job, found.model, made.model, made.quantization)
    assert str(refused.value).startswith(said)


def test_quantized_layers_that_several_places_share_are_in_no_checkpoint_of_transformers(llama, tmp_path, monkeypatch):
    """The shared blocks of Zamba: its loader ties plain tensors alone."""
    found, folder = llama
    tied = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    monkeypatch.setattr(found.model.components["model"], "all_tied_weights_keys", tied, raising=False)
    job = job_on(found, "backend=torchao", "dtype=int8")
    made = candidate_of(found, job, folder / "cache")
    with pytest.raises(ConfigError, match=r"^export.path: model.layers.0.mlp.up_proj, .*several places share"):
        check_exportable(str(tmp_path / "x"), job, found.model, made.model, made.quantization)


def test_what_a_library_raises_while_it_writes_its_state_is_one_message(llama, tmp_path, monkeypatch):
    def fails(*_):
        raise AssertionError("Actual method must have closure for freevars")  # of ModelOpt over BigBird

    found, folder = llama
    monkeypatch.setattr("quantlab.backends.modelopt.checkpointing._state", fails)
    with pytest.raises(ConfigError, match=r"^export.path: modelopt model: the library cannot write it .*closure"):
        exported(found, tmp_path / "x", folder / "cache", "backend=modelopt", "dtype=int8")
    assert list(tmp_path.iterdir()) == []
