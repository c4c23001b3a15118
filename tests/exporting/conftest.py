"""What several files look at that ask what an export is afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.shell import Shell, digits_words, make_shell


@pytest.fixture(scope="module")
def exported(template: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in whose folder the digits network in quanto's int8 lies as ``mine``, exported while it was measured; the
    check ran in this process."""
    from quantlab.exporting import check, verify

    def compare(request: Any, _scratch: Path) -> tuple[Any, str]:
        answers: list[Any] = []
        check.compare(request, answers.append)
        return json.loads(json.dumps(answers[-1])), ""

    shell = make_shell(tmp_path_factory.mktemp("export") / "my work", template, trained)
    small = digits_words("evaluation.num_samples=10", "device=cpu", "sweep.floors=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_fresh_process", compare)
        shell.rows(*small, "backend=quanto", "dtype=int8", "export.path=mine")
    return shell
