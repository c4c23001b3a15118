"""Digests of weight files: several at once, each remembered by what its file is known by."""

import hashlib
import json
import os
import threading

import pytest

from quantlab.models import checkpoint


def test_files_are_hashed_side_by_side_and_told_apart(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "abcde"]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]) * (n * 700_000))
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    meeting, told, own = threading.Barrier(2), [], checkpoint._sha256_of

    def together(file, stopped):
        if file in files[-2:]:
            meeting.wait(60)  # for ever, if they were hashed one after the other
        return own(file, stopped)

    monkeypatch.setattr(checkpoint, "_sha256_of", together)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert checkpoint.files_sha256(files, tmp_path, lambda *a: told.append(a)) == expected
    assert told == [("hash weights", n, 5) for n in range(1, 6)]
    monkeypatch.setattr(checkpoint, "_sha256_of", None)
    assert checkpoint.files_sha256(files[::-1], tmp_path) == expected[::-1], "each was remembered"


def test_where_a_file_cannot_be_read_the_others_stay_known(tmp_path, monkeypatch):
    files = [tmp_path / "large", tmp_path / "small"]
    files[0].write_bytes(bytes(2_000_000))
    files[1].write_bytes(b"abc")
    own = checkpoint._sha256_of

    def fails(file, stopped):
        if file == files[1]:
            raise OSError("the disk is gone")
        return own(file, stopped)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "_sha256_of", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            checkpoint.files_sha256(files, tmp_path)
    assert len(json.loads((tmp_path / "digests.json").read_text())) == 1
    assert checkpoint.files_sha256(files, tmp_path)[1].startswith("ba7816bf")


def test_a_file_that_is_not_read_to_its_end_has_no_digest(tmp_path):
    file, stopped = tmp_path / "f", threading.Event()
    file.write_bytes(b"abc")
    stopped.set()
    with pytest.raises(InterruptedError):
        checkpoint._sha256_of(file, stopped)
