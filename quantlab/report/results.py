"""What runs found out, as tables that one works with: pandas DataFrames and arrays, read from their records.

``quantlab.run`` returns :class:`Results`, and ``quantlab.load`` those of earlier runs.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rich.console import Console

from quantlab.errors import ConfigError, TrackingError, nearest
from quantlab.metrics import metric_called
from quantlab.progress import counted, printable, unbroken
from quantlab.report.attribution import attribution_sheet
from quantlab.report.compare import compare
from quantlab.report.comparison_table import told_groups
from quantlab.report.names import told_apart
from quantlab.report.reading import Reader, StoredRun, experiment_id, json_object, read_json, tell_of_newer
from quantlab.report.said_first import said_first
from quantlab.report.selection import ComparisonRequest, checked_margin, children, is_candidate, select
from quantlab.report.table import headline, rows_sheet
from quantlab.report.terminal import MAX_CELL, WIDE, Sheet, show, tell, told_below
from quantlab.tracking.connect import NO_STORE
from quantlab.tracking.pictures import SAMPLE_ARRAYS, SAMPLE_GRID, kept_picture, read_samples
from quantlab.tracking.record import run_id_of
from quantlab.tracking.results import BESIDE, Row, layer_columns, report_data, sample_columns, step_columns
from quantlab.tracking.tags import KIND, PARENT_RUN_ID, REPRODUCES
from quantlab.tracking.values import flatten
from quantlab.vocabulary.numbers import FLOORS, REFERENCE, flat_metrics, is_scheme
from quantlab.vocabulary.reports import SHOWN, Measurements, RunReport
from quantlab.vocabulary.schema import TrackingConfig

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

MAX_LINES = 15
MAX_PICTURES = 6
MAX_FAILED, MAX_REASON = 6, 300
WIDTH = 132
"""Columns of what a notebook shows as text; a terminal has its own."""
_NUMBERS = ("memory/weights_bytes", "memory/compression", "quantization/coverage")


class Results(Sequence[RunReport]):
    """The reports of a request, a row each, and what their runs left: tables, samples, images.

    It is a sequence of :class:`~quantlab.RunReport` (reference and floors first). ``layers``, ``samples``, ``steps``
    and ``images`` come from the runs' records, so that a resumed row has all of them too; of rows that nothing tracked
    (``quantlab.evaluate``) from the reports.
    """

    def __init__(self, reports: Sequence[RunReport], open_store: Callable[[], Reader]) -> None:
        """``open_store`` is called when the records are first needed."""
        self._reports, self._open = tuple(reports), open_store
        for report in self._reports:
            vars(report)[SHOWN] = self._one_html

    def __len__(self) -> int:
        return len(self._reports)

    @overload
    def __getitem__(self, index: int | str) -> RunReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RunReport]: ...
    def __getitem__(self, index: int | str | slice) -> RunReport | Sequence[RunReport]:
        """By its place, or by the scheme's name; ConfigError with the nearest where no row is called so."""
        if not isinstance(index, str):
            return self._reports[index]
        names = self._names if index in self._names else [report.name for report in self._reports]
        if len({*(named := [own for own, name in zip(self._names, names, strict=True) if name == index])}) > 1:
            raise ConfigError(f"results[{index!r}]: several rows are called so; choose {' or '.join(map(repr, named))}")
        if index not in names:
            raise ConfigError(f"results[{index!r}]: no row is called so{nearest(index, names)}; .rows has all of them")
        return self._reports[names.index(index)]

    def __iter__(self) -> Iterator[RunReport]:
        return iter(self._reports)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Results, list, tuple)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> pd.DataFrame:
        """One row a scheme: bytes and headline metrics first, then status, run id, parameters and all other metrics."""
        import pandas as pd

        data = []
        first = [f"quality/{m}" for p in {r["protocol"] for r in self._rows} for m in headline(p, self._rows)]
        for row, name in zip(self._rows, self._names, strict=True):
            whole, metrics = {**row}, row["metrics"]
            told = {k: whole[k] for k in ("status", "run_id", "resumed", "failed_stage", "error")}
            numbers = {k: metrics[k] for k in (*_NUMBERS, *first) if k in metrics}  # what a short view shows
            data.append({"scheme": name, **numbers, **told, **flatten(row["params"]), **metrics})
        return pd.DataFrame(data).set_index("scheme") if data else pd.DataFrame()

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer of each scheme, as read back from its tensors: status, dtype, group size, bits, errors."""
        import pandas as pd

        found = [(name, _columns_of(table)) for name, table in self._tables("layers.json", layer_columns)]
        frames = [pd.DataFrame(columns).assign(scheme=name) for name, columns in found if columns]
        return pd.concat(frames).set_index(["scheme", "component", "name"]) if frames else pd.DataFrame()

    @property
    def samples(self) -> pd.DataFrame:
        """One row a sample of each scheme: its id, cluster and stratum, and each metric of it."""
        return self._columns("samples.json", "sample", sample_columns)

    @property
    def steps(self) -> pd.DataFrame:
        """One row a denoising step of each scheme, one column a curve."""
        return self._columns("steps.json", "step", step_columns)

    def _columns(self, name: str, index: str, own: Callable[[Measurements], dict[str, list[object]]]) -> pd.DataFrame:
        import pandas as pd

        def of_report(report: RunReport) -> dict[str, list[object]]:
            return own(report.measurements) if report.measurements is not None else {}

        frames = {scheme: pd.DataFrame(table) for scheme, table in self._tables(name, of_report) if table}
        return pd.concat(frames, names=["scheme", index]) if frames else pd.DataFrame()

    def _tables(self, name: str, own: Callable[[RunReport], Any]) -> Iterator[tuple[str, Any]]:
        """Each scheme's table: of its run's record, and of the report itself where nothing was tracked."""
        yield from ((run.name, read_json(self._reader, run, name)) for run in self._runs)
        reports = zip(self._names, self._reports, strict=True)
        yield from ((name, own(report)) for name, report in reports if report.run_id is None)

    @property
    def images(self) -> dict[str, NDArray[np.uint8]]:
        """Scheme -> uint8 (samples, 3, height, width, channels): reference, candidate, difference."""
        reads = ((run.name, partial(self._reader.read_artifact, run)) for run in self._runs)
        found = ((name, kept_picture(read, SAMPLE_ARRAYS)) for name, read in reads)
        arrays = ((name, read_samples(content)) for name, content in found if content)
        return {name: samples[0] for name, samples in arrays if samples is not None}

    def compare(self, metric: str | None = "", margin: float = 0.0) -> Told:
        """What ``quantlab compare`` prints of these runs, under a metric and a margin of the user's.

        Raises ConfigError for a metric that they do not have, TrackingError where there is nothing to compare.
        """
        ids = tuple(run.run_id for run in self._runs)
        if not ids:
            raise TrackingError(
                "compare: none of these rows has a run in the store; run a recipe (quantlab.run) for one"
            )
        request = ComparisonRequest(
            sweep=self.sweep_id or "",
            run_ids=() if self.sweep_id else ids,
            metric=metric_called(str(metric or "")),
            margin=checked_margin(margin),
        )
        selection = select(request, self._reader)
        wanted = {*ids}  # a later sweep that took these jobs over may have others
        groups = (tuple(run for run in group if run.run_id in wanted) for group in selection.groups)
        selection = replace(selection, groups=tuple(group for group in groups if group))
        failed = [run for run in selection.failed if run.run_id in wanted]
        console, file = _console()
        shown = []
        for told in told_groups(compare(request, selection, self._reader), failed):
            if isinstance(told, Sheet):
                show(console, replace(told, all_in="quantlab compare --wide"))
            else:
                tell(console, told)
            shown.append(_html_table(told) if isinstance(told, Sheet) else _html_lines([told]))
        return Told(file.getvalue(), shown)

    def __repr__(self) -> str:
        lines = self._text().splitlines()
        return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "... .rows has all of it"])

    def _text(self) -> str:
        console, file = _console()
        for sheet in self._sheets:
            show(console, replace(sheet, all_in=".rows"))
        return file.getvalue().rstrip() or "no rows"

    def _repr_html_(self) -> str:
        parts = [_html_lines(self._unquantized)]
        parts += [_html_table(sheet) for sheet in self._sheets]
        failed = [r for r in self._reports if r.status == "FAILED"] if len(self) > 1 else []  # one alone says it itself
        lines = [f"failed: {r.name} at {r.failed_stage}: {printable(r.error, MAX_REASON)}" for r in failed]
        others = (
            [f"... and {len(lines) - MAX_FAILED} more that failed: .rows has all"] if len(lines) > MAX_FAILED else []
        )
        parts.append(_html_lines([*lines[:MAX_FAILED], *others]))
        pictures: list[str] = []
        left = 0
        for run in filter(is_candidate, self._runs):
            picture = kept_picture(partial(self._reader.read_artifact, run), SAMPLE_GRID)
            left += bool(picture) and len(pictures) == MAX_PICTURES
            if picture and len(pictures) < MAX_PICTURES:
                data, name = base64.b64encode(picture).decode(), html.escape(printable(run.name, 200))
                pictures.append(
                    f'<figure style="margin:0;max-width:100%"><figcaption style="max-width:24em">{name}: '
                    f'reference, quantized, difference</figcaption><img alt="samples of {name}" style="max-width:100%" '
                    f'src="data:image/png;base64,{data}"></figure>'
                )
        shown = f'<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:end">{"".join(pictures)}</div>'
        more = _html_lines([f"... and {counted(left, 'more scheme')} with images: .images has all"] if left else [])
        return "\n".join([*filter(None, parts), *([shown, more] if pictures else [])])

    def _one_html(self, report: RunReport) -> str:
        """Of a single report: as of all of them, and where its numbers are."""
        alone = Results([replace(report)], lambda: self._reader)
        lines = [f"status: {report.status}"]
        lines += [f"at {report.failed_stage}: {report.error}"] if report.error else []
        lines += [f"run: {report.run_id}"] if report.run_id else []
        lines += [f"{len(report.quantization.layers)} layers: .quantization"] if report.quantization else []
        return "\n".join([alone._repr_html_(), _html_lines(lines)])

    @property
    def sweep_id(self) -> str | None:
        """Id of the run that is the sweep's; None of a single run."""
        parents = {run.tags.get(PARENT_RUN_ID) for run in self._runs}
        return parents.pop() if len(parents) == 1 else None

    @property
    def _sheets(self) -> list[Sheet]:
        """The rows of each protocol, and what each component costs where that was measured."""
        found: list[Sheet | None] = []
        for protocol in sorted({r["protocol"] for r in self._rows}):
            rows = [r for r in self._rows if r["protocol"] == protocol]
            found += [rows_sheet(rows, protocol), attribution_sheet(rows, headline(protocol, rows))]
        return [sheet for sheet in found if sheet]

    @property
    def _unquantized(self) -> list[str]:
        schemes = [r for r in self._rows if "quantization/coverage" in r["metrics"]]
        return said_first((r["name"], r["unquantized"]) for r in schemes)

    @cached_property
    def _rows(self) -> list[Row]:
        return [report_data(r) for r in self._reports]

    @cached_property
    def _reader(self) -> Reader:
        return self._open()

    @cached_property
    def _runs(self) -> list[StoredRun]:
        """The runs of the rows that have one, under the rows' names."""
        names = dict.fromkeys((name, r.run_id) for r, name in zip(self._reports, self._names, strict=True) if r.run_id)
        ids = list(dict.fromkeys(run_id for _, run_id in names if run_id))
        found = {run.run_id: run for run in (self._reader.by_id(ids) if ids else [])}
        return [replace(found[run_id], name=name) for name, run_id in names if run_id in found]

    @cached_property
    def _names(self) -> list[str]:
        """The rows' names, those of several references and their floors told apart."""
        return told_apart(self._rows)


