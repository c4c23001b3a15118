"""A backend of another package works everywhere by its row alone: no file of quantlab names it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.backends import table
from quantlab.backends.table import Backend, backends, offers
from quantlab.errors import ConfigError, MissingPackage
from quantlab.planning.composition import schema_nodes
from quantlab.planning.listing import LISTS
from quantlab.planning.plan import plan
from quantlab.report.pareto_figure import draw_pareto
from quantlab.vocabulary.capabilities import Offer
from tests.support.shell import Shell, digits_words, make_shell

ROOT = Path(__file__).resolve().parents[2]
MODULE = Path(__file__).parent / "sixth" / "rowint8.py"
WORDS = ("-m", *digits_words("evaluation.num_samples=10", "backend=rowint8,quanto", "dtype=int8"))


def install(site: Path, version: str = "1.0", point: str = "rowint8 = rowint8:BACKEND") -> None:
    """What pip leaves of a package with an entry point."""
    site.mkdir(exist_ok=True)
    (site / "rowint8.py").write_text(MODULE.read_text())
    for old in site.glob("rowint8-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"rowint8-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rowint8\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{table.ENTRY_POINTS}]\n{point}\n")


def forget() -> None:
    for read in (backends, offers, schema_nodes):
        read.cache_clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package on the path of this process, until the module's tests are over."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
        forget()
        yield site
    sys.modules.pop("rowint8", None)
    forget()


@pytest.fixture(scope="module")
def swept(site, template, trained, tmp_path_factory) -> tuple[Shell, dict]:
    """A sweep over the sixth backend and one of quantlab's, and its rows."""
    shell = make_shell(tmp_path_factory.mktemp("sixth") / "work", template, trained)
    return shell, shell.rows(*WORDS)


def test_it_is_in_the_lists(site):
    row = next(r for r in LISTS["backends"]() if r["backend"] == "rowint8")
    assert row == {"backend": "rowint8", "installed": "1.0", "dtypes": "int8"}
    assert "rowint8" in next(r for r in LISTS["dtypes"]() if r["dtype"] == "int8")["backends"].split()
    offered = {r["dtype"] for r in LISTS["combinations"]() if r["backend"] == "rowint8" and r["offered"]}
    assert offered == {"int8"}
    assert [r["algorithm"] for r in LISTS["algorithms"]() if r["backend"] == "rowint8"] == ["max"]


def test_another_process_finds_it_too(site):
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "list", "backends", "--json"], capture_output=True, text=True, cwd=site
    )
    assert "rowint8" in [r["backend"] for r in json.loads(done.stdout)]
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import rowint8, quantlab; from quantlab.backends.table import backends; "
            "assert backends()['rowint8'] is rowint8.BACKEND; import sys; assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        cwd=site,
    )
    assert imported.returncode == 0, imported.stderr


def test_it_is_composed_and_checked_like_the_others(site):
    (job,) = plan(["backend=rowint8", "dtype=auto", "quantization.largest_code=100"]).jobs
    assert job.name == "rowint8 int8 largest_code=100"
    assert (job.schemes[""].native.largest_code, job.axes.dtype, job.axes.group_size) == (100, "int8", "auto")
    with pytest.raises(ConfigError, match=r"largest_cod: no such key; did you mean largest_code"):
        plan(["backend=rowint8", "largest_cod=3"])
    with pytest.raises(ConfigError, match=r"quantization.largest_code: .* is a setting of rowint8"):
        plan(["backend=quanto", "dtype=int8", "quantization.largest_code=3"])
    with pytest.raises(ConfigError, match=r"^dtype=int4: rowint8 offers int8; int4 is offered by"):
        plan(["backend=rowint8", "dtype=int4"])
    with pytest.raises(ConfigError, match=r"^backend=rowint: there are .*rowint8.*did you mean rowint8"):
        plan(["backend=rowint", "dtype=int8"])


def test_a_pasted_dictionary_finds_it(site):
    (job,) = plan(["quantization.quantization_config={quant_method:rowint8,largest_code:90}"]).jobs
    assert (job.name, job.schemes[""].native.largest_code) == ("rowint8 int8 per-row largest_code=90", 90)


