"""A component that is quantized while it is read from its files is, bit for bit, the one that was loaded whole."""

import copy
import functools
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantlab.errors import ConfigError, ModelError
from quantlab.models.architectures import Part, read_architecture
from quantlab.models.outline import empty
from quantlab.modules.layers import state_digest
from quantlab.modules.source import Source, shards_of
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_streamed
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tables import CAPABILITIES, storages, the_scheme
from tests.support.tiers import covering
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tied Llama in shards with an index, whose rows of 256 fit every block."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder / "one", hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "one")
    model.to(torch.bfloat16).save_pretrained(folder / "shards", max_shard_size="700KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder / "shards"


def source_of(folder, dtype="bfloat16", key="model.path=x"):
    part = read_architecture(ModelConfig(family="causal_lm", path=str(folder)), "model").parts["model"]
    return Source(module=empty(key, part, dtype), shards=shards_of(key, folder), device="cpu")


def request_of(backend, dtype, compute_dtype="bfloat16", settings=None, **axes):
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, on_mismatch="skip", **axes), settings)
    return QuantizationRequest(
        component="model",
        scheme=scheme,
        compute_dtype=compute_dtype,
        device="cpu",
        default_exclusions=("lm_head",),
    )


def streamed(source, request):
    module = copy.deepcopy(source.module)
    chosen = select_streamed(request, module)
    return quantize_component(request, module, source.module, chosen, source=source)


def answer(module):
    with torch.no_grad():
        return module(input_ids=torch.arange(1, 33)[None]).logits


EVERY = [
    (b, d, next(c for c in ("bfloat16", "float32") if c in row.compute_dtypes))
    for b, rows in CAPABILITIES.items()
    if b != "none"
    for d, row in rows.items()
    if "cpu" in row.devices
]


@pytest.fixture(scope="module")
def both(llama):
    """dtype -> the model as it lies in its files, and as it was loaded whole."""
    from transformers import AutoModelForCausalLM

    def load(dtype):
        whole = AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
        return source_of(llama, dtype), whole.eval().requires_grad_(False)

    return functools.cache(load)


@pytest.mark.parametrize(
    ("backend", "dtype", "compute"),
    covering(EVERY, lambda c: (c[0], c[0] + c[2])),  # a library's formats go one way
    ids=["-".join(c[:2]) for c in EVERY],
)
def test_bits_are_those_of_a_model_that_was_loaded_whole(both, backend, dtype, compute):
    source, whole = both(compute)
    request = request_of(backend, dtype, compute)
    made, report = streamed(source, request)
    resident, known = quantize_component(request, copy.deepcopy(whole), whole)
    assert report == known
    assert report.coverage > 0.5
    assert torch.equal(answer(made), answer(resident))
    assert state_digest(made.state_dict()) == state_digest(resident.state_dict())
    assert sum(storages(made).values()) == sum(storages(resident).values())
    assert not [n for n, p in made.named_parameters() if p.is_meta]


@pytest.mark.parametrize(("backend", "dtype"), [("quanto", "int8"), ("gguf", "q8_0")])
def test_it_says_how_many_layers_are_done(llama, backend, dtype):
    """Of a large model they take minutes: streamed one by one, whole all at once, and read back one by one."""
    source, told = source_of(llama), []
    request, module = request_of(backend, dtype), copy.deepcopy(source.module)
    chosen = select_streamed(request, module)
    num = len(chosen.taken)
    tell = lambda *args: told.append(args)  # noqa: E731
    quantize_component(request, module, source.module, chosen, source=source, advance=tell)
    assert num > 3
    one_by_one = [("quantize", i, num) for i in range(num + 1)]
    assert told == [*one_by_one, *(("read back", i, num) for i in range(1, num + 1))]
    told.clear()
    whole = nn.Sequential(*(nn.Linear(256, 256) for _ in range(num)))
    quantize_component(request_of(backend, dtype, "float32"), copy.deepcopy(whole), whole, advance=tell)
    assert told == [("quantize", 0, num), ("quantize", num, num), *(("read back", i, num) for i in range(1, num + 1))]


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_every_part_of_a_pipeline_is_filled_as_it_is_loaded(tmp_path, name):
    """Names, dtypes, ties, and buffers that are in no file; with no scheme at all."""
    from diffusers import DiffusionPipeline

    folder = BUILDERS["flux"](tmp_path / "flux")
    part = read_architecture(ModelConfig(family="diffusers", path=str(folder))).parts[name]
    source = Source(module=empty("k", part, "bfloat16"), shards=shards_of("k", folder / name), device="cpu")
    module = copy.deepcopy(source.module)
    source.fill_others(module, ())
    whole = getattr(DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16), name)
    assert state_digest(dict(module.named_buffers())) == state_digest(dict(whole.named_buffers()))
    assert state_digest(module.state_dict()) == state_digest(whole.state_dict())
    assert sum(storages(module).values()) == sum(storages(whole).values())


