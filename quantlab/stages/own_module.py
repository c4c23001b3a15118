"""Anyone's own ``torch.nn.Module`` from Python: quantized, and compared with itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from quantlab.backends.scheme import Scheme, scheme_of_config
from quantlab.backends.table import held_packages, loggers
from quantlab.errors import (
    ConfigError,
    NotFinite,
    QuantlabError,
    TrackingError,
    first_line,
    in_words,
    is_of_the_machine,
)
from quantlab.models.defaults import default_exclusions
from quantlab.models.loaded import LoadedModel
from quantlab.models.outline import cast_as_loaded
from quantlab.modules.compute_dtype import component_dtype
from quantlab.modules.device import current, uncollected
from quantlab.modules.emulated import emulated_products, lacking
from quantlab.modules.feed import feed_of_batches
from quantlab.modules.fingerprint import fingerprint_warning, grid_fingerprint, known_grid
from quantlab.modules.hooks import check_offloading
from quantlab.modules.layers import check_finite_weights, state_digest
from quantlab.modules.memory import component_memory, measure_stage, note_held
from quantlab.modules.packed import stored_at
from quantlab.modules.precision import exact_arithmetic, own_modes
from quantlab.modules.reached import called, check_uncompiled, check_weights_are_here, recorded_reads
from quantlab.modules.read_in_source import changes_in_source, note_failures, reads_in_source
from quantlab.modules.ties import copied
from quantlab.planning.job import scheme_name
from quantlab.progress import headline_of, progress_bars, say, under_way
from quantlab.protocols.module import ModuleInputs, check, inputs_of, observe, samples_of
from quantlab.protocols.unchanged import same_memory, same_state
from quantlab.quiet import quiet_libraries
from quantlab.report.reading import Reader
from quantlab.report.results import Results
from quantlab.report.said_first import said_first
from quantlab.stages.calibrate import calibrate_component
from quantlab.stages.evaluate import evaluate as evaluate_stage
from quantlab.stages.evaluate import summarize
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from quantlab.vocabulary.called import called_in_words, check_batches, check_config, check_configs, checked_kinds
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.fields import check_values
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.numbers import FLOOR_BF16, FLOOR_FP32, FLOORS, REFERENCE
from quantlab.vocabulary.reports import QuantizationReport, RunReport
from quantlab.vocabulary.schema import EvaluationConfig


@called_in_words()
@own_modes()
def quantize(
    module: Any,
    config: QuantizationConfigMixin,
    *,
    calibration: Sequence[Any] | None = None,
    on_mismatch: str = "error",
    replace_default_exclusions: bool = False,
    layer_kinds: Sequence[str] = ("linear",),
    inputs: Sequence[Any] = (),
) -> tuple[Any, QuantizationReport]:
    """A quantized copy of any ``torch.nn.Module``, and what each Linear layer became, read back from its tensors.

    Args:
        module: a container with ``nn.Linear`` layers inside (a bare Linear cannot be replaced in itself).
        config: one of the five native configs; its ``modules_to_not_convert`` uses quantlab's matcher.
        calibration: batches as the module's forward takes them, for configs whose ``needs_data`` is true.
        layer_kinds: ``linear``, ``conv``, ``embedding``, ``expert``, ``recurrent``, ``parameter``: which kinds of
            layers are quantized.
        inputs: batches as the module's forward takes them: the first is run once (else the first of ``calibration``),
            to see which weights the module reads instead of calling their layers; these are stored so that reading
            gives dequantized values. Without any the source of its parts is looked at, and where the quantized
            module's forward fails, a note at the error names the layers there.
        replace_default_exclusions: quantize also what the command line leaves out of a model of this class (output
            heads, what the class keeps in float32).
        on_mismatch: ``error``, ``skip``, or a dtype to fall back to, for layers whose shape does not fit.

    Raises:
        ConfigError, NotQuantized: see :func:`quantlab.stages.quantize.quantize_component`.
    """
    module = _checked(module)
    check_config(config)
    check_batches("inputs", inputs)
    check_batches("calibration", calibration)
    check_finite_weights(module, "module")
    scheme = _scheme_of(
        config,
        on_mismatch=on_mismatch,
        replace_default_exclusions=replace_default_exclusions,
        layer_kinds=checked_kinds(layer_kinds),
    )
    read: Sequence[str] = reads_in_source(module)
    if known := inputs or (calibration if scheme.native.needs_data else ()) or ():
        not_finite = () if inputs else (NotFinite,)  # of calibration data: calibrating names the layer
        quiet = contextlib.suppress(*not_finite)
        with in_eval_mode(module), same_state(module), recorded_reads(module) as read, quiet:
            observe(_loaded(module), _given(module, list(known[:1])), EvaluationConfig())
    elif changing := changes_in_source(module):
        say(
            f"module: {changing} changes weights as it runs, and would change the quantized ones: run the module once "
            "in eval mode before, where it does so at the first call alone, or pass inputs=[batch], which finds out",
            "warning",
        )
    with progress_bars(), in_eval_mode(module), same_memory(module):  # in train mode reading a weight may change it
        under_way(f"quantize: {_name_of(config)}")
        made, report = _quantized(module, scheme, calibration, read)
    if not inputs:
        note_failures(made, [r.name for r in report.layers if r.status in ("quantized", "fallback")])
    return made, report


def _scheme_of(config: QuantizationConfigMixin, **more: Any) -> Scheme:
    """:func:`scheme_of_config`, whose errors begin with the argument."""
    try:
        return scheme_of_config(config, **more)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("quantization.")) from error


def _quantized(
    module: Any, scheme: Scheme, calibration: Sequence[Any] | None, read: Sequence[str]
) -> tuple[Any, QuantizationReport]:
    dtype, device = _dtype_and_device(module)
    request = QuantizationRequest(
        component="model",
        scheme=scheme,
        compute_dtype=dtype,
        device=device,
        default_exclusions=default_exclusions(module),
        read=tuple(read),
        is_called=True,
    )
    with current(device):
        candidate = _copied(module).eval()
        selection = select_layers(request, candidate)
        calibrated = None
        if scheme.native.needs_data:
            feed = feed_of_batches(_needed(scheme.native, calibration), device, dtype)
            calibrated = calibrate_component(request, candidate, selection, feed)
        return quantize_component(request, candidate, module, selection, calibrated)


def _loaded(module: Any) -> LoadedModel:
    """The user's module as the stages take it."""
    dtype, device = _dtype_and_device(module)
    return LoadedModel(
        name="module",
        protocol="module",
        components={"model": module},
        dtype=dtype,
        device=device,
        weights_sha256=state_digest(module.state_dict()),
    )