def test_a_job_is_read_back_and_its_bytes_add_up(swept):
    _, rows = swept
    metrics = rows["rowint8 int8"]["metrics"]
    assert rows["rowint8 int8"]["status"] == "FINISHED"
    assert 0 < metrics["quality/latent_rel_mse"] < 0.1
    assert 0 < metrics["quantization/weight_rel_error_max"] < 0.02
    assert metrics["memory/quantized_bytes"] > 0
    assert metrics["memory/quantized_bytes"] == rows["quanto int8"]["metrics"]["memory/quantized_bytes"]
    assert metrics["memory/scale_bytes"] > 0
    assert metrics["memory/disk_bytes_model"] > metrics["memory/quantized_bytes"]


def test_it_is_resumed_until_its_package_changes(swept, site, tmp_path):
    shell, _ = swept
    assert {r["resumed"] for r in shell.rows(*WORDS).values()} == {True}
    install(site, version="1.1")
    try:
        again = shell.rows(*WORDS)
    finally:
        install(site)
    assert {name for name, r in again.items() if not r["resumed"]} == {"rowint8 int8"}


def test_it_is_compared_and_drawn(swept, tmp_path):
    shell, rows = swept
    code, out, err = shell("compare", "sweep=latest", "--html", "page.html")
    assert code == 0, err
    assert "rowint8 int8" in out
    assert "rowint8 int8" in (shell.folder / "page.html").read_text()
    draw_pareto(list(rows.values()), tmp_path / "figure.svg")
    assert backends()["rowint8"].colour in (tmp_path / "figure.svg").read_text()


@pytest.mark.slow
def test_the_contract_of_backends_holds(site):
    """The tests that every backend passes take their cases from the table, so they are an author's too."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/contract/test_backends.py"]
    done = subprocess.run([*command, "-k", "rowint8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) >= 5, done.stdout[-300:]


# -- rows that are wrong


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Backend)])
def test_what_is_missing_in_a_row_is_named(site, field):
    row = backends()["rowint8"]
    empty = Offer(rows={}) if field == "offer" else () if isinstance(getattr(row, field), tuple) else ""
    if field in ("holds", "loggers", "same_bits", "input_algorithms", "elsewhere", "used_with"):
        assert not getattr(dataclasses.replace(row, **{field: ()}), field)
        empty = "words"
    with pytest.raises(ConfigError, match=rf"^backend .*: {field}: .*; correct its row$"):
        dataclasses.replace(row, **{field: empty})
    if field == "used_with":
        return  # rows of other packages may be from before it
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(Backend) if f.name != field}
    with pytest.raises(TypeError, match=field):
        Backend(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "green"}, "colour: #rrggbb is wanted"),
        ({"name": "Row Int8"}, "name: a lower-case word is wanted"),
        ({"name": "quanto"}, "module: the quant_method of its Config is rowint8"),
        (
            {"same_bits": ("largest_cod",)},
            "same_bits: its Config has no setting largest_cod; did you mean largest_code",
        ),
        ({"input_algorithms": ("imatrix",)}, "input_algorithms: no dtype is offered with imatrix"),
        ({"module": json}, "module: it has no Config"),
    ],
)
def test_what_is_wrong_in_a_row_is_named(site, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(backends()["rowint8"], **change)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("rowint8 = rowint8:GONE", r"^backend rowint8: rowint8:GONE of rowint8 cannot be loaded \(AttributeError"),
        ("rowint8 = not_there:BACKEND", r"^backend rowint8: not_there:BACKEND of rowint8 cannot be loaded"),
        ("rowint8 = rowint8:Config", r"names a .*, not a Backend"),
        ("other = rowint8:BACKEND", r"^backend other: .* names the row of rowint8; make them agree"),
    ],
)
def test_an_entry_point_that_cannot_be_used_names_its_package(site, point, message):
    install(site, point=point)
    forget()
    try:
        with pytest.raises(ConfigError, match=message):
            backends()
    finally:
        install(site)
        forget()


def test_a_missing_library_names_what_brings_it(site, monkeypatch):
    row = dataclasses.replace(backends()["rowint8"], imports=("no_such_library",), install="rowint8[all]")
    monkeypatch.setattr(table, "backends", lambda: {"rowint8": row})
    monkeypatch.setattr("quantlab.backends.scheme.backend_of", lambda name: row)
    with pytest.raises(MissingPackage, match=r"^backend=rowint8: .*no_such_library.* pip install 'rowint8\[all\]'"):
        plan(["backend=rowint8", "dtype=int8"])
