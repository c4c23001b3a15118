"""A checkpoint that needs code of its own: never run, and the message says so and what to do."""

import json
import shutil

import pytest

from quantlab.errors import ModelError
from quantlab.models import diffusers_pipeline
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import load_bert, load_llama, save_bert, save_llama

CODE = "import pathlib\npathlib.Path(__file__).with_name('was_run').touch()\n"
TOLD = r"^model\.path=.*remote code: not run, by policy; .*quantlab\.evaluate in Python$"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_llama(folder / "llama")
    save_bert(folder / "bert")
    build_tiny_flux(folder / "flux")
    return folder


def changed(file, **values):
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def config_of_its_own(folder):
    """The architecture is the checkpoint's."""
    names = {"AutoConfig": "its_own.Mine", "AutoModelForCausalLM": "its_own.Mine", "AutoModel": "its_own.Mine"}
    changed(folder / "config.json", model_type="mine", auto_map=names)


def code_of_another_repository(folder):
    names = {"AutoConfig": "owner/name--its_own.Mine", "AutoModelForCausalLM": "owner/name--its_own.Mine"}
    changed(folder / "config.json", model_type="mine", auto_map=names)


def tokenizer_of_its_own(folder):
    """The model is the library's, its tokenizer is not."""
    names = {"AutoTokenizer": ["its_own.Mine", None]}
    changed(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=names)
    (folder / "tokenizer.json").unlink(missing_ok=True)


@pytest.mark.parametrize("change", [config_of_its_own, code_of_another_repository, tokenizer_of_its_own])
@pytest.mark.parametrize(("kind", "load"), [("llama", load_llama), ("bert", load_bert)])
def test_a_transformers_checkpoint_with_code_of_its_own(sources, tmp_path, kind, load, change):
    folder = shutil.copytree(sources / kind, tmp_path / "model")
    (folder / "its_own.py").write_text(CODE)
    change(folder)
    with pytest.raises(ModelError, match=TOLD) as told:
        load(folder, tmp_path / "cache")
    assert "check the path" not in str(told.value)
    assert not (folder / "was_run").exists()


def test_code_beside_a_class_of_the_library_is_not_needed(sources, tmp_path):
    """Many checkpoints bring code from before their architecture was in transformers."""
    folder = shutil.copytree(sources / "llama", tmp_path / "model")
    (folder / "its_own.py").write_text(CODE)
    changed(folder / "config.json", auto_map={"AutoModelForCausalLM": "its_own.Mine"})
    assert load_llama(folder, tmp_path / "cache").weights_sha256
    assert not (folder / "was_run").exists()


def pipeline_in_a_file(folder):
    changed(folder / "model_index.json", _class_name=["its_own", "MinePipeline"])


def pipeline_of_another_name(folder):
    """As Diffusers saves a pipeline whose class is the caller's."""
    changed(folder / "model_index.json", _class_name="MinePipeline")
    (folder / "pipeline.py").write_text(CODE)


def part_in_a_file(folder):
    changed(folder / "model_index.json", transformer=["its_own", "MineTransformer"])
    (folder / "transformer" / "its_own.py").write_text(CODE)


def part_of_a_module_that_is_nowhere(folder):
    changed(folder / "model_index.json", transformer=["their_package.models", "MineTransformer"])


def model_of_its_own(folder):
    changed(folder / "model_index.json", transformer=["diffusers", "AutoModel"])
    changed(folder / "transformer" / "config.json", _class_name=None, auto_map={"AutoModel": "its_own.Mine"})
    (folder / "transformer" / "its_own.py").write_text(CODE)


@pytest.mark.parametrize(
    "change",
    [
        pipeline_in_a_file,
        pipeline_of_another_name,
        part_in_a_file,
        part_of_a_module_that_is_nowhere,
        model_of_its_own,
    ],
)
def test_a_pipeline_with_code_of_its_own(sources, tmp_path, change):
    folder = shutil.copytree(sources / "flux", tmp_path / "pipeline")
    (folder / "its_own.py").write_text(CODE)
    change(folder)
    with pytest.raises(ModelError, match=TOLD):
        diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(folder)), "cpu", tmp_path / "cache")
    assert not list(folder.rglob("was_run"))


@pytest.mark.parametrize("name", ["a_module_somewhere", "a_package_somewhere.__main__"])
def test_no_module_is_imported_because_an_index_names_it(sources, tmp_path, monkeypatch, name):
    """Whatever can be imported here: modules of Python that do something then, and files of the current folder."""
    from quantlab.vocabulary.schema import EvaluationConfig

    package = tmp_path / "path" / "a_package_somewhere"
    package.mkdir(parents=True)
    for file in (package / "__init__.py", package / "__main__.py", package.with_name("a_module_somewhere.py")):
        file.write_text(CODE)
    monkeypatch.syspath_prepend(package.parent)
    folder = shutil.copytree(sources / "flux", tmp_path / "pipeline")
    changed(folder / "model_index.json", transformer=[name, "MineTransformer"])
    config = ModelConfig(family="diffusers", path=str(folder))
    with pytest.raises(ModelError, match=TOLD):
        diffusers_pipeline.look(config, EvaluationConfig())
    with pytest.raises(ModelError, match=TOLD):
        diffusers_pipeline.load(config, "cpu", tmp_path / "cache")
    assert not list(tmp_path.rglob("was_run"))
