"""Adapters stay as they are around a quantized base layer, on every backend; what cannot be kept is refused by name."""

import functools
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from quantlab.backends import exclusions
from quantlab.errors import ConfigError, ModelError
from tests.support.configs import config_of, dtypes_on_cpu
from tests.support.copies import inputs, net, quantized
from tests.support.exclusion_rules import tiny_llama
from tests.support.tables import BACKENDS

EACH = [(b, d) for b in BACKENDS for d in dtypes_on_cpu(b)[:2]]


class Block(nn.Module):
    """Two layers under names that adapters are told."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)
        self.head = nn.Linear(256, 64)

    def forward(self, x):
        return self.head(self.down(self.act(self.up(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block.down(block.up(x))
        return x


def adapted(config, dtype=torch.float32):
    """A model with an adapter of PEFT whose weights are large; only base layers are quantized in it."""
    import peft

    torch.manual_seed(0)
    model = Block().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and not name.startswith("head"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval().requires_grad_(False)


def lora(**more):
    import peft

    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **more)


def switched(model, is_on):
    for part in model.modules():
        if hasattr(part, "enable_adapters"):
            part.enable_adapters(is_on)
    return model


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_the_effect_of_a_lora_survives(backend, dtype):
    """A layer with the adapter minus without is what the adapter adds, for quantized layers as for others."""
    made, report = quantized(adapted(lora()), backend, dtype)
    done = {r.name for r in report.layers if r.status == "quantized"}
    assert done == {"up.base_layer", "down.base_layer", "head"}
    for name in ("up", "down"):
        layer, x = made.get_submodule(name), inputs()
        with torch.no_grad():
            found = switched(layer, True)(x) - switched(layer, False)(x)
            expected = layer.lora_B["default"](layer.lora_A["default"](x)) * 2
        assert torch.linalg.vector_norm(found - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_report_says_that_the_adapters_layers_were_left_alone(backend):
    made, report = quantized(adapted(lora()), backend, dtypes_on_cpu(backend)[0])
    rows = {r.name: r for r in report.layers}
    left = rows["up.lora_A.default"]
    assert (left.status, left.dtype, left.reason) == ("excluded", "float32", "a part of the adapter up")
    assert sum("adapter" in r.reason for r in report.layers) == 4
    assert type(made.up.lora_A["default"]) is nn.Linear


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_effect_of_a_lora_of_diffusers_survives(backend):
    """Diffusers' own injection, into a whole model: switching it moves the output as it does without quantization."""
    import peft
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 4, "in_channels": 4}
    widths = {"joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 64, "out_channels": 4}
    model = SD3Transformer2DModel(**sizes, **widths).eval()
    targets = ["to_q", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    made, report = quantized(model.requires_grad_(False), backend, dtypes_on_cpu(backend)[0])
    done = {r.name for r in report.layers if r.status == "quantized"}
    assert {f"transformer_blocks.0.attn.{t}.base_layer" for t in targets} < done
    assert not [name for name in done if "lora_" in name]
    call = {"encoder_hidden_states": torch.ones(1, 3, 64), "pooled_projections": torch.ones(1, 64)}
    call |= {"hidden_states": torch.ones(1, 4, 4, 4), "timestep": torch.tensor([3.0])}
    moved = []
    for each in (model, made):
        with torch.no_grad():
            with_lora = each(**call).sample
            each.disable_adapters()
            moved.append(with_lora - each(**call).sample)
    assert torch.linalg.vector_norm(moved[1] - moved[0]) < 0.5 * torch.linalg.vector_norm(moved[0])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if "transformers" in config_of(b).exclusion_rules])
def test_a_librarys_rule_reads_the_paths_from_before_the_adapter(backend):
    """Its entries were written for the model without: the output layer is left out with an adapter on it too."""
    import peft

    model = tiny_llama()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["lm_head", "up_proj"]), model)
    config = config_of(backend, ["lm_head"], exclusion_rule="transformers")
    assert {n for n in exclusions.expand(config, model)[0] if "lora_" not in n} == {"lm_head.base_layer"}
    assert exclusions.excluded_layers(config_of(backend, ["lm_head"]), model) == {"lm_head.base_layer"}


def others():
    """Kind -> config; and whether its forward looks at the weight (its values or its shape) of the base layer."""
    import peft

    names = ["up", "down"]
    return {
        "rslora": (lora(use_rslora=True), False),
        "bias": (lora(lora_bias=True), False),
        "ia3": (peft.IA3Config(target_modules=names, feedforward_modules=["down"]), False),
        "oft": (peft.OFTConfig(r=0, oft_block_size=32, target_modules=names), False),
        "dora": (lora(use_dora=True), True),
        "loha": (peft.LoHaConfig(r=4, alpha=8, target_modules=names), True),
        "lokr": (peft.LoKrConfig(r=4, alpha=8, target_modules=names), True),
        "boft": (peft.BOFTConfig(boft_block_size=32, target_modules=names), True),
        "hra": (peft.HRAConfig(r=4, target_modules=names), True),
    }


@pytest.mark.parametrize("kind", ["rslora", "bias", "ia3", "oft"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_that_use_the_base_layers_output_alone_work(backend, kind):
    config, looks = others()[kind]
    assert not looks
    model = adapted(config)
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0])
    with torch.no_grad():
        expected, found = model.up(inputs()), made.up(inputs())
    assert torch.linalg.vector_norm(found - expected) < 0.2 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "boft", "hra"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_that_look_at_the_weight_are_refused_by_name(backend, kind):
    config, looks = others()[kind]
    assert looks
    model = adapted(config)
    with pytest.raises(ModelError, match=r"^model\.components=model: the adapter up .*weight of its base layer.*merge"):
        quantized(model, backend, dtypes_on_cpu(backend)[0])
    made, report = quantized(model, backend, dtypes_on_cpu(backend)[0], modules_to_not_convert={"my": ["up", "down"]})
    assert [r.name for r in report.layers if r.status == "quantized"] == ["head"]
    with torch.no_grad():
        assert torch.equal(made.up(inputs()), model.up(inputs()))


