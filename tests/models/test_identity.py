"""The same weights under another configuration are another model, and what differs is named."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from quantlab.models import causal_lm, diffusers_pipeline
from quantlab.models.checkpoint import file_sha256
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_pipelines import build_tiny_sdxl
from tests.support.tiny_text_models import save_llama


def language_model(folder, cache):
    return causal_lm.load(ModelConfig(family="causal_lm", path=str(folder)), "cpu", cache)


def pipeline(folder, cache):
    return diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(folder)), "cpu", cache)


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def differing(a, b):
    return {k for k in {**a.identity, **b.identity} if a.identity.get(k) != b.identity.get(k)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


LANGUAGE = [
    ("config.json", lambda d: d.update(hidden_act="gelu"), "model.config"),
    ("config.json", lambda d: d.update(rms_norm_eps=1e-2), "model.config"),
    (
        "config.json",
        lambda d: d.update(rope_theta=5.0, rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
        "model.config",
    ),
    ("generation_config.json", lambda d: d.update(temperature=0.3, do_sample=True), "model.generation_config"),
    ("tokenizer_config.json", lambda d: d.update(chat_template="{{ messages }}"), "tokenizer"),
    ("tokenizer_config.json", lambda d: d.update(bos_token="</s>"), "tokenizer"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].update({"a": 300}), "tokenizer"),
]


@pytest.mark.parametrize(("file", "change", "part"), LANGUAGE, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(LANGUAGE)])
def test_an_edited_language_model_is_another(llama, tmp_path, file, change, part):
    changed = shutil.copytree(llama, tmp_path / "changed")
    edit(changed / file, change)
    was, now = language_model(llama, tmp_path / "a"), language_model(changed, tmp_path / "b")
    assert was.weights_sha256 == now.weights_sha256
    assert part in differing(was, now)
    assert differing(was, now) <= {part, "model.config", "model.generation_config"}


def test_where_a_model_lies_is_no_part_of_it(llama, tmp_path):
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / "under another name")
    edit(moved / "config.json", lambda d: d.update(_name_or_path="somebody/else", transformers_version="1.0"))
    was, now = language_model(llama, tmp_path / "a"), language_model(moved, tmp_path / "b")
    assert not differing(was, now)
    now.parts["tokenizer"](["short", "and a longer one"], padding=True, truncation=True, max_length=9)
    assert not differing(was, language_model(moved, tmp_path / "b"))
    assert not differing(was, now.with_components({}))


PIPELINE = [
    ("scheduler/scheduler_config.json", lambda d: d.update(beta_end=0.02), {"scheduler.config"}),
    ("model_index.json", lambda d: d.update(force_zeros_for_empty_prompt=False), {"pipeline.config"}),
    ("unet/config.json", lambda d: d.update(act_fn="gelu"), {"unet.config"}),
    ("vae/config.json", lambda d: d.update(scaling_factor=0.5), {"vae.config"}),
    ("text_encoder/config.json", lambda d: d.update(hidden_act="relu"), {"text_encoder.config"}),
    ("tokenizer/tokenizer_config.json", lambda d: d.update(model_max_length=7), {"tokenizer"}),
]


@pytest.mark.parametrize(("file", "change", "parts"), PIPELINE, ids=[f for f, _, _ in PIPELINE])
def test_an_edited_pipeline_is_another(sdxl, tmp_path, file, change, parts):
    changed = shutil.copytree(sdxl, tmp_path / "changed")
    edit(changed / file, change)
    assert differing(pipeline(sdxl, tmp_path / "a"), pipeline(changed, tmp_path / "b")) - {"weights"} == parts


def test_a_file_that_was_replaced_under_the_same_name_size_and_time_is_read_again(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 100_000)
    before = file_sha256(file, tmp_path)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"b" * 100_000)
    os.utime(file, ns=times)
    assert file_sha256(file, tmp_path) != before
