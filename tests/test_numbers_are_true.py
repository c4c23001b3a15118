"""The tracked numbers against scripts that import no quantlab, and a planted fault that must show.

``independent/*.py`` apply a library, as its documentation says, to the same cached weights and the stored noise. Both
sides run in batches of one size on one thread, so that they may differ by rounding of the metrics alone.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import quantlab
from quantlab import tracking
from quantlab.datasets.table import DATASETS
from quantlab.models.loaded import LoadedModel
from quantlab.models.table import FAMILIES
from quantlab.modules.holders import holders
from quantlab.modules.kept import read_tree
from quantlab.modules.trees import replaced
from quantlab.planning.job import Job
from quantlab.planning.plan import plan
from quantlab.stages.evaluate import evaluate, summarize
from quantlab.stages.observe import observe
from quantlab.stages.quantize import _read_row, quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.reports import LayerReport, QuantizationReport, RunReport
from tests.support.shell import TINY
from tests.support.tables import BACKENDS
from tests.support.tiers import default_of

SCRIPTS = Path(__file__).parent / "independent"
SHARED = SCRIPTS / "_digits.py"
ROWS = {
    "bitsandbytes_nf4": "bitsandbytes nf4",
    "torchao_int8": "torchao int8",
    "torchao_int4_g64": "torchao int4 g64",
    "quanto_int8": "quanto int8",
    "gguf_q8_0": "gguf q8_0",
    "modelopt_int8": "modelopt int8",
}
"""Script -> name of the row whose numbers it recomputes."""
NUM_SAMPLES, BATCH_SIZE, NUM_STEPS = 40, 20, 6
MAX_LINES = 100
RECIPE = f"""# @package _global_
defaults:
  - override /model: digits_dit
  - override /evaluation: quick
num_threads: 1
model: {json.dumps(TINY)}
tracking: {{save_checkpoint: false}}
evaluation:
  num_samples: {NUM_SAMPLES}
  batch_size: {BATCH_SIZE}
  floor_batch_size: 10
  num_inference_steps: {NUM_STEPS}
  num_teacher_forced: 0
  num_bootstrap: 200
sweep:
  candidates:
    - {{backend: bitsandbytes, dtype: nf4}}
    - {{backend: torchao, dtype: int8}}
    - {{backend: torchao, dtype: int4, group_size: 64}}
    - {{backend: quanto, dtype: int8}}
    - {{backend: gguf, dtype: q8_0}}
    - {{backend: modelopt, dtype: int8}}
