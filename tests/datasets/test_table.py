"""The rows of the data sets, and the options that choose them."""

import json

import pytest
import yaml

from quantlab.datasets.calibration import check_calibration
from quantlab.datasets.table import CALIBRATION_SETS, DATASETS
from quantlab.errors import ConfigError
from quantlab.planning.places import conf_dir
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.schema import ExperimentConfig, ModelConfig


def chosen(group: str, key: str) -> set[str]:
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {yaml.safe_load(file.read_text(encoding="utf-8"))[key] for file in files}


def test_rows_are_named_by_their_key_and_belong_to_protocols():
    for name, row in DATASETS.items():
        assert name == row.name
        assert row.protocols
        assert set(row.protocols) <= set(PROTOCOLS)


def test_every_data_set_has_an_option_and_every_option_a_data_set():
    assert chosen("dataset", "name") == set(DATASETS)
    assert chosen("calibration", "source") == set(CALIBRATION_SETS)


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.read_file is not None])
def test_a_file_of_the_users_is_refused_before_loading_by_its_key(name, tmp_path):
    with pytest.raises(ValueError, match=r"^dataset.path=.*absent.txt: the file cannot be read"):
        DATASETS[name].read_file(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("theirs", "source", "mine", "told"),
    [
        ("audio", "wiki_extracts", None, "calibration.source=wiki_extracts: it has text, .* have sound"),
        ("audio", "pairs", "source", "calibration.path=.*: it has text, .* have sound"),
        ("source", "pairs", "audio", "calibration.path=.*: it has sound, .* have text"),
    ],
)
def test_calibration_reads_what_the_evaluation_reads(tmp_path, theirs, source, mine, told):
    def pairs(name, key):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({key: f"{n}", "target": "b"}) + "\n" for n in range(64)))
        return str(path)

    config = ExperimentConfig(model=ModelConfig(family="seq2seq", path="nowhere"))
    config.dataset.name, config.dataset.path = "pairs", pairs("evaluation", theirs)
    config.calibration.source = source
    config.calibration.path = pairs("calibration", mine) if mine else None
    with pytest.raises(ConfigError, match=f"^{told}"):
        check_calibration(config)
    if mine:
        config.calibration.path = pairs("calibration", theirs)
        check_calibration(config)
