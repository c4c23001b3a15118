"""One word for one thing, and what each is; the nearest choices to one that is none."""

from __future__ import annotations

import json
import re

import pytest

from quantlab.errors import ConfigError, nearest
from quantlab.metrics import METRICS
from quantlab.planning.glossary import ALSO, WORDS
from quantlab.planning.listing import meaning
from quantlab.planning.plan import plan
from quantlab.report.table import columns
from quantlab.report.verdicts import RULES
from quantlab.vocabulary.numbers import FLOORS
from tests.support.shell import Shell


def test_each_column_of_the_table_is_a_word_that_is_explained():
    for title in columns([]):
        assert title in WORDS


@pytest.mark.parametrize(
    ("word", "holds"),
    [
        ("floor", "another legitimate execution"),
        ("mib", "memory/weights_bytes"),
        ("quality/psnr_db", METRICS["psnr_db"].description),
        ("nf4", "(4 bits)"),
        ("awq_lite", "AWQ"),
        ("expert", "packed experts"),
        ("psnr", METRICS["psnr_db"].description),
        ("schemes", "how weights are stored"),
        ("memory/compression", "the same as saving: bytes at 16 bits"),
        ("compression", "the same as saving"),
        ("weights_bytes", "the same as MiB"),
        ("point", "the same as combination"),
        ("gguf", "a backend; its dtypes: q8_0"),
        ("group_size", "group_size=OPTION: 16, 32, 64, 128"),
        ("latent_rel_mse", METRICS["latent_rel_mse"].description),
        ("near the floor", RULES["near the floor"]),
        ("too few samples", RULES["too few samples"]),
        ("holm", "the same as p (Holm)"),
        ("simulated", "stored wider"),
        ("sweep", "jobs"),
        ("recipe", "YAML"),
        ("margin", "smallest difference that matters"),
        ("perf/step_ms", "evaluation.speed=true"),
        ("decode_tokens_per_s_p90", "evaluation.speed=true"),
    ],
)
def test_what_a_word_is(word, holds, tmp_path):
    assert holds in meaning(word)
    assert Shell(tmp_path)("help", word) == (0, f"{word}: {meaning(word)}\n", "")


@pytest.mark.parametrize(
    "word", [*FLOORS, "±", "°", "~", "resumed", "FAILED", "SKIPPED", "dB", "fraction", "sample", "algorithm"]
)
def test_what_tables_show_is_explained(word):
    assert meaning(word)


def test_every_verdict_and_every_column_of_a_comparison_is_explained(tmp_path):
    assert all(meaning(verdict) == text for verdict, text in RULES.items())
    assert meaning("p (Holm)")
    shell = Shell(tmp_path)
    assert shell("help", "inside", "the", "floor") == shell("help", "inside the floor")
    assert len(shell("help", "floor", "front")[1].splitlines()) == 2


