"""One run: what a job or a sweep writes, first to its folder, then to the store."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Protocol, Self, SupportsFloat

from quantlab.errors import TrackingError, in_words
from quantlab.progress import in_markdown, under_way
from quantlab.quiet import warnings_kept
from quantlab.tracking.events import Event
from quantlab.tracking.pictures import framed_grid
from quantlab.tracking.record import Record, now_ms
from quantlab.tracking.tags import ARTIFACT_DIGESTS, FAILURE, LOGGED_IMAGES, NOTE, STAGE
from quantlab.tracking.values import (
    MAX_DIGEST_CHARS,
    MAX_KEY_CHARS,
    MAX_PARAM_CHARS,
    as_text,
    checked_key,
    checked_number,
    checked_tags,
    digest_of,
    flatten,
    shortened,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL.Image import Image as Picture

_LOG = logging.getLogger(__name__)

WARNINGS = "warnings.txt"
"""Artifact: what libraries warned of."""
DONE = "done"
"""The stage of a run that has finished."""
_ENDS = ("FINISHED", "FAILED", "KILLED")
MAX_PARAGRAPH = 1000
"""Characters of a paragraph of a description."""
SMALL_PIXELS = 256
"""Sides of the small copy of a picture, as MLflow makes them."""
_TERMINATED = 143
"""Exit code of a process that SIGTERM ended."""


class Sink(Protocol):
    """Where events go after the folder."""

    def sync(self, record: Record) -> bool:
        """Send what has not arrived."""


class Run:
    """An open run. As a context manager it ends FINISHED, or FAILED with the stage and the error.

    ``stage`` is set by whoever walks through the stages; it names the place of a failure, also of a killed process.
    """

    def __init__(self, sink: Sink, record: Record) -> None:
        self.record = record
        self._sink = sink
        self._old_handler: Callable[[int, FrameType | None], object] | int | None = None
        self._terminated = False
        self._quiet = contextlib.ExitStack()
        self._digests: dict[str, str] = {}
        self._is_together = False

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; ``local-...`` as long as no store has taken it."""
        return self.record.run_id

    @property
    def stage(self) -> str:
        """Where the run is."""
        return str(self.record.summary["tags"].get(STAGE, ""))

    @stage.setter
    def stage(self, name: str) -> None:
        under_way(f"{self.record.summary['name']}: {name}")
        self.set_tags({STAGE: name})

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While open, events reach the folder one by one as ever; ``run.json`` and the store follow once at the end."""
        if self._is_together:
            yield
            return
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False
            self.record.show()
            self._sink.sync(self.record)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Nested mappings become dotted keys. A parameter is written once: another value for it is a TrackingError."""
        flat = {checked_key(key, "parameter"): value for key, value in flatten(params).items()}
        known = self.record.summary["params"]
        for key, value in flat.items():
            if known.get(key, value) != value:
                raise TrackingError(f"parameter {key!r}: is {known[key]!r} already, not {value!r}; use another name")
        for key, value in flat.items():
            if len(value) > MAX_PARAM_CHARS:
                self._log_text(value, checked_key(f"params/{key}.txt", "parameter"))
        if flat:
            self._write({"op": "params", "values": flat})

    def log_metrics(self, metrics: Mapping[str, SupportsFloat | None]) -> None:
        """Numbers by name; None is left out, NaN and infinities are a MetricUndefined, and nothing is logged then.

        What is known already with the same value is no second point of it.
        """
        values = {checked_key(k, "metric"): checked_number(k, v) for k, v in metrics.items() if v is not None}
        known = self.record.summary["metrics"]
        values = {key: value for key, value in values.items() if known.get(key) != value}
        if values:
            self._write({"op": "metrics", "values": values})

    def log_curve(self, name: str, values: Sequence[SupportsFloat]) -> None:
        """A metric over steps, from step 0 on; NaN and infinities are a MetricUndefined, and nothing is logged then."""
        points = [checked_number(f"{name}, step {k}", v) for k, v in enumerate(values)]
        if points:
            self._write({"op": "curve", "name": checked_key(name, "metric"), "values": points})

    def log_input(
        self, name: str, digest: str, context: str, source: Mapping[str, object], profile: Mapping[str, object]
    ) -> None:
        """Data that the run looked at, for MLflow's list of data sets; ``context`` says what it was for.

        ``source`` has a ``uri`` where it is a file; ``profile`` is shown beside the name.
        """
        self._write(
            {
                "op": "input",
                "name": shortened(as_text(name), MAX_KEY_CHARS, "cut here"),
                "digest": digest.removeprefix("sha256:")[:MAX_DIGEST_CHARS],
                "context": context,
                "source": dict(source),
                "profile": dict(profile),
            }
        )

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Text by name; a later value replaces an earlier one. Text over 5000 characters is cut, visibly."""
        known = self.record.summary["tags"]
        values = {key: value for key, value in checked_tags(tags).items() if known.get(key) != value}
        if values:
            self._write({"op": "tags", "values": values})

    def log_artifact(self, path: Path | str, artifact_path: str | None = None) -> None:
        """A file, under its own name in the folder ``artifact_path`` of the run's artifacts.

        A file outside the run's folder is copied into it first. TrackingError where there is no such file.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise TrackingError(f"artifact {path}: no such file; an artifact is one file")
        name = _artifact_name(f"{artifact_path}/{path.name}" if artifact_path else path.name)
        if not path.is_relative_to(self.record.folder):
            copy = self._place(name)
            shutil.copyfile(path, copy)
            path = copy
        self._write_artifact(name, path)

    def log_json(self, data: object, name: str) -> None:
        """Plain data as a JSON file."""
        self._log_text(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n", name)

    def log_table(self, columns: Mapping[str, Sequence[object]], name: str) -> None:
        """Columns of equal length as a table that MLflow's page shows (``layers.json``)."""
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise TrackingError(f"table {name!r}: columns of different lengths ({lengths}); give one value a row")
        if not name.endswith(".json"):
            raise TrackingError(f"table {name!r}: a table is a .json file; name it {name}.json")
        table = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        self._log_text(json.dumps(table, ensure_ascii=False, default=str), name, table=True)

    def log_image_grid(self, images: ArrayLike, name: str) -> None:
        """A picture of many: a uint8 array (rows, columns, height, width, 1 or 3), as one PNG.

        An array (columns, height, width, channels) is one row. Images under 64 pixels are enlarged by whole factors.
        """
        name = _artifact_name(name)
        picture = framed_grid(images, name)
        target = self._place(name)
        picture.save(target)
        self._write_artifact(name, target)

    def log_image(self, picture: Picture, key: str, step: int) -> None:
        """A picture for MLflow's image grid, under the names that its page looks for: whole, and a small copy."""
        name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{now_ms()}+{uuid.uuid4().hex}"
        small = picture.copy()
        small.thumbnail((SMALL_PIXELS, SMALL_PIXELS))
        with self.together():
            for shown, ending in ((picture, ".png"), (small, "+compressed.webp")):
                file = _artifact_name(name + ending)
                target = self._place(file)
                shown.save(target)
                self._write_artifact(file, target)
            self.set_tags({LOGGED_IMAGES: "True"})

    def describe(self, *paragraphs: str) -> None:
        """Go on with the run's description, which MLflow shows as Markdown: what is given is text."""
        said = [self.record.summary["tags"].get(NOTE, ""), *(in_markdown(text, MAX_PARAGRAPH) for text in paragraphs)]
        self.set_tags({NOTE: "\n\n".join(filter(None, said))})

    def finish(self, status: str, error: str = "", stage: str = "") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; nothing can be written to it afterwards."""
        if status not in _ENDS:
            raise TrackingError(f"status={status}: a run ends as one of {', '.join(_ENDS)}")
        stage = DONE if status == "FINISHED" else stage
        tags = {FAILURE: error, STAGE: stage}
        with self.together():
            self.set_tags({k: v for k, v in tags.items() if v})
            if error:
                self.describe(
                    f"{' at '.join(filter(None, ('failed', stage or self.stage)))}: {' '.join(error.split())}"
                )
            self._write({"op": "finish", "status": status, "error": error, "stage": stage or self.stage})

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can signals be handled
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # another's handler stays in place
            self._old_handler = signal.signal(signal.SIGTERM, self._terminate)
        self._quiet.enter_context(warnings_kept(self.record.folder / WARNINGS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.close()
        try:
            if not self.record.is_open:
                return
            if (warned := self.record.folder / WARNINGS).is_file():
                self._write_artifact(WARNINGS, warned)
            self._end(error)
        except OSError as disk:  # no room for the end; what led here is what the user is told
            if error is None:
                raise
            _LOG.warning("%s: the run's end is not written (%s); the next start ends it", self.record.folder, disk)
        finally:
            if self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)
                self._old_handler = None

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.finish("FINISHED")
            return
        with contextlib.suppress(OSError):  # a short line may find room where a long text does not
            self._log_text("".join(traceback.format_exception(error)), "failure.txt")
        told = self._terminated or (isinstance(error, SystemExit) and error.code == _TERMINATED)  # by an outer run
        text = "SIGTERM: the process was told to end" if told else in_words(error)
        self.finish("FAILED", text)

    def _terminate(self, *_: object) -> None:
        """Schedulers end a job by SIGTERM; an exception is what closes its run."""
        self._terminated = True
        raise SystemExit(_TERMINATED)

    def _write(self, event: Event) -> None:
        if not self.record.is_open:
            raise TrackingError(f"run {self.record.summary['name']!r}: has ended; start another for what comes later")
        self.record.append(event, shows=not self._is_together)
        if not self._is_together:
            self._sink.sync(self.record)

    def _log_text(self, text: str, name: str, table: bool = False) -> None:
        name = _artifact_name(name)
        path = self._place(name)
        content = text.encode(errors="backslashreplace")
        path.write_bytes(content)
        with self.together():
            self._write_artifact(name, path, table)
            if name.endswith(".json"):
                self._digests[name] = digest_of(content)
                self.set_tags({ARTIFACT_DIGESTS: json.dumps(self._digests)})

    def _write_artifact(self, name: str, path: Path, table: bool = False) -> None:
        if Path(name).name != path.name:
            raise TrackingError(f"artifact {name!r}: the file is called {path.name}; an artifact keeps its file's name")
        file = path.relative_to(self.record.folder).as_posix()
        self._write({"op": "artifact", "name": name, "file": file, "table": table})

    def _place(self, name: str) -> Path:
        path = self.record.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _artifact_name(name: str) -> str:
    if name == "run.json" or Path(name).parts[:1] == ("tracking",):
        raise TrackingError(f"artifact {name!r}: the name is taken by the run's own record; choose another")
    return checked_key(name, "artifact")
