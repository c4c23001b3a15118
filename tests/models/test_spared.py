"""A process that only plans does without packages, and nobody else does."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import torch

from quantlab import cli
from quantlab.commands import WITH_ALL
from quantlab.errors import ConfigError, ModelError
from quantlab.models import spared as module
from quantlab.models.outline import _without_values
from quantlab.models.spared import COMPILER, PACKAGES, spared
from quantlab.modules.device import collect_as_usual
from quantlab.running import forecast as forecasting
from tests.support.tables import BACKENDS, CAPABILITIES
from tests.support.tiny_families import FAMILIES

ROOT = Path(__file__).parents[2]
DIGITS = ["plan", "model=digits_dit", "backend=quanto", "dtype=int8"]


def function():
    return 1


@pytest.fixture
def extra(tmp_path, monkeypatch):
    """A package that is installed and not imported yet, among those that are done without."""
    (tmp_path / "an_adapter.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGES", (*PACKAGES, "an_adapter"))
    importlib.import_module("transformers.utils.import_utils")  # which it looks at
    return "an_adapter"


def test_inside_a_package_is_not_installed_and_afterwards_it_is(extra):
    before, is_available = dict(sys.modules), torch.distributed.is_available
    with spared():
        assert importlib.util.find_spec(extra) is None
        with pytest.raises(ImportError):
            importlib.import_module(extra)
        assert not torch.distributed.is_available()
    assert importlib.util.find_spec(extra) is not None
    assert sys.modules == before
    assert torch.distributed.is_available is is_available


def test_an_error_inside_leaves_nothing_behind(extra):
    before, is_available = dict(sys.modules), torch.distributed.is_available
    with pytest.raises(KeyError), spared():
        raise KeyError(extra)
    assert sys.modules == before
    assert torch.distributed.is_available is is_available


def test_what_is_imported_already_stays(extra):
    found = importlib.import_module(extra)
    try:
        with spared():
            assert importlib.import_module(extra) is found
    finally:
        del sys.modules[extra]


def test_without_a_compiler_its_marks_leave_a_function_as_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, COMPILER, raising=False)
    monkeypatch.delitem(vars(torch), "_dynamo", raising=False)
    with spared():
        assert torch.compiler.disable(function) is function
        assert torch.compiler.disable(recursive=False)(function) is function
        assert torch.compiler.allow_in_graph(function) is function
    assert COMPILER not in sys.modules


def test_transformers_models_are_listed_once_and_the_same(monkeypatch):
    from transformers.utils import import_utils

    own = import_utils.create_import_structure_from_path
    folder = Path(import_utils.__file__).parents[1] / "models" / "llama"
    expected = import_utils.define_import_structure(str(folder / "__init__.py"))
    asked = []
    monkeypatch.setattr(import_utils, own.__name__, functools.cache(lambda path: asked.append(path) or own(path)))
    with spared():
        by_folder = import_utils.define_import_structure(folder)
        by_file = import_utils.define_import_structure(str(folder / "__init__.py"))
    assert by_file == by_folder == expected
    assert asked == [folder]


def test_distributions_are_looked_for_when_one_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(metadata, "packages_distributions", own := lambda: asked.append(1) or {"torch": ["a-torch"]})
    with spared():
        found = metadata.packages_distributions()
        assert not asked
        assert found.get("torch") == ["a-torch"]
        assert "nothing" not in found
        assert list(found) == ["torch"]
        assert len(found) == len(asked) == 1
    assert metadata.packages_distributions is own


@pytest.fixture
def own_process():
    """``main()`` takes the process for its own, and lets the collector look seldom."""
    yield
    collect_as_usual()


@pytest.mark.usefixtures("own_process")
def test_only_the_command_of_a_process_of_its_own_does_without(monkeypatch, capsys):
    entered = []
    monkeypatch.setattr(forecasting, "spared", lambda: entered.append(1) or nullcontext())
    with pytest.raises(SystemExit) as ended:
        cli.main(DIGITS)
    assert ended.value.code == 0
    assert not entered
    monkeypatch.setattr(sys, "argv", ["quantlab", *DIGITS])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert entered
    said = capsys.readouterr().out
    half = len(said) // 2
    assert said[:half] == said[half:]


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("code", [0, 7])
@pytest.mark.parametrize("error", [ImportError("no an_adapter"), ModelError("model.path=x: no class"), NameError("x")])
def test_what_fails_so_is_asked_of_a_process_that_has_all_and_one_of_both_tells_it(error, code, monkeypatch, capsys):
    asked = []

    def fails(*_, is_last):
        raise error

    def run(command, env, check):
        asked.append((command, env[WITH_ALL]))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(forecasting, "forecast", fails)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["quantlab", *DIGITS])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert asked == [([sys.executable, *sys.orig_argv[1:]], "1")]
    said = capsys.readouterr()
    assert not said.out, "which may be JSON"
    if code:
        assert not said.err, "the other process has told it"
    else:
        assert len(said.err.splitlines()) == 1
        assert said.err.endswith(f"(without them: {type(error).__name__}: {error})\n")
    monkeypatch.setenv(WITH_ALL, "1")
    with pytest.raises((type(error), SystemExit)):
        cli.main()
    assert len(asked) == 1


@pytest.mark.usefixtures("own_process")
def test_a_mistake_of_the_user_is_told_at_once(monkeypatch, capsys):
    def fails(*_, is_last):
        raise ConfigError("components.x: there is none")

    monkeypatch.setattr(forecasting, "forecast", fails)
    monkeypatch.setattr(sys, "argv", ["quantlab", *DIGITS])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "components.x" in capsys.readouterr().err


# -- a model that nobody fills


def made():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Embedding(8, 4), torch.nn.Conv2d(2, 2, 3))
    net.register_buffer("positions", torch.arange(7).expand((1, -1)))
    net.register_buffer("halves", torch.arange(0, 4, 2, dtype=torch.float16))
    return net


def test_what_is_not_filled_has_the_shapes_and_dtypes_of_what_is():
    with torch.device("meta"):
        expected = made()
    state = torch.random.get_rng_state()
    with _without_values():
        found = made()
    assert all(tensor.is_meta for tensor in found.state_dict().values())
    for one, other in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert (one[0], one[1].shape, one[1].dtype, one[1].stride()) == (
            other[0],
            other[1].shape,
            other[1].dtype,
            other[1].stride(),
        )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_tensor_that_has_values_is_filled():
    with _without_values():
        drawn = torch.zeros(64, device="cpu").normal_()
        counted = torch.arange(3, device="cpu")
    assert drawn.abs().sum() > 0
    assert counted.tolist() == [0, 1, 2]


# -- in processes of their own

PLANS = """
import importlib.util, json, sys
from quantlab.planning.plan import plan
from quantlab.running.forecast import forecast

