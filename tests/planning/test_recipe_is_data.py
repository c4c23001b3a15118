"""A recipe is data: nothing that it says is run, imported, looked up in the environment or taken for a resolver."""

from __future__ import annotations

import importlib
import itertools
import json
import re

import hydra.utils
import pytest
from hydra._internal.instantiate import _instantiate2
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from quantlab.errors import ConfigError, QuantlabError
from quantlab.planning.plan import plan

SPECIALS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_", "_call_", "_execution_whitelist_")
PLACES = {
    "launcher.settings": "launcher: {{settings: {0}}}",
    "a setting of a launcher": "launcher: {{settings: {{additional_parameters: {0}}}}}",
    "launcher": "launcher: {0}",
    "model": "model: {0}",
    "tracking": "tracking: {0}",
    "quantization": "quantization: {0}",
    "quantization.quantization_config": "quantization: {{quantization_config: {0}}}",
    "quantization.modules_to_not_convert": "quantization: {{modules_to_not_convert: {0}}}",
    "quantization.algorithm_settings": "defaults: [override /backend: modelopt]\nquantization: {{algorithm_settings: {0}}}",
    "quantization.tensor_types": "defaults: [override /backend: gguf]\nquantization: {{tensor_types: {0}}}",
    "sweep": "sweep: {0}",
    "sweep.grid": "sweep: {{grid: {0}}}",
    "a value of sweep.grid": "sweep: {{grid: {{dtype: [{0}]}}}}",
    "sweep.candidates": "sweep: {{candidates: [{0}]}}",
    "a value of sweep.candidates": "sweep: {{candidates: [{{dtype: {0}}}]}}",
    "a pasted candidate": "sweep: {{candidates: [{{quantization_config: {0}}}]}}",
    "sweep.search.objectives": "sweep: {{search: {{objectives: {0}}}}}",
    "the defaults list": "defaults: [{0}]",
    "hydra": "hydra: {0}",
    "the recipe": "{0}",
}


def spelled(special: str) -> dict[str, str]:
    """Ways to say ``_target_`` in a place that takes a mapping, as YAML flow text."""
    call = {special: "shutil.copyfile", "src": "a", "dst": "b"}
    return {
        "nested": json.dumps({"extra": call}),
        "here": json.dumps(call),
        "flattened": json.dumps({f"extra.{k}": v for k, v in call.items()}),
        "deeper": json.dumps({"a.b": {f"c.{special}": "shutil.copyfile"}}),
        "in a list": json.dumps({"extra": [[call]]}),
        "a whole path": json.dumps({f"hydra.launcher.{special}": "shutil.copyfile"}),
        "added": json.dumps({f"+hydra.launcher.{special}": "shutil.copyfile"}),
        "forced": json.dumps({f"++launcher.settings.x.{special}": "shutil.copyfile"}),
        "a group": json.dumps({"hydra/launcher": "joblib", "hydra.searchpath": ["pkg://antigravity"]}),
        "interpolated": '{extra: "${name}", ' + json.dumps(special) + ': "${name}"}',
        "put together": '{"${name}' + special + '": shutil.copyfile}',
        "in text": json.dumps({"extra": json.dumps(call)}),
    }


@pytest.fixture
def nothing_runs(monkeypatch):
    """Whatever turns a name into code: what it was called with."""
    called = []

    def watch(owner, name):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: called.append((name, args)))

    for owner in (hydra.utils, _instantiate2):
        watch(owner, "instantiate")
    for name in ("get_method", "get_class", "get_object", "call"):
        watch(hydra.utils, name)
    for name in ("_locate", "_resolve_target"):
        watch(_instantiate2, name)
    real = importlib.import_module

    def imported(name, package=None):
        if name in ("shutil", "antigravity"):
            called.append(("import_module", name))
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", imported)
    return called


def written(folder, text):
    file = folder / "mine.yaml"
    file.write_text(f"# @package _global_\n{text}\n")
    return f"recipe={file}"