def test_a_mix_of_formats_and_a_fallback_are_streamed_too(llama):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval().requires_grad_(False)
    for settings, axes in (({"file_type": "q4_k_m"}, {}), ({"tensor_types": {"*.q_proj": "q8_0"}}, {})):
        request = request_of("gguf", "q4_k", settings=settings, **axes)
        made, report = streamed(source_of(llama), request)
        resident, known = quantize_component(request, copy.deepcopy(whole), whole)
        assert report == known
        assert len({row.dtype for row in report.layers}) > 2
        assert state_digest(made.state_dict()) == state_digest(resident.state_dict())


def test_what_needs_data_is_refused(llama):
    source = source_of(llama)
    with pytest.raises(ConfigError, match="^memory.placement=streamed: .*algorithm=awq"):
        streamed(source, request_of("torchao", "int8", algorithm="awq"))


def broken(llama, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(llama, folder)
    return folder, sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"


def cut_off(folder, files, index):
    files[0].write_bytes(files[0].read_bytes()[:-100])


def missing(folder, files, index):
    files[1].unlink()


def lying(folder, files, index):
    data = json.loads(index.read_text())
    name = next(n for n, f in data["weight_map"].items() if f == files[0].name)
    data["weight_map"][name] = files[1].name
    index.write_text(json.dumps(data))


def no_index(folder, files, index):
    index.write_text("{")


def with_down_proj(files):
    for file in files:
        tensors = load_file(file)
        if found := [n for n in tensors if n.endswith("down_proj.weight")]:
            return file, tensors, found[0]
    raise AssertionError("no shard has one")


def lost(folder, files, index):
    file, tensors, name = with_down_proj(files)
    del tensors[name]
    save_file(tensors, file)
    data = json.loads(index.read_text())
    del data["weight_map"][name]
    index.write_text(json.dumps(data))


def other_shape(folder, files, index):
    file, tensors, name = with_down_proj(files)
    tensors[name] = tensors[name][:, :64].contiguous()
    save_file(tensors, file)


def none_at_all(folder, files, index):
    for file in [*files, index]:
        file.unlink()


@pytest.mark.parametrize("damage", [cut_off, missing, lying, no_index, lost, other_shape, none_at_all])
def test_damaged_files_are_one_message(llama, tmp_path, damage):
    folder, files, index = broken(llama, tmp_path)
    damage(folder, files, index)
    with pytest.raises(ModelError) as caught:
        streamed(source_of(folder), request_of("bitsandbytes", "nf4"))
    assert str(caught.value).startswith("model.path=x"), caught.value


def test_layers_are_read_one_at_a_time(llama, monkeypatch):
    """While one layer is quantized, no other unquantized layer has values."""
    source, seen = source_of(llama), []
    module = copy.deepcopy(source.module)
    request = request_of("quanto", "int8")
    chosen = select_streamed(request, module)
    true = request.scheme.backend.module.quantize

    def watch(model, names, *args):
        dense = [n for n, m in model.named_modules() if n in chosen.taken and type(m) is nn.Linear]
        seen.append([n for n in dense if not model.get_submodule(n).weight.is_meta])
        true(model, names, *args)

    monkeypatch.setattr(request.scheme.backend.module, "quantize", watch)
    quantize_component(request, module, source.module, chosen, source=source)
    assert seen == [[name] for name in chosen.taken]


def test_a_class_that_no_library_has_is_refused():
    with pytest.raises(ModelError, match="^k: .*NoSuchClass"):
        empty("k", Part(class_name="NoSuchClass", config={}), "float32")


@pytest.mark.parametrize("backend", [b for b in CAPABILITIES if b != "none"])
def test_the_dense_weight_of_a_layer_is_gone_before_the_next_is_read(llama, backend, monkeypatch):
    dtype, compute = next((d, c) for b, d, c in EVERY if b == backend and d not in ("float8_e5m2",))
    request, source, seen, alive = request_of(backend, dtype, compute), source_of(llama, compute), {}, []
    fill = Source.fill

    def watched(self, module, path):
        alive.append([n for n, weight in seen.items() if weight() is not None])
        fill(self, module, path)
        seen[path] = weakref.ref(module.get_submodule(path).weight)

    monkeypatch.setattr(Source, "fill", watched)
    streamed(source, request)
    assert len(seen) > 4
    assert max(map(len, alive)) <= 1
