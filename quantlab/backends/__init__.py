"""The backends: one file a library, one table that lists them.

A backend file has, at module level and without importing torch or its library there:

``Config``
    its native config class;
``resolve(config, device, compute_dtype)``
    the config with every ``auto`` that depends on them made concrete (``device`` is ``cpu`` or ``cuda``);
``quantize(model, layers, config, compute_dtype)``
    replaces each named ``nn.Linear`` of ``model`` by its quantized form, in place, on the device where it is;
``read_back(layer)``
    a :class:`~quantlab.reports.StoredWeight` concluded from the layer's tensors, never from the config;
``save(model, folder)`` and ``load(model, layers, config, folder)``
    the quantized weights to files, and from files into a fresh unquantized copy of the model, in place, so that the
    outputs are bit-equal.

To add a backend: one file here, one row below, its rows in ``capabilities.py``, one option in ``conf/backend``.
"""

from __future__ import annotations
