"""llama.cpp itself, as the wheel ``xllamacpp`` has it: its tokens of a text, and its perplexity program's arithmetic.

``python -m tests.support.llama_cpp MODEL.gguf TEXT_FILE`` prints JSON: ``windows`` (token ids as the network gets them)
and ``ppl``. It is a process of its own since a library that is called over its C interface may end the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
from pathlib import Path

from quantlab.backends.gguf import kernels
from quantlab.backends.gguf.kernels import library

CONTEXT = 512


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


class Llama(kernels.Llama):
    """With the tokens that its program makes of a text."""

    def tokens(self, text: bytes) -> list[int]:
        """As ``llama-perplexity -f`` reads a file (common/arg.cpp, ``common_tokenize(ctx, params.prompt, true)``)."""
        prompt = text.removesuffix(b"\n")
        ids = (ctypes.c_int32 * (len(prompt) + 2))()
        add_special, parse_special = ctypes.c_bool(True), ctypes.c_bool(False)
        num = self.lib.llama_tokenize(self.vocab, prompt, len(prompt), ids, len(ids), add_special, parse_special)
        return list(ids[:num])


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


def of_llama_cpp(model_file: Path, text_file: Path) -> dict[str, object]:
    """:func:`perplexity` in a process of its own."""
    command = [sys.executable, "-m", "tests.support.llama_cpp", str(model_file), str(text_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(perplexity(sys.argv[1], Path(sys.argv[2]).read_bytes())))
