"""Which package a pipeline of Diffusers lacks: some say it only where they are made, or where they use it."""

from __future__ import annotations

import ast
import inspect
import re
from types import TracebackType

from quantlab.errors import MissingPackage, ModelError, QuantlabError

_ADVISED = re.compile(r"pip install (?:-U |--upgrade )?([\w.-]*\w)")
_GUARD = re.compile(r"is_(\w+)_available")
_INSTALLED_AS = {"cv2": "opencv-python", "bs4": "beautifulsoup4", "PIL": "pillow", "sklearn": "scikit-learn"}
"""Module -> the package that brings it, where they are not called the same."""


def wanting(key: str, pipeline: str, error: ImportError | NameError) -> QuantlabError | None:
    """What to raise for an ``error`` in making or running a pipeline, by what it says or by its source; None where no
    package is behind it.

    A name that nobody defined is one that Diffusers imports where a package is there.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and error.name and not isinstance(error, ModuleNotFoundError):
        there = error.name.partition(".")[0]
        return ModelError(
            f"{key}: {pipeline} needs what the installed {there} does not have ({text[:300]}); install another release "
            "of it"
        )
    if advised := _ADVISED.search(text):
        package = advised[1]
    elif isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
    else:
        package = _imported_as(error)
        if not package:
            return None
    if not package:
        return MissingPackage(f"{key}: {pipeline} needs what is not installed ({text[:300]}); install that")
    package = _INSTALLED_AS.get(package, package)
    fitting = ", of a version that goes with the installed torch" if package.startswith("torch") else ""
    return MissingPackage(
        f"{key}: {pipeline} needs the package {package}, which is not installed; pip install {package}{fitting}"
    )


def _imported_as(error: NameError) -> str:
    """The package that would have brought a name to the module that misses it; "" for none."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    try:
        source = "" if last is None else inspect.getsource(inspect.getmodule(last.tb_frame) or last.tb_frame)
        tree = ast.parse(source)
    except (OSError, SyntaxError, TypeError):
        return ""
    for node in ast.walk(tree):
        guard = _GUARD.search(ast.unparse(node.test)) if isinstance(node, ast.If) else None
        if guard is None or not isinstance(node, ast.If):
            continue
        for line in node.body:
            if isinstance(line, (ast.Import, ast.ImportFrom)) and error.name in list(map(_bound, line.names)):
                module = line.names[0].name if isinstance(line, ast.Import) else line.module or ""
                is_relative = isinstance(line, ast.ImportFrom) and line.level > 0
                return guard[1] if is_relative else module.partition(".")[0]
    return ""


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]
