"""What is alive at each hand-over of a calibrated job: counted by weak references, for every calibrated algorithm."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantlab.modules.layers import own_tensors, state_digest, view_of
from quantlab.modules.memory import storages
from quantlab.stages.calibrate import calibrate_component, in_smaller_batches
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from tests.support.calibrated import calibrated_schemes, data, net, request_of

SCHEMES = calibrated_schemes()


def references(module):
    """Weak references to what a module is made of."""
    return [weakref.ref(part) for part in (*module.modules(), *module.parameters(), *module.buffers())]


def living(refs):
    return sum(ref() is not None for ref in refs)


class Scarce:
    """A feed whose memory runs out at its last call, in the first attempt."""

    def __init__(self, feed, is_first):
        self.feed, self.is_first = feed, is_first

    def __getattr__(self, name):
        return getattr(self.feed, name)

    def __call__(self, module):
        for i in range(len(self.feed.calls)):
            self.step(module, i)

    def step(self, module, i):
        if self.is_first and i == len(self.feed.calls) - 1:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return self.feed.step(module, i)


def test_the_table_has_such_schemes():
    assert {scheme.backend for scheme in SCHEMES} >= {"torchao", "quanto", "modelopt", "gguf"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nothing_of_an_attempt_that_ran_out_of_memory_is_there_in_the_next(scheme):
    original, request, refs = net(scheme.compute_dtype), request_of(scheme), []
    throwaway = copy.deepcopy(original)  # libraries are imported now: pytest keeps what they log, with its frames
    calibrate_component(request, throwaway, select_layers(request, throwaway), data(scheme))

    def attempt(batch_size):
        assert living(refs) == 0
        module = copy.deepcopy(original)
        refs.extend(references(module))
        selection = select_layers(request, module)
        found = calibrate_component(request, module, selection, Scarce(data(scheme), batch_size == 4))
        return module, selection, found

    module, selection, found = in_smaller_batches(attempt, 4, "cpu")
    quantize_component(request, module, original, selection, found)
    refs = references(module)
    del module, selection, found
    gc.collect()
    assert living(refs) == 0, "a candidate is gone with its job"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_evidence_compares_with_the_plain_algorithm_without_a_third_dense_copy(scheme, monkeypatch):
    """Layer by layer on the reference's own memory: the same numbers, and the reference stays as it is."""
    request = request_of(scheme)
    plain = request.scheme.without_data()
    if plain is None:
        pytest.skip("no such format without data")
    request = QuantizationRequest(**{**vars(request), "scheme": plain})
    original = net(scheme.compute_dtype)
    before = state_digest(original.state_dict())
    whole, expected = quantize_component(request, copy.deepcopy(original), original)
    module, most = view_of(original), []
    shared = {key for key in storages(original, ())}
    backend = plain.backend.module
    real = backend.quantize

    def watched(model, layers, *args):
        most.append(sum(size for key, size in storages(model, ()).items() if key not in shared))
        return real(model, layers, *args)

    monkeypatch.setattr(backend, "quantize", watched)
    made, report = quantize_component(request, module, original, is_view=True)
    assert len(most) == 2
    assert most[0] <= original[0].weight.nbytes + original[0].bias.nbytes, "one layer's own, and no more"
    assert [row.weight_rel_error for row in report.layers] == [row.weight_rel_error for row in expected.layers]
    x = torch.randn(5, 256).to(getattr(torch, scheme.compute_dtype))
    with torch.no_grad():
        assert torch.equal(made(x), whole(x))
    assert state_digest(original.state_dict()) == before


def test_a_view_has_hooks_and_ties_and_no_memory_of_its_own():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    module["b"].weight = module["a"].weight
    module["a"].register_forward_hook(lambda *_: None)
    view = view_of(module)
    assert storages(view, ()) == storages(module, ())
    assert view["b"].weight is view["a"].weight
    assert view["a"].weight is not module["a"].weight
    assert len(view["a"]._forward_hooks) == 1
    own_tensors(view["a"])
    view["a"].weight.data.zero_()
    view["norm"].to(torch.float64)
    assert module["a"].weight.any()
    assert module["norm"].weight.dtype == torch.float32


def test_a_config_that_speaks_of_layers_is_handed_all_of_them(monkeypatch):
    """Alone, a layer would leave the entry of another one without a match."""
    from quantlab.backends.scheme import scheme_of_config
    from tests.support.tables import BACKENDS

    gguf, original, handed = BACKENDS["gguf"], net("float32"), []
    real = gguf.quantize
    monkeypatch.setattr(
        gguf, "quantize", lambda model, layers, *more: handed.append(list(layers)) or real(model, layers, *more)
    )
    config = gguf.Config(gguf_type="q4_0", tensor_types={"2": "q8_0"})
    request = replace(request_of(SCHEMES[0]), scheme=scheme_of_config(config), compute_dtype="float32")
    _, report = quantize_component(request, view_of(original), original, is_view=True)
    assert handed == [["0", "2"]]
    assert [row.dtype for row in report.layers] == ["q4_0", "q8_0"]
