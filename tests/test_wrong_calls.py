"""Public functions that are called wrongly: a message of ours, with the argument that was meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from tests.support.shell import digits_words

NET = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
X = torch.randn(4, 64)
INT8 = quantlab.QuantoConfig("int8")
Q4 = quantlab.GGUFQuantizationConfig(gguf_type="q4_0", algorithm="imatrix")
L: Any = quantlab.load

CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "store": (
        lambda: L(tracking="none"),
        r"^tracking='none': quantlab\.load calls it uri: uri='none'; .* takes what, uri, ",
    ),
    "sweep": (lambda: L(sweep="latest"), r"^sweep='latest': quantlab\.load calls it what: what='latest';"),
    "near": (lambda: L(experimnt="a"), r"^experimnt='a': .*; did you mean experiment\?$"),
    "what": (lambda: L(5), r"^what=5: quantlab\.load takes a value of str or Path there$"),
    "folder": (lambda: L(output_dir=None), r"^output_dir=None: quantlab\.load takes a value of str or Path there$"),
    "axis": (
        lambda: quantlab.run(backend="quanto"),
        r"^backend='quanto': .*; words of the command line go into overrides=\['backend=quanto'\]$",
    ),
    "an option": (
        lambda: quantlab.compose(["-m", "dtype=int8,int4"]),
        r"^overrides: '-m' is an option of the command line; several values of a key are a sweep by themselves$",
    ),
    "another option": (lambda: quantlab.run(overrides=["--json"]), r"^overrides: '--json' is an option of the command"),
    "axis to compose": (lambda: quantlab.compose(dtype="int8"), r"overrides=\['dtype=int8'\]$"),
    "quiet": (lambda: quantlab.run("digits_backends", quiet="no"), r"^quiet='no': quantlab\.run takes .* bool there$"),
    "none given": (lambda: quantlab.quantize(NET), r"^quantlab\.quantize: missing a required argument: 'config'; "),
    "a dictionary": (lambda: quantlab.quantize(NET, {}), r"e\.g\. quantlab\.config_from_dict\(config\)$"),
    "one kind": (lambda: quantlab.quantize(NET, INT8, layer_kinds="conv"), r"^layer_kinds='conv': a list of kinds"),
    "no kind": (lambda: quantlab.quantize(NET, INT8, layer_kinds=None), r"^layer_kinds=None: a list of kinds"),
    "a tensor": (lambda: quantlab.quantize(NET, INT8, inputs=X), r"^inputs=Tensor: .* inputs=\[batch\]$"),
    "calibration": (lambda: quantlab.quantize(NET, Q4, calibration=X), r"^calibration=Tensor: .*=\[batch\]$"),
    "a generator": (lambda: quantlab.quantize(NET, Q4, calibration=iter([X])), r"^calibration=list_iterator: a list"),
    "a word for no": (lambda: quantlab.evaluate(NET, [INT8], [X], floors="no"), r"^floors='no': .* bool there$"),
    "no bootstrap": (
        lambda: quantlab.evaluate(NET, [INT8], [X], num_bootstrap=0),
        r"^num_bootstrap=0: a whole number from 2 to",
    ),
    "no dictionary": (lambda: quantlab.config_from_dict("x"), r"^quantization_config='x': a dictionary is wanted"),
    "no file": (lambda: quantlab.from_pretrained_config(5), r"^config=5: a mapping, a config\.json or the folder"),
    "no mapping": (lambda: quantlab.to_pipeline_config(INT8, {}), r"^configs=QuantoConfig: component -> config is"),
    "no modules": (lambda: quantlab.to_pipeline_config({"a": INT8}, NET), r"^modules=Sequential: component -> module"),
    "no component": (
        lambda: quantlab.to_pipeline_config({"transfomer": INT8}, {"transformer": NET, "vae": NET, "scheduler": None}),
        r"^components\.transfomer: modules has no module of that name; did you mean transformer\?; it has transformer, "
        r"vae; give pipe\.components$",
    ),
    "no module": (
        lambda: quantlab.to_pipeline_config({"scheduler": INT8}, {"transformer": NET, "scheduler": object()}),
        r"^components\.scheduler: modules has no module of that name; it has transformer; give pipe\.components$",
    ),
    "no name": (
        lambda: quantlab.to_pipeline_config({0: INT8}),
        r"^components: 0 is no name of a component, such as tr",
    ),
    "a path": (
        lambda: quantlab.to_pipeline_config({"transformer.blocks": INT8}),
        r"'transformer\.blocks' is no name of",
    ),
    "no config": (lambda: quantlab.to_pipeline_config({"a": "int8"}, {}), r"^components\.a='int8': one of quantlab's"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_told_what_was_meant(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = CALLS[case]
    with pytest.raises(ConfigError, match=message):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def results(shell: Any, monkeypatch: pytest.MonkeyPatch) -> quantlab.Results:
    code, _, err = shell(*digits_words("-m", "backend=quanto,torchao", "dtype=int8,nf4", "sweep.on_invalid=skip", "-q"))
    assert code == 1, err  # a layer of torchao's nf4 does not fit
    monkeypatch.chdir(shell.folder)
    found: quantlab.Results = quantlab.load("latest")
    return found


def test_names_that_are_nearly_right(results: quantlab.Results) -> None:
    assert results["quanto int8"].name == "quanto int8"
    for call, message in (
        (lambda: results["quanto int"], r"^results\['quanto int'\]: no row is called so; did you mean quanto int8\?"),
        (lambda: results.compare(metric="psnr_bd"), r"^metric=psnr_bd: .*; did you mean psnr_db\?$"),
        (lambda: results.compare(metric="kld_men"), r"; kld_mean is of language and seq2seq, and these are of diff"),
        (lambda: results.compare(metric="kld_mean"), r"; kld_mean is of language and seq2seq, and these are of diff"),
        (lambda: results.compare(margin=-1), r"^margin=-1: give a number that is 0 or more"),
        (lambda: results.compare(margin=float("nan")), r"^margin=nan: give a number"),
        (lambda: quantlab.load("quantlb"), r"^load\('quantlb'\): .*; did you mean quantlab\?; "),
        (lambda: quantlab.load("lastest"), r"; did you mean latest\?; "),
        (lambda: quantlab.load(experiment="quantlb"), r"^tracking.experiment=quantlb: .*did you mean quantlab\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert results.compare(metric=None) == results.compare()


def test_what_the_command_line_takes_is_taken(results: quantlab.Results) -> None:
    ids = [report.run_id for report in results]
    assert [report.run_id for report in quantlab.load("sweep=latest")] == ids
    assert {report.run_id for report in quantlab.load("experiment=quantlab")} == {*ids}
    assert [report.run_id for report in quantlab.load(uri=Path("outputs/mlflow.db"))] == ids


def test_a_row_that_failed_is_shown_among_the_others(results: quantlab.Results) -> None:
    """Its report was never written: it is of the protocol of its model's family."""
    assert results["torchao nf4"].status == "FAILED"
    assert {report.protocol for report in results} == {"diffusion"}
    assert "FAILED" in repr(results)
    assert "torchao nf4" in results.rows.index
