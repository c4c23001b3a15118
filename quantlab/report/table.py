"""The table at the end of a request: one row a scheme, for the terminal and as Markdown.

A row is what :func:`quantlab.tracking.results.report_data` gives and what ``rows.json`` of a sweep holds, so the
terminal and the documents show the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quantlab.errors import nearest
from quantlab.metrics import METRICS, bounds_of
from quantlab.metrics.statistics import MIN_CLUSTERS
from quantlab.progress import in_markdown
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.elsewhere import said_elsewhere
from quantlab.report.names import once_each, told_apart
from quantlab.report.selection import backends_of
from quantlab.report.terminal import Column, Sheet
from quantlab.report.verdicts import TOO_FEW, error_metric, is_inside, largest_floor, less, with_other_batch
from quantlab.tracking.results import Measured, Row
from quantlab.tracking.values import flatten
from quantlab.vocabulary.amounts import mib
from quantlab.vocabulary.numbers import is_scheme, metric_value, time_in_words
from quantlab.vocabulary.reports import MetricValue

MAX_SKIPPED = 8  # rows of impossible combinations that a terminal shows
MARKS = {
    "(": "MiB, bits/weight: of the quantized components, whole (of their quantized layers)",
    "..": "(low..high): 95 % interval",
    "±": "±: the longer half of the 95 % interval, in the same power of ten unless it has its own",
    "°": "° surely inside the noise floor",
    "~": "~ simulated: stored wider than the dtype says",
}
"""What may stand in a cell -> what it means."""
KEEP = {"scheme": 9, "MiB": 8, "bits/weight": 6, "saving": 3, "coverage": 2, "s": 1}
"""Column -> how long it stays where the terminal is narrow; see :class:`quantlab.report.terminal.Column`."""
CAPTIONS = {"saving": "saving is against 16 bit"}
OF_SPEED = {
    "time_to_first_token_ms": "from the prompt to the first token",
    "prefill_tokens_per_s": "tokens of the prompt over the time to the first token",
    "decode_tokens_per_s": "tokens after the first over their time",
    "sample_s": "from the prompt to the picture, video or sound",
    "step_ms": "one denoising step",
}
"""What is measured with ``evaluation.speed=true`` alone, behind ``perf/`` -> what it is."""
ANY = (-math.inf, math.inf)
MAX_DIGITS = 6
LARGE = 1e5
"""From here on a number has a power of ten, as on the page."""
MAX_LOPSIDED = 3.0
"""How many times as long as the shorter half the longer one may be that stands behind ±."""
CPU_SECONDS = "times on a CPU say nothing about a GPU"


def headline(protocol: str, rows: Iterable[Measured]) -> list[str]:
    """The protocol's headline metrics that a row has (of images, videos or sound); the first two of none."""
    if protocol not in PROTOCOLS:  # of rows that failed, of a model that is not known any more
        return []
    metrics = [row["metrics"] for row in rows]
    found = [m for m in PROTOCOLS[protocol].HEADLINE if any(f"quality/{m}" in known for known in metrics)]
    return found or list(PROTOCOLS[protocol].HEADLINE[:2])


def columns(shown: Sequence[str]) -> list[str]:
    """Column titles of a table with these metrics."""
    return [
        "scheme",
        "bits/weight",
        "MiB",
        "saving",
        *(title_of(m) for m in shown),
        "coverage",
        "s",
    ]


