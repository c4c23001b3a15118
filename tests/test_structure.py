"""The architecture as tests: floors, heavy imports, shipped files, documents that tell the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantlab"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    0: ("errors", "dtypes", "capabilities", "axes", "config", "reports", "experiment", "recipe", "progress", "quiet"),
    1: (
        "backends",
        "models",
        "datasets",
        "metrics",
        "protocols",
        "memory",
        "layers",
        "tracking",
        "statistics",
        "provenance",
        "fingerprint",
        "interop",
        "calibration",
    ),
    2: ("stages", "report", "composition", "listing"),
    3: ("candidate", "pipeline", "job", "sweep", "resume", "execute", "launch", "reproduce", "search"),
    4: ("cli", "api", "__main__", "__init__"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "bitsandbytes",
    "torchao",
    "optimum",
    "modelopt",
    "mlflow",
    "libgguf",
    "sklearn",
    "scipy",
    "skimage",
    "optuna",
    "accelerate",
    "plotly",
    "matplotlib",
    "PIL",
    "numpy",
    "safetensors",
    "gguf",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts else "__init__"


def imports(path: Path):
    tree = ast.parse(path.read_text())
    typing_only = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    in_function = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(node)
        if n is not node
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in typing_only:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            full = [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else names
            yield names, full, id(node) in in_function


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = FLOOR_OF[module_name(path)]
    for names, full, _ in imports(path):
        for name, whole in zip(names, full * len(names) if len(full) < len(names) else full, strict=False):
            if name.split(".")[0] == "quantlab":
                target = (whole if name == "quantlab" else name).split(".")[1]
                assert FLOOR_OF[target] <= own, f"{path.name} (floor {own}) imports {target} (floor {FLOOR_OF[target]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_first_party_imports_stand_at_the_top_and_heavy_ones_inside_functions(path):
    for names, _, in_function in imports(path):
        for name in names:
            top = name.split(".")[0]
            assert not (top == "quantlab" and in_function and path.name != "cli.py"), (
                f"{name} is imported in a function"
            )
            assert in_function or top not in HEAVY, f"{name} is imported at module level"


def test_only_tracking_imports_mlflow():
    users = {
        str(p.relative_to(PACKAGE))
        for p in SOURCES
        for names, _, _ in imports(p)
        if any(n.split(".")[0] == "mlflow" for n in names)
    }
    assert users
    assert all(u.startswith("tracking") for u in users)


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
]


@pytest.mark.parametrize("statement", LIGHT)
def test_nothing_heavy_is_imported(statement):
    heavy = sorted(HEAVY - {"numpy"})
    code = f"{statement}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


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
