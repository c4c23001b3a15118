"""Tiny random text models and a byte tokenizer, made offline and saved as transformers folders."""

from pathlib import Path

import torch

from quantlab.models import causal_lm, encoder
from quantlab.vocabulary.schema import ModelConfig

SPECIAL = ("<pad>", "<s>", "</s>")
TEXT = "".join(f"Sentence {i}: the quick brown fox number {i * i} jumps over {i % 7} lazy dogs.\n" for i in range(120))
OTHER = "".join(f"Line {i}: {i % 11} slow red hens sit below box {i * 3} and wait.\n" for i in range(150))
"""Of which no line is in the other."""


def byte_tokenizer(adds_bos=False, max_length=4096):
    """One token a byte (ids after the special tokens); BOS begins a text only where ``adds_bos``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )


def save_llama(folder: Path, adds_bos=False, seed=0, **sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 259, **sizes}
    config = LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(adds_bos).save_pretrained(folder)
    return folder


def save_llama_and_texts(folder: Path) -> None:
    """``model`` of layers that each backend takes, ``text.txt`` to evaluate and ``other.txt`` to calibrate on."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text("".join(reversed(TEXT)))
    save_llama(folder / "model", hidden_size=64, intermediate_size=128)


def save_bert(folder: Path, seed=0, **sizes):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, **sizes}
    config = BertConfig(
        vocab_size=259,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        **sizes,
    )
    BertModel(config).save_pretrained(folder)
    byte_tokenizer(max_length=128).save_pretrained(folder)
    return folder


def load_llama(folder: Path, cache: Path, **settings):
    return causal_lm.load(ModelConfig(family="causal_lm", path=str(folder), **settings), "cpu", cache)


def load_bert(folder: Path, cache: Path, **settings):
    return encoder.load(ModelConfig(family="encoder", path=str(folder), **settings), "cpu", cache)


def with_noise(model, size, seed=0):
    """The model with relative Gaussian noise on all its matrices."""
    module = model.copy_of("model")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * size)
    return model.with_components({"model": module})
