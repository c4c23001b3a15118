"""The words of tables, messages and documents: one for each thing (``quantlab help WORD``, ``quantlab list words``)."""

from __future__ import annotations

WORDS = {
    "scheme": "how weights are stored: backend, dtype, group size and the other axes, spelled out and checked",
    "candidate": "one of the schemes that a recipe lists (sweep.candidates), and the quantized copy that is measured",
    "job": "one scheme on one model, data set and evaluation: what is run, resumed and reproduced",
    "combination": "one choice of each swept key, before it is known to be possible; a possible one becomes a job",
    "run": "what tracking keeps of a job (or of a sweep): parameters, metrics, artifacts, under a run id",
    "row": "what a job found out, as a line of a table, of rows.json, or of results.rows",
    "reference": "the unquantized model; each quality metric compares with its outputs on the same inputs",
    "floor": "what another legitimate execution of the reference costs (bfloat16, another batch size): below it, "
    "nothing can be told from noise",
    "verdict": "what is said of a difference: better, worse, not distinguishable, inside the floor; by paired tests",
    "front": "the schemes that are surely better than every smaller one (Pareto front of bytes and a metric)",
    "coverage": "share of the components' weights that are stored quantized; in the metrics quantization/coverage",
    "saving": "bytes at 16 bits over the bytes that are stored: 4.00x is a quarter; in the metrics memory/compression",
    "MiB": "stored weights of the quantized components, with scales, zero points and what stays unquantized in them; "
    "in the metrics memory/weights_bytes",
    "bits/weight": "stored bits of a weight, scales included: of the quantized components as a whole, in brackets "
    "of their quantized layers",
    "s": "seconds of the stage evaluate; in the metrics perf/evaluate_s",
    "p (Holm)": "how surprising a difference would be if there were none (paired test), adjusted for the number of "
    "comparisons",
    "margin": "the smallest difference that matters, in the metric's unit: compare margin=VALUE",
    "simulated": "stored wider than the dtype says, and marked with ~: the quality is the dtype's, the bytes are not",
    "recipe": "a YAML file: a model, data, an evaluation and the schemes to measure; quantlab init writes a first one",
    "sweep": "several jobs on one reference: of a recipe's candidates, of a grid, or of -m; a run of its own",
    "component": "a part of a model that is quantized on its own: transformer, text_encoder, model",
}
"""Word -> what it means."""

SHOWN = {
    "\u00b1": "the longer half of the 95 % interval, in the number's own power of ten: 2.3e-6 \u00b10.3",
    "\u00b0": "surely inside the noise floor: the upper bound of the difference is below the floor",
    "(low..high)": "the 95 % interval where it is lopsided or ends at a bound of the metric; else \u00b1 stands for it",
    "*": "on the front: surely better than every smaller scheme (Pareto front of bytes and a metric)",
    "floor_bf16": "the reference in bfloat16: what another dtype of the same weights costs",
    "floor_fp32": "a 16-bit reference in float32: what its own dtype costs",
    "floor_batch": "the reference with another batch size: what the order of sums costs",
    "floor_attention": "the reference with another implementation of attention",
    "floor_device": "the reference made here against the one that was brought along (reference.path)",
    "resumed": "of an earlier job that measured the same: nothing ran; sweep.force=true runs it again",
    "status": "of a row: finished, failed (with the stage and the reason) or skipped (an impossible combination)",
    "failed": "a job that ended with an error, at the stage that is named; it is tried again by the same command",
    "skipped": "a combination that no backend offers; the reason is told",
    "sample": "the unit of uncertainty: an image, a window of text, a pair, a row of a module's output",
    "algorithm": "how codes and scales are found: max of each group, or from calibration data (awq, imatrix)",
    "db": "decibels: ten times a decimal logarithm of a ratio of squares; 3 dB more is half the squared error",
    "nats": "unit of a divergence with natural logarithms; 1 nat is 1.44 bits",
    "fraction": "a share from 0 to 1",
}
"""What else tables show -> what it means."""

ALSO = {
    "memory/compression": "saving",
    "memory/weights_bytes": "MiB",
    "memory/bits_per_weight_model": "bits/weight",
    "memory/bits_per_weight_quantized": "bits/weight",
    "quantization/coverage": "coverage",
    "perf/evaluate_s": "s",
    "size": "MiB",
    "point": "combination",
    "pareto": "front",
    "p": "p (Holm)",
    "holm": "p (Holm)",
    "~": "simulated",
    "bits": "bits/weight",
}
"""Other names of the same -> the word."""