WAYS = [
    *itertools.product(PLACES, ("nested", "flattened", "interpolated", "in a list")),
    *itertools.product(("launcher.settings", "sweep.candidates", "sweep.grid"), spelled("_target_")),
]


@pytest.mark.parametrize(("place", "way"), dict.fromkeys(WAYS))
def test_no_place_of_the_schema_takes_code(tmp_path, nothing_runs, place, way):
    with pytest.raises(ConfigError, match=r"^recipe=\S*mine.yaml: "):
        plan([written(tmp_path, PLACES[place].format(spelled("_target_")[way]))])
    assert nothing_runs == []


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("place", ["launcher.settings", "quantization.quantization_config", "sweep.candidates"])
def test_no_word_of_hydras_is_taken(tmp_path, nothing_runs, place, special):
    with pytest.raises(ConfigError, match=rf"^recipe=\S*mine.yaml: .*{special}.* never names code"):
        plan([written(tmp_path, PLACES[place].format(spelled(special)["nested"]))])
    assert nothing_runs == []


@pytest.mark.parametrize(
    "word", ["launcher.settings.x=1", "++launcher.settings._target_=os.system", "launcher.settings={a: 1}"]
)
@pytest.mark.parametrize("launcher", ["serial", "pool", "slurm", "ray"])
def test_settings_of_a_launcher_are_a_closed_set(nothing_runs, launcher, word):
    with pytest.raises(ConfigError, match=r"^(\+\+)?launcher\.settings"):
        plan([f"launcher={launcher}", "backend=quanto", word])
    assert nothing_runs == []


# -- resolvers


def named(resolver: str) -> dict[str, str]:
    """Ways to reach a resolver from a recipe."""
    head, _, tail = resolver.rpartition(".")
    split = f"{head}.${{name}}" if head else "${name}"
    call = f"${{{split}:SECRET}}"
    return {
        "plain": f'output_dir: "${{{resolver}:SECRET}}"',
        "no argument": f'output_dir: "${{{resolver}:}}"',
        "its name from a key": f'name: {tail}\noutput_dir: "x/{call}"',
        "its name from a key, in a number": f'name: {tail}\nnum_threads: "{call}"',
        "in a list": f'name: {tail}\nmodel: {{components: [a, "{call}"]}}',
        "in a mapping": f'name: {tail}\nquantization: {{quantization_config: {{quant_method: "{call}"}}}}',
        "in a grid": f'name: {tail}\nsweep: {{grid: {{output_dir: ["{call}", b]}}}}',
        "in a candidate": f'name: {tail}\nsweep: {{candidates: [{{output_dir: "{call}"}}]}}',
        "escaped in a grid": f'sweep: {{grid: {{output_dir: ["\\\\${{{resolver}:SECRET}}", b]}}}}',
        "escaped in a candidate": f'sweep: {{candidates: [{{output_dir: "\\\\${{{resolver}:SECRET}}"}}]}}',
        "escaped twice": f'sweep: {{candidates: [{{output_dir: "\\\\\\\\\\\\${{{resolver}:SECRET}}"}}]}}',
        "by another key": f'name: {tail}\nmodel: {{path: "{call}"}}\noutput_dir: "${{model.path}}"',
        "as an argument": f'name: {tail}\noutput_dir: "${{${{name}}:${{{resolver}:SECRET}}}}"',
        "in the address": f'name: {tail}\ntracking: {{uri: "http://host/{call}"}}',
        "in a setting": f'name: {tail}\ndefaults: [override /launcher: slurm]\nlauncher: {{settings: {{partition: "{call}"}}}}',
        "in the defaults list": f'name: {tail}\ndefaults: ["override /backend": "{call}"]',
        "in a group of the defaults list": f'name: {tail}\ndefaults: ["override /{call}": torchao]',
        "in a key": f'name: {tail}\nquantization: {{modules_to_not_convert: {{"{call}": [a]}}}}',
    }