def title_of(metric: str) -> str:
    """A metric over its column, with its unit and the direction that is better."""
    row = METRICS[metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    unit = f" [{row.unit}]" if row.unit not in ("", "1") else ""
    return f"{metric.removesuffix('_db')}{unit}{arrow}"


def legend(rows: Iterable[Sequence[str]]) -> str:
    """What the marks in these cells mean, and of no others; names of schemes are no marks."""
    told = [text for row in rows for text in row[1:]]
    return "; ".join(said for mark, said in MARKS.items() if any(_has(text, mark) for text in told))


def _has(text: str, mark: str) -> bool:
    return mark in text and not (mark == "(" and ".." in text)  # the brackets of an interval are its own


def with_marks(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[Column]:
    """The columns, each with what the marks in its cells mean; names of schemes are no marks."""
    marked = [columns[0]]
    for j, column in enumerate(columns[1:], 1):
        said = (legend(("", row[j]) for row in rows), column.caption)
        marked.append(replace(column, caption="; ".join(filter(None, said))))
    return marked


def said_beside(rows: Iterable[Row]) -> list[str]:
    """What must be said beside the rows of some backends: a number of theirs is another one elsewhere."""
    told: dict[str, list[tuple[str, Sequence[str], Mapping[str, float]]]] = {}
    for row in rows:
        if "quantization/coverage" in row["metrics"]:
            said = (row["name"], [*backends_of(flatten(row["params"]))], row["metrics"])
            told.setdefault(row["protocol"], []).append(said)
    return list(dict.fromkeys(text for protocol, some in told.items() for text in said_elsewhere(some, protocol)))


def cells(row: Measured, shown: Sequence[str], bounds: bool = True) -> list[str]:
    """One row's texts, in the order of :func:`columns`; ``bounds``: intervals with both their ends."""
    metrics = row["metrics"]
    if row["status"] != "FINISHED":
        texts = [""] * (len(columns(shown)) - 2)
        texts[1] = row["status"]  # under MiB, which stays longest
        return [row["name"], *texts, ""]
    return [
        row["name"],
        _shown(metrics.get("memory/bits_per_weight_model"), "{:.2f}")
        + _shown(metrics.get("memory/bits_per_weight_quantized"), " ({:.2f})"),
        stored_mib(metrics),
        _shown(metrics.get("memory/compression"), "{:.2f}x"),
        *(_quality(row, m, bounds) for m in shown),
        _shown(metrics.get("quantization/coverage"), "{:.1f} %", 0.01),
        _shown(metrics.get("perf/evaluate_s"), "{:.1f}"),
    ]


def stored_mib(metrics: Mapping[str, float]) -> str:
    """What a scheme stores, as a cell under MiB and in a sentence: marked where its format is simulated."""
    found = metrics.get("memory/weights_bytes")
    return "" if found is None else f"{'~' if metrics.get('memory/is_simulated') else ''}{mib(found)}"


def _shown(value: float | None, pattern: str, unit: float = 1.0) -> str:
    return "" if value is None else pattern.format(value / unit)


def short_number(value: float) -> str:
    """A number as a cell has it: three digits, and as many as tell it from 1."""
    if value != 0 and abs(value) < 1e-3:
        return _with_power(value, 1)
    if LARGE <= abs(value) < math.inf:
        return _with_power(value, 2)
    short = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"
    if short in ("1", "-1") and abs(value) != 1:
        return f"{value:.{min(-_power(1 - abs(value)), MAX_DIGITS)}f}"
    return short


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _with_power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def in_bounds(value: float, low: float, high: float) -> str:
    """``0.986 (0.486..1)``: short numbers, with as many digits as tell the three apart."""
    apart = _power(high - low) if math.isfinite(high - low) else MAX_DIGITS

    def text(number: float) -> str:
        short = short_number(number)
        if "e" in short:
            return _with_power(number, max(1, min(_power(number) - apart, MAX_DIGITS)))
        if not math.isfinite(number):
            return short
        is_round = short == f"{number:.0f}" and number == round(number)
        digits = min(-apart, MAX_DIGITS)
        return short if is_round or len(short.partition(".")[2]) >= digits else f"{number:.{digits}f}"

    return f"{text(value)} ({text(low)}..{text(high)})"


def with_half_width(value: float, half: float) -> str:
    """``40.1 ±0.3``; in ``2.3e-6 ±0.3`` the half-width has the value's power of ten, in ``0 ±3e-6`` its own.

    One digit of it is shown, two where the first is a 1; one below the value's last digit has its own power too.
    """
    largest = max(abs(value), half)
    if not half or not math.isfinite(largest):
        return short_number(value)
    power = 0 if 1e-3 <= largest < LARGE else math.floor(math.log10(largest))
    mantissa, width = _same_digits(value / 10**power, half / 10**power)
    if power and abs(float(mantissa)) >= 10:  # 9.8 that is shown without a digit
        power = 0 if power == -4 else power + 1
        mantissa, width = _same_digits(value / 10**power, half / 10**power)
    if not float(width):
        return f"{mantissa} ±{_with_power(half, 0)}"  # below the last digit
    if not power:
        return f"{mantissa} ±{width}"
    return f"{mantissa}e{power} ±{width}" if float(mantissa) else f"0 ±{width}e{power}"


def _same_digits(value: float, half: float) -> tuple[str, str]:
    first = f"{half:.1e}"
    digits = min(max(0, -int(first.partition("e")[2]) + first.startswith("1")), 6)
    return f"{value:z.{digits}f}", f"{half:.{digits}f}"


def _quality(row: Measured, metric: str, bounds: bool) -> str:
    metrics = row["metrics"]
    text = with_interval(metrics, f"quality/{metric}", bounds)
    return text + ("°" if text and is_scheme(row["name"], metrics) and inside_floor(metric, metrics) else "")


def with_interval(metrics: Mapping[str, float], name: str, bounds: bool = False) -> str:
    """A number by its tracked name as a cell has it, with its 95 % interval where there is one; "" where it is not."""
    value = metrics.get(name)
    if value is None:
        return ""
    return number_cell(metric_value(metrics, name), bounds_of(name), bounds)


def number_cell(value: MetricValue, possible: tuple[float, float] = ANY, bounds: bool = False) -> str:
    """A number with its 95 % interval where there is one, as ``40.1 ±0.3`` or with both ``bounds``.

    Both are also shown where ± would say another interval: one that goes beyond what is ``possible``, or that reaches
    much further than the longer half to its other side.
    """
    low, high = value.ci_lo, value.ci_hi
    if low is None or high is None or low == high:
        return short_number(value.value)
    short, half = sorted((high - value.value, value.value - low))
    is_lopsided = (
        half > MAX_LOPSIDED * short or not possible[0] <= value.value - half <= value.value + half <= possible[1]
    )
    if bounds or is_lopsided:
        return in_bounds(value.value, low, high)
    return with_half_width(value.value, half)


def inside_floor(metric: str, metrics: Mapping[str, float]) -> bool:
    """Does a scheme surely cost no more than another execution of the reference does?"""
    error = error_metric(metric)
    known = METRICS[error].of_reference
    if known is None or f"quality/{error}" not in metrics:
        return False
    floor = largest_floor(metrics, metric)
    value = with_other_batch(metric_value(metrics, f"quality/{error}"), metrics, error)
    return floor is not None and bool(is_inside(less(value, known), floor.cost))


def rows_sheet(
    rows: Iterable[Row], protocol: str, caption: str = "", more: Sequence[str] = (), *, is_plain: bool = False
) -> Sheet:
    """The rows for a terminal, with ``more`` columns: metrics by their tracked names (``perf/decode_tokens_per_s``).

    ``is_plain``: for other programs, to which a scheme's name is its name.
    """
    rows = once_each([*rows])
    shown = headline(protocol, rows)
    skipped = [r for r in rows if r["status"] == "SKIPPED"]
    listed = [r for r in rows if r not in skipped] + skipped[:MAX_SKIPPED]
    texts = [cells(row, shown, bounds=False) for row in listed]
    styles = {}
    ran = [row for row in listed if row["status"] != "SKIPPED"]
    all_resumed = bool(ran) and all(row.get("resumed") for row in ran)
    for i, (row, name) in enumerate(zip(listed, told_apart(listed), strict=True)):
        texts[i][0] = name
        texts[i][0] += " (resumed)" if row.get("resumed") and not all_resumed and not is_plain else ""
        if row["status"] == "FAILED" or not is_scheme(row["name"], row["metrics"]):
            styles[i] = "red" if row["status"] == "FAILED" else "dim"
    left = len(skipped) - MAX_SKIPPED
    untold = f"and {left} more skipped (rows.json)" if left > 0 else ""
    timed = "" if any(row["metrics"].get("perf/representative") for row in rows) else CPU_SECONDS
    own = [replace(c, caption=timed) if c.title == "s" else c for c in sheet_columns(shown)]
    further, absent = asked_columns(listed, texts, more, is_plain=is_plain)
    own += further
    earlier = "resumed: all rows are those of earlier jobs" if all_resumed else ""
    told = (untold, *said_beside(rows), *absent, caption, _too_few(rows, shown), earlier)
    return Sheet(columns=with_marks(own, texts), rows=texts, styles=styles, caption=told)


def asked_columns(
    rows: Sequence[Measured], texts: Sequence[list[str]], names: Sequence[str], *, is_plain: bool = False
) -> tuple[list[Column], list[str]]:
    """The columns of the metrics ``names``, whose cells are put behind the ``texts`` of each row; and what is said of
    those that no row has. ``is_plain``: for other programs, to which these columns are there all the same."""
    known = {name for row in rows for name in row["metrics"]}
    tracked = [_tracked(name, known) for name in names]
    timed = "" if any(row["metrics"].get("perf/representative") for row in rows) else CPU_SECONDS
    columns = []
    for name in tracked if is_plain else [name for name in tracked if name in known]:
        columns.append(Column(title=_chosen(name, is_plain), keep=8, caption=timed if name.startswith("perf/") else ""))
        for text, row in zip(texts, rows, strict=True):
            values = row["metrics"]
            text.append(_shown(values.get(name), "{:.4g}") if is_plain else with_interval(values, name))
    return columns, _not_there(names, known)


def _too_few(rows: Iterable[Measured], shown: Sequence[str]) -> str:
    """A sentence where the samples are too few for any interval."""
    nums = [row["metrics"].get(f"quality/{shown[0]}/n") for row in rows if is_scheme(row["name"], row["metrics"])]
    is_few = any(num is not None and num < MIN_CLUSTERS for num in nums)
    return f"{TOO_FEW}: no intervals and no verdicts; take {MIN_CLUSTERS} or more" if is_few else ""


def _chosen(name: str, is_plain: bool) -> str:
    """The title of a column that was asked for: of a time in words, between which a line can end."""
    words, unit = time_in_words(name)
    return f"{words}{f' [{unit}]' if unit else ''}" if name.startswith("perf/") and not is_plain else name


def _tracked(name: str, known: Iterable[str]) -> str:
    """The tracked name of what was asked for: ``perf/step_ms`` may be asked for as ``step_ms``."""
    return next((k for k in (name, f"perf/{name}", f"quality/{name}") if k in known), name)


def _not_there(names: Sequence[str], known: set[str]) -> list[str]:
    """A sentence for each metric that was asked for and no row has."""
    return [f"--columns {n}: no row has it{_way_to(n, known)}" for n in names if _tracked(n, known) not in known]


def _way_to(name: str, known: set[str]) -> str:
    is_of_speed = name.removeprefix("perf/").removesuffix("_p90") in OF_SPEED
    return "; evaluation.speed=true measures it" if is_of_speed else nearest(name, known)


_GROUPS = ("quality", "memory", "perf", "quantization", "calibration", "export")
_OF_TIMES = ("_s", "_ms", "_per_token", "_p90", "_bytes", "representative", "speed_repeats", "speed_warm_up")
"""How names end behind ``perf/``, and behind the names of stages."""


def no_columns(names: Sequence[str]) -> list[str]:
    """A sentence for each name that no row can ever have as a metric: known before anything is measured."""
    known = {*METRICS, *(f"{name}{end}" for name in OF_SPEED for end in ("", "_p90"))}
    told = []
    for name in names:
        group, _, rest = name.rpartition("/") if name.count("/") == 1 else ("", "", name)
        is_deep = name.count("/") > 1 and name.startswith(_GROUPS)
        is_known = rest in known or (group in ("", "perf") and rest.endswith(_OF_TIMES))
        if not (is_deep or is_known or group in ("memory", "quantization", "calibration", "export")):
            found = nearest(rest, known) or "; quantlab list metrics shows them"
            told.append(f"--columns {name}: no metric is called so{found}")
    return told


def sheet_columns(shown: Sequence[str], first: str = "") -> list[Column]:
    """:func:`columns` for a terminal; of the metrics ``first`` stays longest, or else the first one."""
    keep = {title_of(m): 7 if m == (first or shown[0]) else 5 - min(i, 1) for i, m in enumerate(shown)}
    titles = columns(shown)
    return [
        Column(title=t, is_text=i == 0, keep=keep[t] if t in keep else KEEP[t], caption=CAPTIONS.get(t, ""))
        for i, t in enumerate(titles)
    ]


def markdown(rows: Sequence[Row], protocol: str) -> str:
    """The rows as a Markdown table."""
    rows = once_each(rows)
    names = told_apart(rows)
    shown = headline(protocol, rows)
    head = columns(shown)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    lines += [
        "| " + " | ".join(in_markdown(c) for c in [name, *cells(row, shown)[1:]]) + " |"
        for row, name in zip(rows, names, strict=True)
        if row["status"] != "SKIPPED"
    ]
    return "\n".join(lines)
