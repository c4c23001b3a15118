from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def torch():
    """torch, with the library imported once for the module."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("optimum.quanto")
    return torch
