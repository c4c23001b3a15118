"""The saved view of MLflow's runs: made once, left to whoever changed it, read by MLflow's own page."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from quantlab.protocols.table import PROTOCOLS
from quantlab.tracking import open_store
from quantlab.tracking.results import IMAGE_KEY
from quantlab.tracking.saved_view import PREFIX, saved_view, view_state
from quantlab.tracking.tags import PARENT_RUN_ID
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.browser import chromium, texts

METRICS = {"quality/latent_rel_mse": [0.0, 6e-4, 0.02], "quality/psnr_db": [100.0, 45.4]}
SWEEP = "0123456789abcdef0123456789abcdef"
NAME = "quantlab-0123456789ab"


def tags(store):
    return store.client.get_experiment(store.experiment_id).tags


def test_it_is_saved_once_and_another_ones_change_stays(base):
    store = open_store(TrackingConfig(), base)
    address = saved_view(store, METRICS, SWEEP)
    assert address == f"#/experiments/{store.experiment_id}/runs?viewStateShareKey={NAME}&compareRunsMode=CHART"
    assert json.loads(tags(store)[PREFIX + NAME]) == view_state(METRICS, SWEEP)
    store.client.set_experiment_tag(store.experiment_id, PREFIX + NAME, "mine")
    assert saved_view(store, METRICS, SWEEP) == address
    assert saved_view(store, METRICS, SWEEP[::-1]) != address
    assert tags(store)[PREFIX + NAME] == "mine"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_fits_a_tag(protocol):
    text = json.dumps(
        view_state({f"quality/{name}": [1.0] for name in PROTOCOLS[protocol].HEADLINE}, SWEEP, [IMAGE_KEY])
    )
    assert len(text) < 5000
    ids = [chart["uuid"] for chart in json.loads(text)["compareRunCharts"]]
    assert len(ids) == len(set(ids))


def test_what_would_read_0_00_on_a_bar_has_none():
    charts = view_state(METRICS, SWEEP)["compareRunCharts"]
    assert [c["metricKey"] for c in charts if c["type"] == "BAR"] == ["quality/psnr_db", "memory/weights_bytes"]
    assert [c["yaxis"]["key"] for c in charts if c["type"] == "SCATTER"] == list(METRICS)


def test_a_store_that_takes_no_tag_costs_only_the_view(capsys):
    from mlflow.exceptions import MlflowException

    def refuses(_):
        raise MlflowException("no right to do this")

    store = SimpleNamespace(client=SimpleNamespace(get_experiment=refuses), experiment_id="1")
    assert saved_view(store, METRICS, SWEEP) == ""
    assert "no right to do this" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_mlflows_page_shows_its_columns_and_charts(base, tmp_path):
    from tests.screenshots import START_S, look_at, mlflow_server

    store = open_store(TrackingConfig(), base)
    from PIL import Image

    first = next(iter(METRICS))
    sweeps = [store.client.create_run(store.experiment_id, run_name=name).info.run_id for name in ("mine", "later")]
    for name, size, of in (("quanto int8", 4.0, 0), ("gguf q4_k", 2.0, 0), ("torchao int4", 3.0, 1)):
        tags = {PARENT_RUN_ID: sweeps[of]}
        run = store.client.create_run(store.experiment_id, run_name=name, tags=tags)
        for metric, value in ((first, 1e-3 / size), ("memory/weights_bytes", size)):
            store.client.log_metric(run.info.run_id, metric, value)
        store.client.log_image(run.info.run_id, Image.new("RGB", (64, 64), "red"), key=IMAGE_KEY, step=0)
        store.client.set_terminated(run.info.run_id)
    address = saved_view(store, {first: METRICS[first]}, sweeps[0], [IMAGE_KEY])
    with chromium(tmp_path / "profile") as browser, mlflow_server(base) as server:
        browser.set_script_timeout(START_S)
        look_at(browser, f"{server}/{address}", 1500, 1000)
        shown = " ".join(texts(browser, "body"))
        assert "quality against bytes" in shown
        assert "memory/weights_bytes vs. quality/latent_rel_mse" in shown
        assert "Error loading shared view" not in shown
        assert IMAGE_KEY in shown
        grid = "return [...document.querySelectorAll('img')].filter(e => e.src.includes('images')).length"
        assert browser.execute_script(grid) == 2, "a tile for each scheme"
        assert "quanto int8" in shown
        assert "torchao int4" not in shown, "of another sweep"
        look_at(browser, f"{server}/{address.removesuffix('&compareRunsMode=CHART')}", 1500, 1000)
        assert any("quality/latent_rel_mse" in text for text in texts(browser, ".ag-header-cell"))
        widths = "return [...document.querySelectorAll('.ag-header-cell')].map(e => [e.getAttribute('col-id'), e.offsetWidth])"
        shown = {key: width for key, width in browser.execute_script(widths) if key.startswith("metrics.")}
        wanted = view_state({first: METRICS[first]}, sweeps[0])["columnWidths"]
        assert list(shown)[:2] == list(wanted)[:2], "quality first"
        assert shown.items() <= wanted.items(), "names of columns are whole"
