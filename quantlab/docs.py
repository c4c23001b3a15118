"""Numbers in documents come from tracked runs: ``python -m quantlab.docs`` writes them.

In the :data:`DOCUMENTS` it fills what stands between ``<!-- table: RECIPE -->`` (the rows of its newest finished run),
``<!-- figure: RECIPE -->`` (a picture of them, written beside the recipe), ``<!-- calibration: RECIPE -->`` (its
algorithms, each paired with the plain one on the same bits) or ``<!-- list: WHAT -->`` (what ``quantlab list WHAT``
prints) or ``<!-- plan: NAME -->`` (the phases of one of :data:`PLANS`) or ``<!-- init: NAME -->`` (one of
:data:`INITS`: a first recipe) or ``<!-- exports: NAME -->`` (the cells in ``recipes/NAME.json``, which
``tests/exporting/make_cells.py`` measures) or ``<!-- foreign: NAME -->`` (the rows in ``recipes/NAME.json``, of
``tests/exporting/make_foreign.py``) and ``<!-- end -->``. In each recipe that has such a run it replaces the line
``# Expect: ...``, and in each for a GPU the memory that its plan needs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlab.backends.table import distributions
from quantlab.errors import ConfigError
from quantlab.planning.listing import LISTS
from quantlab.planning.plan import plan
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.compare import Comparison, compare
from quantlab.report.comparison_table import p_text
from quantlab.report.pareto_figure import draw_pareto
from quantlab.report.price_table import phases_markdown
from quantlab.report.reading import open_reader
from quantlab.report.said_first import said_first
from quantlab.report.selection import parse_request, select
from quantlab.report.table import cells, columns, headline, legend, markdown, said_beside
from quantlab.running.choice import most_on_device
from quantlab.running.first_recipe import recipe_text
from quantlab.running.forecast import book_of, forecast, phases_of_floors
from quantlab.tracking import find_records
from quantlab.tracking.results import SweepResults
from quantlab.tracking.tags import KIND, RECIPE
from quantlab.vocabulary.amounts import GIB, MIB
from quantlab.vocabulary.numbers import metric_value

BLOCK = re.compile(
    r"(<!-- (table|figure|calibration|list|plan|init|exports|foreign): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL
)
SHOWN_VERSIONS = ("torch", "diffusers", "transformers")
"""Beside these, what the backends name."""


PLANS = {
    "flux_dev_24_gib": "model=flux_dev backend=bitsandbytes dtype=nf4 memory.device_gib=24 memory.host_gib=32",
}
"""Name of a block -> the request that it shows."""
INITS = {"first_recipe": "model=causal_lm model.path=Qwen/Qwen3-0.6B device=cpu"}
"""Name of a block -> the words behind ``quantlab init my.yaml``."""
FOREIGN_METRICS = ("quality/kld_mean", "memory/bits_per_weight", "memory/weights_bytes", "quantization/coverage")
"""What is kept of a row of checkpoints that others made."""
NEEDS = re.compile(r"\(one GPU with \d+ GiB or more(; \d+ part by part)?\)")
"""How a recipe says the memory that it needs."""
DOCUMENTS = ("README.md", "recipes/README.md", "quantlab/README.md", "quantlab/metrics/README.md")
"""Where blocks are filled; those that a checkout does not have are passed over."""


class Sweep(SweepResults):
    """``rows.json`` of a finished sweep, and where and when it was tracked."""

    run_id: str
    uri: str
    date: str


def newest(runs_dir: Path, recipe: str) -> Sweep | None:
    """The newest finished sweep of a recipe; None without one.

    Rows that it found finished count with the time that they took and from the day on which they ran. Raises
    ConfigError where that is not to be had.
    """
    found = find_records(runs_dir, {RECIPE: recipe, KIND: "sweep"})
    ids = {Path(r["folder"]) / "rows.json": r["run_id"] for r in found}
    files = sorted((f for f in ids if f.is_file()), key=lambda p: p.parent.name)
    if not files:
        return None
    data: SweepResults = json.loads(files[-1].read_text(encoding="utf-8"))
    earlier = {r["run_id"] for r in data["rows"] if r.get("resumed")}
    jobs = [r for r in find_records(runs_dir, {}) if r["run_id"] in earlier] if earlier else []
    if len(jobs) < len(earlier):
        raise ConfigError(
            f"recipe={recipe}: {len(earlier) - len(jobs)} of its rows were found finished, and their folders are gone: "
            "what they cost is not known; run it with sweep.force=true"
        )
    began = min([files[-1].stat().st_mtime, *(job["start_ms"] / 1000 for job in jobs)])
    return {
        **data,
        "seconds": data["seconds"] + sum(((job["end_ms"] or 0) - job["start_ms"]) / 1000 for job in jobs),
        "run_id": ids[files[-1]],
        "uri": f"sqlite:///{runs_dir.parent.absolute() / 'mlflow.db'}",
        "date": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d"),
    }


def table_block(data: Sweep) -> str:
    """Caption and Markdown table of a run."""
    rows = [r for r in data["rows"] if r["protocol"]]
    environment = data["environment"]
    versions = ", ".join(
        f"{n} {environment['versions'][n]}" for n in (*SHOWN_VERSIONS, *distributions()) if n in environment["versions"]
    )
    machine = environment["hardware"]
    where = ", ".join(g["name"] for g in machine["gpus"]) or f"CPU ({machine['cpu_capability']})"
    minutes = data["seconds"] / 60
    n = next(iter(r["metrics"][f"quality/{PROTOCOLS[r['protocol']].HEADLINE[0]}/n"] for r in rows))
    bits = max(r["metrics"].get("memory/bits_per_weight_model", 0) for r in rows)
    computed = "float32" if bits > 24 else "16 bits"
    protocol = rows[0]["protocol"]
    marks = "; ".join([legend(cells(r, headline(protocol, rows)) for r in rows), *said_beside(rows)])
    caption = (
        f"Measured {data['date']} in {minutes:.1f} min on a {where} with {machine['torch_threads']} threads, "
        f"n = {n:.0f}; the model, kept layers and scales are in {computed}. {marks}.\n\n*{versions}*"
    )
    schemes = [r for r in rows if "quantization/coverage" in r["metrics"]]
    first = "".join(f"{line}.\n\n" for line in said_first((r["name"], r.get("unquantized", ())) for r in schemes))
    return f"{first}{markdown(rows, protocol)}\n\n{caption}\n"


def calibration_block(data: Sweep) -> str:
    """What each algorithm of a sweep costs or buys over the plain one: a Markdown table of paired differences."""
    lines = [
        "| algorithm | against | metric | difference (95 % interval) | of plain | p (Holm) | verdict |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for group in compare_sweep(data["run_id"], data["uri"]):
        values = {r.name: r.metrics[f"quality/{group.metric}"] for r in group.candidates}
        for v in group.twins:
            d = v.difference
            share = f"{values[v.a] / values[v.b]:.2f}x" if values[v.b] else ""
            interval = "" if d.ci_lo is None else f" ({d.ci_lo:+.1e}..{d.ci_hi:+.1e})"
            lines.append(
                f"| {v.a} | {v.b} | {group.metric} | {d.value:+.1e}{interval} | {share} | "
                f"{p_text(v.p_holm)} | {v.text} |"
            )
    return "\n".join(lines) + "\n"


def compare_sweep(run_id: str, uri: str) -> list[Comparison]:
    """The comparison of a tracked sweep by its first headline metric."""
    request = parse_request([f"sweep={run_id}", f"tracking.uri={uri}"])
    reader = open_reader(request.tracking, Path.cwd())
    return compare(request, select(request, reader), reader)


def expectation(data: Sweep) -> str:
    """The recipe header's line: cost, and the best and worst row."""
    rows = [r for r in data["rows"] if r["status"] == "FINISHED" and "quantization/coverage" in r["metrics"]]
    metric = PROTOCOLS[rows[0]["protocol"]].HEADLINE[0]
    shown = headline(rows[0]["protocol"], rows)
    index = columns(shown).index("saving") + 1
    ranked = sorted(rows, key=lambda r: r["metrics"][f"quality/{metric}"])
    best, worst = ranked[0], ranked[-1]
    text = [f"{metric} {cells(r, shown)[index]} ({r['name']})" for r in (best, worst)]
    machine = data["environment"]["hardware"]
    where = ", ".join(g["name"] for g in machine["gpus"]) or f"{machine['torch_threads']} CPU threads"
    return (
        f"# Expect: measured {data['date']}, {len(rows)} schemes in {data['seconds'] / 60:.1f} min on {where}; "
        f"from {text[0]} to {text[1]}"
    )


