"""The place of an export: what is there is kept until the new one is whole, and nothing of others is overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from quantlab.errors import ConfigError, DiskFull
from quantlab.exporting.folder import MANIFEST, check_room, check_target, clean_json, written_beside

ROOT = Path(__file__).parents[2]


def filled(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    (folder / "weights").write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_new_export_takes_the_place_of_an_old_one(tmp_path):
    place = filled(tmp_path / "it", "old")
    with written_beside(place) as fresh:
        (fresh / "weights").write_text("new")
        assert (place / "weights").read_text() == "old"
    assert (place / "weights").read_text() == "new"
    assert names(tmp_path) == {"it"}


def test_what_fails_leaves_what_was_there(tmp_path):
    place = filled(tmp_path / "it", "old")

    def fail() -> None:
        with written_beside(place) as fresh:
            (fresh / "weights").write_text("half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert (place / "weights").read_text() == "old"
    assert names(tmp_path) == {"it"}


def test_nothing_is_left_where_nothing_was(tmp_path):
    with pytest.raises(RuntimeError), written_beside(tmp_path / "deep" / "it"):
        raise RuntimeError
    assert names(tmp_path / "deep") == set()


@pytest.mark.parametrize("kind", ["file", "link", "folder", "readonly"])
def test_what_is_no_export_is_left_alone(tmp_path, kind):
    place = tmp_path / "it"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(tmp_path)
    elif kind == "folder":
        place.mkdir()
        (place / "mine").write_text("mine")
    else:
        if os.getuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
    with pytest.raises(ConfigError) as refused:
        check_target("export.path", place)
    assert str(refused.value).startswith(f"export.path={place}: ")
    assert "give" in str(refused.value)


@pytest.mark.parametrize("name", ["x\0y", "a" * 300])
def test_what_no_folder_is_called_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"export\.path="):
        check_target("export.path", f"{tmp_path}/{name}")


def test_an_empty_folder_and_an_export_may_be_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert check_target("export.path", tmp_path / "empty") == tmp_path / "empty"
    assert check_target("export.path", filled(tmp_path / "old", "x")) == tmp_path / "old"


def test_room_is_asked_for_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(DiskFull, match=r"export\.path=.*GiB are free"):
        check_room("export.path", tmp_path / "a" / "b", 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 0, 2**40))
    check_room("export.path", tmp_path / "a" / "b", 2**30)


def test_parts_of_dead_processes_go_and_those_of_younger_ones(tmp_path):
    """A number is given again: a process that began after the folder did not make it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    younger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for left in (f".it.{dead.pid}.part", f".it.{younger.pid}.part"):
        (tmp_path / left).mkdir()
    began = psutil.Process.create_time
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psutil.Process, "create_time", lambda own: began(own) + 3600)
        with written_beside(tmp_path / "it") as fresh:
            (fresh / "x").write_text("x")
    younger.communicate(b"\n")
    assert names(tmp_path) == {"it"}


def test_two_exports_to_one_place(tmp_path):
    """The second is refused before it works, and leaves the first's part; one in the same process too."""
    place = tmp_path / "it"
    with written_beside(place) as fresh:
        with pytest.raises(ConfigError, match=r"^export=.*/it: another export to it is under way; wait"):
            check_target("export", place)
        with pytest.raises(ConfigError, match=r"^export\.path=.*/it: another export"), written_beside(place):
            pass
        (fresh / MANIFEST).write_text("{}")
    assert names(place) == {MANIFEST}
    (tmp_path / f".it.{os.getppid()}.part").mkdir()
    with pytest.raises(ConfigError, match="another export"):
        check_target("export", place)
    assert names(tmp_path) == {"it", f".it.{os.getppid()}.part"}


def test_a_place_below_what_is_no_folder(tmp_path):
    """Refused is a file; what is not there yet is made, at any depth, also where a link leads."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^export\.path=.*/it: .*/file cannot be written; give"):
        check_target("export.path", tmp_path / "file" / "deep" / "it")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place in (tmp_path / "a" / "b [c]", tmp_path / "link"):
        with written_beside(check_target("export.path", place / "it")) as fresh:
            (fresh / MANIFEST).write_text("{}")
        assert names(place) == {"it"}


def test_what_comes_to_the_place_meanwhile_is_kept(tmp_path):
    place = tmp_path / "it"

    def write() -> None:
        with written_beside(place):
            place.mkdir()
            (place / "mine").write_text("mine")

    with pytest.raises(ConfigError, match="a folder that quantlab did not export"):
        write()
    assert names(tmp_path) == {"it"}
    assert (place / "mine").read_text() == "mine"


def test_the_models_own_folder_is_no_place(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    for name in ("model", "model/", "x/../model", "model/.", "link/../model", "x/y/../../model", "link/x/.."):
        with pytest.raises(ConfigError, match="a folder that quantlab did not export"):
            check_target("export", f"{tmp_path}/{name}")


def test_an_export_that_was_on_its_way_out_comes_back(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    filled(tmp_path / f".it.{dead.pid}.old", "old")
    with written_beside(tmp_path / "it") as fresh:
        assert (tmp_path / "it" / "weights").read_text() == "old"
        (fresh / MANIFEST).write_text("{}")
    assert names(tmp_path) == {"it"}


def test_paths_of_this_machine_are_taken_out_or_refused(tmp_path):
    mine = str(tmp_path / "mine")
    said = {"_name_or_path": mine, "a": {"_name_or_path": "x"}, "b": [1]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "ids").write_bytes(b"\xff\x00")
    clean_json(tmp_path, mine)
    assert (tmp_path / "config.json").read_text().split() == ["{", '"a":', "{},", '"b":', "[", "1", "]", "}"]
    (tmp_path / "tokenizer.txt").write_text(f"from {mine}/it")
    with pytest.raises(ConfigError, match=r"tokenizer\.txt would say .*mine"):
        clean_json(tmp_path, mine)


WRITER = """
import sys, time
from pathlib import Path
from quantlab.exporting.folder import MANIFEST, written_beside
for n in range(10**6):
    with written_beside(Path(sys.argv[1])) as fresh:
        (fresh / MANIFEST).write_text("{}")
        for i in range(20):
            (fresh / f"weights{i}").write_text(str(n))
    print("written", flush=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_an_old_export_a_new_one_or_none(tmp_path):
    """Killed at any moment: the place holds twenty files of one writing, or is not there; the next writing clears up."""
    place = tmp_path / "it"
    for wait in (0.0, 0.001, 0.003, 0.01, 0.02, 0.05):
        code = [sys.executable, "-c", WRITER, str(place)]
        writer = subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if place.exists():
            assert len({f.read_text() for f in place.glob("weights*")}) == 1
            assert len(list(place.glob("weights*"))) == 20
    with written_beside(place) as fresh:
        (fresh / MANIFEST).write_text("{}")
    assert names(tmp_path) == {"it"}
