"""The parts of a pipeline come and go, also those of a candidate, which are in no file; nothing else changes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantlab.errors import ConfigError
from quantlab.models.diffusers_pipeline import load
from quantlab.models.part_by_part import placed_alone, placed_by_groups
from quantlab.modules.groups import blocks_of, most_bytes, num_bytes
from quantlab.modules.layers import state_digest
from quantlab.modules.residence import Prompts, Residence
from quantlab.stages.observe import observed_settings
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiers import default_of
from tests.support.tiny_families import family_model
from tests.support.tiny_pipelines import BUILDERS, SMALL


@pytest.fixture
def model(tmp_path):
    folder = BUILDERS["flux"](tmp_path / "flux")
    config = ModelConfig(family="diffusers", path=str(folder), components=["text_encoder_2", "vae"])
    return load(config, "cpu", tmp_path / "cache")


def alone(model, tmp_path):
    return placed_alone(model, "cpu", None, Prompts(folder=tmp_path / "prompts", key="k"))


def with_candidates(model, originals, names):
    """A model whose ``names`` are of a candidate: halved weights."""
    made = {name: copy.deepcopy(originals[name]) for name in names}
    for module in made.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone() * 0.5
    return model.with_components(made)


def made_by(model):
    assert model.sample is not None
    return model.sample(model, torch.tensor([3, 4]), {"prompt": ["a red fox", "two cats"]}, replace(SMALL, height=32))


@pytest.fixture
def seen(monkeypatch):
    """What was on the device after each change: (who was wanted, the names that are there)."""
    found = []
    bring = Residence.bring

    def brought(self, name):
        before = set(self.here), {n for n, g in self.waiting.items() if g.is_away}
        bring(self, name)
        here = {*self.here, *(n for n, guest in self.waiting.items() if not guest.is_away)}
        if (set(self.here), {n for n, g in self.waiting.items() if g.is_away}) != before:
            found.append((name, here))

    monkeypatch.setattr(Residence, "bring", brought)
    return found


@pytest.mark.parametrize("names", [["transformer"], ["transformer", "vae"], ["text_encoder_2", "transformer", "vae"]])
def test_images_are_decoded_when_the_candidates_denoiser_has_gone(names, model, tmp_path, seen, monkeypatch):
    originals = dict(model.components)
    expected = made_by(with_candidates(model, originals, names))
    monkeypatch.setattr("quantlab.modules.residence.moves", lambda device: True)  # as on a GPU
    candidate = with_candidates(alone(model, tmp_path), originals, names)
    for _ in range(2):
        made = made_by(candidate)
        assert torch.equal(made.latents, expected.latents)
        assert torch.equal(made.media["images"], expected.media["images"])
        assert [here for name, here in seen if name == "vae"][-1] == {"vae"}
        assert all(name in here for name, here in seen)
        assert all(len(here) == 1 for _, here in seen[len(names) :])  # at first all guests are there
        for name in names:
            assert all(p.untyped_storage().nbytes() for p in candidate.components[name].parameters())
            assert not candidate.components[name]._forward_pre_hooks


@pytest.mark.parametrize(
    "names", default_of([[], ["transformer"], ["text_encoder", "unconditional_transformer"]], ["transformer"])
)
def test_a_part_of_which_only_the_layers_are_called_comes_for_them(names, tmp_path, monkeypatch):
    """Ideogram 4 calls its text encoder's embedding and its layers, one by one, and never the encoder."""
    model, inputs = family_model("ideogram_4", tmp_path)
    components = dict.fromkeys(("text_encoder", "transformer", "unconditional_transformer"))
    model = model.with_components({name: model.parts["pipeline"].components[name] for name in components})
    originals, settings = dict(model.components), replace(SMALL, height=32, width=32)

    def run(placed):
        candidate = with_candidates(placed, originals, names)
        given = candidate, inputs.noise, inputs.conditioning, settings
        return [candidate.sample(*given) for _ in range(2)]

    expected = run(model)
    monkeypatch.setattr("quantlab.modules.residence.moves", lambda device: True)  # as on a GPU
    placed = replace(alone(model, tmp_path), parts={**alone(model, tmp_path).parts, "prompts": None})
    for made, wanted in zip(run(placed), expected, strict=True):
        assert torch.equal(made.latents, wanted.latents)
        assert torch.equal(made.media["images"], wanted.media["images"])


