"""Marks for tests that need optional asset wheels."""

from __future__ import annotations

import importlib.util

import pytest

from quantlab.models.assets import INSTALL


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skips where one of the wheels is not installed."""
    there = all(importlib.util.find_spec(module) is not None for module in modules)
    return pytest.mark.skipif(not there, reason=INSTALL)
