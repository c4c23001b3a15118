"""The rows of the model families say what their files do."""

import pytest

from quantlab.errors import ConfigError
from quantlab.models.table import FAMILIES, family_of
from quantlab.planning.plan import plan
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.schema import DigitsModelConfig, ModelConfig
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import save_bert, save_llama


def test_rows_are_named_by_their_key_and_belong_to_a_protocol():
    assert all(name == row.name and row.protocol in PROTOCOLS for name, row in FAMILIES.items())


@pytest.mark.parametrize(
    ("family", "save"), [("causal_lm", save_llama), ("encoder", save_bert), ("diffusers", build_tiny_flux)]
)
def test_a_loaded_model_is_run_by_the_protocol_of_its_row(family, save, tmp_path):
    config = ModelConfig(family=family, path=str(save(tmp_path / "model")))
    model = family_of(config).load(config, "cpu", tmp_path)
    assert model.protocol == FAMILIES[family].protocol


@pytest.mark.parametrize("option", ["digits_dit", "smollm2_135m", "qwen3_0_6b", "encoder", "flux_schnell"])
def test_the_data_set_that_a_model_brings_fits_its_row(option):
    (job,) = plan([f"model={option}", "backend=torchao"]).jobs
    assert family_of(job.config.model).name == job.config.model.family


def test_digits_weights_are_found_by_the_row():
    trained = FAMILIES["digits_dit"].trained
    assert trained.files == ("model.safetensors", "judge.safetensors")
    assert trained.cache_key(DigitsModelConfig()) != trained.cache_key(DigitsModelConfig(train_seed=1))


def test_the_digits_family_needs_its_own_settings(tmp_path):
    config = ModelConfig(family="digits_dit")
    with pytest.raises(ConfigError, match=r"^model.family=digits_dit: .*choose it by model=digits_dit$"):
        family_of(config).load(config, "cpu", tmp_path)