def test_on_a_processor_nothing_is_moved(model, tmp_path, seen):
    originals = dict(model.components)
    candidate = with_candidates(alone(model, tmp_path), originals, ["transformer"])
    made_by(candidate)
    assert not candidate.parts["residence"].waiting
    assert {name for name, _ in seen} == {"text_encoder", "text_encoder_2", "vae"}


def test_tiles_change_the_pixels_of_reference_and_candidate_alike_wherever_they_lie(model, tmp_path):
    tiled = replace(SMALL, height=64, width=64, tiled_decoding=True)
    given = model, torch.tensor([3]), {"prompt": ["a red fox"]}
    decoder = model.parts["pipeline"].vae
    decoder.tile_sample_min_size, decoder.tile_latent_min_size = 32, 16
    plain = model.sample(*given, replace(tiled, tiled_decoding=False))
    assert not decoder.use_tiling
    resident = model.sample(*given, tiled)
    assert torch.equal(plain.latents, resident.latents)
    assert not torch.equal(plain.media["images"], resident.media["images"])
    placed = alone(model, tmp_path)
    decoder = placed.parts["pipeline"].vae
    decoder.tile_sample_min_size, decoder.tile_latent_min_size = 32, 16
    again = placed.sample(placed, *given[1:], tiled)
    assert torch.equal(resident.media["images"], again.media["images"])


def test_tiles_are_part_of_what_a_reference_is_of():
    assert observed_settings(SMALL) != observed_settings(replace(SMALL, tiled_decoding=True))


@pytest.fixture
def encoded(model):
    """The batches that the text encoders ran on."""
    found = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(model.parts["pipeline"], name).register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    return found


def keeping(model, tmp_path):
    return replace(model, parts={**model.parts, "prompts": Prompts(folder=tmp_path / "prompts", key="k")})


def test_prompts_are_encoded_once_where_all_parts_stay(model, tmp_path, encoded):
    expected = made_by(model)
    encoded.clear()
    kept = keeping(model, tmp_path)
    first, again = made_by(kept), made_by(kept)
    assert encoded == [2, 2]
    candidate = made_by(with_candidates(kept, model.components, ["transformer", "vae"]))
    assert encoded == [2, 2]
    assert not torch.equal(candidate.latents, first.latents)
    for made in (first, again):
        assert torch.equal(made.latents, expected.latents)
        assert torch.equal(made.media["images"], expected.media["images"])
    kept.sample(kept, torch.tensor([3]), {"prompt": ["a red fox"]}, replace(SMALL, height=32))
    assert encoded == [2, 2, 1, 1]  # by itself it is another call
    placed = alone(model, tmp_path)
    assert torch.equal(made_by(placed).latents, expected.latents)
    assert not placed.parts["residence"].here


def test_an_encoder_that_is_measured_encodes_each_time(model, tmp_path, encoded):
    kept = keeping(model, tmp_path)
    reference = made_by(kept)
    encoded.clear()
    candidate = with_candidates(kept, model.components, ["text_encoder_2"])
    first, again = made_by(candidate), made_by(candidate)
    assert len(encoded) == 4
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, reference.latents)
    assert torch.equal(made_by(kept).latents, reference.latents)