def next_steps(results: Results, output_dir: str, tracking: TrackingConfig, width: int = WIDE) -> list[str]:
    """What one does after a run: its id and folder, then compare, reproduce, and the store's page; at most 4 lines.

    Without a scheme there is nothing to compare. Where both have no room in ``width`` columns, the id is that of the
    command below."""
    tracked = [r for r in results if r.run_id and r.status == "FINISHED"]
    schemes = [r for r in tracked if is_scheme(r.name, flat_metrics(r))]
    asked_for = schemes or [r for r in tracked if r.name not in FLOORS] or tracked
    if not asked_for:
        return []
    last, folders = asked_for[-1], _folders(output_dir)
    ids = {r.run_id for r in results if r.run_id}
    folder = _sweep_of(folders, ids)
    sweep = run_id_of(folder) if folder else ""
    run_id = sweep or str(last.run_id)
    folder = folder or next((f for f in folders if run_id_of(f) == run_id), None)
    is_server = tracking.uri.startswith("http")
    ui = tracking.uri if is_server else f"mlflow ui --backend-store-uri {shlex.quote(tracking.uri)}"
    chosen = f"sweep={sweep}" if sweep else " ".join(str(r.run_id) for r in schemes)
    has_store = tracking.uri != NO_STORE
    where = f" tracking.uri={shlex.quote(tracking.uri)}" if tracking.uri != TrackingConfig().uri else ""
    where += f" output_dir={shlex.quote(output_dir)}" if not has_store and output_dir != "outputs" else ""
    kind, where_to = "sweep" if sweep else "run", f" in {folder}" if folder else ""
    first = f"{kind} {run_id}{where_to}"
    return [
        first if len(first) <= width or not folder else f"{kind}{where_to}",
        *([f"which is better:  quantlab compare {chosen}{where}"] if schemes else []),
        f"run one again:    quantlab reproduce {last.run_id}{where}",
        *([f"look at all:      {ui}"] if has_store else []),
    ]


