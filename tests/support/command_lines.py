"""Command lines made at random from the schema itself: its keys and groups, with values right, wrong and odd."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from quantlab.backends.table import backends, own_settings
from quantlab.planning.places import groups
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.launching import LAUNCHER_SETTINGS
from quantlab.vocabulary.schema import DigitsModelConfig, ExperimentConfig


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key of a schema's node with its field, nodes included."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        yield f"{prefix}{field.name}", field
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")


FIELDS: dict[str, dataclasses.Field[Any]] = dict(leaves(ExperimentConfig()))
FIELDS |= dict(leaves(DigitsModelConfig(), "model."))
for _settings in LAUNCHER_SETTINGS.values():
    FIELDS |= dict(leaves(_settings(), "launcher.settings."))
FIELDS |= {f"quantization.{n}": f for b in backends() for n, f in own_settings(b).items()}
BARE = [f.name for f in dataclasses.fields(QuantizationAxes)] + sorted({n for b in backends() for n in own_settings(b)})
OPEN = [
    "sweep.grid.dtype",
    "sweep.grid.output_dir",
    "sweep.grid.hydra",
    "sweep.grid.evaluation.num_samples",
    "sweep.search.objectives",
    "quantization.modules_to_not_convert.mine",
    "quantization_config",
    "recipe",
]
HYDRA = ["hydra.run.dir", "hydra.verbose", "hydra/launcher", "hydra.job.chdir", "hydra"]
KEYS = [*FIELDS, *BARE, *OPEN, *HYDRA]
ODD = [
    "", "null", "true", "[]", "{}", "[[]]", "[{}]", "[null]", "{a:1}", "[{a:1}]", "[{foo:1}]", "{a:{b:[]}}", "{a:{a:{a:{}}}}",
    "[a]", "[a,b]", "['']", "''", "' '", "0", "1", "-1", "2", "0.5", "-0.0", "nan", "inf", "-inf", "1e999", "1e30", "9" * 40,
    "1_000", "0x10", "abc", "a b", "a=b", "a:b", "a,b", "1,2", "int8,int4", "[a],[b]", "[],[norms]", "{a:1},{b:2}",
    "${name}", "${nowhere}", "${oc.env:HOME}", "${", "$", "\\", "'", '"', "'a", "[", "]", "{", "}", "(", ")", "#", "%s", "{0}",
    "glob(*)", "glob(int*)", "range(1,3)", "interval(0,1)", "choice(1,2)", "choice()", "sort(2,1)", "shuffle(1,2)", "int(x)",
    "float(1)", "str(1)", "json_str(1)", "tag(x,choice(1,2))", "extend_list(a)", "cast(1)",
    "_target_", "{_target_:os.system}", "../..", "/", "~", ".", "é", "日本語", "🙂", "\u202e", "\x00", "\x1b[31m", "\t", "\n", "\ud800",
    "x" * 5000, "[" * 60, "{a:" * 40,
]  # fmt: skip


def right(field: dataclasses.Field[Any]) -> st.SearchStrategy[str]:
    """Values that the schema takes for a field, and the first ones outside its range."""
    said = field.metadata
    if "least" in said:
        least, most = said["least"], said["most"]
        return st.sampled_from([str(v) for v in (least, least + 1, most, least - 1, most + 1, least + 0.5)])
    if said.get("choices"):
        return st.sampled_from([str(c) for c in said["choices"]])
    return st.sampled_from(["true", "false", "word", "1"])


@st.composite
def words(draw: st.DrawFn) -> str:
    """One word."""
    kind = draw(st.sampled_from(["group", "group", "key", "key", "key", "odd key", "no key"]))
    options = groups()
    if kind == "group":
        group = draw(st.sampled_from(sorted(options)))
        values = st.sampled_from([*options[group], f"[{options[group][0]}]" if options[group] else "x", "none"])
        value = draw(st.one_of(values, values, values, st.sampled_from(ODD), st.text(max_size=12)))
        return f"{draw(st.sampled_from(['', '', '', '', '+', '++', '~']))}{group}={value}"
    if kind == "key":
        key = draw(st.sampled_from(KEYS))
        value = draw(
            st.one_of(right(FIELDS[key]) if key in FIELDS else st.nothing(), st.sampled_from(ODD), st.text(max_size=12))
        )
        return f"{draw(st.sampled_from(['', '', '', '', '', '+', '++', '~']))}{key}={value}"
    if kind == "odd key":
        key = draw(st.sampled_from(KEYS))
        at = draw(st.integers(0, len(key)))
        key = draw(
            st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "." + key[at:], key.upper(), f"{key}.x", f"{key}@x"])
        )
        return f"{key}={draw(st.sampled_from(ODD))}"
    return draw(
        st.one_of(
            st.text(max_size=15),
            st.sampled_from(["=", "==", "a=", "=a", "-x", "--", "+", "~", "backend", "list", "run"]),
        )
    )


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command line that asks for no more than a dry run."""
    line = draw(st.lists(words(), min_size=1, max_size=4))
    usual = draw(st.sampled_from([["backend=quanto"], ["backend=torchao", "dtype=int4"], ["backend=gguf"], []]))
    flag = draw(st.sampled_from([[], [], ["-m"]]))
    return [*flag, *usual, *line, "sweep.dry_run=true"]


def keys_of(line: list[str]) -> tuple[str, ...]:
    """What a message about a command line may begin with."""
    keys = {w.partition("=")[0] for w in line} | {w for w in line if "=" not in w}
    keys |= {k.lstrip("+~") for k in keys}
    keys |= {f"quantization.{k}" for k in keys if k in BARE} | {k.removeprefix("quantization.") for k in keys}
    return (*(k for k in keys if k), "''", "=")
