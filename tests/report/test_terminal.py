"""Tables where the terminal is narrow: no number and no word is broken; what is hidden is said; other programs get tabs."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from quantlab import progress
from quantlab.backends.table import backends
from quantlab.metrics import metric_called
from quantlab.progress import broken, spell_out
from quantlab.report import terminal
from quantlab.report.comparison_table import pairs_sheet
from quantlab.report.table import (
    cells,
    columns,
    in_bounds,
    legend,
    rows_sheet,
    said_beside,
    with_half_width,
    with_interval,
)
from quantlab.report.terminal import Column, Sheet, complain, show
from quantlab.report.verdicts import BETTER, Verdict
from quantlab.running.status import JobStatus
from quantlab.running.status import sheet as status_sheet
from quantlab.vocabulary.reports import MetricValue


def printed(sheet, width, **look):
    file = io.StringIO()
    show(Console(file=file, width=width, markup=False, highlight=False, emoji=False), sheet, **look)
    return file.getvalue()


def measured(name, value=0.0123, half=0.0004, **more):
    metrics = {
        "memory/bits_per_weight_model": 4.5123,
        "memory/bits_per_weight_quantized": 4.25,
        "memory/weights_bytes": 123_456_789,
        "memory/compression": 3.55,
        "quantization/coverage": 0.973,
        "perf/evaluate_s": 12.3,
    }
    for i, metric in enumerate(("psnr_db", "ssim", "lpips_proxy", "latent_rel_mse", "latent_cosine")):
        metrics |= {f"quality/{metric}": value * (i + 1), f"quality/{metric}/ci_lo": value * (i + 1) - half / 2}
        metrics |= {f"quality/{metric}/ci_hi": value * (i + 1) + half}
    return {
        **{"name": name, "status": "FINISHED", "metrics": metrics | more, "protocol": "diffusion", "error": ""},
        "params": {"quantization": {"backend": name.split()[0]}},
    }


ROWS = [measured("torchao int4 g128 awq"), measured("bitsandbytes nf4", 31.2, 0.44)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_error_goes_on_between_words_in_a_terminal_and_is_one_line_elsewhere(monkeypatch, capsys, is_terminal):
    console = Console(stderr=True, width=60, force_terminal=is_terminal)
    monkeypatch.setattr(terminal, "stderr", console)
    text = f"model=gpt2: there are {', '.join(['sd35_medium'] * 12)};\n      did you mean sdxl?"
    complain(text)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(f"quantlab: {text}".split())
    assert (max(map(len, lines)) <= 60) == is_terminal
    assert is_terminal or len(lines) == 2


@pytest.mark.parametrize(("num", "text"), [(0, "0.00"), (18432, "0.018"), (17936, "0.017"), (104858, "0.10"), (4.03 * 2**20, "4.03")])  # fmt: skip
def test_bytes_of_small_modules_are_told_apart(num, text):
    row = measured("torchao int8", **{"memory/weights_bytes": num})
    assert cells(row, [])[2] == text


@pytest.mark.parametrize(("num", "is_said"), [(3, True), (5, False)])
def test_few_samples_have_no_interval_and_that_is_said_with_the_way_out(num, is_said):
    row = measured("torchao int8", **{"quality/latent_rel_mse/n": float(num), "quality/psnr_db/n": float(num)})
    row["metrics"] = {k: v for k, v in row["metrics"].items() if is_said < 1 or "/ci_" not in k}
    text = " ".join(printed(rows_sheet([row], "diffusion", f"n = {num}"), 80).split())
    assert ("too few samples: no intervals and no verdicts; take 5 or more" in text) == is_said


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("status", ["FAILED", "SKIPPED"])
def test_a_row_without_numbers_says_why_at_any_width(width, status):
    more = ["perf/time_to_first_token_ms", "perf/prefill_tokens_per_s", "perf/decode_tokens_per_s"]
    ran = [measured("torchao int4 g128", **dict.fromkeys(more, 1234.5))]
    rows = [*ran, {**measured("quanto int4"), "status": status, "metrics": {}}]
    lines = printed(rows_sheet(rows, "diffusion", "n = 100", more), width).splitlines()
    assert sum(status in line for line in lines if "quanto int4" in line) == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_said_on_the_way_goes_on_between_words_in_a_terminal(monkeypatch, capsys, is_terminal):
    console = Console(stderr=True, width=60, force_terminal=is_terminal, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    progress.say("made beside the whole unquantized model, since it is not read from safetensors files of its own")
    lines = capsys.readouterr().err.splitlines()
    assert (max(map(len, lines)) <= 60) == is_terminal
    assert "safetensors" in " ".join(lines).split()


def test_what_is_printed_has_no_spaces_at_its_lines_ends():
    for width in range(60, 120, 5):
        lines = printed(rows_sheet([measured("a b", **{"memory/is_simulated": 1.0})], "diffusion", "n = 100"), width)
        assert not [line for line in lines.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200])
def test_no_cell_is_broken_at_any_width(width):
    sheet = rows_sheet(ROWS, "diffusion", "n = 100")
    text = printed(sheet, width)
    assert max(map(len, text.splitlines())) <= width
    body = [line.strip("│") for line in text.splitlines() if "torchao" in line]
    assert len(body) == 1, "the row stands in one line"
    shown = [cell.strip() for cell in body[0].split("│")]
    whole = list(sheet.rows[0])
    assert all(cell in whole for cell in shown)
    hidden = len(sheet.columns) - len(shown)
    flat = " ".join(text.split())
    assert (f"... {hidden} column{'s' * (hidden > 1)} hidden" in flat) == bool(hidden)
    assert (hidden == 0) == (width >= 132), "all of it from 132 columns on"


def test_a_long_name_goes_on_between_its_words():
    name = "torchao int4 g128 modules=[norms, output] layer_kinds=linear,embedding"
    text = printed(rows_sheet([measured(name)], "diffusion"), 80)
    first = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert " ".join(part for part in first if part) == name


def test_columns_give_way_in_their_order():
    sheet = Sheet(
        columns=[Column(title=t, keep=k) for t, k in zip("abcd", (9, 1, 5, 1), strict=True)], rows=[["1" * 20] * 4]
    )
    assert [re.findall(r"[a-d]", printed(sheet, w).splitlines()[1]) for w in (100, 80, 60, 40)] == [
        ["a", "b", "c", "d"],
        ["a", "b", "c"],
        ["a", "c"],
        ["a"],
    ]


def test_a_column_comes_back_where_a_wider_one_that_went_after_it_left_room():
    columns = [Column(title=t, keep=k) for t, k in zip("abcd", (9, 2, 1, 1), strict=True)]
    sheet = Sheet(columns=columns, rows=[["1" * num for num in (20, 40, 3, 4)]])
    shown = {w: re.findall(r"[a-d]", printed(sheet, w).splitlines()[1]) for w in (80, 72, 70, 60, 32, 27)}
    assert {w: "".join(titles) for w, titles in shown.items()} == {
        80: "abcd",
        72: "abc",
        70: "ab",
        60: "acd",
        32: "ac",  # what would have stayed longer comes back first
        27: "a",
    }
    assert "1 column hidden (b): --wide" in printed(sheet, 60)


def test_wide_hides_and_breaks_nothing():
    text = printed(rows_sheet(ROWS, "diffusion"), 40, wide=True)
    assert "hidden" not in text
    assert all(cell in text for row in rows_sheet(ROWS, "diffusion").rows for cell in row)


def test_tabs_for_other_programs():
    sheet = rows_sheet([measured("a\tb\nc"), *ROWS], "diffusion", "a caption")
    lines = printed(sheet, 40, is_plain=True).splitlines()
    assert [len(line.split("\t")) for line in lines] == [len(sheet.columns)] * 4
    assert lines[0].split("\t") == [c.title for c in sheet.columns]


words = st.text(alphabet="abcdefgh.0123456789µ漢", min_size=1, max_size=18)
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)


@given(
    rows=st.lists(st.tuples(words, words, sentences, words), min_size=1, max_size=4),
    width=st.integers(min_value=62, max_value=150),
)
def test_words_of_sentences_and_numbers_stay_whole(rows, width):
    columns = [
        Column(title="name", is_text=True),
        Column(title="number", keep=5),
        Column(title="what it is", is_text=True, may_wrap=True),
        Column(title="more", keep=1),
    ]
    text = printed(Sheet(columns=columns, rows=rows), width)
    found = set(re.split(r"[\s│┃]+", text))
    for name, _, sentence, _ in rows:
        assert {name, *sentence.split()} <= found


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (2.31e-6, 3.4e-7, "2.3e-6 ±0.3"),
        (2.31e-6, 1.4e-7, "2.31e-6 ±0.14"),
        (9.8e-4, 7.1e-4, "0.0010 ±0.0007"),
        (9.8e-6, 7.1e-6, "1.0e-5 ±0.7"),
        (-9.97e6, 3e5, "-1.00e7 ±0.03"),
        (99_999.6, 1.1, "99999.6 ±1.1"),
        (40.123, 0.31, "40.1 ±0.3"),
        (40.123, 12.0, "40 ±12"),
        (0.9987, 0.00021, "0.9987 ±0.0002"),
        (-0.0123, 0.0041, "-0.012 ±0.004"),
        (0.0, 2.0e-5, "0 ±2e-5"),
        (-3e-8, 3.2e-6, "0 ±3e-6"),
        (123456.0, 1900.0, "1.235e5 ±0.019"),
        (5.0, 0.0, "5"),
        (1e-12, 0.5, "0.0 ±0.5"),
        (40.0, 0.96, "40.0 ±1.0"),
        (-0.23, 3.1, "0 ±3"),
        (-0.04, 0.12, "-0.04 ±0.12"),
        (0.999994, 3.1e-7, "0.999994 ±3e-7"),
        (1234.5, 2e-9, "1234.500000 ±2e-9"),
    ],
)
def test_a_value_with_its_half_width(value, half, text):
    assert with_half_width(value, half) == text


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "text"),
    [
        ("same_top1", 0.986, 0.486, 1.0, "0.986 (0.486..1)"),
        ("same_top1", 0.9987, 0.9973, 1.0, "0.999 (0.997..1)"),
        ("latent_cosine", 0.99987, 0.9997, 0.99995, "0.9999 (0.9997..0.99995)"),
        ("ssim", 0.9, 0.88, 0.93, "0.90 ±0.03"),
        ("psnr_db", 99.5, 98.9, 100.0, "99.50 (98.90..100.0)"),
        ("psnr_db", 40.1, 39.8, 40.3, "40.1 ±0.3"),
        ("kld_mean", 0.004, 0.0, 0.03, "0.004 (0..0.03)"),
        ("kld_mean", 4e-6, 1e-6, 3e-5, "4.0e-6 (1.0e-6..3.0e-5)"),
        ("kld_mean", 4.06e-6, 4.04e-6, 4.08e-6, "4.06e-6 ±0.02"),
        ("ppl", 17.5, 17.0, 25.0, "17.50 (17.00..25.00)"),
        ("ppl", 1.02, 1.0, 1.3, "1.02 (1..1.3)"),
        ("psnr_db", 40.1, None, None, "40.10"),
        ("output_cosine", 0.99987, None, None, "0.9999"),
        ("output_cosine", 0.9999999, None, None, "1.000000"),
        ("latent_rel_mse", 1.004, None, None, "1.004"),
        ("ppl", 1.0006, None, None, "1.0006"),
        ("ppl", 1.0, None, None, "1"),
    ],
)
def test_an_interval_that_is_lopsided_or_ends_where_the_metric_does_has_both_bounds(metric, value, low, high, text):
    name = f"quality/floor_bf16/{metric}"
    bounds = {} if low is None else {f"{name}/ci_lo": low, f"{name}/ci_hi": high}
    found = with_interval({name: value, **bounds}, name)
    assert found == text
    assert len(found) <= 24, "two of them beside each other in 80 columns"


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (4.06e-6, 4.05e-6, 4.07e-6, "4.06e-6 (4.05e-6..4.07e-6)"),
        (0.99987, 0.99981, 0.99992, "0.9999 (0.9998..0.99992)"),
        (56.713, 56.5, 56.93, "56.71 (56.50..56.93)"),
        (5.3e-6, 5.0e-6, 5.7e-6, "5.3e-6 (5.0e-6..5.7e-6)"),
        (-0.2, -1.0, 0.0, "-0.2 (-1..0)"),
        (0.0053, 1.2e-13, 2.31e11, "0.0053 (1.2e-13..2.3e11)"),  # one row has all of the error
        (123_456.0, 1_234.0, 9e6, "1.2e5 (1234.0..9.0e6)"),
    ],
)
def test_both_bounds_have_the_digits_that_tell_them_apart(value, low, high, text):
    assert in_bounds(value, low, high) == text


def test_a_bound_in_brackets_is_no_bits_of_layers():
    row = measured("x", **{"quality/psnr_db": 99.9, "quality/psnr_db/ci_lo": 98.0, "quality/psnr_db/ci_hi": 100.0})
    sheet = rows_sheet([row], "diffusion")
    (column,) = [c for c in sheet.columns if c.title.startswith("psnr")]
    assert column.caption == "(low..high): 95 % interval"


def test_the_half_width_is_the_longer_one():
    [row] = rows_sheet([measured("x", 10.0, 0.4)], "diffusion").rows
    assert "10.0 ±0.4" in row


@pytest.mark.parametrize("width", [44, 60, 80, 132])
def test_what_is_said_below_is_of_the_columns_that_are_shown(width):
    """A mark, a saving or a time that nobody sees needs no word."""
    rows = [measured("quanto int4", **{"quality/psnr_db": 39.0, "memory/is_simulated": 1.0}), *ROWS]
    text = " ".join(printed(rows_sheet(rows, "diffusion", "n = 100"), width).split())
    head, said = text.split("└")
    for title, mark in (
        ("bits/weight", "of the quantized components"),
        ("saving", "saving is against 16 bit"),
        ("┃ s┃", "times on a CPU"),
        ("MiB", "~ simulated"),
    ):
        assert (mark in said) == (title in head.split("┡")[0].replace(" ┃", "┃")), (title, width)
    assert said.count("±: the longer half") == ("↓" in head.split("┡")[0])
    assert "n = 100" in said


def test_rows_that_are_all_of_earlier_jobs_say_so_once_and_keep_their_names():
    rows = [{**row, "resumed": True} for row in ROWS]
    sheet = rows_sheet(rows, "diffusion")
    assert [row[0] for row in sheet.rows] == [row["name"] for row in ROWS]
    assert " ".join(printed(sheet, 80).split()).count("resumed") == 1
    skipped = {**measured("nf4"), "status": "SKIPPED", "metrics": {}}
    assert [row[0] for row in rows_sheet([*rows, skipped], "diffusion").rows][:2] == [row["name"] for row in ROWS]
    some = [rows[0], ROWS[1]]
    assert [row[0] for row in rows_sheet(some, "diffusion").rows] == [
        "torchao int4 g128 awq (resumed)",
        "bitsandbytes nf4",
    ]
    assert [row[0] for row in rows_sheet(some, "diffusion", is_plain=True).rows] == [row["name"] for row in ROWS]


def test_the_legend_names_the_marks_that_are_there():
    plain = [["a°~ (name)", "4.50", "1"]]
    assert legend(plain) == ""
    assert legend([["x", "4.50 (4.25)", "~1.00"]]).split("; ") == [
        "MiB, bits/weight: of the quantized components, whole (of their quantized layers)",
        "~ simulated: stored wider than the dtype says",
    ]
    assert "±" in legend([["x", "1.0 ±0.2"]])
    assert "°" in legend([["x", "1.0°"]])


@pytest.mark.parametrize("name", backends())
def test_what_a_backends_own_programs_do_otherwise_is_said_beside_its_rows(name):
    told = backends()[name].elsewhere
    own = {"params": {"quantization": {"backend": "none"}, "components": {"vae": {"backend": name}}}}
    plain = {"quantization": {"backend": "none"}}
    others = {"params": {**plain, "checkpoint": "theirs", "resolved": {"checkpoint_method": f"none, {name}"}}}
    for rows in ([measured(name), measured(f"{name} other")], [measured("parts") | own], [measured("theirs") | others]):
        for protocol in ("language", "diffusion", "module"):  # what is run by Diffusers computes as its row does
            caption = rows_sheet([row | {"protocol": protocol} for row in rows], protocol).caption
            wanted = list(told) if protocol == "language" else []
            assert [text for text in caption if text.startswith(f"{name}:")] == wanted
    empty = {**measured(name), "metrics": {}, "protocol": "language"}
    assert not said_beside([empty]), "a row without numbers needs no note"


def test_documents_have_both_ends_of_an_interval():
    assert "10.00 (9.8..10.40)" in cells(measured("x", 10.0, 0.4), ["psnr_db"])
    assert len(columns(["psnr_db"])) == len(cells(measured("x"), ["psnr_db"]))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_these_characters_gets_others(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    spell_out(stream)
    stream.write("10 ±0.2° ↑ … 漢\n")
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert (
        text
        == {
            "ascii": "10 +-0.2# ^ ... \\u6f22\n",
            "latin-1": "10 ±0.2° ^ ... \\u6f22\n",
            "utf-8": "10 ±0.2° ↑ … 漢\n",
        }[encoding]
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_columns_stand_below_one_another_in_any_encoding(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    spell_out(stream)
    rows = [*ROWS, {**measured("漢"), "metrics": {}}]
    show(Console(file=stream, width=100, markup=False, highlight=False, emoji=False), rows_sheet(rows, "diffusion"))
    stream.flush()
    lines = [line for line in raw.getvalue().decode(encoding).splitlines() if line.startswith(("|", "│", "┃"))]
    assert len(lines) >= len(rows)
    assert len({cell_len(line) for line in lines}) == 1, lines


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_jobs_of_a_sweep_fit_a_terminal(width):
    one = JobStatus(
        name="torchao int4 g128",
        state="running",
        node="node-17.cluster",
        attempt=2,
        elapsed_s=1234.5,
        log="/scratch/someone/outputs/runs/20260101-120000-torchao-int4-g128-abcdefgh/worker.log",
    )
    text = printed(status_sheet([one]), width)
    assert max(map(len, text.splitlines())) <= width
    assert "torchao int4 g128" in text
    assert "running" in text
    assert ("worker.log" in text) == (width == 160)
    assert ("--wide" in text) == (width < 160)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("psnr_db", "psnr_db"),
        ("psnr", "psnr_db"),
        ("quality/psnr_db", "psnr_db"),
        ("quality/psnr", "psnr_db"),
        ("quality/kld_mean", "kld_mean"),
        ("kld", "kld"),
        ("", ""),
    ],
)
def test_a_metric_by_the_names_that_people_read(typed, name):
    assert metric_called(typed) == name


def test_sentences_above_a_table_have_a_line_each_and_none_breaks_its_own():
    sheet = Sheet(columns=[Column(title="a")], rows=[["1" * 30]], title=("one [/.]", "two\nthree"))
    lines = printed(sheet, 80).splitlines()
    assert [line.strip() for line in lines[:2]] == ["one [/.]", "two\\nthree"]


@pytest.mark.parametrize("width", [30, 34, 60])
def test_a_name_that_is_longer_than_its_column_goes_on_behind_a_separator(width):
    names = ["quality/reference_grid_fingerprint", "transformer_blocks.10.attn.to_out.0", "a:very_long-name/of.parts"]
    sheet = Sheet(
        columns=[Column(title="m", is_text=True), Column(title="was")], rows=[[n, "0.123456789"] for n in names]
    )
    lines = printed(sheet, width).splitlines()
    assert max(map(len, lines)) <= width
    told = [line.strip("│").split("│")[0].strip() for line in lines if line.startswith("│")]
    assert "".join(told) == "".join(names)
    assert all(piece in names or piece[-1] in "/_.:-" or any(n.endswith(piece) for n in names) for piece in told)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "names", [("bitsandbytes int8", "bitsandbytes nf4"), ("modelopt int4 awq_lite", "torchao int4 g128 awq")]
)
def test_sentences_go_on_in_the_next_line_before_a_name_is_broken(names, width):
    pair = Verdict(a=names[0], b=names[1], difference=MetricValue(value=0.5, n=8), test="t", p_holm=0.01, text=BETTER)
    text = printed(pairs_sheet([pair], "kld_mean"), width)
    assert max(map(len, text.splitlines())) <= width
    cells = " ".join(line.replace("│", " ") for line in text.splitlines() if line.startswith("│"))
    assert {*cells.split()} <= {*" ".join(names).split(), "is", "better", "+0.5", "0.010"}


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_long_name_leaves_room_for_the_numbers(width):
    layers = ",".join(f"model.layers.{i}.self_attn.q_proj" for i in range(4))
    name = f"torchao int4 g32 (modules_to_not_convert.mine=[{layers}])"
    text = printed(rows_sheet([measured(name), *ROWS], "diffusion"), width)
    assert max(map(len, text.splitlines())) <= width
    head = text.partition("┡")[0]
    assert {"MiB", "latent_rel_mse"} <= {*head.replace("┃", " ").split()}, "a table of names alone says nothing"
    first = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join("".join(first).split()).startswith("".join(name.split()))


def test_what_has_no_separator_is_left_to_the_table():
    assert broken("abcdefghij kl", 4) == "abcdefghij kl"
    assert broken("ab/cd/ef gh_ij", 5) == "ab/\ncd/ef gh_ij"


def test_captions_of_an_ascii_terminal_are_measured_as_they_are_printed():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    spell_out(stream)
    sheet = Sheet(columns=[Column(title="m", is_text=True)], rows=[["x" * 60]], caption=("± " * 39,))
    show(Console(file=stream, width=80, markup=False, highlight=False), sheet)
    stream.flush()
    assert max(map(len, raw.getvalue().decode("ascii").splitlines())) <= 80