def _folders(output_dir: str) -> list[Path]:
    """The newest runs' folders."""
    return sorted(Path(output_dir).expanduser().glob("runs/*"), reverse=True)[:500]


def _sweep_of(folders: Sequence[Path], ids: set[str]) -> Path | None:
    """The newest sweep of just these jobs; else the newest that has them among others."""
    larger = None
    for folder in folders:
        rows = _rows_of(folder)
        if ids <= rows <= {*ids, None}:
            return folder
        larger = larger or (folder if ids <= rows else None)
    return larger


def _rows_of(folder: Path) -> set[str | None]:
    """Ids of the jobs of a sweep, by its folder; none of a folder that is no sweep's."""
    try:
        rows = json_object((folder / "rows.json").read_bytes()).get("rows", [])
        return {row["run_id"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _columns_of(table: Any) -> Any:
    """The columns of a table as MLflow keeps it, or of one that is columns."""
    is_kept = bool(table) and set(table) == {"columns", "data"}
    return {k: [row[i] for row in table["data"]] for i, k in enumerate(table["columns"])} if is_kept else table


class Told(str):
    """Text that a notebook shows as tables and paragraphs, with all columns."""

    def __new__(cls, text: str, parts: Sequence[str] = ()) -> Told:
        told = super().__new__(cls, text)
        told._parts = tuple(parts)
        return told

    _parts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return "\n".join(self._parts)


def _console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    is_known = os.environ.get("COLUMNS", "").isdigit() or (sys.stdout is not None and sys.stdout.isatty())
    console = Console(
        file=file,
        width=min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH) if is_known else WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
        color_system=None,
        force_jupyter=False,  # in a notebook rich would show the table at once, and leave the text empty
    )
    return console, file


def _html_table(sheet: Sheet) -> str:
    """A sheet as HTML; nothing in it is markup. A notebook's own style would align all of it to the right."""

    def row(texts: Sequence[str], cell: str) -> str:
        sides = ["left" if column.is_text else "right" for column in sheet.columns]
        return "".join(
            f'<{cell} style="text-align:{side}{whole(side, cell)}">{html.escape(printable(text, MAX_CELL))}</{cell}>'
            for side, text in zip(sides, texts, strict=True)
        )

    def whole(side: str, cell: str) -> str:  # no number is broken: in a narrow notebook the table scrolls
        return ";white-space:nowrap" if (side, cell) == ("right", "td") else ""

    titles = [re.sub(" (?=[\u2191\u2193]$)", "\u00a0", column.title) for column in sheet.columns]
    head = row(titles, "th")
    body = "".join(f"<tr>{row(texts, 'td')}</tr>" for texts in sheet.rows)
    title, caption = map(_html_lines, (sheet.title, told_below(sheet, range(len(sheet.columns)))))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'{title}<div style="overflow-x:auto">{table}</div>{caption}'


def _html_lines(lines: Sequence[str]) -> str:
    return "".join(f"<div>{html.escape(unbroken(printable(line)))}</div>" for line in lines)


def chosen_rows(what: str, reader: Reader, tracking: TrackingConfig) -> list[tuple[StoredRun, dict[str, Any]]]:
    """The runs that ``what`` names, each with its ``report.json`` (empty of one that did not finish).

    ``what``: ``latest``, the id of a sweep or a run, or an experiment's name. Raises TrackingError for none of them.
    """
    if what == "latest":
        found = _latest(reader, tracking)
    elif known := reader.by_id([what]):
        found = children(reader, known[0]) if known[0].tags.get(KIND) == "sweep" else known
    elif what in reader.experiments():
        runs = reader.of_experiment(reader.experiments()[what], {})
        found = [r for r in runs if r.tags.get(KIND) != "sweep" and REPRODUCES not in r.tags]
    else:
        names = ", ".join(sorted(reader.experiments()))
        raise TrackingError(
            f"load({what!r}): no such run, sweep or experiment in {reader.uri}"
            f"{nearest(what, ['latest', *reader.experiments()])}; it has the experiments {names}, and "
            f"quantlab.load('latest') is the newest of {tracking.experiment} (experiment=NAME: of another)"
        )
    comes_along = (REFERENCE, *FLOORS)  # by name: what failed has no numbers, and stands where it was run
    started = sorted(found, key=lambda run: (run.name.split(" #")[0] not in comes_along, run.start_ms))
    return [(run, read_json(reader, run, "report.json") if run.status == "FINISHED" else {}) for run in started]


def kept_beside(reader: Reader, chosen: Sequence[tuple[StoredRun, object]]) -> list[dict[str, Any]]:
    """The reference and the floors that a single run kept, where it is what was chosen."""
    runs = [run for run, _ in chosen]
    if len(runs) != 1 or PARENT_RUN_ID in runs[0].tags:
        return []
    rows: list[dict[str, Any]] = read_json(reader, runs[0], BESIDE).get("rows", [])
    return rows


def _latest(reader: Reader, tracking: TrackingConfig) -> list[StoredRun]:
    number = experiment_id(reader, tracking.experiment, f"tracking.experiment={tracking.experiment}")
    for run in reader.of_experiment(number, {}):
        if PARENT_RUN_ID in run.tags or REPRODUCES in run.tags:
            continue
        rows = children(reader, run) if run.tags.get(KIND) == "sweep" else [run]
        if any(row.status == "FINISHED" for row in rows):
            tell_of_newer(reader, tracking.experiment, run, "load('latest')")
            return rows
    raise TrackingError(f"load('latest'): nothing has finished in experiment {tracking.experiment} of {reader.uri}")
