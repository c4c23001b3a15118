"""From words to typed configs: every option composes, the command line wins, bad words get one clear message."""

import functools
import itertools
import textwrap

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.planning.places import conf_dir, groups, own_options, recipes
from quantlab.planning.plan import plan
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, native_config
from tests.support.tiers import default_of


def one(*words):
    (job,) = plan(list(words)).jobs
    return job


def test_default_request():
    config = one("backend=torchao").config
    assert (config.model.family, config.dataset.name, config.quantization.backend) == (
        "digits_dit",
        "digits_classes",
        "torchao",
    )


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in groups().items() for o in options])
def test_every_option_composes(group, option, tmp_path):
    words = [f"{group}={option}"]
    if group == "dtype":
        words.append(f"backend={next(b for b, rows in CAPABILITIES.items() if option in rows or option == 'auto')}")
    elif group == "group_size":
        words += (
            ["backend=bitsandbytes", "dtype=nf4"] if option.isdigit() and int(option) > 512 else ["backend=torchao"]
        )
    elif group == "evaluation" and option in ("language", "text_to_image"):  # their numbers are not those of digits
        words.append("model=smollm2_135m" if option == "language" else "model=flux_schnell")
    elif group == "dataset" and "language" in DATASETS[option].protocols:
        words.append("model=smollm2_135m")
    elif group == "dataset" and DATASETS[option].protocols in (("vision",), ("seq2seq",)):
        words.append(f"model={DATASETS[option].protocols[0]}")
    elif (group, option) == ("model", "auto"):  # it looks at a checkpoint
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        words.append(f"model.path={tmp_path}")
    job = one(*words)
    if group in ("backend", "dtype", "group_size"):
        assert str(getattr(job.config.quantization, group)) == option


def test_a_model_brings_its_data_set_and_evaluation_and_the_command_line_wins():
    assert one("model=smollm2_135m", "backend=quanto").config.dataset.name == "wiki_extracts"
    assert one("model=smollm2_135m", "backend=quanto", "dataset=text").config.dataset.name == "text"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.family=digits"], r"^model.family=digits: there are digits_dit, .*did you mean digits_dit\?"),
        (["dataset.name=prompt"], r"^dataset.name=prompt: there are digits_classes, .*did you mean prompts\?"),
        (
            ["model=smollm2_135m", "dataset=prompts"],
            r"^dataset=prompts: .*model.family=smollm2, .*protocol language; choose one of wiki_extracts, text$",
        ),
    ],
)
def test_an_unknown_family_or_data_set_and_one_that_does_not_fit_are_refused_before_loading(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(words)


@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b, rows in CAPABILITIES.items() for d in rows])
def test_every_promised_combination_builds_a_native_config(backend, dtype):
    for group_size in ("auto", *CAPABILITIES[backend][dtype].group_sizes):
        native = native_config(QuantizationAxes(backend=backend, dtype=dtype, group_size=group_size))
        assert (native is None) == (backend == "none")


def test_bare_axis_and_own_keys_go_to_the_quantization_node():
    job = one("backend=torchao", "dtype=int8", "activation_dtype=int8")
    assert job.config.quantization.activation_dtype == "int8"
    job = one("backend=bitsandbytes", "dtype=nf4", "bnb_4bit_use_double_quant=true")
    assert job.schemes[""].native.bnb_4bit_use_double_quant is True


def test_exclusion_groups_add_up_with_own_entries():
    job = one(
        "backend=quanto", "modules_to_not_convert=[norms,output]", "quantization.modules_to_not_convert.own=[proj]"
    )
    assert set(job.config.quantization.modules_to_not_convert) == {"norms", "output", "own"}
    assert "proj" in job.schemes[""].native.modules_to_not_convert


