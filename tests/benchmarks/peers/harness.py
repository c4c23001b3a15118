"""The same model and scheme by lm-evaluation-harness, on a task of the text: ``harness.py FOLDER TASKS LENGTH SCHEME``.

The harness is given a model that transformers quantized; its rolling windows predict the first token of each too.
"""

import json
import sys

import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from schemes import load
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder, tasks, length, scheme):
    model = HFLM(
        pretrained=load(AutoModelForCausalLM, transformers, folder, scheme),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=int(length),
        batch_size=4,
        device="cpu",
    )
    found = simple_evaluate(
        model=model,
        tasks=["peers"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
    )
    print(json.dumps({scheme: {"bits_per_byte": found["results"]["peers"]["bits_per_byte,none"]}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
