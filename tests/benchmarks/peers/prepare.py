"""What both sides start from: ``prepare.py WINDOWS LENGTH IMAGES TRAIN_STEPS language|images...`` in the place of a sweep.

Models in quantlab's cache and as plain folders, a text of exactly so many windows, seeds, and a store. Prints paths as JSON.
"""

import json
import sys
from pathlib import Path

CACHE = Path("outputs", "cache").absolute()


def language(windows, length):
    from transformers import AutoTokenizer

    from quantlab.datasets.wiki_extracts import documents, evaluation_half
    from quantlab.models import smollm2
    from quantlab.vocabulary.schema import ModelConfig

    smollm2.load(ModelConfig(family="smollm2"), "cpu", CACHE)
    folder = next(p for p in CACHE.glob("models/smollm2_135m-*") if p.is_dir())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = "\n\n".join(evaluation_half(documents())[:200])
    text = tokenizer.decode(tokenizer(whole, verbose=False)["input_ids"][: windows * length + length // 2])
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert len(ids) // length == windows, len(ids)
    Path("text.txt").write_text(text, encoding="utf-8")
    Path("texts.jsonl").write_text(json.dumps({"text": tokenizer.decode(ids[: windows * length])}), encoding="utf-8")
    Path("ids.json").write_text(json.dumps([ids[i * length : (i + 1) * length] for i in range(windows)]))
    paths = {"text": "text.txt", "texts": "texts.jsonl", "ids": "ids.json"}
    return {"smollm2": str(folder), **{name: str(Path(path).absolute()) for name, path in paths.items()}}


def images(num, train_steps):
    from quantlab.datasets.digits_classes import NUM_CLASSES, _seed
    from quantlab.models import digits_dit
    from quantlab.vocabulary.schema import DatasetConfig, DigitsModelConfig

    model = digits_dit.load(DigitsModelConfig(num_train_steps=train_steps), "cpu", CACHE)
    model.components["transformer"].save_pretrained("digits")
    data, labels = DatasetConfig(name="digits_classes"), [i % NUM_CLASSES for i in range(num)]
    seeds = [_seed(data, label, i // NUM_CLASSES) for i, label in enumerate(labels)]
    Path("seeds.json").write_text(json.dumps({"seeds": seeds, "labels": labels}), encoding="utf-8")
    return {"digits": str(Path("digits").absolute()), "seeds": str(Path("seeds.json").absolute())}


def main(windows, length, num_images, train_steps, *kinds):
    from quantlab.tracking import open_store
    from quantlab.vocabulary.schema import TrackingConfig

    open_store(TrackingConfig(), Path.cwd())
    made = {}
    if "language" in kinds:
        made |= language(int(windows), int(length))
    if "images" in kinds:
        made |= images(int(num_images), int(train_steps))
    print(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