BAD = [
    (["backend=torchoa"], r"^backend=torchoa: there are .*did you mean torchao\?"),
    (["backend=torchao", "dtype=int9"], r"^dtype=int9: there are"),
    (
        ["backend=quanto", "dtype=nf4"],
        r"^dtype=nf4: quanto offers int8, int4, int2, float8_e4m3, float8_e5m2; nf4 is offered by bitsandbytes and torchao",
    ),
    (["backend=quanto", "group_size=64"], r"^group_size=64: quanto chooses its own group size; leave group_size=auto"),
    (["backend=gguf", "dtype=q4_k", "group_size=64"], r"^group_size=64: gguf q4_k offers auto, 32"),
    (["grup_size=64"], r"^grup_size: no such key; did you mean group_size\?"),
    (["metric=quality/psnr_db"], r"^metric: no such key of a run, and to compare .*: quantlab compare metric=\.\.\."),
    (["sweep=latest"], r"^sweep: settings lie below it; write sweep\.NAME=value, and .* quantlab compare sweep=\.\.\."),
    (["memory=8"], r"^memory: settings lie below it; write memory\.NAME=value"),
    (
        ["backend=torchao", "quantization.grup_size=64"],
        r"^quantization\.grup_size: no such key; did you mean group_size\?",
    ),
    (
        ["backend=torchao", "bnb_4bit_use_double_quant=true"],
        r"bnb_4bit_use_double_quant: no such key with this backend; .*bitsandbytes",
    ),
    (["evaluation.num_samples=abc"], r"^evaluation\.num_samples=abc: a whole number is wanted"),
    (["evaluation.num_samples=0"], r"^evaluation\.num_samples=0: a whole number from 1 to"),
    (["evaluation.num_sampels=10"], r"^evaluation\.num_sampels: no such key; did you mean num_samples\?"),
    (["dataset.context_length=64"], r"did you mean evaluation\.context_length or calibration\.context_length\?"),
    (["dataset.num_samples=3"], r"^dataset\.num_samples: no such key; did you mean evaluation\.num_samples or calib"),
    (["model.device=cpu"], r"^model\.device: no such key; device stands by itself: device=VALUE$"),
    (["evaluation.dtype=int8"], r"^evaluation\.dtype: no such key; dtype stands by itself: dtype=VALUE$"),
    (["device=tpu"], r"^device=tpu: there are auto, cpu, cuda"),
    (["+dtype=int4"], r"^\+dtype=int4: keys are neither added nor removed"),
    (["backend"], r"^backend: an override is key=value"),
    (["group_size=32,64", "backend=torchao"], r"^group_size=32,64: several values are a sweep; add -m"),
    (["recipe=digits_backend"], r"^recipe=digits_backend: no such recipe; did you mean digits_backends\?"),
    (["recipe=nowhere/x.yaml"], r"^recipe=nowhere/x.yaml: no such file"),
    (["backend=torchao", "algorithm=awq_lite"], r"^algorithm=awq_lite: torchao int8 offers"),
    (["backend=torchao", "quantization.on_mismatch=maybe"], r"^quantization.on_mismatch=maybe: torchao offers"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_words_are_refused_beginning_with_the_key(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(words)


def test_numeric_options_need_no_quotes():
    jobs = plan(["backend=torchao", "dtype=int4", "group_size=32,64,128"], multirun=True).jobs
    assert [j.config.quantization.group_size for j in jobs] == [32, 64, 128]


def test_a_grid_lists_every_impossible_combination_and_starts_nothing():
    words = ["backend=torchao,quanto,bitsandbytes", "dtype=int8,int4,nf4"]
    with pytest.raises(ConfigError) as caught:
        plan(words, multirun=True)
    text = str(caught.value)
    assert text.startswith("2 of 9 combinations are impossible")
    assert "backend=quanto dtype=nf4" in text
    assert "backend=bitsandbytes dtype=int4" in text
    skipped = plan([*words, "sweep.on_invalid=skip"], multirun=True)
    assert (len(skipped.jobs), len(skipped.invalid)) == (7, 2)


def test_two_jobs_never_share_a_name():
    jobs = plan(["backend=quanto", "evaluation.num_inference_steps=5,10"], multirun=True).jobs
    assert len({j.name for j in jobs}) == 2


def write(tmp_path, text, name="mine.yaml"):
    file = tmp_path / name
    file.write_text("# @package _global_\n" + textwrap.dedent(text))
    return f"recipe={file}"


def test_own_recipe_file_and_the_command_line_wins(tmp_path):
    recipe = write(
        tmp_path,
        """
        defaults:
          - override /backend: quanto
          - override /dtype: int4
        evaluation: {num_samples: 30, batch_size: 10}
        """,
    )
    job = one(recipe)
    assert (job.config.quantization.dtype, job.config.evaluation.num_samples, job.config.recipe) == ("int4", 30, "mine")
    assert one(recipe, "dtype=int8").config.quantization.dtype == "int8"
    assert one(recipe, "evaluation.num_samples=40").config.evaluation.num_samples == 40
    quick = one(recipe, "evaluation=quick").config.evaluation
    assert (quick.num_samples, quick.num_inference_steps) == (20, 5)


def test_a_recipe_with_a_grid_is_a_sweep_and_the_command_line_replaces_an_axis(tmp_path):
    recipe = write(tmp_path, "sweep: {grid: {backend: [torchao, modelopt], dtype: [int8, int4]}}")
    assert len(plan([recipe]).jobs) == 4
    assert [j.config.quantization.dtype for j in plan([recipe, "dtype=int4"]).jobs] == ["int4", "int4"]


def test_candidates_with_own_settings(tmp_path):
    recipe = write(
        tmp_path,
        """
        sweep:
          candidates:
            - {backend: bitsandbytes, dtype: nf4, bnb_4bit_use_double_quant: true}
            - {backend: torchao, dtype: int4, group_size: 64}
        """,
    )
    found = plan([recipe])
    assert found.is_sweep
    assert [j.name for j in found.jobs] == ["bitsandbytes nf4 bnb_4bit_use_double_quant", "torchao int4 g64"]
    with pytest.raises(ConfigError, match=r"^dtype: recipe=mine lists its candidates"):
        plan([recipe, "dtype=int8"])
    # without a recipe there is none to be named, and none to be dropped
    with pytest.raises(
        ConfigError, match=r"^dtype: sweep.candidates= lists the candidates; drop dtype=... or give dtype"
    ):
        plan(["sweep.candidates=[{backend: quanto, dtype: int8}]", "dtype=int8"])


def test_candidates_and_swept_keys_are_multiplied(tmp_path):
    recipe = write(tmp_path, "sweep: {candidates: [{backend: quanto, dtype: int8}, {backend: gguf, dtype: q4_k}]}")
    jobs = plan([recipe, "dataset.seed=7,8"], multirun=True).jobs
    assert [(j.name, j.config.dataset.seed) for j in jobs] == [
        ("quanto int8 (dataset.seed=7)", 7),
        ("gguf q4_k (dataset.seed=7)", 7),
        ("quanto int8 (dataset.seed=8)", 8),
        ("gguf q4_k (dataset.seed=8)", 8),
    ]
    words = [recipe, "dataset.seed=7,8", "evaluation.num_inference_steps=2,3"]
    assert len({j.name for j in plan(words, multirun=True).jobs}) == 8
    with pytest.raises(ConfigError, match=r"^backend: recipe=mine lists its candidates"):
        plan([recipe, "backend=quanto,torchao"], multirun=True)


def test_a_name_says_what_sets_jobs_of_one_scheme_apart():
    jobs = plan(["backend=quanto", "dtype=int8,int4", "dataset.seed=0,1"], multirun=True).jobs
    assert [j.name for j in jobs] == [
        "quanto int8 (dataset.seed=0)",
        "quanto int8 (dataset.seed=1)",
        "quanto int4 (dataset.seed=0)",
        "quanto int4 (dataset.seed=1)",
    ]


def test_the_seed_of_the_intervals_is_called_so():
    with pytest.raises(ConfigError, match=r"^evaluation.seed: .*evaluation.bootstrap_seed .*dataset.seed"):
        one("evaluation.seed=3")
    assert one("evaluation.bootstrap_seed=3").config.evaluation.bootstrap_seed == 3


REFUSED = [
    ("hydra: {callbacks: {x: {_target_: os.system}}}", "hydra is not allowed"),
    ("model: {_target_: os.system}", "_target_ is not allowed"),
    ("sweep: {candidates: [{backend: torchao, _target_: x}]}", "_target_ is not allowed"),
    ("output_dir: ${oc.env:HOME}", "reaches outside the config"),
    ("name: ${oc.decode:x}", "reaches outside the config"),
    ("quantization: {group_size: 32}", r"quantization.group_size hides group_size=.* of the command line"),
    ("sweep: {grid: {dtype: [int8]}, candidates: [{dtype: int8}]}", "exclude each other"),
    ("defaults:\n  - override /hydra/launcher: x", "never hydra's"),
    ("[1, 2]", "a recipe has keys"),
    ("evaluation: {num_sampels: 3}", r"num_sampels: no such key; did you mean num_samples\?"),
    ("sweep: {grid: {dtype: int8}}", r"dtype"),
    ("a: [", "not valid YAML|not a readable YAML"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_recipe_is_data(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        plan([write(tmp_path, text)])


LARGE = {"digits_search", "digits_calibration", "smollm2_bitwidths"}
"""Recipes whose grids take seconds; ``digits_bitwidths`` has a test of its own."""


@functools.cache
def shipped(name):
    return plan([f"recipe={name}"])


@pytest.mark.parametrize("name", default_of(sorted(recipes()), *(set(recipes()) - LARGE)))
def test_every_shipped_recipe_composes(name):
    assert shipped(name).jobs


def test_digits_bitwidths_has_thirty_combinations_over_all_backends():
    jobs = shipped("digits_bitwidths").jobs
    assert len(jobs) >= 30
    assert {j.config.quantization.backend for j in jobs} == set(CAPABILITIES) - {"none"}


REPLAYED = [
    ["backend=torchao", "dtype=int4", "group_size=64"],
    ["backend=bitsandbytes", "dtype=nf4", "bnb_4bit_use_double_quant=true", "modules_to_not_convert=[norms]"],
    ["model=smollm2_135m", "backend=gguf", "dtype=q4_0", "evaluation.num_samples=8"],
]


@pytest.mark.parametrize("words", REPLAYED, ids=" ".join)
def test_a_run_as_a_recipe_composes_to_the_same_config(tmp_path, words):
    job = one(*words)
    file = tmp_path / "replay.yaml"
    file.write_text(job.recipe_yaml)
    again = one(f"recipe={file}")
    assert {k: v for k, v in again.resolved.items() if k != "recipe"} == {
        k: v for k, v in job.resolved.items() if k != "recipe"
    }
    assert again.schemes[""].native == job.schemes[""].native


def test_every_conf_file_is_an_option_of_the_table():
    assert set(groups()["backend"]) == set(CAPABILITIES)
    dtypes = {d for rows in CAPABILITIES.values() for d in rows}
    assert set(groups()["dtype"]) == dtypes | {"auto"}
    sizes = {str(g) for rows in CAPABILITIES.values() for row in rows.values() for g in row.group_sizes}
    assert sizes | {"auto", "none"} == set(groups()["group_size"])
    assert conf_dir().is_dir()


def test_axes_are_plain_data():
    assert QuantizationAxes() == QuantizationAxes()
    lists = QuantizationAxes(modules_to_not_convert={"a": ["x", "y"], "b": ["y", "z"]})
    assert lists.exclusions() == ("x", "y", "z")
    assert list(itertools.chain(*lists.modules_to_not_convert.values())) == ["x", "y", "y", "z"]


def test_nodes_of_an_application_around_us_are_neither_read_nor_lost():
    """Whoever calls us may have a Hydra application, with names of its own in the one config store."""
    store = ConfigStore.instance()
    store.store(name="schema", node={"mine": 1})
    hydras = store.repo["hydra"]["config.yaml"]
    try:
        assert one("backend=quanto").config.quantization.backend == "quanto"
        assert store.load("schema.yaml").node == {"mine": 1}
        assert store.repo["hydra"]["config.yaml"] is hydras
        assert "quantization_schema" not in store.repo
    finally:
        del store.repo["schema.yaml"]


def test_an_application_around_us_keeps_its_search_path(tmp_path):
    assert one("backend=quanto")  # our plugins are registered for good
    (tmp_path / "theirs.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        whole = compose("theirs", return_hydra_config=True)
    assert whole.a == 1
    assert [source.path for source in whole.hydra.runtime.config_sources][:2] == ["hydra.conf", str(tmp_path)]
    assert whole.hydra.job_logging.version == 1  # of Hydra's own options


def test_a_composition_leaves_the_schema_as_it_was():
    one("model=smollm2_135m", "backend=quanto", "dtype=int4", "model.dtype=float32")
    assert one("backend=torchao").config.dataset.name == "digits_classes"
    assert one("backend=torchao") == one("backend=torchao")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("name.x=", "name.x: name is one value"),
        ("dataset.seed.x=", "dataset.seed.x: "),
        ("model.path.x=1", "model.path.x: "),
    ],
)
def test_a_key_below_a_word_is_named_as_it_was_typed(word, said):
    with pytest.raises(ConfigError) as refused:
        plan(["backend=quanto", word])
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("name", ["reference", "floor_bf16", "floor_device"])
def test_no_candidate_has_the_name_of_the_reference_or_of_a_floor(name, tmp_path):
    """Rows are told apart by it: a candidate of that name was the floor of the rows after it."""
    with pytest.raises(ConfigError, match=f"^name={name}: .*; choose another"):
        plan(["backend=quanto", "dtype=int8", f"name={name}"])
    with pytest.raises(ConfigError, match=f"name={name}: "):
        plan([f"sweep.candidates=[{{backend: quanto, dtype: int8, name: {name}}}, {{backend: gguf, dtype: q8_0}}]"])
    file = tmp_path / name
    file.mkdir()
    with pytest.raises(ConfigError, match=f"^checkpoint={file}: .*name="):
        plan([f"checkpoint={file}", "model=causal_lm", "model.path=somewhere"])
    assert plan([f"checkpoint={file}", "model=causal_lm", "model.path=somewhere", "name=mine"]).jobs[0].name == "mine"


def test_a_file_of_options_is_parsed_once_a_process_and_read_as_it_is_now(tmp_path, monkeypatch):
    """A grid composes the same files for every job."""
    own = tmp_path / "evaluation" / "mine.yaml"
    own.parent.mkdir()

    def batch_size(value):
        own.write_text(f"# @package evaluation\nbatch_size: {value}\n")
        with own_options(str(tmp_path)):
            return one("backend=torchao", "evaluation=mine").config.evaluation.batch_size

    assert batch_size(3) == 3
    monkeypatch.setattr(OmegaConf, "load", lambda file: pytest.fail(f"{file} is parsed again"))
    assert batch_size(3) == 3
    monkeypatch.undo()
    assert batch_size(4) == 4
