"""Which of a sweep's schemes is exported, and what is refused before anything runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from quantlab.errors import ConfigError, NotQuantized
from quantlab.exporting.folder import MANIFEST
from quantlab.planning.picking import Condition, conditions
from quantlab.planning.plan import plan
from quantlab.running import winner
from quantlab.running.winner import check_same
from quantlab.vocabulary.reports import LayerReport, QuantizationReport
from tests.support.exports import checker, patched
from tests.support.shell import digits_words

WORDS = digits_words("evaluation.num_samples=10", "device=cpu")


def test_conditions_are_data():
    assert conditions("psnr_db>=40, memory/weights_bytes < 1e6") == (
        Condition(metric="quality/psnr_db", comparison=">=", bound=40.0),
        Condition(metric="memory/weights_bytes", comparison="<", bound=1e6),
    )


@pytest.mark.parametrize(
    "text",
    [
        "psnr_db",
        "psnr_db=40",
        "psnr_db>=",
        "psnr_db>=forty",
        "psnr_dbb>=40",
        "psnr_db>=1e",
        "psnr_db>=40 and ssim>0.9",
        "__import__('os')>=1",
        "psnr_db>=40,",
        ",".join(["psnr_db>=1"] * 9),
        "psnr_db>=--1",
    ],
)
def test_what_is_no_condition_is_refused_by_its_key(text):
    with pytest.raises(ConfigError, match=r"export\.pick"):
        conditions(text)


@pytest.mark.parametrize(
    ("comparison", "held"), [(">=", (False, True, True)), ("<=", (True, True, False)), (">", (False, False, True)), ("<", (True, False, False))]
)  # fmt: skip
def test_each_comparison_holds_as_it_says(comparison, held):
    one = Condition(metric="x", comparison=comparison, bound=2.0)
    assert tuple(one.holds({"x": v}) for v in (1.0, 2.0, 3.0)) == held
    assert not one.holds({})
    assert not one.holds({"x": float("nan")})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.winner=true"], "give export.path"),
        (["export.pick='psnr_db>=40'"], "give export.path"),
        (["export.path=x", "export.winner=true"], "chooses among the jobs of a sweep"),
        (["-m", "export.path=x", "dtype=int8,int4"], "add export.winner=true"),
        (["-m", "export.path=x", "export.winner=true", "export.pick='psnr_db>=40'", "dtype=int8,int4"], "keep one"),
        (["export.path=x", "export.winer=true"], "winer"),
    ],
)
def test_keys_that_contradict_each_other(words, said):
    with pytest.raises(ConfigError, match=said):
        plan([w for w in words if w != "-m"], multirun="-m" in words)


def test_a_sweeps_jobs_do_not_export_themselves():
    request = plan(["export.path=x", "export.winner=true", "dtype=int8,int4"], multirun=True)
    assert request.export.path == "x"
    assert all(job.config.export.path is None for job in request.jobs)


def layers(**changed: object) -> QuantizationReport:
    given = {
        "component": "model",
        "name": "a",
        "kind": "linear",
        "shape": (4, 4),
        "status": "quantized",
        "dtype": "int8",
        "weight_bytes": 16,
        "scale_bytes": 16,
        "weight_rel_error": 0.01,
    }
    return QuantizationReport(layers=(LayerReport(**{**given, **changed}),), num_parameters=16)  # type: ignore[arg-type]


COLUMNS = ["component", "name", "status", "dtype", "weight_bytes", "scale_bytes", "weight_rel_error"]
RECORDED = {"columns": COLUMNS, "data": [["model", "a", "quantized", "int8", 16, 16, 0.01]]}


@pytest.mark.parametrize(
    ("protocol", "metric", "values"),
    [
        ("diffusion", "latent_rel_mse", [3.0, 1.0, 2.0]),
        ("language", "kld_mean", [3.0, 1.0]),
        ("diffusion", "nothing", [1.0, 2.0]),
    ],
)
def test_of_schemes_of_one_size_the_closer_one_is_picked(monkeypatch, protocol, metric, values):
    monkeypatch.setattr(winner, "report_data", lambda report: {"metrics": report.metrics})
    reports = [
        SimpleNamespace(
            name=str(value),
            status="FINISHED",
            protocol=protocol,
            metrics={"memory/weights_bytes": 1.0, "memory/compression": 2.0, f"quality/{metric}": value},
        )
        for value in values
    ]
    jobs = [SimpleNamespace(name=report.name, schemes={"": 1}) for report in reports]
    plan = SimpleNamespace(jobs=jobs, export=SimpleNamespace(pick="memory/compression>1"))
    found, _ = winner._picked(plan, reports)
    assert found.name == "1.0"


def test_a_candidate_is_what_the_run_recorded():
    check_same(RECORDED, layers())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtype": "int4"}, "has dtype int4 now and had int8"),
        ({"weight_bytes": 8}, "has weight_bytes 8 now"),
        ({"weight_rel_error": 0.0101}, "rounds its weights otherwise"),
        ({"name": "b"}, "had no layer b"),
    ],
)
def test_a_candidate_that_became_another_is_not_exported(changed, said):
    with pytest.raises(NotQuantized, match=said):
        check_same(RECORDED, layers(**changed))


@pytest.fixture(scope="module")
def one():
    with checker() as found:
        yield found


@pytest.mark.slow
def test_a_sweep_exports_the_smallest_that_has_the_numbers(shell, one, monkeypatch):
    patched(monkeypatch, one)
    words = ["-m", *WORDS, "sweep.floors=false", "backend=torchao", "dtype=int8,int4"]
    rows = shell.rows(*words, "export.path=out", "export.pick='latent_rel_mse<1000, memory/weights_bytes>1'")
    smallest = min(
        (r for r in rows.values() if "quantization/coverage" in r["metrics"]),
        key=lambda r: r["metrics"]["memory/weights_bytes"],
    )
    assert json.loads((shell.folder / "out" / MANIFEST).read_text())["name"] == smallest["name"]
    assert shell.tracked()[smallest["name"]]["tags"]["export/outputs_identical"] == "yes"
    card = (shell.folder / "out" / "README.md").read_text()
    assert "to run it on one device, planned" in card
    assert "![reference, quantized, difference](images/" in card
    assert (shell.folder / "out" / "images" / "reference_quantized_difference.png").is_file()
    code, _, err = shell(*words, "export.path=none", "export.pick='latent_rel_mse<0'")
    assert code == 0
    assert "nothing is exported: none of the 2 finished schemes has latent_rel_mse<0" in err
    assert not (shell.folder / "none").exists()


@pytest.mark.slow
def test_a_sweep_exports_the_smallest_inside_the_floor_or_says_why_not(shell, one, monkeypatch):
    patched(monkeypatch, one)
    words = [w for w in WORDS if not w.startswith("evaluation.num_samples")]
    request = ["-m", *words, "evaluation.num_samples=20", "backend=torchao", "dtype=int8,int4"]
    code, _, err = shell(*request, "export.path=out", "export.winner=true")
    assert code == 0, err
    sweep = next(r for r in shell.tracked().values() if r["tags"].get("quantlab.kind") == "sweep")
    _, out, _ = shell("compare", f"sweep={sweep['run_id']}", "--json")
    inside = "inside the floor" in out
    assert (shell.folder / "out" / MANIFEST).is_file() == inside or "nothing is exported" in err


@pytest.mark.slow
def test_a_run_that_cannot_be_exported_says_why(shell):
    shell.rows(*WORDS, "sweep.floors=false", "backend=none", "dtype=auto")
    run = shell.tracked()["reference"]["run_id"]
    for words, said in (
        ([run, "out"], "is not quantized"),
        (["latest", "out"], "is quantized; run one"),
        (["nobody", "out"], "no such run"),
        ([run], "no folder is named to write to"),
        ([run, "out", "--force"], "no such option"),
        ([run, "out", "dtype=int4"], "exported as it was measured"),
        ([run, "outputs"], "quantlab did not export"),
    ):
        code, _, err = shell("export", *words)
        assert (code, said in err) == (2, True), err
        assert "Traceback" not in err
