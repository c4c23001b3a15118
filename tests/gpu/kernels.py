"""Each kernel of a backend against the weight that its layer reads back as: ``python tests/gpu/kernels.py torchao``.

A process a backend, as a kernel may take the interpreter with it. Prints a JSON object a line: the scheme, the compute
dtype, the case and the relative error of the layer's output, against float64 products of the decoded weight.
"""

import argparse
import itertools
import json
import math
import time

import torch
from torch import nn

import quantlab
from tests.support.schemes import schemes_on
from tests.support.tables import BACKENDS, CAPABILITIES

ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Compute dtype -> what a product in it may differ by."""
INPUTS = {
    "none": 0.0,
    "int8": 0.03,
    "float8_e4m3": 0.06,
    "float8_e5m2": 0.1,
    "mxfp8": 0.06,
    "mxfp4": 0.25,
    "nvfp4": 0.2,
}
"""Activation dtype -> what rounding normally distributed inputs adds."""


def shapes(row):
    """(out_features, in_features): one that fits everything, a row longer than a CUDA block, and ragged sides."""
    yield 96, 512
    yield 64, 4096
    step_in, step_out = math.lcm(row.in_features_multiple, 1), row.out_features_multiple
    if row.numel_multiple == 1:
        yield (33 if step_out == 1 else 3 * step_out), (130 if step_in == 1 else 3 * step_in)


def cases(in_features, dtype, device):
    """Name -> input."""
    draw = torch.Generator().manual_seed(1)
    made = {f"{rows} rows": torch.randn(rows, in_features, generator=draw) for rows in (1, 8, 17)}
    made["transposed"] = torch.randn(in_features, 24, generator=draw).t()
    made["transposed image"] = torch.randn(1, in_features, 24, generator=draw).permute(0, 2, 1)
    made["one token a sample"] = torch.randn(3, 1, in_features, generator=draw)
    made["no rows"] = torch.randn(0, in_features, generator=draw)
    if dtype != "float16":
        made["beyond float16"] = made["17 rows"] * 1e5
    for name, x in made.items():
        yield name, x.to(device, getattr(torch, dtype))


def rows_of(backend, device, names=None, dtypes=None, is_wanted=lambda number, scheme: True):
    """A dictionary for each scheme, compute dtype, shape and case; ``error`` is None where something was raised."""
    for number, scheme in enumerate(schemes_on(device)):
        row = CAPABILITIES[scheme.backend][scheme.dtype]
        if scheme.backend != backend or (names and str(scheme) not in names) or not is_wanted(number, scheme):
            continue
        for dtype, shape in itertools.product(row.compute_dtypes, shapes(row)):
            if dtypes is None or dtype in dtypes:
                yield from _of(scheme, dtype, shape, device)


def _of(scheme, dtype, shape, device):
    told = {"scheme": str(scheme), "compute_dtype": dtype, "shape": list(shape)}
    torch.manual_seed(0)
    out_features, in_features = shape
    model = nn.Sequential(nn.Linear(in_features, out_features)).to(device, getattr(torch, dtype)).eval()
    seen = [torch.randn(16, in_features).to(device, getattr(torch, dtype)) for _ in range(4)]
    started = time.perf_counter()
    try:
        made, report = quantlab.quantize(model, scheme.native, calibration=seen if scheme.native.needs_data else None)
        stored = BACKENDS[scheme.backend].read_back(made[0])
    except quantlab.QuantlabError as error:
        yield {**told, "case": "quantize", "error": None, "refused": str(error).splitlines()[0][:200]}
        return
    except Exception as error:  # noqa: BLE001 what a kernel raises is a finding
        yield {**told, "case": "quantize", "error": None, "raised": f"{type(error).__name__}: {error}"[:300]}
        return
    told["seconds"] = round(time.perf_counter() - started, 2)
    told["weight_error"] = report.layers[0].weight_rel_error
    dense, bias = stored.dense.double(), model[0].bias.detach().double()
    is_static = report.layers[0].activation_granularity.endswith("static")
    tolerance = ROUNDING[dtype] + INPUTS[report.layers[0].activation_dtype] * (2 if is_static else 1)
    for case, x in cases(in_features, dtype, device):
        if is_static and case == "beyond float16":  # of what it was calibrated on, too
            continue
        wanted = x.double() @ dense.T + bias
        try:
            with torch.no_grad():
                found = made(x).double()
            difference = (found - wanted).norm() / wanted.norm() if x.numel() else torch.zeros(())
            same = tuple(found.shape) == tuple(wanted.shape)
            error = float(difference) if same else math.inf
            yield {**told, "case": case, "error": error, "tolerance": tolerance, "ok": error < tolerance}
        except Exception as error:  # noqa: BLE001 what a kernel raises is a finding
            yield {**told, "case": case, "error": None, "raised": f"{type(error).__name__}: {error}"[:300]}
            if "CUDA error" in str(error):
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schemes", nargs="*")
    parser.add_argument(
        "--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="each Nth scheme, from I on"
    )
    parser.add_argument("--plain", action="store_true", help="without calibration data")
    given = parser.parse_args()

    def is_wanted(number, scheme):
        return number % given.part[1] == given.part[0] and not (given.plain and scheme.native.needs_data)

    for found in rows_of(given.backend, given.device, given.schemes, is_wanted=is_wanted):
        print(json.dumps(found), flush=True)
