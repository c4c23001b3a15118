"""The tables of ``quantlab plan`` and of attribution in a narrow terminal: nothing broken, columns give way in an order."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from quantlab.progress import spell_out
from quantlab.report.attribution import attribution_sheet
from quantlab.report.price_table import price_tables
from quantlab.report.terminal import Sheet, show, tell
from quantlab.vocabulary.numbers import ALONE, ON_TOP
from quantlab.vocabulary.prices import ComponentPrice, Kept, Kind, Phase, Price
from quantlab.vocabulary.reports import MemoryReport

NAME = "bitsandbytes nf4 g128 layer_kinds=linear,embedding"


MEMORY = MemoryReport(
    weights_bytes=12_345_678_901, quantized_bytes=12_000_000_000, scale_bytes=345_678_901, other_bytes=0,
    bytes_at_16_bit=24_000_000_000, num_parameters=12_000_000_000,
)  # fmt: skip


def component(name, scheme=""):
    kinds = [("codes", "float8_e4m3", 12_000_000_000), ("Qwen3VLMoeTextRMSNorm", "bfloat16", 23_456)]
    return ComponentPrice(
        name=name, memory=MEMORY, quantized_parameters=12_000_000_000, kept=(), scheme=scheme,
        kinds=tuple(Kind(what=w, dtype=d, parameters=n, num_bytes=n) for w, d, n in kinds),
        original_bytes=24_000_000_000, quantizing_bytes=1,
    )  # fmt: skip


def price(name, **budget):
    phases = tuple(
        Phase(name=n, device_bytes=31 * 2**30, host_bytes=2**30, activation_bytes=2**20)
        for n in ("encode prompts", "decode")
    )
    return Price(
        name=name, backend="a", dtype="b", group_size="auto", device="cuda", compute_dtype="bfloat16", budget=budget,
        components=(component("transformer", name), component("text_encoder_2")),
        phases={placement: phases for placement in ("resident", "streamed", "one at a time")},
    )  # fmt: skip


def attributed():
    metrics = {"memory/weights_bytes": 5e9}
    for part in ("transformer", "text_encoder_3"):
        metrics |= {f"memory/{part}/weights_bytes": 4.1e9, f"memory/{part}/saved_bytes": 3.2e9}
        for metric, value in {"latent_rel_mse": 2.3e-6, "psnr_db": 39.1, "ssim": 0.9912}.items():
            for start in (f"{ALONE}/{part}/", f"{ON_TOP}/{part}/", "quality/"):
                metrics |= {f"{start}{metric}": value, f"{start}{metric}/ci_lo": value * 0.9}
                metrics |= {f"{start}{metric}/ci_hi": value * 1.2}
    sheet = attribution_sheet([{"name": NAME, "status": "FINISHED", "metrics": metrics}], ["latent_rel_mse", "psnr_db"])
    return [sheet]


SHEETS = {
    "one": [told for told in price_tables([price(NAME, device_bytes=24 * 2**30)]) if isinstance(told, Sheet)],
    "without a budget": [told for told in price_tables([price(NAME)]) if isinstance(told, Sheet)],
    "a grid": [told for told in price_tables([price(NAME, host_bytes=1), price("x")]) if isinstance(told, Sheet)],
    "attribution": attributed(),
}
ALL = [(kind, i) for kind, sheets in SHEETS.items() for i in range(len(sheets))]


def printed(sheet, width, **look):
    file = io.StringIO()
    show(Console(file=file, width=width, markup=False, highlight=False, emoji=False), sheet, **look)
    return file.getvalue()


def test_there_are_all_of_them():
    assert {kind: len(sheets) for kind, sheets in SHEETS.items()} == {
        "one": 2, "without a budget": 2, "a grid": 1, "attribution": 1
    }  # fmt: skip


@pytest.mark.parametrize("width", [50, 60, 80, 132])
@pytest.mark.parametrize(("kind", "i"), ALL)
def test_no_number_and_no_word_is_broken(kind, i, width):
    sheet = SHEETS[kind][i]
    text = printed(sheet, width)
    assert max(map(len, text.splitlines())) <= width
    table = [line for line in text.splitlines() if "│" in line]
    whole = {word for row in sheet.rows for cell in row for word in cell.split()}
    assert {word for line in table for word in re.split(r"[\s│]+", line) if word} <= whole
    hidden = re.search(r"(\d+) columns? hidden", " ".join(text.split()))
    shown = len(table[0].strip("│").split("│"))
    assert shown + (int(hidden[1]) if hidden else 0) == len(sheet.columns)


@pytest.mark.parametrize(("kind", "i"), ALL)
def test_wide_shows_all_and_tabs_too(kind, i):
    sheet = SHEETS[kind][i]
    text = printed(sheet, 40, wide=True)
    assert "hidden" not in text
    assert all(cell in text for row in sheet.rows for cell in row)
    lines = printed(sheet, 40, is_plain=True).splitlines()
    assert [line.split("\t") for line in lines] == [[c.title for c in sheet.columns], *map(list, sheet.rows)]


GOES = {
    ("one", 0): ["bytes", "parameters", "dtype", "bits/weight", "GiB"],
    ("one", 1): ["of it activations", "host", "fits"],
    ("a grid", 0): ["one at a time", "streamed", "resident", "bits/weight", "fits", "weights"],
    ("attribution", 0): [
        "psnr + others", "psnr alone", "MiB", "latent_rel_mse + others", "latent_rel_mse alone", "saves MiB"
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "i"), GOES)
def test_what_gives_way_first(kind, i):
    columns = SHEETS[kind][i].columns
    order = sorted((c.keep, -j) for j, c in enumerate(columns) if c.keep < 9)
    gone = [columns[-j].title for _, j in order]
    assert [re.sub(r" (\[\w+\] )?[↑↓]", "", title) for title in gone] == GOES[kind, i]


def test_a_terminal_of_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    spell_out(stream)
    for kind, i in ALL:
        show(Console(file=stream, width=80, markup=False, highlight=False), SHEETS[kind][i])
    stream.flush()
    assert "+-0." in raw.getvalue().decode("ascii")


def test_sentences_go_on_between_words_in_a_terminal_and_are_one_line_elsewhere():
    line = "impossible: " + "a sentence of words " * 10
    for is_terminal in (True, False):
        file = io.StringIO()
        tell(Console(file=file, width=40, force_terminal=is_terminal, color_system=None, highlight=False), line.strip())
        lines = file.getvalue().splitlines()
        assert (len(lines) > 1) == is_terminal
        assert " ".join(" ".join(lines).split()) == line.strip()


@pytest.mark.parametrize(("num_bytes", "unit", "said"), [(3 * 2**29, "GiB", "1.500"), (3 * 2**19, "MiB", "1.500")])
def test_a_small_model_is_told_in_mebibytes(num_bytes, unit, said):
    """Of the digits model every number read 0.00 GiB."""
    part = replace(component("transformer", NAME), memory=replace(MEMORY, weights_bytes=num_bytes))
    phases = {"resident": (Phase(name="reference", device_bytes=num_bytes, host_bytes=0, activation_bytes=0),)}
    kept = (Kept(rule="a rule", modules=("a",), num_bytes=num_bytes),)
    small = replace(price(NAME), components=(replace(part, kept=kept),), phases=phases)
    parts, _, line, phase = price_tables([small])
    assert parts.rows[-1][parts.columns.index(next(c for c in parts.columns if c.title == unit))] == said
    assert line == f"  {said} {unit}: a rule (a)"
    assert phase.caption[0].startswith(unit)
    assert phase.rows[0][2] == said
    (grid,) = price_tables([small, replace(small, name="x")])
    assert grid.caption[0].startswith(unit)
    assert grid.rows[0][1] == said
