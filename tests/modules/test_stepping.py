"""Draws, dtypes and steps of a pipeline: heard and paired, and as before afterwards."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from quantlab.modules.stepping import cast_call, heard_steps, in_their_dtypes, paired_draws, seeded


def of_all(dtype):
    """What a pipeline draws: of two generators, by itself, and of the first once more."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    torch.manual_seed(5)
    made = [torch.randn(2, 5, 7, generator=g, dtype=dtype) for g in (first, second)]
    made += [torch.rand_like(made[0]), torch.rand(30, dtype=dtype), torch.randn(20, generator=first)]
    return made


@pytest.mark.parametrize("reference", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_the_references_in_whatever_dtype(dtype, reference):
    own = torch.randn, torch.rand_like
    with paired_draws(()) as told:
        expected = of_all(reference)
    assert all(torch.equal(a, b) for a, b in zip(expected, of_all(reference), strict=True))  # as torch draws
    name = str(reference).removeprefix("torch.")
    assert (torch.randn, torch.rand_like) == own
    assert told == [[name, name], [name, "float32"], [name]]
    if dtype != reference:
        assert not torch.equal(of_all(dtype)[0], expected[0].to(dtype))  # what torch does by itself
    with paired_draws(told) as again:
        found = of_all(dtype)
    assert again == told
    assert all(a.dtype == b.dtype for a, b in zip(found, of_all(dtype), strict=True))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


def test_what_the_reference_did_not_draw_is_drawn_as_asked():
    with paired_draws([["float32"], ["float32"]]):
        made = of_all(torch.bfloat16)
    assert made[4].dtype == torch.float32
    assert torch.equal(made[1], of_all(torch.float32)[1].to(torch.bfloat16))  # as the generators that it knows


def shaped(dtype):
    return torch.zeros(40, dtype=dtype)


WAYS = {
    "normal_": lambda dtype, g: shaped(dtype).normal_(1, 2, generator=g),
    "a part": lambda dtype, g: shaped(dtype)[::2].normal_(generator=g),
    "uniform_": lambda dtype, g: shaped(dtype).uniform_(-1, 1, generator=g),
    "exponential_": lambda dtype, g: shaped(dtype).exponential_(generator=g),
    "log_normal_": lambda dtype, g: shaped(dtype).log_normal_(generator=g),
    "cauchy_": lambda dtype, g: shaped(dtype).cauchy_(generator=g),
    "normal of tensors": lambda dtype, g: torch.normal(shaped(dtype), shaped(dtype) + 1, generator=g),
    "normal of a mean": lambda dtype, g: torch.normal(shaped(dtype), 2.0, generator=g),
    "normal of a size": lambda dtype, g: torch.normal(0.0, 2.0, (40,), generator=g, dtype=dtype),
    "multinomial": lambda dtype, g: torch.multinomial(shaped(dtype) + 1, 20, generator=g),
    "trunc_normal_": lambda dtype, g: torch.nn.init.trunc_normal_(shaped(dtype), generator=g),
    "gumbel_softmax": lambda dtype, g: torch.nn.functional.gumbel_softmax(shaped(dtype)),
    "bernoulli": lambda dtype, g: torch.bernoulli(shaped(dtype) + 0.5, generator=g),
    "randint": lambda dtype, g: torch.randint(0, 9, (40,), generator=g),
}


@pytest.mark.parametrize("reference", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_so_is_what_is_filled_in_place_and_drawn_by_weights(way, dtype, reference):
    def drawn(dtype):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(8)
        makes = [WAYS[way](dtype, own) for own in (generator, None)]
        return *makes, torch.randn(20), torch.randn(20, generator=generator)

    plain = torch.Tensor.normal_
    with paired_draws(()) as told:
        expected = drawn(reference)
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn(reference), strict=True))  # as torch draws
    with paired_draws(told) as again:
        found = drawn(dtype)
    assert again == told
    assert torch.Tensor.normal_ is plain
    assert found[0].dtype == drawn(dtype)[0].dtype
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=2**-6, atol=2**-7)


def test_numpy_and_python_draw_what_belongs_to_the_seed():
    def drawn():
        return random.random(), float(np.random.rand()), float(np.random.normal())

    random.seed(1)
    np.random.seed(1)
    undisturbed = drawn()
    random.seed(1)
    np.random.seed(1)
    found = []
    for seed in (2**40 + 3, 2**40 + 3, 4):
        with seeded(seed):
            found.append(drawn())
    assert found[0] == found[1] != found[2]
    assert drawn() == undisturbed


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, timestep):
        seen.append((x.dtype, timestep.dtype))
        return {"sample": self.linear(x) + timestep.to(x.dtype)}


