"""Places that cannot be written are found before any work, with the path and the reason."""

from __future__ import annotations

import shutil
import time

import pytest

from quantlab.errors import ConfigError
from quantlab.planning import ready
from quantlab.running import sweep
from quantlab.running.sweep import ARTIFACTS, PLACES
from tests.support.shell import digits_words


@pytest.mark.parametrize("place", [*PLACES, ARTIFACTS])
def test_a_file_where_a_folder_should_be(place, tmp_path):
    target = tmp_path / "outputs" / place
    target.parent.mkdir(parents=True)
    target.write_text("no folder")
    began = time.process_time()
    with pytest.raises(
        ConfigError, match=r"^output_dir=.*outputs: .* cannot be written \((File exists|Not a dir).*set "
    ):
        sweep._usable_folder(str(tmp_path / "outputs"), is_beside=True)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_refuses(place, tmp_path, monkeypatch):
    (tmp_path / place).mkdir(parents=True)
    real = sweep.tempfile.TemporaryFile

    def refusing(dir):
        if dir == tmp_path / place:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(sweep.tempfile, "TemporaryFile", refusing)
    with pytest.raises(ConfigError, match=rf"{place} cannot be written \(Permission denied\)"):
        sweep._usable_folder(str(tmp_path))


def test_the_command_says_so_before_it_loads_anything(shell):
    (shell.folder / "outputs" / "mlartifacts").write_text("no folder")
    code, _, err = shell(*digits_words("backend=quanto", "dtype=int8"))
    assert code == 2
    assert "mlartifacts cannot be written (Not a directory)" in " ".join(err.split())


def test_a_disk_without_room_is_told_before_anything_is_loaded(shell, monkeypatch):
    free = []
    usage = shutil.disk_usage(shell.folder)
    monkeypatch.setattr(ready.shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    words, said = digits_words("backend=quanto", "dtype=int8"), []
    free[:] = [2 * 2**20]
    for more in (["sweep.dry_run=true"], []):
        code, _, err = shell(*words, *more)
        assert code == 1
        said.append(" ".join(err[err.index("quantlab: output_dir=") :].split()))
    assert said[0] == said[1]
    assert "2 MiB are free on its disk" in said[0]
    assert not list((shell.folder / "outputs").glob("runs/*"))
    free[:] = [2**30]
    shell.rows(*words)
    free[:] = [2 * 2**20]
    assert shell(*words, "sweep.dry_run=true")[0] == 1, "a single run begins anew"
