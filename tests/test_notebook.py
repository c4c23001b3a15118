"""A notebook, cell by cell: what each shows, as Jupyter would choose it (HTML where there is any)."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path

import pytest

from tests.support.shell import digits_words, make_shell

NOTEBOOK = Path(__file__).parent / "notebooks" / "results.ipynb"


def cells():
    """The source of each cell of code, but for the one of parameters, which are given."""
    data = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in data["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code if "parameters" not in cell["metadata"].get("tags", [])]


def executed(source, names):
    """Run a cell; what its last expression shows."""
    *body, last = ast.parse(source).body
    assert isinstance(last, ast.Expr), "each cell of this notebook shows something"
    exec(compile(ast.Module(body, type_ignores=[]), str(NOTEBOOK), "exec"), names)
    value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def test_the_notebook_is_kept_without_outputs():
    data = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in data["cells"])


@pytest.mark.slow
def test_each_cell_shows_what_it_should(tmp_path, template, trained):
    shell = make_shell(tmp_path / "notebook", template, trained)
    names = {"words": digits_words("backend=quanto", "dtype=int8,int4")}
    with contextlib.chdir(shell.folder):
        first, layers, again, whole, later, compared = (executed(source, names) for source in cells())
    for shown in (first, again, later):
        assert shown.count("<tr>") == 6, "titles, reference, two floors, two schemes"
        assert 'src="data:image/png;base64,' in shown
    assert "int4" in layers
    assert ["resumed: all rows" in shown for shown in (first, again, later)] == [False, True, False]
    assert whole == "True"
    assert "quanto int4" in compared
    assert "\\n" not in compared, "a comparison is shown as it is printed"