def list_block(what: str) -> str:
    """A list of the command line as a Markdown table."""
    rows = LISTS[what]()
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def figure_block(data: Sweep, recipe: str, root: Path, document: Path) -> str:
    """Writes the picture of a sweep beside its recipe; the image with its caption, for ``document``."""
    file = root / "recipes" / f"{recipe}.svg"
    draw_pareto(data["rows"], file)
    link = Path(os.path.relpath(file, document.parent)).as_posix()
    rows = [r for r in data["rows"] if "quantization/coverage" in r["metrics"]]
    what = f"{len(rows)} schemes of recipe={recipe}: quality over stored bits"
    return f"![{what}]({link})\n\n{what}, measured {data['date']}; hollow: simulated.\n"


def plan_block(name: str) -> str:
    """The command of a plan and its phases."""
    [price] = forecast(plan(PLANS[name].split()))
    return f"```bash\nquantlab plan {PLANS[name]}\n```\n\n{phases_markdown(price)}"


def init_block(name: str) -> str:
    """The command that writes a first recipe, and the recipe."""
    words = INITS[name].split()
    text = recipe_text("my.yaml", words, plan([*words, "sweep.dry_run=true"]).jobs[0])
    return f"```bash\nquantlab init my.yaml {INITS[name]}\n```\n\n```yaml\n{text}```\n"


