"""The backends: one file a library, one table that lists them.

A backend file has, at module level and without importing torch or its library there:

``Config``
    its native config class;
``resolve(config, device, compute_dtype)``
    the config with every ``auto`` that depends on them made concrete (``device`` is ``cpu`` or ``cuda``);
``calibrate(model, layers, config, compute_dtype, feed)``
    only in backends that use data, called before ``quantize`` and only for configs whose ``needs_data`` is true: puts
    observers on the named layers of ``model``, in place, runs ``feed(model)`` (a
    :class:`~quantlab.modules.feed.CalibrationFeed`) as often as the algorithm needs, and returns what ``quantize``
    needs of it (None where the layers hold it themselves);
``quantize(model, layers, config, compute_dtype, calibrated)``
    replaces each named ``nn.Linear`` of ``model`` by its quantized form, in place, on the device where it is;
    ``calibrated`` is what ``calibrate`` returned, and is passed only for configs whose ``needs_data`` is true;
``write_calibration(calibrated, folder, feed)``
    only where the library has a file format for what calibration found: writes it and returns the file's path;
``read_back(layer)``
    a :class:`~quantlab.vocabulary.reports.StoredWeight` concluded from the layer's tensors, never from the config;
``save(model, folder)`` and ``load(model, layers, config, folder)``
    the quantized weights to files, and from files into a fresh unquantized copy of the model, in place, so that the
    outputs are bit-equal.

``README.md`` beside this file says how a backend is written, in order.
"""

from __future__ import annotations
