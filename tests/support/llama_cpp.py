"""llama.cpp itself, as the wheel ``xllamacpp`` has it: its tokens of a text, and its perplexity program's arithmetic.

``python -m tests.support.llama_cpp MODEL.gguf TEXT_FILE`` prints JSON: ``windows`` (token ids as the network gets them)
and ``ppl``. It is a process of its own since a library that is called over its C interface may end the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import sys
from pathlib import Path

CONTEXT = 512


def library() -> str | None:
    """The shared object in the wheel, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        return None
    return str(next(Path(found.origin).parent.glob("xllamacpp*.so")))


def save_gguf(module, tokenizer, file: Path, *, add_bos: bool, kind: str = "F32") -> Path:
    """A Llama of transformers with a byte-level BPE tokenizer as a gguf file; ``kind`` is the type of its matrices."""
    import gguf

    config, state = module.config, {k: v.detach().float().numpy() for k, v in module.state_dict().items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(core["vocab"], key=core["vocab"].__getitem__)
    control = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in control else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(add_bos)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, values in state.items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp's rotary embedding turns neighbours, transformers' turns halves
                rows = values.shape[0] // heads // 2
                values = values.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(values.shape)
        told = names.get_name(name, (".weight",))
        if kind != "F32" and values.ndim == 2:
            format_of_file = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(told, gguf.quants.quantize(values, format_of_file), raw_dtype=format_of_file)
        else:
            writer.add_tensor(told, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


class _Settings(ctypes.Structure):
    """A struct of settings that is only passed on: larger than any version of it."""

    _fields_ = (("numbers", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def perplexity(model_file: str, text: bytes) -> dict[str, object]:
    """What ``llama-perplexity -m model_file -f text`` computes (tools/perplexity/perplexity.cpp, ``perplexity``)."""
    import numpy as np

    path = library()
    assert path is not None, "xllamacpp is not installed"
    lib = ctypes.CDLL(path)
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory")
    for name in pointers:
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Settings
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_batch_init.restype = _Batch
    lib.llama_vocab_get_add_bos.restype = ctypes.c_bool
    lib.llama_backend_init()
    model = ctypes.c_void_p(lib.llama_model_load_from_file(model_file.encode(), lib.llama_model_default_params()))
    settings = lib.llama_context_default_params()
    assert list(settings.numbers[:4]) == [512, 2048, 512, 1], "n_ctx, n_batch, n_ubatch, n_seq_max are not its first"
    context = ctypes.c_void_p(lib.llama_init_from_model(model, settings))
    vocab = ctypes.c_void_p(lib.llama_model_get_vocab(model))
    prompt = text.removesuffix(b"\n")  # common/arg.cpp, --file
    ids = (ctypes.c_int32 * (len(prompt) + 2))()
    add_special, parse_special = ctypes.c_bool(True), ctypes.c_bool(False)  # common_tokenize(ctx, params.prompt, true)
    num = lib.llama_tokenize(vocab, prompt, len(prompt), ids, len(ids), add_special, parse_special)
    tokens, vocab_size = list(ids[:num]), lib.llama_vocab_n_tokens(vocab)
    batch = lib.llama_batch_init(CONTEXT, 0, 1)
    windows, nll, count = [], 0.0, 0
    for start in range(0, num // CONTEXT * CONTEXT, CONTEXT):
        window = tokens[start : start + CONTEXT]
        if lib.llama_vocab_get_add_bos(vocab):
            window[0] = lib.llama_vocab_bos(vocab)
        windows.append(window)
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(context)), ctypes.c_bool(True))
        batch.n_tokens = CONTEXT
        for k, token in enumerate(window):
            batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.logits[k] = token, k, 1, k >= CONTEXT // 2
            batch.seq_id[k][0] = 0
        assert lib.llama_decode(context, batch) == 0, "llama_decode failed"
        for k in range(CONTEXT // 2, CONTEXT - 1):
            row = lib.llama_get_logits_ith(context, k)
            logits = np.ctypeslib.as_array(row, (vocab_size,)).astype(np.float64)
            logits -= logits.max()
            nll += float(np.log(np.exp(logits).sum()) - logits[tokens[start + k + 1]])
            count += 1
    return {"windows": windows, "ppl": math.exp(nll / count), "num_scored": count}


if __name__ == "__main__":
    print(json.dumps(perplexity(sys.argv[1], Path(sys.argv[2]).read_bytes())))
