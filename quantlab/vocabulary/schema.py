"""The schema of a run: one typed dataclass for each node of the composed configuration. Torch-free, mutable, plain."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.fields import SEED, choice, number, path, text
from quantlab.vocabulary.launching import LauncherConfig

__all__ = ["LauncherConfig"]
_MANY = 10**6
SAMPLERS = ("tpe", "nsga2", "random")


@dataclass
class ModelConfig:
    """The ``model`` node."""

    family: str = "digits_dit"
    """Row of ``models.FAMILIES``."""
    path: str | None = path(None)
    """Local folder or Hub id."""
    revision: str | None = None
    variant: str | None = None
    """Which of a checkpoint's weight files are read: ``fp16`` for ``model.fp16.safetensors``; null: those without."""
    without: list[str] = field(default_factory=list)
    """Components of a pipeline that are not loaded, where it can do without (SD 3's ``text_encoder_3``)."""
    components: list[str] = field(default_factory=list)
    """Components to quantize; empty: the family's main ones (the denoisers, the model)."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of a pipeline's own call: ``{negative_prompt: "", true_cfg_scale: 4.0}``."""
    dtype: str = choice("auto", *COMPUTE_DTYPES)
    """Compute dtype of the reference; auto: float32 on a CPU; on a GPU bfloat16 for pipelines, and for other models
    what config.json says, or else what most weights in the files are of."""
    default_exclusions: list[str] = field(default_factory=list)
    """The family's own entries of ``modules_to_not_convert``."""


@dataclass
class DigitsModelConfig(ModelConfig):
    """``model=digits_dit``: trained on first use, then found in the cache by content."""

    num_train_steps: int = number(500, 1, _MANY)
    train_batch_size: int = number(64, 1, 1797)
    train_seed: int = number(0, 0, SEED)
    num_layers: int = number(3, 1, 64)
    num_heads: int = number(8, 1, 64)


@dataclass
class DatasetConfig:
    """The ``dataset`` node: what the model is evaluated on."""

    name: str = "digits_classes"
    """Row of ``datasets.DATASETS``."""
    path: str | None = path(None)
    """A file of the user's own (prompts, one a line; or text)."""
    seed: int = number(0, 0, SEED)


@dataclass
class EvaluationConfig:
    """The ``evaluation`` node. A protocol reads the fields it needs."""

    num_samples: int = number(200, 1, _MANY)
    batch_size: int = number(100, 1, _MANY)
    floor_batch_size: int = number(50, 1, _MANY)
    """Batch size of the ``floor_batch`` row."""
    num_bootstrap: int = number(2000, 2, _MANY)
    bootstrap_seed: int = number(0, 0, SEED)
    """Of the draws that make the intervals; what is sampled from has ``dataset.seed``."""
    attribute: bool = False
    """Of a job with several quantized components: measure also each alone, paired with all together."""
    speed: bool = False
    """Measure also tokens a second, or seconds an image and a step, of one at a time: :mod:`quantlab.stages.speed`."""
    compile: bool = False
    """Candidates run as torch.compile makes their denoisers or model, and are measured so; floors run as they are."""
    deterministic: bool = True
    """On a GPU cuDNN takes the same algorithm each time; float32 is float32 (no TF32) either way."""
    # diffusion
    num_inference_steps: int = number(20, 1, 1000)
    guidance_scale: float = number(1.5, 0, 1000)
    height: int | None = number(None, 8, 16384)
    width: int | None = number(None, 8, 16384)
    num_frames: int | None = number(None, 1, 16384)
    """Of a video; null: the pipeline's own. A number that it would round is refused."""
    tiled_decoding: bool = False
    """Decode in tiles, as the pipeline's decoder cuts them: less memory, other pixels, of reference and candidates."""
    num_teacher_forced: int = number(50, 0, _MANY)
    """Samples of which each denoiser call is replayed on the reference's inputs; 0: no teacher-forced metric."""
    # language, encoder
    context_length: int = number(256, 4, 2**24)
    perplexity_protocol: str = "ppl/v2"
    num_continuations: int = number(2, 0, 1000)
    """Language models: prompts that reference and candidate go on with, to be read side by side; 0: none. Each token is
    a forward call."""
    continuation_tokens: int = number(16, 1, 4096)


@dataclass
class CalibrationConfig:
    """The ``calibration`` node: the data that an algorithm may look at; a scheme that needs none does not read it."""

    source: str = "digits_classes"
    """Row of ``datasets.CALIBRATION_SETS``."""
    path: str | None = path(None)
    """A file of the user's own (prompts, one a line; or text)."""
    num_samples: int = number(40, 1, _MANY)
    batch_size: int = number(20, 1, _MANY)
    """At most so many samples a call; calls are as even as they can be."""
    seed: int = number(1, 0, SEED)
    num_evidence_calls: int = number(40, 0, _MANY)
    """Forward calls, evenly spaced over the set, on which each layer's error is measured; 0: none."""
    # diffusion; null: as in the evaluation
    num_inference_steps: int | None = number(None, 1, 1000)
    guidance_scale: float | None = number(None, 0, 1000)
    # language, encoder
    context_length: int = number(256, 4, 2**24)