"""


@dataclass(frozen=True)
class Sweep:
    """The sweep that ran once, and what MLflow says of its rows."""

    cache: Path
    jobs: Mapping[str, Job]
    reports: Mapping[str, RunReport]
    tracked: Mapping[str, Mapping[str, float]]

    @property
    def weights(self) -> Path:
        (file,) = self.cache.glob("models/*/model.safetensors")
        return file.parent

    @property
    def reference(self) -> Path:
        """The reference's outputs as torch alone reads them."""
        (kept,) = self.cache.glob("reference/*.safetensors")
        file = self.cache / "reference.pt"
        if not file.exists():
            import torch

            def own(value):  # tensors that are read back are views of one storage, which torch.save does not take
                return value.clone() if isinstance(value, torch.Tensor) else None

            torch.save(replaced(read_tree(kept), own), file)
        return file


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, trained: Path, one_thread: None) -> Sweep:
    folder = tmp_path_factory.mktemp("numbers")
    shutil.copytree(trained, folder / "outputs" / "cache")
    recipe = folder / "six_rows.yaml"
    recipe.write_text(RECIPE)
    words = [f"output_dir={folder}/outputs", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    reports = quantlab.run(str(recipe), words, quiet=True, trust=True)
    jobs = plan([f"recipe={recipe}", *words], multirun=True).jobs
    store = tracking.open_store(jobs[0].config.tracking, folder)
    runs = [tracking.get_run(store, str(report.run_id)) for report in reports]
    return Sweep(
        cache=folder / "outputs" / "cache",
        jobs={job.name: job for job in jobs},
        reports={report.name: report for report in reports},
        tracked={run["name"]: run["metrics"] for run in runs},
    )


# -- agreement


@pytest.fixture(scope="module")
def recomputed(sweep: Sweep) -> dict[str, dict[str, float]]:
    """What each script prints. One process runs them all, for imports take longer than the scripts; ModelOpt's comes
    first, since the other libraries change the order of its sums (by 1e-4 of an error of 1e-6)."""
    return _printed(sorted(ROWS, key=lambda script: "modelopt" not in script), sweep)


def _printed(scripts: list[str], sweep: Sweep) -> dict[str, dict[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [str(word) for word in (sweep.weights, sweep.reference, BATCH_SIZE, NUM_STEPS)]
    files = [str(SCRIPTS / f"{script}.py") for script in scripts]
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfor file in {files!r}:\n"
        f"    sys.argv = [file, *{words!r}]\n    runpy.run_path(file, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(scripts, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("script", ROWS)
def test_a_script_without_quantlab_finds_the_tracked_numbers(
    script: str, sweep: Sweep, recomputed: Mapping[str, Mapping[str, float]]
) -> None:
    tracked, own = sweep.tracked[ROWS[script]], recomputed[script]
    assert own["latent_rel_mse"] > 0, "an unquantized model would agree with itself"
    assert tracked["quality/latent_rel_mse"] == pytest.approx(own["latent_rel_mse"], rel=1e-6, abs=0)
    assert tracked["quality/psnr_db"] == pytest.approx(own["psnr_db"], rel=1e-6, abs=0)
    assert tracked["memory/weights_bytes"] == own["weights_bytes"]


@pytest.mark.parametrize("script", ROWS)
def test_the_scripts_are_short_and_import_no_quantlab(script: str) -> None:
    files = [SCRIPTS / f"{script}.py", SHARED]
    assert sum(len(file.read_text().splitlines()) for file in files) <= MAX_LINES
    library = {
        "bitsandbytes_nf4": "bitsandbytes",
        "gguf_q8_0": "gguf",
        "modelopt_int8": "modelopt",
        "quanto_int8": "optimum",
    }.get(script, "torchao")
    allowed = {"torch", "diffusers", "numpy", "safetensors", library, "_digits"} | sys.stdlib_module_names
    assert _imported(files) <= allowed - {"importlib", "runpy"}


def _imported(files: list[Path]) -> set[str]:
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_the_reference_against_itself_is_exact(sweep: Sweep) -> None:
    tracked = sweep.tracked["reference"]
    assert tracked["quality/latent_rel_mse"] == 0.0
    assert tracked["quality/psnr_db"] == 100.0
    assert tracked["quality/n_identical"] == tracked["quality/n_identical/n"] == NUM_SAMPLES


def test_every_quantized_row_differs_from_the_reference(sweep: Sweep) -> None:
    for name in ROWS.values():
        assert sweep.tracked[name]["quality/n_identical"] < NUM_SAMPLES
        assert sweep.tracked[name]["memory/weights_bytes"] < sweep.tracked["floor_bf16"]["memory/weights_bytes"]


# -- a planted fault

FAULTY = "transformer_blocks.0.ff.net.2"


def _double_gguf(layer: Any) -> None:
    import numpy as np

    blocks = layer.qweight.numpy().reshape(layer.out_features, -1, 34)  # a float16 scale and 32 int8 codes
    blocks[..., :2] = (2 * blocks[..., :2].copy().view(np.float16)).view(np.uint8)


DOUBLE: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes nf4": lambda layer: layer.weight.quant_state.absmax.mul_(2),
    "torchao int8": lambda layer: layer.weight.scale.mul_(2),
    "torchao int4 g64": lambda layer: layer.weight.scale.mul_(2),
    "quanto int8": lambda layer: layer.weight._scale.mul_(2),
    "gguf q8_0": _double_gguf,
    "modelopt int8": lambda layer: layer.weight_quantizer._scale.mul_(2),
}
"""Row -> doubles the scales of one of its layers, in place."""


@pytest.fixture(scope="module")
def model(sweep: Sweep) -> LoadedModel:
    config = next(iter(sweep.jobs.values())).config
    return FAMILIES["digits_dit"].load(config.model, "cpu", sweep.cache)


def _quantized(job: Job, model: LoadedModel) -> tuple[QuantizationRequest, Any, QuantizationReport]:
    assert job.schemes[""] is not None
    request = QuantizationRequest(
        component="transformer", scheme=job.schemes[""], compute_dtype="float32", device="cpu"
    )
    return request, *quantize_component(request, model.copy_of("transformer"), model.components["transformer"])


def _latent_rel_mse(sweep: Sweep, job: Job, model: LoadedModel, transformer: Any) -> float:
    settings = job.config.evaluation
    inputs = DATASETS["digits_classes"].load(job.config.dataset, settings, model)
    reference = observe(model, inputs, settings, sweep.cache)
    candidate = model.with_components({"transformer": transformer})
    return summarize(evaluate(candidate, model, reference, inputs, settings), settings)["latent_rel_mse"].value


@pytest.mark.parametrize("row", default_of(DOUBLE, "torchao int4 g64", "quanto int8"))
def test_doubled_scales_of_one_layer_show_in_its_row_and_in_the_quality(
    row: str, sweep: Sweep, model: LoadedModel
) -> None:
    import torch

    job = sweep.jobs[row]
    request, transformer, report = _quantized(job, model)
    sound = _latent_rel_mse(sweep, job, model, transformer)
    assert sound == pytest.approx(sweep.tracked[row]["quality/latent_rel_mse"], rel=1e-6)

    with torch.no_grad():
        DOUBLE[row](transformer.get_submodule(FAULTY))
    found = holders(model.components["transformer"])
    rows = [r for r in report.layers if r.status == "quantized"]
    again = [_read_row(request, found[r.name], transformer.get_submodule(r.name), None, "", {}) for r in rows]
    changed = {new.name: new for new, old in zip(again, rows, strict=True) if new != old}
    assert list(changed) == [FAULTY]
    _check_error(changed[FAULTY], next(r for r in report.layers if r.name == FAULTY))
    # twice the noise of an int8 model is still little: the fault of one layer must stand far above the rounding of all
    assert _latent_rel_mse(sweep, job, model, transformer) > 3 * sound


def _check_error(faulty: LayerReport, sound: LayerReport) -> None:
    assert sound.weight_rel_error is not None
    assert faulty.weight_rel_error is not None
    assert 0 < sound.weight_rel_error < 0.15
    # || 2 Wq - W || <= || W || + 2 || Wq - W ||
    assert abs(faulty.weight_rel_error - 1) <= 2 * sound.weight_rel_error
    assert (faulty.weight_bytes, faulty.scale_bytes) == (sound.weight_bytes, sound.scale_bytes)


def test_the_rows_are_one_of_each_backend(sweep: Sweep) -> None:
    assert {sweep.jobs[name].config.quantization.backend for name in ROWS.values()} == set(BACKENDS)
    assert all(sweep.reports[name].status == "FINISHED" for name in ROWS.values())
