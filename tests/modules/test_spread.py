"""Where a model is cut, on which device each block lies, and that nothing is computed on two devices at once."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from quantlab.errors import ConfigError
from quantlab.modules.spread import Spread, blocks, plan_map
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_llama(tmp_path_factory.mktemp("llama"))).eval()


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(BUILDERS["flux"](tmp_path_factory.mktemp("flux")))


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def placed(modules, devices):
    """The modules on ``devices``, and how they lie."""
    spread = Spread(plan_map(modules, len(devices), None), devices)
    return {name: spread.place(name, m) for name, m in modules.items()}, spread


@contextmanager
def fake_devices():
    """Inside tensors have devices, ``cpu`` and ``meta``, and no values; operations between two devices are errors, as with
    real ones, and what is moved is moved."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def faked(module):
    """A copy of a module with tensors of the mode that is open."""
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def test_blocks_are_whole_and_what_is_around_them_is_cut(llama):
    found = {block.path for block in blocks("model", llama)}
    assert found == {
        *("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    }


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("cpu", "meta", "cpu")])
def test_a_language_model_runs_on_several_devices(llama, devices):
    with fake_devices():
        made, spread = placed({"model": faked(llama)}, devices)
        model = made["model"]
        ids = torch.zeros(2, 5, dtype=torch.long)
        for mask in (None, torch.ones(2, 5, dtype=torch.long)):
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            assert str(out.logits.device) == "cpu"
    assert {str(p.device) for p in model.parameters()} == set(devices)
    assert str(model.device) == "cpu"
    assert str(model.model.layers[0].self_attn.q_proj.weight.device) in devices
    assert sum(spread.weights_bytes(made, ())) == sum(spread.map.num_bytes)


def test_a_pipelines_modules_run_on_several_devices(flux):
    modules = {n: m for n, m in flux.components.items() if isinstance(m, nn.Module)}
    with fake_devices():
        made, spread = placed({n: faked(m) for n, m in modules.items()}, ("cpu", "meta"))
        assert {str(p.device) for p in made["vae"].parameters()} == {"cpu"}
        for name in ("text_encoder", "text_encoder_2"):
            out = made[name](torch.ones(2, 7, dtype=torch.long), output_hidden_states=True)
            assert {str(t.device) for t in (out[0], *out.hidden_states)} == {"cpu"}
        config = made["transformer"].config
        out = made["transformer"](
            hidden_states=torch.zeros(2, 8, config.in_channels),
            encoder_hidden_states=torch.zeros(2, 7, config.joint_attention_dim),
            pooled_projections=torch.zeros(2, config.pooled_projection_dim),
            timestep=torch.zeros(2),
            guidance=torch.zeros(2),
            img_ids=torch.zeros(8, 3),
            txt_ids=torch.zeros(7, 3),
        )
        assert str(out.sample.device) == "cpu"
    there = {str(p.device) for m in made.values() for p in m.parameters()}
    assert there == {"cpu", "meta"}
    assert spread.weights_bytes(made, ()) == list(spread.map.num_bytes)


def test_accelerate_finds_that_the_map_covers_every_weight(llama):
    from accelerate.utils.modeling import check_device_map

    found = plan_map({"model": llama}, 2, None)
    check_device_map(llama, dict(found.where["model"]))


def test_a_copy_and_a_layer_in_anothers_place_run_as_the_first_does(llama):
    from quantlab.modules.layers import replace_layer

    with fake_devices() as mode:
        made, _ = placed({"model": faked(llama)}, ("cpu", "meta"))
        twin = copy.deepcopy(made["model"], {id(mode): mode})
        layer = nn.Linear(32, 259, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.empty(259, 32, device="meta"), requires_grad=False)
        replace_layer(twin, "lm_head", layer)
        ids = torch.zeros(2, 5, dtype=torch.long)
        assert str(twin(input_ids=ids, use_cache=False).logits.device) == "cpu"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.inner(x)


class Stack(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, widths=(8, 8, 8, 8), tied=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.first = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(width) for width in widths])
        self.register_buffer("table", torch.ones(5), persistent=False)
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.first.weight


def test_weights_that_are_shared_lie_together():
    found = plan_map({"model": Stack(tied=True)}, 2, None)
    assert found.number("model", "head") == found.number("model", "first") == 0
    assert found.number("model", "blocks.3") == 1
    assert sum(found.num_bytes) == (3 + 5 + 16 * 8 + 4 * 64) * 4
    spread = Spread(found, ("cpu", "cpu"))
    model = spread.place("model", Stack(tied=True))
    assert model.head.weight is model.first.weight
    assert spread.weights_bytes({"model": model}, ()) == list(found.num_bytes)


def test_the_fullest_device_holds_the_least():
    found = plan_map({"model": Stack()}, 2, None)
    assert found.num_bytes == ((3 + 5 + 128 + 2 * 64) * 4, (2 * 64 + 128) * 4)
    assert found.number("model", "") == found.number("model", "table") == 0


@pytest.mark.parametrize(
    ("model", "budget", "told"),
    [
        (Stack((8, 32, 8)), 2000, r"^memory.device_gib=1e-6: blocks.1 of model lies on one device or none, and takes"),
        (Stack(), 900, r"^memory.device_gib=1e-6: .* do not lie on 2 devices .*memory.devices"),
        (nn.Linear(8, 8), None, r"^memory.placement=spread: Linear \(model\) does not say where it may be cut"),
    ],
)
def test_what_does_not_fit_or_cannot_be_cut_is_refused(model, budget, told):
    with pytest.raises(ConfigError, match=told):
        plan_map({"model": model}, 2, budget, "memory.device_gib=1e-6" if budget else "")


def test_the_current_device_is_the_blocks_own_and_the_first_after_it(monkeypatch):
    said = []
    monkeypatch.setattr("quantlab.modules.spread.make_current", said.append)
    spread = Spread(plan_map({"model": Stack()}, 2, None), ("cpu", "meta"))
    model = spread.connect("model", Stack())
    with pytest.raises(RuntimeError):
        model.blocks[3](torch.ones(2, 7))
    assert said == ["meta", "cpu"]


@pytest.mark.gpu
def test_on_gpus_a_language_model_answers_as_on_one(llama):
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two CUDA devices")
    ids = torch.arange(20).reshape(2, 10).cuda()
    with torch.no_grad():
        expected = copy.deepcopy(llama).cuda()(input_ids=ids).logits
        made, _ = placed({"model": copy.deepcopy(llama)}, ("cuda:0", "cuda:1"))
        assert {str(p.device) for p in made["model"].parameters()} == {"cuda:0", "cuda:1"}
        assert torch.equal(made["model"](input_ids=ids).logits, expected)
    assert torch.cuda.current_device() == 0
