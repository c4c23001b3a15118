"""CUDA code that is compiled on the machine: never for what torch computes, once and under a lock for the MX formats."""

import importlib
import threading
import time

import pytest
from filelock import FileLock

from quantlab.backends import modelopt as backend
from quantlab.backends.modelopt import NVIDIAModelOptConfig, extensions
from quantlab.backends.modelopt import library as library_module
from quantlab.errors import ConfigError

LIBRARY = "modelopt.torch.quantization.extensions"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """ModelOpt's own module with a getter that only looks; the build folder is a fresh one."""
    theirs = importlib.import_module(LIBRARY)
    folder = tmp_path / "torch_extensions" / "modelopt_cuda_ext_mx"
    folder.mkdir(parents=True)

    def get_cuda_ext_mx(raise_if_failed=False):
        loaded.append(raise_if_failed)

    loaded = []
    monkeypatch.setattr(theirs, "get_cuda_ext_mx", get_cuda_ext_mx)
    monkeypatch.setattr(extensions, "missing_compiler", lambda: "")
    monkeypatch.setattr("torch.utils.cpp_extension._get_build_directory", lambda name, verbose: str(folder))
    theirs.loaded, theirs.folder = loaded, folder
    return theirs


def builds(library):
    return f"import pathlib; pathlib.Path({str(library.folder)!r}, 'x.so').touch()"


def test_integers_and_fp8_go_by_torch():
    """With the library's kernels one scheme had two sets of numbers, and long rows none."""
    library = extensions.leave_out()
    assert library.get_cuda_ext() is None
    assert library.get_cuda_ext_fp8() is None


def test_it_is_built_once(library, monkeypatch, capsys):
    monkeypatch.setattr(extensions, "_BUILD", builds(library))
    extensions.build_mx("MXFP8")
    assert "MXFP8: ModelOpt compiles its CUDA code, once on this machine" in "".join(capsys.readouterr())
    monkeypatch.setattr(extensions, "_BUILD", "raise SystemExit('built twice')")
    extensions.build_mx("MXFP4")
    assert library.loaded == [True, True]
    assert "compiles" not in "".join(capsys.readouterr())


def test_a_lock_of_a_dead_process_is_taken_away(library, monkeypatch):
    """torch waits for this file without an end."""
    (library.folder / "lock").touch()
    monkeypatch.setattr(
        extensions,
        "_BUILD",
        f"assert not __import__('os').path.exists({str(library.folder / 'lock')!r}); {builds(library)}",
    )
    extensions.build_mx("MXFP8")
    assert library.loaded == [True]


def test_a_lock_of_a_living_process_is_waited_for(library, monkeypatch):
    monkeypatch.setattr(extensions, "_BUILD", "raise SystemExit('built twice')")
    lock = FileLock(library.folder.parent / "modelopt_cuda_ext_mx.quantlab.lock", thread_local=False)
    lock.acquire()

    def other():
        time.sleep(0.3)
        (library.folder / "x.so").touch()
        lock.release()

    thread = threading.Thread(target=other)
    thread.start()
    extensions.build_mx("MXFP8", timeout_s=20)
    thread.join()
    assert library.loaded == [True]
    with lock, pytest.raises(ConfigError, match="another process has been compiling ModelOpt's CUDA code for 0 s"):
        extensions.build_mx("MXFP8", timeout_s=0.1)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        ("import time; time.sleep(60)", "was not compiled in 1 s"),
        ("raise SystemExit('error: no such architecture')", r"does not compile here \(error: no such architecture\)"),
    ],
)
def test_a_build_that_fails_is_told(library, monkeypatch, build, told):
    monkeypatch.setattr(extensions, "_BUILD", build)
    with pytest.raises(ConfigError, match=f"^quant_type=MXFP8: .*{told}.*choose another dtype$"):
        extensions.build_mx("MXFP8", timeout_s=1)
    assert library.loaded == []


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(extensions, "missing_compiler", lambda: "nvcc")
    with pytest.raises(
        ConfigError, match="^quant_type=MXFP4: ModelOpt compiles CUDA code for it, and nvcc is not here"
    ):
        extensions.build_mx("MXFP4")


@pytest.mark.parametrize(("config", "device", "is_built"), [
    (NVIDIAModelOptConfig("MXFP8"), "cuda:1", True),
    (NVIDIAModelOptConfig("MXFP4"), "cpu", False),
    (NVIDIAModelOptConfig("INT8", channel_quantize=0), "cuda", False),
], ids=str)  # fmt: skip
def test_it_is_built_before_a_stage_is_measured(config, device, is_built, monkeypatch):
    built = []
    monkeypatch.setattr(library_module, "build_mx", built.append)
    backend.prepare(config, device)
    assert bool(built) == is_built