def test_damaged_and_other_prompts_are_not_taken(model, tmp_path, encoded):
    kept = keeping(model, tmp_path)
    expected = made_by(kept)
    [file] = (tmp_path / "prompts").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    encoded.clear()
    assert torch.equal(made_by(kept).latents, expected.latents)
    made_by(replace(kept, parts={**kept.parts, "prompts": Prompts(folder=tmp_path / "prompts", key="other")}))
    made_by(kept.with_components({"transformer": copy.deepcopy(kept.components["transformer"]).to(torch.bfloat16)}))
    assert encoded == [2, 2] * 3
    guided = replace(SMALL, height=32, guidance_scale=7.0)  # some pipelines look at it while they encode
    kept.sample(kept, torch.tensor([3, 4]), {"prompt": ["a red fox", "two cats"]}, guided)
    assert encoded == [2, 2] * 4


def by_groups(model, tmp_path):
    return placed_by_groups(model, "cpu", None, Prompts(folder=tmp_path / "prompts", key="k"))


def test_a_pipeline_in_groups_makes_the_same(model, tmp_path):
    originals = {name: copy.deepcopy(module) for name, module in model.components.items()}
    expected = made_by(model)
    halved = made_by(with_candidates(model, originals, ["transformer"]))
    placed = by_groups(model, tmp_path)
    assert hasattr(placed.components["transformer"].transformer_blocks[0], "_diffusers_hook")
    for reference in (made_by(placed), made_by(placed)):
        assert torch.equal(reference.latents, expected.latents)
        assert torch.equal(reference.media["images"], expected.media["images"])
    assert torch.equal(made_by(with_candidates(placed, originals, ["transformer"])).latents, halved.latents)
    cast = placed.copy_of("transformer")
    assert state_digest(cast.state_dict()) == state_digest(originals["transformer"].state_dict())
    same = placed.with_components({"transformer": placed.placed("transformer", cast)})
    assert torch.equal(made_by(same).latents, expected.latents)


def test_a_class_that_cannot_run_in_groups_is_refused_by_name(model, tmp_path):
    model.components["transformer"]._supports_group_offloading = False
    told = r"^memory.placement=group_offload: Diffusers says of FluxTransformer2DModel \(transformer\)"
    with pytest.raises(ConfigError, match=told):
        by_groups(model, tmp_path)


def test_blocks_come_one_by_one_where_most_weights_are_in_them():
    block = nn.Linear(64, 64, bias=False)
    deep = nn.ModuleDict({"blocks": nn.ModuleList([block, nn.Linear(64, 64, bias=False)]), "head": nn.Linear(64, 8)})
    assert blocks_of(deep) == [*deep["blocks"]]
    assert most_bytes(deep) == num_bytes(deep)
    shallow = nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(64, 640)})
    assert blocks_of(shallow) == []
    assert most_bytes(shallow) == (64 + 1) * 640 * 4
    tied = nn.ModuleDict({"blocks": nn.ModuleList([block, nn.Linear(64, 64, bias=False)])})
    tied["blocks"][1].weight = block.weight
    assert blocks_of(tied) == []


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["alone", "group_offload"])
def test_on_a_gpu_parts_come_and_go_and_make_the_same(where, tmp_path):
    folder = BUILDERS["flux"](tmp_path / "flux")
    config = ModelConfig(family="diffusers", path=str(folder), dtype="float32", components=["vae"])
    whole = load(config, "cuda", tmp_path / "cache")
    originals = {name: copy.deepcopy(module) for name, module in whole.components.items()}
    place = {"alone": placed_alone, "group_offload": placed_by_groups}[where]
    prompts = Prompts(folder=tmp_path / "prompts", key="k")
    placed = place(load(config, "cpu", tmp_path / "cache"), "cuda", None, prompts)
    for names in ([], ["transformer"], ["transformer", "vae"]):
        expected, made = (made_by(with_candidates(m, originals, names)) for m in (whole, placed))
        assert torch.equal(made.latents, expected.latents)
        assert torch.equal(made.media["images"], expected.media["images"])
    if where == "group_offload":
        assert {p.device.type for p in placed.components["transformer"].parameters()} == {"cpu"}
