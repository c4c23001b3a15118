"""The matcher on a real module tree, the walk over Linear layers, digests and the check for NaN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantlab.backends.exclusions import taken_by_transformers
from quantlab.backends.torchao.forms import PER_MODULE, form_of_layer
from quantlab.errors import ConfigError, ModelError
from quantlab.modules import layers
from quantlab.modules.layers import (
    all_finite,
    changed_tensors,
    check_finite_weights,
    linear_layers,
    matches,
    replace_layer,
    resolve_exclusions,
    state_digest,
)

BLOCK = tuple(
    f"transformer_blocks.0.{leaf}"
    for leaf in (
        "norm1.linear",
        "norm1_context.linear",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
)
BOTH_TO_Q = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")
TAKEN = {
    "proj_out": ("proj_out",),
    "norm_out.linear": ("norm_out.linear",),
    "norm_out": ("norm_out.linear",),
    "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
    "transformer_blocks.0": BLOCK,
    "transformer_blocks": BLOCK,
    "*.to_q": BOTH_TO_Q,
    "*.attn.to_?": tuple(f"{where}transformer_blocks.0.attn.to_{x}" for where in ("", "single_") for x in "qkv"),
    "transformer_blocks.*.ff": ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"),
    "*proj_out": ("single_transformer_blocks.0.proj_out", "proj_out"),
    "[xc]*_embedder": ("context_embedder", "x_embedder"),
    "re:.*to_q": BOTH_TO_Q,
    r"re:(.*\.)?proj_out": ("single_transformer_blocks.0.proj_out", "proj_out"),
    r"re:transformer_blocks\.\d+\.attn\.add_.*": tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
}
NOTHING = {
    "attn": "*.attn would match 11 of them",
    "to_out.0": "*.to_out.0 would match 1 of them",
    "0": "*.0 would match 20 of them",
    "ff.net": "*.ff.net would match 2 of them",
    "proj_out.weight": "proj_out would match 1 of them",
    "out": "near are transformer_blocks.0.attn.to_out",
    "TO_Q": "transformer_blocks.0.attn.to_q",
    "proj_outt": "near are proj_out",
    "k": "the layers are time_text_embed.timestep_embedder.linear_1",
    "add_": "the layers are",
    "does_not_exist": "and 25 more",
    "": "matches none of the 28 layers",
    "re:to_q": "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.norm1.norm": "only modules that are not quantized anyway",
    "blocks.0": "matches none",
    "*[": "matches none",
}
COMPONENT = st.text("ab01_", min_size=1, max_size=3)
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


class TestMatcher:
    def test_the_tree_has_28_layers(self, flux):
        assert len(linear_layers(flux)) == 28

    @pytest.mark.parametrize("entry", TAKEN)
    def test_takes_exactly(self, flux, entry):
        excluded = resolve_exclusions(linear_layers(flux), [entry], module_names(flux))
        assert excluded == dict.fromkeys(TAKEN[entry], entry)

    @pytest.mark.parametrize("entry", NOTHING)
    def test_an_entry_that_matches_nothing_is_refused_with_what_is_near(self, flux, entry):
        with pytest.raises(ConfigError) as error:
            resolve_exclusions(linear_layers(flux), [entry], module_names(flux))
        assert str(error.value).startswith(f"modules_to_not_convert={entry}: ")
        assert NOTHING[entry] in str(error.value)

    def test_family_defaults_may_match_nothing_and_the_first_entry_is_named(self, flux):
        entries = ["lm_head", "*.to_q", "transformer_blocks.0.attn"]
        excluded = resolve_exclusions(linear_layers(flux), entries, module_names(flux), optional_entries=["lm_head"])
        assert excluded["transformer_blocks.0.attn.to_q"] == "*.to_q"
        assert excluded["transformer_blocks.0.attn.to_k"] == "transformer_blocks.0.attn"
        assert len(excluded) == 9

    def test_a_regex_that_does_not_compile_is_refused(self):
        with pytest.raises(ConfigError, match=r"^modules_to_not_convert=re:\(: not a regular expression"):
            matches("re:(", "a")

    def test_an_expression_that_does_not_end_is_told(self, monkeypatch):
        """Of a recipe, of a block of transformers, and of torchao's mapping: the ways grow as Fibonacci's numbers."""
        monkeypatch.setattr(layers, "_PATIENCE_S", 0.05)
        expression, path = r"(\w\w|\w)+[.-]\d", "transformer_blocks_of_the_denoiser_attention_add_q_projection"
        mapping = {"_type": PER_MODULE, "_version": 1, "_data": {"fqn_to_config": {f"re:{expression}": None}}}
        for key, call in {
            "components.vae.modules_to_not_convert=re:": lambda: resolve_exclusions(
                [path], [f"re:{expression}"], key="components.vae.modules_to_not_convert"
            ),
            "modules_to_not_convert=": lambda: taken_by_transformers(expression, path),
            "fqn_to_config=re:": lambda: form_of_layer(mapping, path),
        }.items():
            with pytest.raises(ConfigError) as error:
                call()
            assert str(error.value).startswith(f"{key}{expression}: does not end on the layer {path}")

    def test_an_expression_with_repetitions_in_repetitions_ends_where_it_can(self):
        with pytest.raises(ConfigError, match="matches none of the 1 layers"):
            resolve_exclusions(["transformer_blocks.10.attn.add_q_proj.to_out.0"], [r"re:(\w+\.?)+!"])

    def test_a_mapping_of_torchaos_with_no_expression(self):
        mapping = {"_type": PER_MODULE, "_version": 1, "_data": {"fqn_to_config": {"re:(": None}}}
        with pytest.raises(ConfigError, match=r"^fqn_to_config=re:\(: not a regular expression"):
            form_of_layer(mapping, "a")

    @given(container=PATH, below=PATH, other=PATH)
    def test_a_container_takes_what_is_below_it_and_no_sibling(self, container, below, other):
        assert matches(container, container)
        assert matches(container, f"{container}.{below}")
        assert not matches(container, f"x{container}.{below}")
        assert not matches(container, f"{container}x.{below}")
        inside = other.split(".")[: container.count(".") + 1] == container.split(".")
        assert matches(container, other) == inside

    @given(prefix=PATH, container=PATH)
    def test_a_path_counts_from_the_root(self, prefix, container):
        name = f"x.{prefix}.{container}"
        assert not matches(container, name)
        assert matches(f"*.{container}", name)
        assert matches(f"*.{container}", f"{name}.leaf")


class TestLinearLayers:
    def test_each_object_once_and_not_inside_attention(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict(
            {
                "a": shared,
                "b": nn.Sequential(shared, nn.Linear(4, 2)),
                "mha": nn.MultiheadAttention(4, 2),
                "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
                "conv": nn.Conv2d(1, 1, 1),
            }
        )
        assert list(linear_layers(model)) == ["a", "b.1"]

    def test_subclasses_with_their_own_forward_are_left_out(self):
        class Plain(nn.Linear):
            pass

        class Scaled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 2

        model = nn.Sequential(Plain(2, 2), Scaled(2, 2))
        assert list(linear_layers(model)) == ["0"]

    def test_diffusers_lora_linear_counts_until_a_lora_is_set(self):
        from diffusers.models.lora import LoRACompatibleLinear

        with pytest.warns(FutureWarning, match="LoRACompatibleLinear"):
            layer = LoRACompatibleLinear(2, 2)
        model = nn.Sequential(layer)
        assert list(linear_layers(model)) == ["0"]
        layer.lora_layer = nn.Identity()
        assert linear_layers(model) == {}

    def test_the_root_is_not_listed(self):
        assert linear_layers(nn.Linear(2, 2)) == {}

    def test_replacing_a_layer_reaches_all_its_paths(self):
        shared, new = nn.Linear(2, 2), nn.Linear(2, 2)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(2, 2))})
        replace_layer(model, "a", new)
        assert model["a"] is model["b"][0] is new
        assert model["b"][1] is not new


class TestDigest:
    def test_depends_on_names_dtypes_shapes_and_bytes_alone(self):
        a = {"x": torch.arange(6.0), "y": torch.ones(2, dtype=torch.bfloat16)}
        assert state_digest(a) == state_digest(dict(reversed(a.items())))
        strided = torch.arange(12.0).reshape(6, 2)[:, 0] / 2
        assert state_digest(a) == state_digest({"x": strided, "y": a["y"].clone()})
        assert state_digest(a).startswith("sha256:")
        others = [
            {"x": a["x"]},
            {**a, "x": a["x"].double()},
            {**a, "x": a["x"].reshape(2, 3)},
            {**a, "x": a["x"] + 1},
            {"z": a["x"], "y": a["y"]},
            {**a, "n": torch.zeros(0)},
            {**a, "extra": "text"},
        ]
        assert len({state_digest(s) for s in [a, *others]}) == len(others) + 1

    def test_sees_inside_tensor_subclasses(self):
        data = torch.arange(4.0)
        digest = state_digest({"w": Pair(data, data)})
        assert digest == state_digest({"w": Pair(data.clone(), data.clone())})
        assert digest != state_digest({"w": Pair(data, data + 1)})
        assert digest != state_digest({"w": data})


class Pair(torch.Tensor):
    """The smallest tensor subclass that holds two tensors."""

    @staticmethod
    def __new__(cls, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["a", "b"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_weight_that_is_not_finite_is_named(bad, dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_buffer("mask", torch.tensor(-float("inf")))
    check_finite_weights(model, "model.path=x")
    weight = model[1].weight.data.clone()
    weight[0, 1] = bad
    model[1].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=r"^model\.path=x: 1 of 9 values of 1\.weight are NaN or infinite"):
        check_finite_weights(model, "model.path=x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (33, 65)])
def test_all_finite_is_what_asking_each_value_says(dtype, shape):
    values = torch.randn(shape).to(dtype)
    assert all_finite(values)
    assert all_finite(torch.full(shape, torch.finfo(dtype).max, dtype=dtype))
    for place in range(0, values.numel(), 64):
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = values.clone()
            broken.view(-1)[place] = bad
            assert not all_finite(broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("num", [1, 5, 64])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_change_of_any_value_is_seen_wherever_its_tensor_begins(dtype, num, offset):
    net = torch.nn.Module()
    net.register_buffer("t", torch.arange(1, num + offset + 1).to(dtype)[offset:])
    for place in (0, num - 1):
        with changed_tensors(net) as changed:
            net.t[place] = 0
        assert changed == ["t"]
        net.t[place] = 1


def test_all_signs_turned_are_seen():
    net = torch.nn.Module()
    net.register_buffer("t", torch.ones(64, dtype=torch.float64))
    with changed_tensors(net) as changed:
        net.t.neg_()
    assert changed == ["t"]


@pytest.mark.slow
def test_importing_imports_no_torch():
    code = (
        "import sys, quantlab.modules.layers as l, quantlab.modules.memory; l.matches('a', 'a.b'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