def registered() -> list[str]:
    hydra.core.utils.setup_globals()
    return sorted(BaseContainer._resolvers)


@pytest.fixture
def resolved(monkeypatch):
    """The resolvers that ran; ``secret`` is one of another package in the same process."""
    hydra.core.utils.setup_globals()
    ran = []
    monkeypatch.setattr("hydra._internal.hydra.setup_globals", lambda: None)  # would put its own in the spies' places
    OmegaConf.register_new_resolver("secret", lambda *args: "x", replace=True)
    for name, real in BaseContainer._resolvers.items():

        def spy(*args, _name=name, _real=real, **kwargs):
            ran.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setitem(BaseContainer._resolvers, name, spy)
    yield ran
    OmegaConf.clear_resolver("secret")


@pytest.mark.parametrize(
    ("resolver", "way"),
    [
        *((resolver, way) for resolver in (*registered(), "secret") for way in ("plain", "its name from a key")),
        *(("oc.env", way) for way in named("a.b")),
        ("secret", "in a grid"),
    ],
)
def test_no_resolver_runs_while_a_recipe_is_composed(tmp_path, monkeypatch, resolved, resolver, way):
    monkeypatch.setenv("SECRET", "a secret of the environment")
    before = dict(BaseContainer._resolvers)
    with pytest.raises(QuantlabError) as caught:
        plan([written(tmp_path, named(resolver)[way])])
    assert resolved == []
    assert "a secret" not in str(caught.value)
    assert re.match(r"recipe=\S*mine.yaml: ", str(caught.value))
    assert before == BaseContainer._resolvers, "whoever composes beside quantlab keeps theirs"


@pytest.mark.parametrize(
    "word", ["output_dir=${oc.env:HOME}/x", "name='${now:%Y}'", "device=${oc.decode:cpu}", "num_threads=${oc.env:N}"]
)
def test_none_runs_for_the_command_line_either(resolved, word):
    with pytest.raises(ConfigError, match=rf"^{word.partition('=')[0]}: .*write the value itself"):
        plan(["backend=quanto", word])
    assert resolved == []


def test_keys_of_the_config_itself_may_be_meant(tmp_path):
    words = [written(tmp_path, 'name: "${quantization.backend} ${model.family}"'), "backend=quanto"]
    (job,) = plan(words).jobs
    assert job.config.name == "quanto digits_dit"


@pytest.mark.parametrize(
    "text", ['name: "${nowhere}"', 'name: "${hydra.runtime.cwd}"', 'name: "${name}"', 'name: "${"']
)
def test_keys_that_are_not_there_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"^recipe=\S*mine.yaml: line 2: name: "):
        plan([written(tmp_path, text), "backend=quanto"])


REFERENCES = {
    "modules_to_not_convert": "quantization.modules_to_not_convert=${name}",
    "one of its lists": "quantization.modules_to_not_convert.mine=${name}",
    "quantization_config": "quantization.quantization_config=${name}",
    "model.components": "model.components=${name}",
    "a list of nodes": "model.components=[${sweep}]",
    "sweep.grid": "sweep.grid=${name}",
    "sweep.candidates": "sweep.candidates=${name}",
    "one of the candidates": "sweep.candidates=[${name}]",
    "sweep.search": "sweep.search=${name}",
    "launcher.settings": "launcher.settings=${tracking}",
    "a word": "name=${model}",
    "a number": "num_threads=${model.family}",
    "a mapping": "tracking.uri=${sweep.grid}",
    "itself": "model.path=${model.path}",
}


@pytest.mark.parametrize("what", REFERENCES)
def test_a_reference_to_something_of_another_kind_is_refused(what):
    word = REFERENCES[what]
    with pytest.raises(ConfigError) as caught:
        plan(["backend=quanto", *(["name=word"] if what != "a word" else []), word])
    assert str(caught.value).startswith(word.partition("=")[0].removesuffix(".mine"))
