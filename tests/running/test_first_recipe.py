"""``quantlab init``: a recipe that composes, of candidates that every layer of the model takes."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from diffusers.models.unets.unet_2d import UNet2DModel
from transformers import ViTConfig, ViTForImageClassification

from quantlab import cli
from quantlab.backends.table import backends, offers
from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.planning.trust import is_trusted
from quantlab.running.first_recipe import _sizes, first_recipe
from quantlab.running.forecast import forecast
from quantlab.vocabulary.reports import MemoryReport
from tests.support.shell import Shell
from tests.support.tiny_text_models import save_bert, save_llama


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def refusals(request):
    return [reason for price in forecast(request) for part in price.components for reason in part.refused]


def test_of_a_language_model(tmp_path, capsys):
    save_llama(tmp_path / "my model", hidden_size=96, intermediate_size=256)
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "my.yaml", "model.path='my model'", "evaluation.num_samples=7", "device=cpu"])
    assert ended.value.code == 0
    assert "quantlab recipe=my.yaml" in capsys.readouterr().out
    request = plan(["recipe=my.yaml"])
    assert is_trusted(request), "its path was typed"
    assert len(request.jobs) == 2 * len(backends())
    config = request.jobs[0].config
    assert (config.model.path, config.model.family) == ("my model", "causal_lm")
    assert (config.evaluation.num_samples, config.device) == (7, "cpu")
    assert refusals(request) == []
    text = (tmp_path / "my.yaml").read_text()
    for line in (line for line in text.splitlines() if "- {backend: " in line):
        backend, dtype = re.findall(r"(?:backend|dtype): (\w+)", line)
        is_simulated = "cpu" in offers()[backend].rows[dtype].is_simulated_on
        assert line.endswith("MiB (simulated: stored wider than the dtype says)") == is_simulated
        assert ("/weight, ~" in line) == is_simulated
    assert text.count("(simulated: ") == 1
    assert "rows of 96, 256" in text
    assert "q4_k" not in text, "superblocks of 256 do not divide rows of 96"
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_tiny_model_has_sizes_that_say_something_and_a_first_look_that_runs(tmp_path, capsys):
    save_llama(tmp_path / "tiny", hidden_size=32, intermediate_size=64)
    with pytest.raises(SystemExit):
        cli.main(["init", "my.yaml", "model.path=tiny", "device=cpu"])
    text = (tmp_path / "my.yaml").read_text()
    assert re.search(r"LlamaForCausalLM, [1-9][0-9]*\.[0-9] k parameters", text)
    sizes = re.findall(r"weight, ~?(\S+) MiB", text)
    assert len(sizes) > len(backends())
    assert all(re.fullmatch(r"0\.0*[1-9][0-9]", size) for size in sizes)
    (look,) = re.findall("# First look: quantlab (.*)", text)
    assert look == "recipe=my.yaml evaluation.num_samples=8"
    assert f"a first look:       quantlab {look}\n" in capsys.readouterr().out
    assert plan(look.split()).jobs[0].config.evaluation.num_samples == 8, "the command line wins over the file"
    (tmp_path / "my.yaml").unlink()
    with pytest.raises(SystemExit):
        cli.main(["init", "my.yaml", "model.path=tiny", "device=cpu", "evaluation.num_samples=8"])
    assert "irst look" not in (tmp_path / "my.yaml").read_text() + capsys.readouterr().out, "it is quick already"


def test_its_bits_are_those_of_plan_and_rows():
    """Buffers are counted, masks are not: of a denoiser with a table of positions, and of two components."""
    told = []
    for sizes in ([(2_000_000, 50_000, 0)], [(2_000_000, 50_000, 0), (600_000, 9, 77_000)]):
        memory = [
            MemoryReport(
                weights_bytes=16_000 + int(parameters * 9 / 16) + index,
                quantized_bytes=0,
                scale_bytes=0,
                other_bytes=0,
                bytes_at_16_bit=2 * (parameters + buffers) + index,
                num_parameters=parameters,
                index_bytes=index,
            )
            for parameters, buffers, index in sizes
        ]
        parts = [SimpleNamespace(scheme=1, memory=m, bits_per_quantized_weight=4.5) for m in memory]
        price = SimpleNamespace(components=parts, is_simulated=False)
        beside = SimpleNamespace(scheme=None, memory=replace(memory[0], weights_bytes=10**9))  # a text encoder
        assert _sizes(price) == _sizes(SimpleNamespace(components=[*parts, beside], is_simulated=False))
        assert f" {sum(m.weights_bytes for m in memory) / 2**20:.2f} MiB" in _sizes(price)
        told.append(_sizes(price).split()[0])
        stored = sum(m.weights_bytes - m.index_bytes for m in memory)
        assert told[-1] == f"{8 * stored / sum((m.bytes_at_16_bit - m.index_bytes) / 2 for m in memory):.2f}"
    assert told[0] == f"{memory[0].bits_per_weight:.2f}"


@pytest.mark.slow
def test_of_shapes_that_few_take(tmp_path):
    save_bert(tmp_path / "odd", hidden_size=36, intermediate_size=64)
    file, request = first_recipe(["odd.yaml", "model.path=odd", "device=cpu"])
    text = file.read_text()
    assert "on_mismatch: skip" in text
    assert "of the weights fit" in text
    assert refusals(request) == []


@pytest.mark.slow
def test_of_a_shipped_model_without_its_weights(tmp_path):
    file, request = first_recipe(["folder/flux.yaml", "model=flux_schnell", "device=cpu"])
    assert {job.config.model.path for job in request.jobs} == {"black-forest-labs/FLUX.1-schnell"}
    text = file.read_text()
    assert "num_inference_steps: 4   # see the model card" in text
    assert "# First look: quantlab recipe=flux.yaml evaluation.num_samples=8\n" in text, "four steps are few already"


WORDS = {
    "": "init: write quantlab init my.yaml",
    "model.path=m": "init: write quantlab init my.yaml",
    "my.yaml": "init: which model?",
    "there.yaml model.path=m": "init: there.yaml is there already",
    "my.yaml model.path=m backend=quanto": "backend: init writes a list of candidates",
    "my.yaml model.path=nowhere": "model.path=nowhere: ",
}


@pytest.mark.parametrize("words", WORDS)
def test_what_is_refused(tmp_path, words):
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        first_recipe(words.split())
    assert str(caught.value).startswith(WORDS[words])
    assert not (tmp_path / "my.yaml").exists()


@pytest.mark.slow
def test_a_pipeline_gets_the_data_that_its_call_takes(tmp_path, capsys):
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    sizes = {"sample_size": 8, "block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    DDPMPipeline(UNet2DModel(**sizes, **blocks), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    shell = Shell(tmp_path)
    code, _, err = shell("init", "my.yaml", "model.path=ddpm", "device=cpu")
    assert (code, err) == (0, "")
    text = (tmp_path / "my.yaml").read_text()
    assert "- override /dataset: none " in text
    assert "guidance_scale" not in text, "its call takes none"
    assert "num_inference_steps" in text
    code, _, err = shell("recipe=my.yaml", "sweep.dry_run=true")
    assert (code, err) == (0, ""), "nobody typed a guidance_scale"
    words = ["model=diffusers", "model.path=ddpm", "dataset=none", "backend=quanto", "dtype=int8", "sweep.dry_run=true"]
    assert shell(*words)[::2] == (0, "")
    _, _, err = shell(*words, "evaluation.guidance_scale=2")
    assert "evaluation.guidance_scale=2.0: DDPMPipeline takes no such argument; it is not used" in " ".join(err.split())


@pytest.mark.slow
def test_data_that_only_the_user_has_are_left_open(tmp_path):
    ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(tmp_path / "vit")
    shell = Shell(tmp_path)
    code, out, _ = shell("init", "my.yaml", "model.path=vit", "device=cpu")
    assert code == 0
    assert "run it:             quantlab recipe=my.yaml dataset.path=...\n" in out
    assert "  path: ???   #" in (tmp_path / "my.yaml").read_text()
    assert "as long as it is left open: dataset.path=... with each command" in (tmp_path / "my.yaml").read_text()
    code, _, err = shell("recipe=my.yaml", "sweep.dry_run=true")
    assert code == 2
    assert re.search(r"recipe=my.yaml: line \d+: dataset.path: is left to whoever runs this recipe", err)
    code, _, err = shell("init", "other.yaml", "model.path=vit", "device=cpu", "dataset.path=pictures")
    assert code == 0
    assert "  path: pictures" in (tmp_path / "other.yaml").read_text()
    assert "left open" not in (tmp_path / "other.yaml").read_text(), "it is given"


def test_pictures_that_are_missing_are_not_told_to_be_prompts(tmp_path):
    ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        "vit"
    )
    code, _, err = Shell(tmp_path)(
        "model=vision", "model.path=vit", "backend=quanto", "dtype=int8", "sweep.dry_run=true"
    )
    assert code == 2
    assert err.startswith("quantlab: dataset.path=null: the pictures are of your own; name a folder of pictures")


@pytest.mark.parametrize("model", ["auto", "causal_lm"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adapter/adapter_config.json", "is an adapter of PEFT (adapter_config.json) without its model; merge it"),
        ("it.gguf", "what a GGUF file holds is measured as a candidate: name the folder"),
        ("folder/it.gguf", "what a GGUF file holds is measured as a candidate: name the folder"),
        ("weights.pt", "is a file; name the folder that save_pretrained wrote"),
        ("empty/readme.md", "neither a config.json nor a model_index.json is there; name a folder"),
    ],
)
def test_what_is_no_model_is_told_what_it_is(tmp_path, name, told, model):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    path = file if file.parent == tmp_path else file.parent
    with pytest.raises(ConfigError) as caught:
        first_recipe(["my.yaml", f"model.path={path}", f"model={model}"])
    assert str(caught.value).startswith(f"model.path={path}: {told}")
