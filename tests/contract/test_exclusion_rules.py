"""The six rules of ``modules_to_not_convert`` against the libraries' own code, and quantlab's one on every backend."""

import copy
import re

import pytest
from torch import nn

import quantlab
from quantlab.backends import exclusions
from quantlab.errors import ConfigError
from quantlab.stages.quantize import quantize_component
from tests.support.configs import METHODS, config_of, rule_of
from tests.support.exclusion_rules import TABLE, excluded_by_diffusers, paths_of, request, tiny_flux, tiny_llama

BY_TRANSFORMERS = [m for m in METHODS if "transformers" in config_of(m).exclusion_rules]
OURS = {
    "proj_out": 1,
    "norm_out.linear": 1,
    "transformer_blocks.0.attn.to_q": 1,
    "transformer_blocks.0": 14,
    "*.to_q": 2,
    "re:.*to_q": 2,
}
"""Entry -> layers that quantlab's matcher takes, on every backend; all other entries of the table match nothing."""


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


@pytest.fixture(scope="module")
def paths(flux):
    return paths_of(flux)


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e or "empty")
def test_diffusers_rules_give_the_known_counts(entry, paths):
    assert len(paths) == 28
    assert tuple(len(exclusions.taken(rule_of(m, "diffusers"), [entry], paths)) for m in METHODS) == TABLE[entry]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e or "empty")
def test_diffusers_own_code_leaves_out_the_same_layers(method, entry, flux, paths):
    assert set(exclusions.taken(rule_of(method, "diffusers"), [entry], paths)) == excluded_by_diffusers(
        method, flux, [entry]
    )


@pytest.mark.parametrize(
    "entry",
    [*TABLE, "transformer_blocks.*.attn", "(norm|proj)_out", "to_q$", r"x_embedder\b"],
    ids=lambda e: e or "empty",
)
@pytest.mark.parametrize("method", BY_TRANSFORMERS)
def test_transformers_rule_is_its_own_function(method, entry, paths):
    from transformers.quantizers.quantizers_utils import should_convert_module

    tail = ".weight" if method == "torchao" else ""
    if entry.startswith("*"):  # the library lets the error of re through
        with pytest.raises(re.error, match="repeat"):
            should_convert_module(paths[0], [entry])
        with pytest.raises(ConfigError, match=r"reads it as a regular expression, which it is not"):
            exclusions.taken(rule_of(method, "transformers"), [entry], paths)
        return
    wanted = {p for p in paths if not should_convert_module(p + tail, [entry])}
    assert set(exclusions.taken(rule_of(method, "transformers"), [entry], paths)) == wanted


def test_transformers_without_a_list_leaves_out_its_defaults():
    from transformers.quantizers.base import get_keys_to_not_convert

    for tie in (False, True):
        model = tiny_llama(tie)
        config = quantlab.config_from_dict({"quant_method": "quanto", "weights": "int8", "activations": None})
        reasons, idle = exclusions.expand(config, model)
        assert set(reasons) == {"lm_head"}
        assert "lm_head" in get_keys_to_not_convert(model)
        assert idle == ()
    with pytest.raises(ConfigError, match="and this is no model of transformers; name the modules"):
        exclusions.expand(config, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in BY_TRANSFORMERS])
def test_transformers_has_no_such_backend(method):
    with pytest.raises(ConfigError, match=f"transformers does not quantize with {method}"):
        exclusions.rule_of(config_of(method), "transformers")


# -- quantlab's one matcher


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", [e for e in TABLE if e])
def test_one_matcher_on_every_backend(method, entry, flux):
    config = config_of(method, [entry])
    if entry in OURS:
        assert len(exclusions.excluded_layers(config, flux)) == OURS[entry]
    else:
        with pytest.raises(ConfigError, match=r"^modules_to_not_convert=.*: matches none of the 28 layers"):
            exclusions.excluded_layers(config, flux)


@pytest.mark.parametrize("method", METHODS)
def test_the_empty_entry_is_no_entry(method):
    with pytest.raises(ConfigError, match="a list of non-empty words"):
        config_of(method, [""])


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_leaves_the_same_layers(method, flux):
    wanted = exclusions.excluded_layers(config_of("quanto", ["transformer_blocks.0"]), flux)
    config = config_of(method, ["transformer_blocks.0"])
    module = copy.deepcopy(flux)
    _, report = quantize_component(request(config, module, on_mismatch="skip"), module, flux)
    assert {r.name for r in report.layers if r.status == "excluded"} == wanted
    assert sum(r.status == "quantized" for r in report.layers) >= 12
