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


def quantized(values, kind):
    """Rows of float32 as bytes of the type ``kind``, by the function with which ``llama-quantize`` makes them."""
    import gguf
    import numpy as np

    quantize = ctypes.CDLL(library()).ggml_quantize_chunk
    quantize.restype, (num_rows, width), (block, size) = ctypes.c_size_t, values.shape, gguf.GGML_QUANT_SIZES[kind]
    values, made = np.ascontiguousarray(values), np.empty((num_rows, width // block * size), np.uint8)
    pointers, numbers = (
        [ctypes.c_void_p(a.ctypes.data) for a in (values, made)],
        map(ctypes.c_int64, (0, num_rows, width)),
    )
    assert quantize(ctypes.c_int(kind), *pointers, *numbers, None) == made.nbytes
    return made


def save_gguf(
    module, tokenizer, file: Path, *, add_bos: bool, kind: str = "F32", keep: tuple[str, ...] = (), quantize=None
) -> Path:
    """A Llama of transformers with a byte-level BPE tokenizer as a gguf file; ``kind`` is the type of its matrices, but
    for those with a word of ``keep`` in their names; ``quantize`` makes them, else the package gguf does."""
    import gguf

    quantize = quantize or gguf.quants.quantize

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
        if kind != "F32" and values.ndim == 2 and not any(word in name for word in keep):
            format_of_file = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(told, quantize(values, format_of_file), raw_dtype=format_of_file)
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


class Llama:
    """A gguf file as llama.cpp runs it, on one thread or as many as it likes."""

    def __init__(self, model_file: str, num_threads: int = 0) -> None:
        path = library()
        assert path is not None, "xllamacpp is not installed"
        self.lib = lib = ctypes.CDLL(path)
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
        assert list(settings.numbers[:4]) == [512, 2048, 512, 1], (
            "n_ctx, n_batch, n_ubatch, n_seq_max are not its first"
        )
        self.context = ctypes.c_void_p(lib.llama_init_from_model(model, settings))
        if num_threads:
            lib.llama_set_n_threads(self.context, num_threads, num_threads)
        self.vocab = ctypes.c_void_p(lib.llama_model_get_vocab(model))
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        self.batch = lib.llama_batch_init(CONTEXT, 0, 1)

    def tokens(self, text: bytes) -> list[int]:
        """As ``llama-perplexity -f`` reads a file (common/arg.cpp, ``common_tokenize(ctx, params.prompt, true)``)."""
        prompt = text.removesuffix(b"\n")
        ids = (ctypes.c_int32 * (len(prompt) + 2))()
        add_special, parse_special = ctypes.c_bool(True), ctypes.c_bool(False)
        num = self.lib.llama_tokenize(self.vocab, prompt, len(prompt), ids, len(ids), add_special, parse_special)
        return list(ids[:num])

    def logits(self, window: list[int], first: int = 0):
        """float32 array (tokens from ``first`` on, vocabulary): what stands at those positions of a window."""
        import numpy as np

        self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(self.context)), ctypes.c_bool(True))
        self.batch.n_tokens = len(window)
        for k, token in enumerate(window):
            self.batch.token[k], self.batch.pos[k], self.batch.n_seq_id[k] = token, k, 1
            self.batch.logits[k] = k >= first
            self.batch.seq_id[k][0] = 0
        assert self.lib.llama_decode(self.context, self.batch) == 0, "llama_decode failed"
        rows = (self.lib.llama_get_logits_ith(self.context, k) for k in range(first, len(window)))
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])


def perplexity(model_file: str, text: bytes) -> dict[str, object]:
    """What ``llama-perplexity -m model_file -f text`` computes (tools/perplexity/perplexity.cpp, ``perplexity``)."""
    import numpy as np

    llama = Llama(model_file)
    tokens = llama.tokens(text)
    windows, nll, count = [], 0.0, 0
    for start in range(0, len(tokens) // CONTEXT * CONTEXT, CONTEXT):
        window = tokens[start : start + CONTEXT]
        if llama.lib.llama_vocab_get_add_bos(llama.vocab):
            window[0] = llama.lib.llama_vocab_bos(llama.vocab)
        windows.append(window)
        logits = llama.logits(window, CONTEXT // 2)[:-1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        targets = tokens[start + CONTEXT // 2 + 1 : start + CONTEXT]
        nll += float((np.log(np.exp(logits).sum(1)) - logits[range(len(targets)), targets]).sum())
        count += len(targets)
    return {"windows": windows, "ppl": math.exp(nll / count), "num_scored": count}


if __name__ == "__main__":
    print(json.dumps(perplexity(sys.argv[1], Path(sys.argv[2]).read_bytes())))