class Strict(Block):
    """Takes the dtype of what it computes from its timesteps."""

    def forward(self, x, timestep):
        return self.linear(x + 0 * x.to(timestep.dtype).sum() if timestep.dtype == x.dtype else x.to(timestep.dtype))


seen: list[tuple[torch.dtype, torch.dtype]] = []


def test_a_component_of_another_dtype_is_given_and_gives_the_pipelines():
    original, narrow = Block(), Block().to(torch.bfloat16)
    x, timestep = torch.ones(2, 4), torch.tensor([999.0, 999.0])
    seen.clear()
    with in_their_dtypes({"unet": narrow}, {"unet": original}, "float32"):
        assert narrow(x, timestep[:1])["sample"].dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.float32)]  # 999 is no number of bfloat16
    assert "forward" not in vars(narrow)
    with in_their_dtypes({"unet": original}, {"unet": original}, "float32"):
        assert "forward" not in vars(original)


class Said(Block):
    @property
    def dtype(self):
        return self.linear.weight.dtype

    def forward(self, x, timestep):
        seen.append((self.dtype, x.dtype))
        return {"sample": self.linear(x)}


class Latents:
    def __init__(self, parameters):
        self.parameters, self.std = parameters, parameters.exp()


class Autoencoder(Said):
    def encode(self, x):
        return (Latents(self.linear(x)),)

    def decode(self, x):
        return self.linear(x)


def test_a_component_of_another_dtype_says_the_pipelines_outside_of_its_forward():
    original, narrow, decoder = Said(), Said().to(torch.bfloat16), Autoencoder().to(torch.bfloat16)
    seen.clear()
    modules, originals = {"unet": narrow, "vae": decoder}, {"unet": original, "vae": Autoencoder()}
    with in_their_dtypes(modules, originals, "float32"):
        assert narrow.dtype == torch.float32  # noise is drawn in it
        narrow(torch.ones(2, 4), torch.ones(2, 4))
        assert decoder.dtype == torch.bfloat16  # what it is given by its decode
        assert decoder.decode(torch.ones(2, 4)).dtype == torch.float32
        latents = decoder.encode(torch.ones(2, 4))[0]
        assert latents.parameters.dtype == latents.std.dtype == torch.float32  # noise is drawn in it
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert narrow.dtype == torch.bfloat16
    assert (type(narrow), type(decoder)) == (Said, Autoencoder)
    assert decoder.decode(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not {"forward", "encode", "decode"} & set(vars(decoder))


def test_a_decoder_that_its_pipeline_widens_is_given_what_it_then_computes_in():
    """Pipelines of SDXL and AuraFlow decode in float32 where the autoencoder is of float16, and narrow it again."""
    decoder, x = Autoencoder().to(torch.float16), torch.full((2, 4), 1 + 2**-20)
    with in_their_dtypes({"vae": decoder}, {"vae": Autoencoder()}, "float32"):
        narrow = decoder.decode(x)
        wide = decoder.to(torch.float32).decode(x)
        assert torch.equal(wide, decoder.linear(x))
        assert torch.equal(decoder.to(torch.float16).decode(x), narrow)
    assert not torch.equal(wide, narrow)


def test_vectors_are_cast_where_a_model_asks_for_it():
    narrow = Strict().to(torch.bfloat16)
    found = cast_call(narrow, [torch.ones(2, 4), torch.ones(2)], {}, torch.float32, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes"):
        cast_call(narrow, [torch.ones(2, 3), torch.ones(2)], {}, torch.float32, torch.bfloat16)


class Scheduler:
    def step(self, model_output, sample):
        return (sample - model_output,)


class Inheriting(Scheduler):
    pass


@pytest.mark.parametrize("kind", [Scheduler, Inheriting])
def test_steps_are_heard_on_a_scheduler_that_stays_of_its_class(kind):
    watched, other, heard, inner = kind(), kind(), [], []
    before = vars(kind).get("step")
    one = torch.ones(1)
    with heard_steps(watched, lambda given, after: heard.append(after)):
        assert type(watched) is kind  # as pipelines ask
        with heard_steps(watched, lambda given, after: inner.append(after)):
            watched.step(one, one)
        other.step(one, one)
        copy.deepcopy(watched).step(one, one)
        watched.step(model_output=one, sample=one)
    assert (len(heard), len(inner)) == (2, 1)
    assert vars(kind).get("step") is before


def test_two_components_of_a_class_say_each_its_own_dtype():
    first, second, original = Said().to(torch.bfloat16), Said().to(torch.float16), Said()
    with in_their_dtypes({"a": first, "b": second}, {"a": original, "b": Said().to(torch.bfloat16)}, "float32"):
        assert (first.dtype, second.dtype, original.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        assert type(first) is type(second) is Said
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float16)


def test_what_has_no_step_is_left_alone():
    with heard_steps(None, lambda *_: None), heard_steps(object(), lambda *_: None):
        pass
