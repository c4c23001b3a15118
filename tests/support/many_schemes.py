"""A page with as many schemes as a large sweep has, made from that of a small one."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

KINDS = {
    "torchao": ("int8", "int8 a8", "int4 g32", "int4 g64 awq", "int4 g128 hqq", "nvfp4 a-nvfp4", "mxfp8", "nf4"),
    "gguf": ("q8_0", "q6_k", "q5_k imatrix", "q4_k imatrix", "q4_k", "q3_k", "iq4_xs", "q2_k"),
    "modelopt": ("int8", "int4 awq_lite g128", "int4 awq_clip g64", "nvfp4 svdquant", "mxfp4", "int3", "int2", "fp8"),
    "quanto": ("int8", "int4", "int4 hqq", "int2", "float8_e4m3", "float8_e5m2", "int4 g64", "int2 g32"),
    "bitsandbytes": ("nf4", "fp4", "int8", "nf4 double", "nf4 g128", "nf4 g256", "fp4 g64", "int8 t6", "nf4 bf16",
                     "fp4 bf16", "nf4 fp16", "fp4 double"),
}  # fmt: skip


def with_many_schemes(data: Any, layers: int = 30) -> Any:
    """44 schemes, many of them close together; with a map of layers."""
    rng = np.random.default_rng(0)
    group = data["groups"][0]
    old = [r for r in group["rows"] if r["role"] == "candidate"]
    view = group["views"]["latent_rel_mse"]
    names = [f"{backend} {kind}" for backend, kinds in KINDS.items() for kind in kinds]
    rows, verdicts = [], {}
    for i, name in enumerate(names):
        row = copy.deepcopy(old[i % len(old)])
        bits = 8.3 if "8" in name.split()[1] else 4.5 if "4" in name.split()[1] else 2.9
        bits *= float(rng.normal(1, 0.02))
        error = 10 ** (-1.2 * bits / 1.7 + float(rng.normal(0, 0.15)))
        size = bits * 5e5
        numbers = {"value": error, "ci_lo": error * 0.9, "ci_hi": error * 1.1, "floor": None}
        row |= {"name": name, "run_id": f"{i:032x}", "backend": name.split()[0], "weights_bytes": size, "link": None}
        row |= {"bits_per_weight_model": bits, "compression": 16 / bits}
        row["metrics"] = {**row["metrics"], "latent_rel_mse": numbers}
        row["axes"] = {"weights_bytes": size, "bits_per_weight_model": bits, "denoise_step_ms": 300 * rng.random() + 50}
        rows.append(row)
        verdicts[name] = {**view["verdicts"][old[0]["name"]]}
    rows.sort(key=lambda r: r["weights_bytes"])
    group["rows"] = [*(r for r in group["rows"] if r["role"] != "candidate"), *rows]
    best, front = 1.0, []
    for row in rows:
        if row["metrics"]["latent_rel_mse"]["value"] < best:
            best = row["metrics"]["latent_rel_mse"]["value"]
            front.append(row["name"])
    view |= {"front": front, "verdicts": verdicts, "pairs": [], "twins": [], "costs": []}
    step = {
        "key": "denoise_step_ms",
        "title": "denoise step",
        "unit": "ms",
        "higher_is_better": False,
        "note": "on a CPU",
    }
    group["axes"] = [a for a in group["axes"] if a["key"] == "weights_bytes"] + [step]
    group["views"] = {"latent_rel_mse": view}
    group["layers"] = {
        **group["layers"],
        "rows": [f"transformer_blocks.{i // 3}.attn.to_{'qkv'[i % 3]}" for i in range(layers)],
        "columns": [r["name"] for r in rows],
        "values": [[float(rng.random() / 10) for _ in rows] for _ in range(layers)],
    }
    return data


def with_components(data: Any) -> Any:
    """The same page of schemes that name each component's own, with layers as deep as a text encoder's."""
    text = json.dumps(data)
    for name in ("int4 a", "int4 b", "int8 a", "int8 b", "int4 c"):
        text = text.replace(f'"{name}"', f'"transformer: bitsandbytes {name} + text_encoder_3: quanto {name}"')
    made = json.loads(text)
    group = made["groups"][0]
    layer = "text_encoder_3: encoder.block.0.layer.1.DenseReluDense.wi_"
    group["layers"]["rows"] = [f"{layer}{i}" for i in range(30)]
    group["layers"]["values"] = [group["layers"]["values"][0]] * 30
    parts = {"transformer": "bitsandbytes", "text_encoder_3": "quanto"}
    names = [row["name"] for row in group["rows"] if row["role"] == "candidate"]
    group["kinds"] = {part: {name: f"{by} {name.split()[2]}" for name in names} for part, by in parts.items()}
    group["unquantized"] = [
        f"all 5 schemes: the largest is {layer.replace(': ', '.')}relative_attention_bias_of_all_heads"
    ]
    return made
