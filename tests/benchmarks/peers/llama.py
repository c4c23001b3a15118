"""llama.cpp on GGUF files of a Llama, what llama-perplexity does with --kl-divergence: ``llama.py files FOLDER PLACE SCHEME...``
converts a checkpoint and quantizes it, ``base PLACE IDS`` the base's log-probabilities, ``compare PLACE IDS SCHEME`` prints one JSON line."""

import json
import sys
from pathlib import Path

import numpy as np

from tests.support.llama_cpp import Llama, quantized, save_gguf


def file_of(place, scheme):
    return Path(place, f"{scheme.split()[-1]}.gguf")


def log_probabilities(llama, window):
    logits = llama.logits(window)[:-1]
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def files(folder, place, *schemes):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for scheme in ("f32", *schemes):
        kind, keep = scheme.split()[-1].upper(), ("embed_tokens", "lm_head")
        file = file_of(place, scheme)
        save_gguf(module, tokenizer, file, add_bos=False, kind=kind, keep=keep, quantize=quantized)
    print("{}")


def base(place, ids):
    llama, windows = Llama(str(file_of(place, "f32")), 1), json.loads(Path(ids).read_text())
    np.save(Path(place, "base.npy"), np.stack([log_probabilities(llama, window) for window in windows]))
    print("{}")


def compare(place, ids, scheme):
    llama, windows = Llama(str(file_of(place, scheme)), 1), json.loads(Path(ids).read_text())
    kld, nll = [], []
    for p, window in zip(np.load(Path(place, "base.npy"), mmap_mode="r"), windows, strict=True):
        q = log_probabilities(llama, window)
        kld.append((np.exp(p) * (p - q)).sum(1))
        nll.append(-q[range(len(q)), window[1:]])
    found = {"kld_mean": float(np.mean(kld)), "ppl": float(np.exp(np.mean(nll)))}
    print(json.dumps({scheme: found}))


if __name__ == "__main__":
    {"files": files, "base": base, "compare": compare}[sys.argv[1]](*sys.argv[2:])