is_last, requests = sys.argv[1] == "spared", json.loads(sys.argv[2])
prices = [price.data() for words in requests for price in forecast(plan([*words, "sweep.dry_run=true"]), is_last=is_last)]
found = [name for name in ("peft", "psutil", "scipy", "torch._dynamo") if name in sys.modules]
print(json.dumps({"prices": prices, "imported": found, "there": importlib.util.find_spec("peft") is not None}))
"""


def planned(how, requests, env=None):
    done = subprocess.run(
        [sys.executable, "-c", PLANS, how, json.dumps(requests)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


ONE = ["backend=bitsandbytes", "dtype=nf4", "memory.device_gib=24", "memory.host_gib=32"]
SHIPPED = [
    *([f"model={name}", *ONE] for name in ("flux_dev", "qwen_image", "wan22_5b", "sdxl", "qwen3_8b", "pixart_sigma")),
    ["model=sd3_medium", *ONE[:2], "memory.device_gib=1", "memory.host_gib=1"],  # with advice, which prices others
    ["model=qwen3_30b_a3b", "backend=quanto", "dtype=int8", "quantization.layer_kinds=[linear,conv]"],
]


@pytest.mark.slow
def test_the_figures_are_those_of_a_process_that_has_all(tmp_path):
    FAMILIES["flux"].build().save_pretrained(tmp_path / "flux")
    local = ["model=diffusers", f"model.path={tmp_path / 'flux'}", *ONE]
    of_each = [["model=smollm2_135m", f"backend={b}", f"dtype={next(iter(CAPABILITIES[b]))}"] for b in BACKENDS]
    requests = [*SHIPPED, local, *of_each]
    short, whole = planned("spared", requests), planned("whole", requests)
    assert short["prices"] == whole["prices"]
    assert len(short["prices"]) == len(requests)
    assert whole["there"] == short["there"]


@pytest.mark.slow
def test_one_plan_imports_neither_adapters_nor_the_compiler():
    assert planned("spared", [SHIPPED[0]])["imported"] == []


@pytest.mark.slow
def test_a_model_that_needs_such_a_package_is_planned_all_the_same(tmp_path):
    """Its class refuses to be made without scipy, which is installed and not wanted."""
    from transformers import Mask2FormerConfig, SwinConfig

    widths = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32}
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(image_size=32, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
    config = Mask2FormerConfig(backbone_config=swin, num_attention_heads=2, decoder_layers=2, **widths)
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    config.save_pretrained(tmp_path)
    words = ["model=vision", f"model.path={tmp_path}", "backend=quanto", "dtype=int8"]
    with pytest.raises(AssertionError, match="scipy"):
        planned("spared", [words])
    command = [sys.executable, "-m", "quantlab", "plan", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == planned("whole", [words])["prices"]