def test_help_in_json_is_rows_as_those_of_the_list_of_words(tmp_path):
    shell = Shell(tmp_path)
    code, out, err = shell("help", "floor", "front", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [{"word": word, "what it is": meaning(word)} for word in ("floor", "front")]
    assert json.loads(shell("help", "--json", "p", "(Holm)")[1])[0]["word"] == "p (Holm)"
    assert shell("help", "--json") == shell("list", "words", "--json")


def test_help_takes_the_options_of_all_commands_and_no_others(tmp_path):
    shell = Shell(tmp_path)
    for option in ("-q", "--plain", "--wide"):
        assert shell("help", option, "floor") == shell("help", "floor")
    assert shell("help", "floor", "-h") == shell("--help")
    code, out, err = shell("help", "floor", "--jso")
    assert (code, out) == (2, "")
    assert err.startswith("quantlab: --jso: no such option; did you mean --json?")


@pytest.mark.parametrize("words", [("confidence", "interval"), ("p", "(Holm)"), ("near", "the", "floor")])
def test_a_word_of_several_needs_no_quotes(tmp_path, words):
    shell = Shell(tmp_path)
    assert shell("help", *words) == shell("help", " ".join(words))
    assert len(shell("help", *words)[1].splitlines()) == 1


def test_an_unknown_word_among_others_is_told_before_any_is_explained(tmp_path):
    code, out, err = Shell(tmp_path)("help", "floor", "flor")
    assert (code, out) == (2, "")
    assert err.startswith("quantlab: help flor: no such word; did you mean floor?")


def test_a_metric_without_a_unit_has_none_in_brackets():
    assert meaning("psnr").endswith("[dB]")
    assert not any(meaning(m.name).endswith(("[1]", "[]")) for m in METRICS.values())


def test_a_word_that_is_none(tmp_path):
    code, _, err = Shell(tmp_path)("help", "flor")
    assert code == 2
    assert err.startswith("quantlab: help flor: no such word; did you mean floor?")


@pytest.mark.parametrize("command", ["push", "plan", "export", "compare", "status", "init", "reference", "reproduce"])
def test_a_command_is_shown_as_in_the_help(tmp_path, command):
    shell = Shell(tmp_path)
    code, out, err = shell("help", command)
    assert (code, err) == (0, "")
    said, told = out[: out.index("  quantlab ")], out[out.index("  quantlab ") :]
    assert told.startswith(f"  quantlab {command} ")
    assert told.count("  quantlab ") == 1
    assert told in shell("--help")[1]
    try:
        assert said == f"{command}: {meaning(command)}\n"
    except ConfigError:
        assert said == ""


def test_other_names_are_of_words_that_there_are():
    assert set(ALSO.values()) <= set(WORDS)
    assert not set(ALSO) & set(WORDS)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal_and_loses_no_word(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, whole, _ = Shell(tmp_path)("--help")
    monkeypatch.setenv("COLUMNS", str(columns))
    _, text, _ = Shell(tmp_path)("--help")
    assert text.split() == whole.split()
    longest = max(map(len, whole.split()))
    assert max(map(len, text.splitlines())) <= max(columns, longest + columns // 2)
    assert columns < 80 or max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize(
    ("override", "ends"),
    [
        ("group_size=48", "; the nearest are 32 and 64"),
        ("group_size=3", "; the nearest are 16"),
        ("group_size=9999", "; the nearest are 4096"),
        ("model=gpt2", "; a model of a folder or of the Hub: model=auto model.path=OWNER/gpt2"),
        ("model=org/gpt2", "; a model of a folder or of the Hub: model=auto model.path=org/gpt2"),
        ("model=mine", "; a model of a folder or of the Hub: model=auto model.path=mine"),
        ("model=flux_de", "; did you mean flux_dev?"),
        ("dtype=int9", "; did you mean int"),
    ],
)
def test_the_way_to_what_was_meant(override, ends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError) as told:
        plan(["backend=torchao", override])
    assert str(told.value).startswith(f"{override}: there are ")
    assert ends in str(told.value)


@pytest.mark.parametrize(
    ("word", "way"),
    [
        ("load_in_4bit=true", "backend=bitsandbytes dtype=nf4"),
        ("model_id=org/gpt2", "model=auto model.path="),
        ("tasks=wikitext", "quantlab export"),
        ("torch_dtype=bfloat16", "model.dtype"),
        ("device_map=auto", "memory.placement"),
    ],
)
def test_words_of_other_tools_lead_to_ours(word, way):
    with pytest.raises(ConfigError, match=rf"^{word.partition('=')[0]}: no such key; .*{re.escape(way)}"):
        plan(["backend=bitsandbytes", word])


@pytest.mark.parametrize(
    "word", ["(low..high)", "low..high", "..", "interval", "intervals", "ci", "confidence interval"]
)
def test_what_intervals_are_written_as_is_explained(tmp_path, word):
    code, out, err = Shell(tmp_path)("help", word)
    assert code == 0, err
    assert "95 %" in out
    assert "lopsided" in out


def test_every_mark_of_a_table_is_explained(tmp_path):
    for mark in ("*", "~", "°", "±", "(low..high)"):
        assert Shell(tmp_path)("help", mark)[0] == 0, mark


def test_the_beginning_of_a_name_means_the_first_that_begins_so():
    assert nearest("kld", ["kld_p99", "kld_mean", "kl"]) == "; did you mean kld_p99?"
    assert nearest("kld_men", ["kld_p99", "kld_mean"]) == "; did you mean kld_mean?"
    assert nearest("KLD", METRICS) == "; did you mean kld_mean?"
    assert nearest("torchao int4", ["torchao int8", "torchao int4 g64"]) == "; did you mean torchao int4 g64?"
    assert nearest("nothing", METRICS) == ""
