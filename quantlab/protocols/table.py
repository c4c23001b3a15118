"""The protocols: how a kind of model is run on its inputs and compared with the reference.

A protocol is one file with ``observe(model, inputs, evaluation, progress, batch_size)``, the model's outputs as a tree
that ``torch.save`` stores, and
``measure(model, inputs, evaluation, reference, reference_model, progress, batch_size)``,
which runs a candidate the same way and returns :class:`~quantlab.vocabulary.reports.Measurements`; and
``calls(model, inputs, settings, components, progress)``, an iterator of (component, call): the forward calls that the
named components get while the model runs on the inputs, as :mod:`quantlab.modules.calls` stores a call.
"""

from __future__ import annotations

from types import ModuleType

from quantlab.protocols import diffusion, encoder, language, module

PROTOCOLS: dict[str, ModuleType] = {
    "diffusion": diffusion,
    "language": language,
    "encoder": encoder,
    "module": module,
}
