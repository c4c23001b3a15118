"""The architecture as tests: wings, heavy imports, shipped files, documents that tell the truth."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantlab"
SOURCES = sorted(PACKAGE.rglob("*.py"))
WINGS = (
    "vocabulary",
    "modules",
    "backends",
    "metrics",
    "models",
    "protocols",
    "datasets",
    "tracking",
    "report",
    "planning",
    "stages",
    "exporting",
    "running",
)
"""Each imports only what stands before it, and the ground below."""
GROUND = ("errors", "progress", "quiet")
"""Files that every wing may import."""
TOP = ("docs", "api", "commands", "cli", "__main__", "__init__")
"""Files that import the wings."""
FLOOR_OF = {name: floor for floor, name in enumerate((*GROUND, *WINGS, *TOP))}
MAX_TOP_FILES = 9
MAX_ANY_SHARE = 0.08
HEAVY = {
    "torch", "diffusers", "transformers", "bitsandbytes", "torchao", "optimum", "modelopt", "mlflow", "libgguf",
    "sklearn", "scipy", "skimage", "optuna", "accelerate", "plotly", "matplotlib", "PIL", "numpy", "safetensors", "gguf",
}  # fmt: skip
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}


def wing_of(module: str) -> str:
    """``backends`` of ``quantlab.backends.gguf.config``; ``__init__`` of ``quantlab``."""
    return (module.split(".") + ["__init__"])[1]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, is in a function, is for types only) for each import of a file; of quantlab the file that it names."""
    found = []

    def visit(node: ast.AST, in_function: bool, typing_only: bool) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports of quantlab are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        found.extend((name, in_function, typing_only) for name in names)
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        typing_only |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):  # what may hold an import
                visit(child, in_function, typing_only)

    visit(parsed(path), False, False)
    return found


@functools.cache
def edges() -> dict[str, set[str]]:
    """File of quantlab -> those that it imports."""
    return {
        module: {name for name, _, _ in imported(path) if name.split(".")[0] == "quantlab" and name != module}
        for module, path in MODULES.items()
    }


def test_every_file_stands_in_a_wing():
    assert {wing_of(m) for m in MODULES} == set(FLOOR_OF)
    assert len([p for p in PACKAGE.iterdir() if p.suffix == ".py"]) <= MAX_TOP_FILES
    assert all((PACKAGE / wing / "__init__.py").is_file() for wing in WINGS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_wing_imports_only_those_below_it(module):
    """Imports for types count: what a file must know to be read is what it depends on."""
    own = FLOOR_OF[wing_of(module)]
    upward = {name for name in edges()[module] if FLOOR_OF[wing_of(name)] > own}
    assert not upward
    assert own >= len(GROUND) or not edges()[module]


def test_no_file_imports_itself_by_way_of_others():
    done, cycles = set(), []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            cycles.append([*path[path.index(module) :], module])
        elif module not in done:
            for name in sorted(edges().get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())
    assert not cycles


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_first_party_imports_stand_at_the_top_and_heavy_ones_inside_functions(path):
    for name, in_function, typing_only in imported(path):
        top = name.split(".")[0]
        assert not (top == "quantlab" and in_function and path.name not in ("cli.py", "commands.py")), (
            f"{name} is imported in a function"
        )
        assert in_function or typing_only or top not in HEAVY, f"{name} is imported at module level"


def test_annotations_say_something():
    """Of what a function takes and gives and what a field holds, few are exactly ``Any``."""
    found, total = [], 0
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            here = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
                here = [a.annotation for a in arguments if a.annotation] + ([node.returns] if node.returns else [])
            elif isinstance(node, ast.AnnAssign):
                here = [node.annotation]
            total += len(here)
            found += [str(path.relative_to(PACKAGE)) for a in here if isinstance(a, ast.Name) and a.id == "Any"]
    assert len(found) <= MAX_ANY_SHARE * total, (len(found), total, Counter(found).most_common(12))


def test_backends_are_named_in_their_wing_and_in_the_vocabulary_only():
    names = re.compile(r'"(torchao|bitsandbytes|quanto|gguf|modelopt)"')
    hits = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        if wing_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) not in ("backends", "vocabulary")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if names.search(line)
    ]
    assert not hits


def test_only_tracking_imports_mlflow():
    users = {wing_of(m) for m, p in MODULES.items() if any(n.split(".")[0] == "mlflow" for n, _, _ in imported(p))}
    assert users == {"tracking"}


def test_files_stay_small():
    too_long = {
        str(p.relative_to(ROOT)): n
        for p in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
        if (n := len(p.read_text().splitlines())) > 500
    }
    assert not too_long


LIGHT = [
    "import quantlab",
    "import quantlab.cli",
    "import quantlab.backends.table",
    "import quantlab; quantlab.compose(['backend=torchao', 'dtype=int4'])",
    "import quantlab.modules.layers, quantlab.modules.memory",
    "from quantlab import BitsAndBytesConfig, GGUFQuantizationConfig, NVIDIAModelOptConfig, QuantoConfig, TorchAoConfig",
    "from quantlab.vocabulary.axes import QuantizationAxes as Axes",
    "all(r.module.Config.from_axes(Axes(backend=n)) for n, r in quantlab.backends.table.backends().items())",
]


def test_nothing_heavy_is_imported():
    """One process, statement after statement: what an earlier one imports, a later one has."""
    heavy = sorted(HEAVY - {"numpy"})
    each = "".join(f"{line}\nprint([m for m in {heavy!r} if m in sys.modules])\n" for line in LIGHT)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{each}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert dict(zip(LIGHT, done.stdout.splitlines(), strict=True)) == dict.fromkeys(LIGHT, "[]")


def test_torchvision_is_never_pulled_in():
    """A CPU build of torch beside torchvision breaks diffusers' and transformers' imports."""
    from importlib import metadata

    names = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
    assert "torchvision" not in names
    assert "torchvision" not in (ROOT / "pyproject.toml").read_text()


EXPECTATIONS = ("# Expect: not yet run", "# Expect: measured ", "# Expect: published ")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_states_its_question_command_and_expectation(recipe):
    lines = recipe.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert "?" in lines[1]
    assert lines[2].startswith(f"# Run: quantlab recipe={recipe.stem}")
    assert any(line.startswith(EXPECTATIONS) for line in lines)


def test_no_absolute_paths_or_package_hosts_in_tracked_files():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    bad = re.compile(r"(?<![\w.])/(?:root|home|work|tmp)/|--(?:index|extra-index|find)-(?:url|links)")
    hits = {
        f
        for f in files
        if (ROOT / f).suffix in (".py", ".md", ".yaml", ".toml", ".txt")
        and f != "tests/test_structure.py"
        and (ROOT / f).is_file()
        and bad.search((ROOT / f).read_text())
    }
    assert not hits