def _given(module: Any, inputs: Sequence[Any]) -> ModuleInputs:
    """The user's batches; a module of one dtype is given that, one of several what the user gives."""
    dtypes = {dtype_name(p.dtype) for p in module.parameters() if p.is_floating_point()}
    return inputs_of(inputs, _dtype_and_device(module)[0] if len(dtypes) == 1 else None)


@contextlib.contextmanager
def in_eval_mode(module: Any) -> Iterator[None]:
    """The module in eval mode, and each of its parts as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _needed(config: QuantizationConfigMixin, calibration: Sequence[Any] | None) -> Sequence[Any]:
    """``calibration``; ConfigError where a config that needs data has none."""
    if calibration is None:
        name = _name_of(config)
        raise ConfigError(
            f"calibration: {name} needs data; pass calibration=[batch, ...], batches as the module's forward takes them"
        )
    return calibration


def _name_of(config: QuantizationConfigMixin, **more: Any) -> str:
    scheme = scheme_of_config(config, compute_dtype="auto", **more)  # the module's own dtype is what counts
    settings = {name: getattr(config, name) for name in scheme.backend.settings}
    return scheme_name(scheme.axes, scheme, settings)


def _checked(module: Any) -> Any:
    """``module`` if it is one that can be quantized; ConfigError otherwise."""
    quiet_libraries(loggers())
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"module={type(module).__name__}: a torch.nn.Module is wanted (for a name: model.path=...)")
    if isinstance(module, torch.nn.Linear):
        raise ConfigError("module: a bare Linear cannot be replaced in itself; wrap it: torch.nn.Sequential(linear)")
    if next(module.parameters(), None) is None:
        raise ConfigError("module: it has no parameters, nothing to quantize; pass the part with the weights")
    check_offloading(module, "module")
    check_uncompiled(module, "module")
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            kind = type(parameter).__name__
            raise ConfigError(f"module: {name} is a {kind}, already quantized: pass the unquantized one")
        if parameter.dtype == torch.float64:
            raise ConfigError(
                f"module: {name} is of float64, and modules are quantized and compared in float32, bfloat16 or "
                "float16; pass module.float(), or copy.deepcopy(module).float() to keep yours"
            )
    check_weights_are_here(module, "module")
    return module


def _dtype_and_device(module: Any) -> tuple[str, str]:
    """The dtype that it computes in, and its device with the number (``cuda:1``)."""
    return dtype_name(component_dtype(module)), str(next(module.parameters()).device)


def _copied(module: Any) -> Any:
    try:
        return copied(module)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if is_of_the_machine(error):
            raise
        raise ConfigError(
            f"module: it cannot be copied ({first_line(error)}); a module that is already quantized is often "
            "so: pass the unquantized one"
        ) from error


@called_in_words()
@own_modes()
@exact_arithmetic()
@uncollected()
def evaluate(
    module: Any,
    configs: Sequence[QuantizationConfigMixin],
    inputs: Sequence[Any],
    *,
    calibration: Sequence[Any] | None = None,
    num_bootstrap: int = 2000,
    floors: bool = True,
    on_mismatch: str = "error",
    layer_kinds: Sequence[str] = ("linear",),
    replace_default_exclusions: bool = False,
    quiet: bool = False,
) -> Results:
    """Quantize ``module`` by each config and compare its outputs with the unquantized module's, row by row.

    Args:
        module: any ``torch.nn.Module`` that returns a tensor, or a tuple or mapping of tensors, of which each is
            compared and the one that moves most counts.
        configs: native quantization configs.
        inputs: batches as the module's forward takes them: a tensor, a tuple of positional arguments, a mapping of
            named ones, or a pair (tuple, mapping) of both; values that are no tensors are passed on as they are.
        calibration: other batches, for configs that need data; a sample of ``inputs`` among them is refused.
        floors: measure the noise floor (the module in another dtype) as a row of its own; it is FAILED, with the
            reason, where the module does not run so.
        on_mismatch, layer_kinds, replace_default_exclusions: see :func:`quantize`.
        quiet: no progress, which is else told on stderr.

    Returns:
        Reports of the reference, its floor (another dtype) and each config: ``output_cosine`` and ``output_rel_error``
        with intervals over different rows (batches, where an output has no several numbers a row, or several rows of
        each input), bytes, and the read-back table. They show themselves as a table, and have
        ``rows``, ``layers`` and ``samples`` as DataFrames. Nothing is tracked. As in a sweep a config that fails among
        others is a FAILED row with its reason; alone it raises.
    """
    module = _checked(module)
    check_configs(configs)
    check_batches("inputs", inputs)
    check_batches("calibration", calibration)
    settings = EvaluationConfig(num_bootstrap=num_bootstrap)
    check_values(settings)
    given = _given(module, inputs)
    asked = {
        "on_mismatch": on_mismatch,
        "layer_kinds": checked_kinds(layer_kinds),
        "replace_default_exclusions": replace_default_exclusions,
    }
    for config in configs:
        if config.needs_data:
            feed_of_batches(_needed(config, calibration))
            mine = samples_of(calibration or ())
            if shared := mine & samples_of(inputs):
                raise ConfigError(
                    f"calibration: {len(shared)} of its {len(mine)} different samples are samples of inputs, so the "
                    "numbers would flatter; give other batches"
                )
    schemes = [(config, _scheme_of(config, **asked)) for config in configs]
    with in_eval_mode(module), same_state(module), progress_bars(quiet) as advance:
        under_way("reference")
        note_held(module)
        model = _loaded(module)
        check_finite_weights(module, "module")
        if warning := fingerprint_warning(grid_fingerprint(module), known_grid(module)):
            say(warning, "warning")
        with current(model.device):
            with emulated_products(lacking(model.device)), recorded_reads(module) as read:
                with same_state(module):
                    reference = observe(model, given, settings)
                check(model, given)
            with same_state(module):
                reports = [_row(REFERENCE, module, None, model, reference, given, settings)]
            size = reports[0].memory["model"]
            if floors:
                under_way("noise floor")
                reports.append(_floor_row(module, model, reference, given, settings))
            for i, (config, scheme) in enumerate(schemes):
                data = calibration if config.needs_data else None
                name = _name_of(config, **asked)
                advance("configs", i, len(schemes))
                under_way(f"{name} ({i + 1} of {len(schemes)})")
                row = _config_row(name, scheme, data, read, model, reference, given, settings, len(schemes) == 1)
                reports.append(row)
            advance("configs", len(schemes), len(schemes))
        for line in said_first((r.name, r.unquantized) for r in reports if r.quantization):
            say(line, "warning")
    known = {r.name: r.quality for r in reports if r.name in FLOORS and r.status == "FINISHED"}
    sized = [replace(r, memory={n: m.of_values_in(size) for n, m in r.memory.items()}) for r in reports]
    return Results([replace(r, floors=known) for r in sized], _no_store)


def _no_store() -> Reader:
    raise TrackingError("quantlab.evaluate tracks nothing; quantlab.run does")


def _config_row(
    name: str,
    scheme: Scheme,
    calibration: Sequence[Any] | None,
    read: Sequence[str],
    model: LoadedModel,
    reference: Any,
    given: ModuleInputs,
    settings: EvaluationConfig,
    is_alone: bool,
) -> RunReport:
    """The row of a config, of one that fails among others too; its candidate is gone when this returns."""
    stage = "quantize"
    try:
        quantized, layers = _quantized(model.components["model"], scheme, calibration, read)
        stage = "evaluate"
        return _candidate_row(name, scheme, quantized, layers, model, reference, given, settings)
    except Exception as error:
        if is_alone:
            raise
        told = in_words(error)
    say(f"{name} at {stage}: {headline_of(told, 500)}", "failed")
    return _failed_row(name, stage, told)


def _candidate_row(
    name: str,
    scheme: Scheme,
    quantized: Any,
    layers: QuantizationReport,
    model: LoadedModel,
    reference: Any,
    given: ModuleInputs,
    settings: EvaluationConfig,
) -> RunReport:
    """The row of a config whose candidate is there; ConfigError where the module does not run with it."""
    module = model.components["model"]
    rows: list[RunReport] = []
    try:
        unquantized = called(
            module,
            _called_if_quantized(layers, module),
            lambda: rows.append(_row(name, quantized, layers, model, reference, given, settings, scheme)),
        )
    except QuantlabError:
        raise
    except Exception as error:  # noqa: BLE001  the module's own code, on layers that it does not know
        if is_of_the_machine(error):
            raise
        raise ConfigError(_why_it_fails(error, name, layers, model, given, settings)) from error
    if unquantized:
        raise ConfigError(
            f"module: {name}: {', '.join(unquantized[:5])} ran unquantized: a function that the module keeps (a "
            "lambda, a hook) holds the module itself, and in a copy still runs the original's layers; make it a "
            f"method, or leave them out: modules_to_not_convert={unquantized[:5]}"
        )
    return rows[0]


def _called_if_quantized(report: QuantizationReport, module: Any) -> list[str]:
    """The quantized layers that have a forward of their own."""
    paths = {path for path, _ in module.named_modules()}
    done = [r.name for r in report.layers if r.status in ("quantized", "fallback") and r.kind == "linear"]
    return [name for name in done if name in paths]  # nn.MultiheadAttention multiplies by its matrices itself


def _why_it_fails(
    error: Exception,
    name: str,
    layers: QuantizationReport,
    model: LoadedModel,
    given: ModuleInputs,
    settings: EvaluationConfig,
) -> str:
    """What to say of a module that runs as it is, and not quantized."""
    module = model.components["model"]
    done = _called_if_quantized(layers, module)
    ran = called(module, done, lambda: observe(model, given, settings))
    read = [layer for layer in done if layer not in ran]
    said = f"{type(error).__name__}: {first_line(error)}"
    if not read:
        return f"module: {name}: it runs as it is, and fails quantized ({said}); exclude the layer that it names"
    return (
        f"module: {name}: it never calls {', '.join(read[:5])}, and fails with these layers quantized ({said}); leave "
        f"them out: modules_to_not_convert={read[:5]}"
    )


def _floor_row(module: Any, model: LoadedModel, reference: Any, given: Any, settings: EvaluationConfig) -> RunReport:
    """The module in another dtype: bfloat16, or float32 where it is narrower; a row even where it cannot run so."""
    name, dtype = (FLOOR_BF16, "bfloat16") if model.dtype == "float32" else (FLOOR_FP32, "float32")
    try:
        return _row(name, cast_as_loaded(_copied(module), dtype), None, model, reference, given, settings)
    except Exception as error:  # noqa: BLE001  the module's own code: one that casts to float32 knows no other dtype
        why = f"{type(error).__name__}: {error}"
        told = f"{name}: the module does not run in {dtype} ({why}); floors=False does without this row"
        return _failed_row(name, "evaluate", told)


def _failed_row(name: str, stage: str, error: str) -> RunReport:
    return RunReport(name=name, status="FAILED", protocol="module", error=error, failed_stage=stage)


def _row(
    name: str,
    module: Any,
    layers: QuantizationReport | None,
    model: LoadedModel,
    reference: Any,
    given: Any,
    settings: EvaluationConfig,
    scheme: Scheme | None = None,
) -> RunReport:
    with measure_stage("evaluate", model.device) as stage, emulated_products(lacking(model.device)):
        candidate = model.with_components({"model": module})
        measured = evaluate_stage(
            candidate, model, reference, given, settings, schemes={"": scheme} if scheme is not None else None
        )
        quality = summarize(measured, settings)
    done = [r.name for r in layers.layers if r.status in ("quantized", "fallback")] if layers else []
    done = [stored_at(module, name) for name in done]
    return RunReport(
        name=name,
        status="FINISHED",
        protocol="module",
        quantization=layers,
        quality=quality,
        unquantized=layers.unquantized if layers else (),
        memory={"model": component_memory(module, done, model.components["model"], held_packages())},
        measurements=measured,
        stages=(stage.report,),
    )
