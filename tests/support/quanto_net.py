"""What quanto stores a weight as, how far that is off, and a module whose weights show it."""

from __future__ import annotations

WEIGHTS = {"int8": "int8", "int4": "int4", "int2": "int2", "float8": "float8_e4m3", "float8_e5m2": "float8_e5m2"}
MAX_ERROR = {"int8": 0.01, "int4": 0.13, "int2": 0.6, "float8": 0.03, "float8_e5m2": 0.06}


def mlp(torch, k: int = 512, n: int = 48, dtype: str = "float32", bias: bool = True):
    torch.manual_seed(0)
    layers = torch.nn.Linear(k, n, bias=bias), torch.nn.GELU(), torch.nn.Linear(n, 8)
    model = torch.nn.Sequential(*layers).to(getattr(torch, dtype)).eval()
    for layer in (model[0], model[2]):
        torch.nn.init.normal_(layer.weight)
    return model.requires_grad_(False)


def relative(torch, a, b) -> float:
    return float(torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()))
