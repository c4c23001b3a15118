"""What a user would write instead, for a language model: transformers loads and quantizes it, perplexity and KL divergence
over windows of a text. ``language.py FOLDER TEXT LENGTH [--as-stored] SCHEME...`` prints one JSON line.

On CPUs with bfloat16 arithmetic bitsandbytes repacks a 4-bit weight at its first call, lossily: ``--as-stored`` has the
products of the codes that are stored instead, which is what quantlab measures.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from schemes import load
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def log_probabilities(model, window):
    return model(window[None]).logits[0, :-1].float().log_softmax(-1)


def as_stored(model):
    """The model, without bitsandbytes' lossy packing."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def main(folder, text, length, *schemes):
    exact = "--as-stored" in schemes
    schemes = [scheme for scheme in schemes if scheme != "--as-stored"]
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = torch.tensor(ids)[: len(ids) // int(length) * int(length)].view(-1, int(length))
    model = load(AutoModelForCausalLM, transformers, folder, "none")
    reference = [log_probabilities(model, window) for window in windows]
    del model
    found = {}
    for scheme in schemes:
        model, kld, nll = load(AutoModelForCausalLM, transformers, folder, scheme), [], []
        model = as_stored(model) if exact else model
        for p, window in zip(reference, windows, strict=True):
            q = log_probabilities(model, window)
            kld.append((p.exp() * (p - q)).sum(-1))
            nll.append(-q.gather(1, window[1:, None])[:, 0])
        found[scheme] = {"kld_mean": float(torch.cat(kld).mean()), "ppl": float(torch.cat(nll).mean().exp())}
        del model
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