PLACEMENTS = ("resident", "streamed", "alone", "group_offload", "spread")
APART = ("alone", "group_offload", "spread")
"""Placements of a model that is loaded on the host."""


@dataclass
class MemoryConfig:
    """The ``memory`` node: what there is, and where a run's parts lie. Results do not depend on it."""

    device_gib: float | None = number(None, 0, 1e6, above=True)
    """Memory of the device (with ``spread``: of each) that a run may use, in GiB; null: what it has free."""
    host_gib: float | None = number(None, 0, 1e6, above=True)
    """The same of the host."""
    placement: str = choice("auto", *PLACEMENTS)
    """``resident``: reference and candidate lie on the device together, a candidate is quantized from a copy.
    ``streamed``: each layer of a candidate goes from the checkpoint's file to the device and is quantized there.
    ``alone``: of a pipeline, each part lies on the device only while it works, prompts are encoded once and kept on the
    disk, and candidates are streamed.
    ``group_offload``: the unquantized model lies on the host, and its layers are on the device in groups while they
    run; candidates are streamed.
    ``spread``: the blocks of each part lie on several devices of the node; a candidate's go where the same block of the
    unquantized model is, streamed unless data is wanted.
    ``auto``: the first of these, but ``spread``, whose phases the budget holds for all jobs that share the model, as
    ``quantlab plan`` counts them; where there is none, that which takes least.
    Wherever a pipeline lies, its prompts are encoded once and kept on the disk, unless an encoder is quantized."""
    devices: int | None = number(None, 2, 64)
    """With ``spread``: how many devices; null: all of the node. On a CPU they are its own memory: a rehearsal."""


@dataclass
class ReferenceConfig:
    """The ``reference`` node."""

    path: str | None = path(None)
    """A folder that ``quantlab reference export DIR`` wrote, here or on another machine; null: observed here."""


@dataclass
class TrackingConfig:
    """The ``tracking`` node."""

    uri: str = text("sqlite:///outputs/mlflow.db", 4096)
    experiment: str = text("quantlab", 250)
    required: bool = True
    """False: a store that does not answer is a warning; results stay in the run's folder and are pushed later."""
    save_checkpoint: bool = True
    """Write the quantized weights to the run's folder to measure ``memory/disk_bytes_model`` (removed afterwards)."""


@dataclass
class ExportConfig:
    """The ``export`` node: what is done with a measured candidate. Numbers do not depend on it."""

    path: str | None = path(None)
    """A folder that is not there, or an earlier export: the quantized model as Diffusers or transformers load it."""
    winner: bool = False
    """In a sweep: the smallest scheme that is surely inside the floor."""
    pick: str = text("", 500)
    """In a sweep: the smallest scheme with these numbers: ``psnr_db>=40, latent_rel_mse<0.01``."""


@dataclass
class SearchConfig:
    """``sweep.search``: which jobs of a grid are run is chosen by what the jobs before them showed."""

    num_trials: int = number(0, 0, _MANY)
    """Jobs that are measured, those that earlier sweeps have measured included; 0: no search, the whole grid."""
    sampler: str = choice(*SAMPLERS)
    """Of Optuna."""
    seed: int = number(0, 0, SEED)
    objectives: dict[str, str] = field(default_factory=dict)
    """Metric -> ``minimize`` or ``maximize``; empty: the weights' bytes and the protocol's first headline metric."""


@dataclass
class SweepConfig:
    """The ``sweep`` node: at most one of ``grid`` and ``candidates``."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    floors: bool = True
    """Measure the noise floors as rows of their own."""
    on_invalid: str = choice("error", "skip")
    """``error``: an impossible combination refuses the sweep; ``skip``: it is a row with its reason."""
    dry_run: bool = False
    force: bool = False
    """Run also what has finished before."""
    retry_failed: bool = True
    """False: a job that failed before keeps its row."""
    isolation: str = choice("auto", "none", "process")
    """``process``: each job in a process of its own; ``none``: in the sweep's (or a worker's); ``auto``: a process
    where a launcher or ``timeout_s`` asks for one, and for schemes that are known to crash the interpreter."""
    timeout_s: float | None = number(None, 0, 1e9, above=True)
    """Seconds after which a job is ended and counts as failed; None: no limit."""
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass
class ExperimentConfig:
    """One job."""

    name: str = text("", 200)
    device: str = choice("auto", "cpu", "cuda")
    num_threads: int = number(0, 0, 512)
    """Threads of torch on the CPU; 0: what is free."""
    output_dir: str = path("outputs")
    recipe: str | None = None
    checkpoint: str | None = path(None)
    """A quantized checkpoint that others made, the candidate in the place of a scheme: a folder, a GGUF file, a Hub id,
    or a GGUF file of one (``owner/name/FILE.gguf``)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    quantization: QuantizationAxes = field(default_factory=QuantizationAxes)
    """The scheme of the components that ``model.components`` names, or the family quantizes by default."""
    components: dict[str, Any] = field(default_factory=dict)
    """Component -> its own scheme: axes, and settings of its backend, as in ``quantization``; with ``backend: none`` it
    is counted, and stays as it is."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def model_with(self) -> ModelConfig:
        """The ``model`` node with all components that are asked for by name, those of ``components`` too."""
        return replace(self.model, components=list(dict.fromkeys([*self.model.components, *self.components])))