def exports_block(file: Path) -> str:
    """Backend x dtype x model: what loads it, whether bits and outputs are identical, and bytes over planned bytes."""
    data = json.loads(file.read_text(encoding="utf-8"))
    cells_of: dict[str, dict[str, dict[str, Any]]] = data["cells"]
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"<sup>{notes.index(text) + 1}</sup>"

    lines = ["| scheme | " + " | ".join(data["models"]) + " |", "|---|" + "---|" * len(data["models"])]
    for scheme, row in cells_of.items():
        shown = [_export_cell(row.get(model), note) for model in data["models"]]
        lines.append(f"| {scheme} | {' | '.join(shown)} |")
    said = [f"{i}. {text}" for i, text in enumerate(notes, 1)]
    legend = (
        "b: each tensor has the bits that were measured; o: outputs are identical, bit for bit, or how far they are "
        "off; then the bytes of the tensors in the files over those that were planned, "
        "without buffers that no checkpoint holds. Loaded by "
        "`from_pretrained` of Diffusers (Llama, SmolLM2: of transformers) in a process that cannot import quantlab."
    )
    return "\n".join([*lines, "", legend, "", *said, "", f"*{data['versions']}; {data['machine']}*"]) + "\n"


def _export_cell(cell: dict[str, Any] | None, note: Callable[[str], str]) -> str:
    if cell is None:
        return ""
    if "refused" in cell:
        return f"refused{note(cell['refused'])}"
    off = cell["rel_error"]
    outputs = (
        "o" if cell["outputs"] else f"o off {off:.1g}{note(cell['reason'])}" if off else f"no o{note(cell['reason'])}"
    )
    aside = [note(cell["loader"].partition(" (")[2].rstrip(")"))] if " (" in cell["loader"] else []
    aside += (
        [note(f"with replace_default_exclusions=true; else: {cell['refused_first']}")] if cell["refused_first"] else []
    )
    return f"b {outputs} {cell['file_bytes'] / cell['planned_bytes']:.3f}{''.join(aside)}"


def foreign_block(file: Path) -> str:
    """Checkpoints of others beside quantlab's own schemes: format, stored bits and the headline metric of each."""
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| row | made by | bits/weight (of quantized layers) | MiB | kld_mean, nats (95 % interval) | verdict |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in data["rows"]:
        verdict = data["verdicts"].get(row["name"], "")
        metrics, value = row["metrics"], metric_value(row["metrics"], "quality/kld_mean")
        interval = "" if value.ci_lo is None else f" ({value.ci_lo:.2g}..{value.ci_hi:.2g})"
        bits = f"{metrics['memory/bits_per_weight_model']:.2f} ({metrics['memory/bits_per_weight_quantized']:.2f})"
        mib = metrics["memory/weights_bytes"] / MIB
        lines.append(f"| {row['name']} | {row['by']} | {bits} | {mib:.3f} | {value.value:.3g}{interval} | {verdict} |")
    pairs = [f"- {pair}" for pair in data["pairs"]]
    told = "Against the reference above; each checkpoint and quantlab's own row, paired:"
    n = metric_value(data["rows"][0]["metrics"], "quality/kld_mean").n
    return (
        "\n".join(
            [*lines, "", told, "", *pairs, "", f"*A tiny Llama, n = {n:.0f}; {data['versions']}; {data['machine']}*"]
        )
        + "\n"
    )


