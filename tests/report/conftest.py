"""The browser and the page that several files look at."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

from quantlab.report.compare import compare
from quantlab.report.html import page_data
from quantlab.report.reading import open_reader
from quantlab.report.selection import parse_request, select
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.browser import chromium
from tests.support.comparison_store import Sweep, shared_sweep


@pytest.fixture(scope="session")
def downloads(tmp_path_factory) -> Path:
    """Where the browser puts what it saves."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def browser(tmp_path_factory, downloads):
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as started:
        yield started


@pytest.fixture
def sweep(template) -> Sweep:
    return shared_sweep(template)


@pytest.fixture
def own_sweep(sweep, tmp_path) -> Sweep:
    """A copy of it, to be changed; its artifacts are those beside the database although their addresses are old."""
    from quantlab.tracking import open_store

    folder = tmp_path / "moved"
    shutil.copytree(sweep.folder, folder)
    return Sweep(folder, open_store(TrackingConfig(), folder), sweep.parent, dict(sweep.runs))


_MADE = {}


@pytest.fixture
def data(sweep):
    """The page's data of the shared sweep, a copy for each test."""
    if sweep.folder not in _MADE:
        request = parse_request(["sweep=latest"])
        reader = open_reader(request.tracking, sweep.folder)
        selection = select(request, reader)
        _MADE[sweep.folder] = page_data(compare(request, selection, reader), selection, reader)
    return copy.deepcopy(_MADE[sweep.folder])