# -- refused by name


def own_forward(layer):
    layer.forward = lambda input: nn.functional.linear(input, layer.weight) * 3


def bound_forward(layer):
    layer.forward = types.MethodType(lambda self, input: nn.functional.linear(input, self.weight), layer)


def accelerates(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


def layerwise_casting(layer):
    from diffusers.hooks import apply_layerwise_casting_hook

    apply_layerwise_casting_hook(layer, torch.float16, torch.float32, non_blocking=False)


@pytest.mark.parametrize(
    ("change", "whose"),
    [
        (own_forward, "own_forward"),
        (bound_forward, "bound_forward"),
        (accelerates, "accelerate's ModelHook"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_on_the_instance_is_refused_and_an_excluded_layer_keeps_it(backend, change, whose):
    model = net()
    change(model[2])
    with torch.no_grad():
        expected = model[2](inputs())
    message = rf"^model\.components=model: 2 has a forward .*{whose}.*exclude the layer with modules_to_not_convert$"
    with pytest.raises(ModelError, match=message):
        quantized(model, backend, dtypes_on_cpu(backend)[0])
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0], modules_to_not_convert={"my": ["2"]})
    with torch.no_grad():
        assert torch.equal(made[2](inputs()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusers_casting_of_layers_is_refused_whether_they_are_excluded_or_not(backend):
    """Its hooks cannot be copied: the copy's would cast the copy's weights and run the original's."""
    model = net()
    layerwise_casting(model[2])
    with pytest.raises(ModelError, match=r"^model\.components=model: 2 has a forward .*Diffusers' layerwise_casting"):
        quantized(model, backend, dtypes_on_cpu(backend)[0])
    with pytest.raises(ModelError, match=r"^model\.components=model: 2 has a forward .* outside of the copy"):
        quantized(model, backend, dtypes_on_cpu(backend)[0], modules_to_not_convert={"my": ["2"]})


@pytest.mark.parametrize("way", ["closure", "first_block_cache"])
def test_a_container_whose_copy_would_run_the_original_is_refused(way):
    """The candidate would be the reference: its error would be 0."""
    model = nn.Sequential(Block(), nn.GELU())
    if way == "closure":
        block = model[0]
        model[0].forward = lambda x: block.down(block.up(x))
    else:
        from diffusers.hooks.hooks import HookRegistry, ModelHook

        HookRegistry.check_if_exists_or_initialize(model[0]).register_hook(ModelHook(), "some_cache")
    with pytest.raises(ModelError, match=r"^model\.components=model: 0 has a forward .* outside of the copy"):
        quantized(model, "quanto", "int8")


def test_a_container_whose_own_forward_is_copied_with_it_is_quantized():
    model = nn.Sequential(Block(), nn.GELU())
    model[0].forward = types.MethodType(lambda self, x: self.down(self.up(x)), model[0])
    accelerates(model)
    made, _ = quantized(model, "quanto", "int8")
    with torch.no_grad():
        error = torch.linalg.vector_norm(made(inputs()) - model(inputs()))
    assert 0 < error < 0.1 * torch.linalg.vector_norm(model(inputs()))


def sequential_offload(model):
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def model_offload(model):
    from accelerate import cpu_offload_with_hook

    return cpu_offload_with_hook(model, torch.device("cpu"))[0]


def group_offload(model, **how):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **how)
    return model


@pytest.mark.parametrize(
    "offload",
    [
        sequential_offload,
        model_offload,
        functools.partial(group_offload, offload_type="leaf_level"),
        functools.partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
    ],
    ids=["sequential", "model", "leaf_level", "block_level"],
)
def test_an_offloaded_model_is_refused(offload):
    import quantlab

    model = offload(Stack())
    config = quantlab.QuantoConfig("int8")
    for call in (lambda: quantlab.quantize(model, config), lambda: quantlab.evaluate(model, [config], [inputs()])):
        with pytest.raises(ModelError, match=r"^module: the weights of .* come and go with each call"):
            call()


def test_a_model_without_values_is_refused():
    import quantlab

    with torch.device("meta"):
        model = net()
    with pytest.raises(ConfigError, match=r"^module: 6 of 6 weights have no values here \(0\.weight"):
        quantlab.quantize(model, quantlab.QuantoConfig("int8"))


# -- computed weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        functools.partial(nn.utils.weight_norm, name="bias", dim=None),
        nn.utils.spectral_norm,
        functools.partial(prune.l1_unstructured, name="weight", amount=0.3),
    ],
    ids=[
        "weight_norm",
        "spectral_norm",
        "orthogonal",
        "old_weight_norm",
        "old_bias_norm",
        "old_spectral_norm",
        "pruned",
    ],
)
def test_layers_whose_weights_are_computed_stay_and_are_reported(backend, wrap):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(model[2])
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model(inputs())
        expected = model[2](inputs())
        made, report = quantized(detached(model), backend, dtypes_on_cpu(backend)[0])
        assert torch.allclose(made[2](inputs()), expected, atol=1e-6)
    row = next(r for r in report.layers if r.name == "2")
    assert (row.status, tuple(row.shape)) == ("excluded", (256, 256))
    assert row.reason.startswith("computed from other parameters")


def detached(model):
    """Old norms leave a tensor with a gradient history, which cannot be copied."""
    for part in model.modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                vars(part)[name] = value.detach()
    return model
