"""What each backend offers for each dtype: one table that validation, messages, ``quantlab list`` and tests read.

A row is a promise about the pinned library versions; ``tests/contract`` walks the table and runs every promise.
Torch-free, and the only place where it is written down which combination is possible. Backends of other packages
bring an :class:`Offer` of their own (:mod:`quantlab.backends.table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quantlab.vocabulary.dtypes import COMPUTE_DTYPES

LAYER_KINDS = ("linear", "conv", "embedding", "expert", "recurrent", "parameter")
GroupSize = int | str  # a number, or "none": one scale a row


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One (backend, dtype) row."""

    group_sizes: tuple[GroupSize, ...] = ()
    """Values of ``group_size`` that are met exactly; ``auto`` is always allowed."""
    in_features_multiple: int = 1
    """in_features must divide by it, whatever the group size."""
    out_features_multiple: int = 1
    min_out_features: int = 1
    """Fewer rows than these the library's product does not take."""
    min_in_features: int = 1
    """Shorter rows than these the library does not take."""
    numel_multiple: int = 1
    grouping: str = "row"
    """``row``: a group stays in a row, so it divides in_features; ``flat``: blocks run over the flat tensor."""
    layer_kinds: tuple[str, ...] = LAYER_KINDS
    """Accepted ``quantization.layer_kinds``; all but linear are packed, and dequantized when they are read."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    min_compute_capability: tuple[int, int] | None = None
    """CUDA compute capability that the library's kernel asks for; None: any."""
    cuda_activations: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of ``activation_dtypes``, those whose kernel asks for CUDA -> the compute capability; static scales may not."""
    needs_nvcc: bool = False
    """The library compiles CUDA code at first use: ``nvcc`` and ``ninja`` must be there."""
    packages: tuple[str, ...] = ()
    """Import names needed beyond the backend's own."""
    compute_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    overflows_in: tuple[str, ...] = ()
    """Of these, dtypes in which some setting of this row gives infinities where the unquantized layer does not."""
    activation_dtypes: tuple[str, ...] = ("none",)
    """Accepted ``activation_dtype``; the first is what ``auto`` means."""
    algorithms: tuple[str, ...] = ("max",)
    """Accepted ``algorithm``; the first is what ``auto`` means."""
    cuda_algorithms: tuple[str, ...] = ()
    """Of these, what the library runs on CUDA only."""
    is_trainable: bool = True
    """Gradients reach the input through the layer, as adapters need; the quantized weight itself is never trained."""
    is_simulated_on: tuple[str, ...] = ()
    """Devices on which the weights are stored wider than the dtype's name says."""
    may_crash_on: tuple[str, ...] = ()
    """Devices on which the library is known to take the interpreter with it in some setting of this row: a sweep then
    gives the job a process of its own (``sweep.isolation=auto``)."""
    is_prototype: bool = False
    layers_at_once: float = 3
    """Sizes of the layer in float32 that are held beside the quantized model while the library quantizes it and it is
    read back: the layer as it was, its codes, what they decode to and what compares the two."""
    note: str = ""

    def needs(self, device: str) -> str:
        """What the row asks of shapes, of the machine and of the device (``cpu`` or ``cuda``), in words."""
        of_shapes = {
            "in_features": self.in_features_multiple,
            "out_features": self.out_features_multiple,
            "weights": self.numel_multiple,
        }
        said = [f"{what} % {multiple}" for what, multiple in of_shapes.items() if multiple > 1]
        said += [f"out_features >= {self.min_out_features}"] if self.min_out_features > 1 else []
        said += [f"in_features >= {self.min_in_features}"] if self.min_in_features > 1 else []
        if device == "cuda":
            said += [f"CUDA {_version(self.min_compute_capability)}"] if self.min_compute_capability else []
            said += [f"activations {a}: CUDA {_version(v)}" for a, v in self.cuda_activations.items()]
            said += ["nvcc and ninja"] if self.needs_nvcc else []
        said += [f"{', '.join(self.packages)} installed"] if self.packages else []
        if len(self.compute_dtypes) < len(COMPUTE_DTYPES):
            said.append(f"computes in {' or '.join(self.compute_dtypes)}")
        return "; ".join(said)


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


