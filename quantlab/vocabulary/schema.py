"""The schema of a run: one typed dataclass for each node of the composed configuration. Torch-free, mutable, plain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantlab.vocabulary.axes import QuantizationAxes


@dataclass
class ModelConfig:
    """The ``model`` node."""

    family: str = "digits_dit"
    """Row of ``models.FAMILIES``."""
    path: str | None = None
    """Local folder or Hub id."""
    revision: str | None = None
    components: list[str] = field(default_factory=list)
    """Components to quantize; empty: the family's main one (the denoiser, the model)."""
    dtype: str = "auto"
    """Compute dtype of the reference; auto: float32 on CPU for the small shipped models, else as stored."""
    default_exclusions: list[str] = field(default_factory=list)
    """The family's own entries of ``modules_to_not_convert``."""


@dataclass
class DigitsModelConfig(ModelConfig):
    """``model=digits_dit``: trained on first use, then found in the cache by content."""

    num_train_steps: int = 500
    train_batch_size: int = 64
    train_seed: int = 0
    num_layers: int = 3
    num_heads: int = 8


@dataclass
class DatasetConfig:
    """The ``dataset`` node: what the model is evaluated on."""

    name: str = "digits_classes"
    """Row of ``datasets.DATASETS``."""
    path: str | None = None
    """A file of the user's own (prompts, one a line; or text)."""
    seed: int = 0


@dataclass
class EvaluationConfig:
    """The ``evaluation`` node. A protocol reads the fields it needs."""

    num_samples: int = 200
    batch_size: int = 100
    floor_batch_size: int = 50
    """Batch size of the ``floor_batch`` row."""
    num_bootstrap: int = 2000
    bootstrap_seed: int = 0
    """Of the draws that make the intervals; what is sampled from has ``dataset.seed``."""
    # diffusion
    num_inference_steps: int = 20
    guidance_scale: float = 1.5
    height: int | None = None
    width: int | None = None
    num_teacher_forced: int = 50
    """Samples of which each denoiser call is replayed on the reference's inputs; 0: no teacher-forced metric."""
    # language, encoder
    context_length: int = 256
    perplexity_protocol: str = "ppl/v1"


@dataclass
class CalibrationConfig:
    """The ``calibration`` node: the data that an algorithm may look at; a scheme that needs none does not read it."""

    source: str = "digits_classes"
    """Row of ``datasets.CALIBRATION_SETS``."""
    path: str | None = None
    """A file of the user's own (prompts, one a line; or text)."""
    num_samples: int = 40
    batch_size: int = 20
    seed: int = 1
    num_evidence_calls: int = 40
    """Forward calls, evenly spaced over the set, on which each layer's error is measured; 0: none."""
    # diffusion; null: as in the evaluation
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    # language, encoder
    context_length: int = 256


@dataclass
class TrackingConfig:
    """The ``tracking`` node."""

    uri: str = "sqlite:///outputs/mlflow.db"
    experiment: str = "quantlab"
    required: bool = True
    """False: a store that does not answer is a warning; results stay in the run's folder and are pushed later."""
    save_checkpoint: bool = True
    """Write the quantized weights to the run's folder to measure ``memory/disk_bytes_model`` (removed afterwards)."""


@dataclass
class SearchConfig:
    """``sweep.search``: which points of a grid are run is chosen by what the points before them showed."""

    num_trials: int = 0
    """Points that are measured, those that earlier sweeps have measured included; 0: no search, the whole grid."""
    sampler: str = "tpe"
    """``tpe``, ``nsga2`` or ``random``, of Optuna."""
    seed: int = 0
    objectives: dict[str, str] = field(default_factory=dict)
    """Metric -> ``minimize`` or ``maximize``; empty: the weights' bytes and the protocol's first headline metric."""


@dataclass
class SweepConfig:
    """The ``sweep`` node: at most one of ``grid`` and ``candidates``."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    floors: bool = True
    """Measure the noise floors as rows of their own."""
    on_invalid: str = "error"
    """``error``: an impossible combination refuses the sweep; ``skip``: it is a row with its reason."""
    dry_run: bool = False
    force: bool = False
    """Run also what has finished before."""
    retry_failed: bool = True
    """False: a job that failed before keeps its row."""
    isolation: str = "auto"
    """``process``: each job in a process of its own; ``none``: in the sweep's (or a worker's); ``auto``: a process
    where a launcher or ``timeout_s`` asks for one, and for schemes that are known to crash the interpreter."""
    timeout_s: float | None = None
    """Seconds after which a job is ended and counts as failed; None: no limit."""
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass
class LauncherConfig:
    """The ``launcher`` node: who runs the jobs of a sweep."""

    engine: str = "serial"
    """``serial``, or the name of a launcher of Hydra's: ``joblib submitit_local submitit_slurm ray``."""
    num_workers: int = 0
    """Processes at once (joblib); 0: one a GPU, or one for every 4 CPUs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of Hydra's launcher under their own names."""


@dataclass
class ExperimentConfig:
    """One job."""

    name: str = ""
    device: str = "auto"
    num_threads: int = 0
    """Threads of torch on the CPU; 0: what is free."""
    output_dir: str = "outputs"
    recipe: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    quantization: QuantizationAxes = field(default_factory=QuantizationAxes)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
