"""Paths in the names of jobs: what tells them apart, not where they lie on this machine."""

from __future__ import annotations

import pytest

from quantlab.planning.plan import plan
from quantlab.vocabulary.files import ends_of_paths

LONG = "/data/a long folder of mine/with matrices/of many models"
IMATRIX = ["backend=gguf", "dtype=q4_k", "algorithm=imatrix"]


def names(*words: str) -> list[str]:
    return [job.name for job in plan([*IMATRIX, *words], multirun=True).jobs]


@pytest.mark.parametrize(
    ("paths", "ends"),
    [
        (["/a/b/one.gguf", "/a/b/two.gguf"], ["one.gguf", "two.gguf"]),
        (["/a/b/m.gguf", "/a/c/m.gguf"], ["b/m.gguf", "c/m.gguf"]),
        (["/x/7/calibration/model/m.gguf", "y/8/calibration/model/m.gguf"], ["7/…/m.gguf", "8/…/m.gguf"]),
        (["m.gguf", "a/m.gguf"], ["m.gguf", "a/m.gguf"]),
        (["/a/m.gguf", "/a/n.gguf", "/b/m.gguf"], ["a/m.gguf", "a/n.gguf", "b/m.gguf"]),
        (["/a/x/", "/a/y/"], ["x", "y"]),
        (["/a/x", "/a/x/"], ["/a/x", "/a/x/"]),
    ],
)
def test_the_shortest_end_that_tells_paths_apart(paths, ends):
    assert ends_of_paths(paths) == dict(zip(paths, ends, strict=True))


def test_a_matrix_of_ones_own_is_named_by_its_file():
    assert names(f"quantization.imatrix_file='{LONG}/mine.gguf'") == ["gguf q4_k imatrix imatrix_file=mine.gguf"]


def test_matrices_of_a_sweep_are_told_apart_by_the_ends_of_their_paths():
    told = names(f"quantization.imatrix_file='{LONG}/1/imatrix.gguf','{LONG}/2/imatrix.gguf'")
    assert told == [f"gguf q4_k imatrix imatrix_file={i}/imatrix.gguf" for i in (1, 2)]


def test_swept_paths_of_data_are_told_apart_so_too():
    """The file of the evaluation's texts, and that of calibration."""
    words = ["model=causal_lm", "model.path=m", "backend=quanto", "dtype=int8", "dataset=text"]
    jobs = plan([*words, f"dataset.path='{LONG}/a.txt','{LONG}/b.txt'"], multirun=True).jobs
    assert [job.name for job in jobs] == [f"quanto int8 (dataset.path={x}.txt)" for x in "ab"]
