"""``quantlab.to_pipeline_config`` says what a run would leave out beside the object that it makes."""

import pytest

import quantlab
from tests.support.tiny_images import sd3

LEFT = ["pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"]


@pytest.fixture(scope="module")
def modules():
    return {"transformer": sd3().transformer}


def test_what_a_run_leaves_out_by_default_is_told(modules, capsys):
    quantlab.to_pipeline_config({"transformer": quantlab.QuantoConfig("int8")}, modules)
    said = " ".join(capsys.readouterr().err.split())
    assert "components.transformer: by this object Diffusers quantizes" in said
    assert "add ['context_embedder', 'time_text_embed', 'norm_out', 'proj_out'] to modules_to_not_convert" in said


def test_nothing_is_told_of_what_is_left_out_already(modules, capsys):
    config = quantlab.TorchAoConfig("int8wo", modules_to_not_convert=LEFT[1:])
    quantlab.to_pipeline_config({"transformer": config}, modules)
    quantlab.to_pipeline_config({"transformer": quantlab.QuantoConfig("int8")})
    assert "by default" not in capsys.readouterr().err


def test_a_librarys_own_list_stays_its_own(modules, capsys):
    from diffusers import QuantoConfig
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    pasted = PipelineQuantizationConfig(
        quant_mapping={"transformer": QuantoConfig(weights_dtype="int8", modules_to_not_convert=["proj_out"])}
    )
    quantlab.to_pipeline_config(quantlab.from_pipeline_config(pasted), modules)
    assert "by default" not in capsys.readouterr().err