def needs(recipe: Path) -> str:
    """GiB of a GPU that the largest phase of a recipe takes, and a floor: with the model whole there, and part by part
    if less."""
    request = plan([f"recipe={recipe}", "sweep.dry_run=true"])
    config = request.jobs[0].config
    floors = phases_of_floors(book_of(config), config).values()
    largest: dict[str, list[int]] = {
        "whole": [min(most_on_device(phases["resident"]) for phases in floors)],
        "alone": [min(most_on_device(phases["alone"]) for phases in floors)],
    }
    for price in forecast(request):
        peaks = {name: most_on_device(rows) for name, rows in price.phases.items() if name != "group_offload"}
        largest["whole"].append(min(peak for name, peak in peaks.items() if name != "alone"))
        largest["alone"].append(min(peaks.values()))
    whole, alone = (-(-max(largest[name]) // GIB) for name in ("whole", "alone"))
    return f"(one GPU with {whole} GiB or more{f'; {alone} part by part' if alone < whole else ''})"


def fill(document: Path, runs_dir: Path, root: Path) -> str:
    """The text of ``document`` with every block filled that there is a run or a list for."""

    def content(match: re.Match[str]) -> str:
        head, kind, name, end = match.groups()
        if kind == "list":
            return head + list_block(name) + end
        if kind == "plan":
            return head + plan_block(name) + end
        if kind == "init":
            return head + init_block(name) + end
        if kind == "exports":
            return head + exports_block(root / "recipes" / f"{name}.json") + end
        if kind == "foreign":
            return head + foreign_block(root / "recipes" / f"{name}.json") + end
        data = newest(runs_dir, name)
        if data is None:
            return match[0]
        if kind == "figure":
            return head + figure_block(data, name, root, document) + end
        return head + (calibration_block if kind == "calibration" else table_block)(data) + end

    return BLOCK.sub(content, document.read_text(encoding="utf-8"))


def main(root: Path, runs_dir: Path) -> list[str]:
    """Update the documents and the recipes below ``root``; returns what was changed, as paths from there."""
    if not (root / "README.md").is_file():
        raise ConfigError(f"{root}: no README.md here; run this in the project's folder")
    changed = []
    documents = [root / name for name in DOCUMENTS if (root / name).is_file()]
    texts = {document: fill(document, runs_dir, root) for document in documents}
    for recipe in sorted((root / "recipes").glob("*.yaml")):
        data, text = newest(runs_dir, recipe.stem), recipe.read_text(encoding="utf-8")
        if NEEDS.search(text):
            texts[recipe] = text = NEEDS.sub(needs(recipe), text)
        if data is not None:
            lines = text.split("\n")
            texts[recipe] = "\n".join(expectation(data) if line.startswith("# Expect:") else line for line in lines)
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path.relative_to(root).as_posix())
    return changed


HELP = """python -m quantlab.docs [RUNS]

Writes the numbers of the documents and recipes of the project in this folder, from the runs in the folder RUNS
(outputs/runs, where none is given), and prints which files it changed."""


def command(words: Sequence[str]) -> int:
    """``python -m quantlab.docs`` with ``words``; its exit code."""
    if any(word in ("--help", "-h", "help") for word in words):
        print(HELP)
        return 0
    try:
        if options := [word for word in words if word.startswith("-")]:
            raise ConfigError(f"{options[0]}: no such option; --help says what there is")
        if words[1:]:
            raise ConfigError(f"{words[1]}: one folder of runs is read; --help says which")
        if words and not Path(words[0]).is_dir():
            raise ConfigError(f"{words[0]}: no such folder; name the one of the runs, see --help")
        changed = main(Path.cwd(), Path(words[0] if words else "outputs/runs"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code
    print("updated:", " ".join(changed) or "nothing")
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
