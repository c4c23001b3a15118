"""quantlab with a note of where its CPU seconds go: ``sampled.py FILE WORDS...`` runs ``quantlab WORDS...`` and writes
part -> seconds to FILE as JSON.

Every 10 ms of CPU time the stack is looked at; what has passed since the last look counts for the first of ``PARTS`` that
has a place in it. A call into a library is one look, with all that it took; a library that MLflow and others import
counts for whoever comes first. Looking is in the seconds.
"""

import atexit
import importlib.util
import json
import runpy
import signal
import sys
import time
from pathlib import Path

IMPORTS, QUANTIZING = "imports of quantlab, Hydra and MLflow", "quantizing"
PARTS = {
    IMPORTS: ("quantlab", "hydra", "omegaconf", "mlflow"),
    "tracking": ("quantlab.tracking", "quantlab.running.overview"),
    "checks of model and inputs": (
        "quantlab.modules.fingerprint",
        "quantlab.modules.layers:check_finite_weights",
        "quantlab.protocols.diffusion:_check_repeats",
        "quantlab.protocols.language_checks",
        "quantlab.stages.reads",
    ),
    "reading back": ("quantlab.stages.quantize:_read_row",),
    QUANTIZING: ("quantlab.stages.quantize:_hand_over",),
    "weighing": ("quantlab.stages.weigh", "quantlab.running.placement:planned"),
    "statistics": ("quantlab.metrics.frechet", "quantlab.metrics.statistics"),
    "clean memory before a stage": ("quantlab.modules.device:give_back",),
    "recipe": ("quantlab.planning",),
}
"""What is told apart -> modules, or functions of one (``module:function``). The first is of what imports take."""
BESIDE = tuple(part for part in PARTS if part != QUANTIZING)
"""What quantlab does beside what a script does."""
OTHER = "loading, running and comparing"


def places(names):
    """(file or folder, function or "") of each name."""
    found = []
    for name in names:
        module, _, function = name.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, name
        file = str(Path(str(spec.origin)).parent) + "/" if spec.submodule_search_locations else str(spec.origin)
        found.append((file, function))
    return found


def part_of(frames, wanted):
    """The part of a stack of (file, function), outermost first."""
    begun = next((i for i, (file, _) in enumerate(frames) if file.startswith("<frozen importlib")), None)
    if begun is not None:
        inside = frames[begun:]
        own = any(file.startswith(folder) for file, _ in inside for folder, _ in wanted[IMPORTS])
        return IMPORTS if own else "other imports"
    for part, some in wanted.items():
        if part != IMPORTS and any(
            file.startswith(at) and function in ("", name) for file, name in frames for at, function in some
        ):
            return part
    return OTHER


def main(file, *words):
    """Run quantlab; the seconds are written also where it ends by an exit."""
    wanted = {part: places(names) for part, names in PARTS.items()}
    seconds, last = dict.fromkeys(PARTS, 0.0), [time.process_time()]

    def look(_signal, frame):
        now = time.process_time()
        frames = []
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        part = part_of(frames[::-1], wanted)
        seconds[part] = seconds.get(part, 0.0) + now - last[0]
        last[0] = now

    def write():
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(file).write_text(json.dumps(seconds), encoding="utf-8")

    atexit.register(write)
    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.01, 0.01)
    sys.argv = ["quantlab", *words]
    runpy.run_module("quantlab", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