Rows = Mapping[str, Capability]

CALLED = {
    **dict.fromkeys(("bnb", "bits_and_bytes"), "bitsandbytes"),
    **dict.fromkeys(("ggml", "llama.cpp", "llama_cpp", "llamacpp"), "gguf"),
    **dict.fromkeys(("nvidia-modelopt", "nvidia_modelopt", "nvidia"), "modelopt"),
    **dict.fromkeys(("optimum-quanto", "optimum_quanto", "optimum"), "quanto"),
    **dict.fromkeys(("ao", "torch-ao", "torch_ao"), "torchao"),
}
"""What a backend is called elsewhere -> its name here."""

CUSTOM = "custom"
"""What the axes of a pasted config read that no axes spell: what it stores is in the report of its layers alone."""
CUSTOM_ROW = Capability(
    activation_dtypes=(CUSTOM,), algorithms=(CUSTOM,), layer_kinds=("linear",), may_crash_on=("cuda",)
)

_ROW_GROUPS: tuple[GroupSize, ...] = (16, 32, 64, 128, 256, 512)
_BNB_BLOCKS: tuple[GroupSize, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_NONE: Rows = {d: Capability() for d in ("float32", "bfloat16", "float16")}

_BITSANDBYTES: Rows = {
    "nf4": Capability(group_sizes=_BNB_BLOCKS, grouping="flat"),
    "fp4": Capability(group_sizes=_BNB_BLOCKS, grouping="flat"),
    "int8": Capability(
        group_sizes=("none",),
        activation_dtypes=("int8",),
        layer_kinds=("linear",),
        note="LLM.int8: activations are rounded to int8 at run time, but for input columns with a value of "
        "llm_int8_threshold or more: a rule applied at each call, nothing is calibrated",
    ),
}

_TORCHAO: Rows = {
    "int8": Capability(
        group_sizes=("none", *_ROW_GROUPS),
        min_in_features=2,
        activation_dtypes=("none", "int8"),
        algorithms=("max", "awq", "smoothquant", "gptq"),
        cuda_algorithms=("gptq",),
        overflows_in=("float16",),
        note="in float16 with one scale a row, an output beyond 65504 / 127 = 516 times the row's largest weight is "
        "infinite, as the scale comes last; awq, smoothquant, gptq and activation_scales=static need calibration data "
        "and are prototypes of torchao",
    ),
    "float8_e4m3": Capability(
        group_sizes=("none",),
        min_in_features=2,
        activation_dtypes=("none", "float8_e4m3"),
        cuda_activations={"float8_e4m3": (8, 9)},
        may_crash_on=("cuda",),  # scaled by rows, with CUDA 12.9 (pytorch/ao 4582)
        layers_at_once=4,
        note="activation_dtype=float8_e4m3 needs CUDA, compute capability 8.9, or activation_scales=static with "
        "calibration data (a prototype)",
    ),
    "float8_e5m2": Capability(group_sizes=("none",), min_in_features=2, layers_at_once=4),
    "int4": Capability(
        group_sizes=("none", *_ROW_GROUPS),
        min_in_features=2,
        is_simulated_on=("cpu",),
        algorithms=("max", "hqq", "awq", "smoothquant"),
        activation_dtypes=("none", "int8"),
        note="kept in int8 (unpacked_to_int8), or tile_packed_to_4d on CUDA 8.0 in bfloat16, or opaque on a CPU (a "
        "prototype); awq and smoothquant need calibration data, a packed format, activation_dtype=none and "
        "groups of 32, 64 or 128",
    ),
    "int3": Capability(
        group_sizes=("none", *_ROW_GROUPS),
        min_in_features=2,
        is_simulated_on=("cpu", "cuda"),
        algorithms=("max", "hqq"),
    ),
    "int2": Capability(
        group_sizes=("none", *_ROW_GROUPS),
        min_in_features=2,
        is_simulated_on=("cpu", "cuda"),
        algorithms=("max", "hqq"),
    ),
    "nf4": Capability(group_sizes=(64,), grouping="flat", numel_multiple=64 * 256, is_prototype=True, layers_at_once=4),
    "nvfp4": Capability(
        group_sizes=(16,),
        in_features_multiple=16,
        out_features_multiple=16,
        compute_dtypes=("float32", "bfloat16"),
        is_prototype=True,
        layers_at_once=8,
    ),
    "mxfp8": Capability(
        group_sizes=(32,),
        in_features_multiple=32,
        activation_dtypes=("mxfp8",),
        layer_kinds=("linear",),
        is_trainable=False,
        compute_dtypes=("bfloat16",),
        is_prototype=True,
        layers_at_once=4,
    ),
    "mxfp4": Capability(
        group_sizes=(32,),
        in_features_multiple=32,
        min_out_features=2,
        activation_dtypes=("mxfp4",),
        layer_kinds=("linear",),
        is_trainable=False,
        compute_dtypes=("bfloat16",),
        is_prototype=True,
        layers_at_once=8,
    ),
}

_QUANTO_ACTIVATIONS = ("none", "int8", "float8_e4m3", "float8_e5m2")
_QUANTO_NOTE = "activations need calibration data"
_QUANTO: Rows = {
    **{
        d: Capability(activation_dtypes=_QUANTO_ACTIVATIONS, algorithms=algorithms, note=_QUANTO_NOTE)
        for d, algorithms in (
            ("int8", ("max",)),
            ("int4", ("max", "hqq")),
            ("int2", ("max", "hqq")),
            ("float8_e4m3", ("max",)),
            ("float8_e5m2", ("max",)),
        )
    },
}

_IMATRIX = ("max", "imatrix")
_Q32 = Capability(group_sizes=(32,), in_features_multiple=32, packages=("libgguf",))
_K = Capability(in_features_multiple=256, packages=("libgguf",), algorithms=_IMATRIX)
_GGUF: Rows = {
    "q8_0": replace(_Q32, note="ggml's quantizer of it takes no importance matrix"),
    **{d: replace(_Q32, algorithms=_IMATRIX) for d in ("q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")},
    **{
        d: replace(_K, group_sizes=(size,))
        for d, size in (("q6_k", 16), ("q5_k", 32), ("q4_k", 32), ("q3_k", 16), ("q2_k", 16), ("iq4_xs", 32))
    },
}

_MODELOPT_ACTIVATIONS = ("none", "int8", "float8_e4m3")
_MODELOPT_AWQ = ("awq_lite", "awq_clip", "awq_full", "svdquant")
_MODELOPT_INTEGER = ("max", "mse", *_MODELOPT_AWQ, "gptq", "local_hessian")
_MODELOPT_INT3 = Capability(
    group_sizes=("none", *_ROW_GROUPS),
    activation_dtypes=_MODELOPT_ACTIVATIONS,
    algorithms=_MODELOPT_INTEGER,
    is_simulated_on=("cpu", "cuda"),
    layers_at_once=4,
    note="kept in int8: ModelOpt packs 8 and 4 bits",
)
_MODELOPT: Rows = {
    "int8": Capability(
        group_sizes=("none", *_ROW_GROUPS),
        activation_dtypes=_MODELOPT_ACTIVATIONS,
        algorithms=("max", "smoothquant", *_MODELOPT_AWQ, "gptq", "local_hessian"),
        note="algorithm=smoothquant needs activation_dtype=int8",
    ),
    "int4": Capability(
        group_sizes=("none", *_ROW_GROUPS), activation_dtypes=_MODELOPT_ACTIVATIONS, algorithms=_MODELOPT_INTEGER
    ),
    "int3": _MODELOPT_INT3,
    "int2": replace(_MODELOPT_INT3, algorithms=tuple(a for a in _MODELOPT_INTEGER if a != "gptq")),
    "float8_e4m3": Capability(
        group_sizes=("none",),
        activation_dtypes=_MODELOPT_ACTIVATIONS,
        algorithms=("max", "awq_lite", "svdquant", "gptq", "local_hessian"),
    ),
    "nvfp4": Capability(
        group_sizes=(16,),
        in_features_multiple=16,
        devices=("cuda",),
        min_compute_capability=(8, 9),
        algorithms=("max", *_MODELOPT_AWQ),
    ),
    **{
        d: Capability(
            group_sizes=(32,),
            in_features_multiple=32,
            devices=("cuda",),
            needs_nvcc=True,
            note="only its CUDA code rounds to it, compiled at first use",
        )
        for d in ("mxfp8", "mxfp4")
    },
}

_CASTS = "a cast, not a quantization; backend=none casts"
_GGML = "a block format of ggml; gguf stores it"
_BLOCKS = "a block format with kernels of its own that the library does not have"
_COMMON: dict[str, str] = {
    **dict.fromkeys(("float32", "bfloat16", "float16"), _CASTS),
    **dict.fromkeys(_GGUF, _GGML),
}
_REASONS: dict[str, dict[str, str]] = {
    "none": {
        d: "backend=none only casts; choose a backend"
        for b in (_BITSANDBYTES, _TORCHAO, _QUANTO, _GGUF, _MODELOPT)
        for d in b
    },
    "bitsandbytes": {
        **dict.fromkeys(("int4", "int3", "int2"), "its 4 bits are nf4 and fp4; it has no integers below 8 bits"),
        **dict.fromkeys(("float8_e4m3", "float8_e5m2"), "its 8-bit floats are for optimizers, not for layers"),
        **dict.fromkeys(("mxfp8", "mxfp4", "nvfp4"), _BLOCKS),
    },
    "torchao": {
        **dict.fromkeys(
            _GGUF,
            "torchao's prototype of it (GGUFWeightOnlyConfig) leaves layers that do not fit "
            "unquantized without a word; gguf stores it",
        ),
        "fp4": "torchao's 4-bit floats are in blocks: mxfp4, nvfp4",
    },
    "quanto": {
        "int3": "it packs 2 and 4 bits only",
        **dict.fromkeys(("nf4", "fp4"), "its formats are integers and 8-bit floats; it has no codebooks"),
        **dict.fromkeys(("mxfp8", "mxfp4", "nvfp4"), _BLOCKS),
    },
    "gguf": {
        **dict.fromkeys(("int8", "int4", "int3", "int2"), "ggml's integers have names of their own: q8_0, q4_0, q3_k"),
        **dict.fromkeys(("nf4", "fp4"), "ggml's non-linear 4 bits are iq4_nl and iq4_xs"),
        **dict.fromkeys(("float8_e4m3", "float8_e5m2"), "ggml has no 8-bit floats"),
        **dict.fromkeys(("mxfp8", "mxfp4", "nvfp4"), "libgguf does not write it"),
    },
    "modelopt": {
        "nf4": "ModelOpt has no NF4 codebook; what Diffusers calls NF4 there is plain INT4",
        "fp4": "ModelOpt's 4-bit floats are in blocks: nvfp4, mxfp4",
        "float8_e5m2": "ModelOpt packs 8-bit floats as e4m3 only",
    },
}


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a backend stores, by dtype, and why it does not store the others."""

    rows: Rows
    """The first is what ``dtype=auto`` means."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """dtype -> why it is not offered, where it is more than "the library has it not"."""

    probed: Mapping[str, str] = field(default_factory=dict)
    """Installed package -> the version that the rows were probed on; another one may do less, or otherwise."""

    def refusal(self, dtype: str) -> str:
        """Why ``dtype`` is not offered; "" where it is (or where no such dtype exists)."""
        return "" if dtype in self.rows else self.reasons.get(dtype) or _COMMON.get(dtype, "")


_PROBED: dict[str, dict[str, str]] = {
    "none": {},
    "bitsandbytes": {"bitsandbytes": "0.50.2"},
    "torchao": {"torchao": "0.18.0"},
    "quanto": {"optimum-quanto": "0.2.7"},
    "gguf": {"gguf": "0.19.0", "libgguf": "0.2.2"},
    "modelopt": {"nvidia-modelopt": "0.47.0"},
}
Offers = Mapping[str, Offer]
OFFERS: dict[str, Offer] = {
    backend: Offer(rows=rows, reasons=_REASONS[backend], probed=_PROBED[backend])
    for backend, rows in (
        ("none", _NONE),
        ("bitsandbytes", _BITSANDBYTES),
        ("torchao", _TORCHAO),
        ("quanto", _QUANTO),
        ("gguf", _GGUF),
        ("modelopt", _MODELOPT),
    )
}
"""backend -> what is possible, of the backends that come with quantlab."""
