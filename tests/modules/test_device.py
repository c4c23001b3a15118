"""What the machine says when it fails, and how its memory is given back; a GPU is faked."""

from __future__ import annotations

import errno
import gc
import weakref

import pytest
import torch

from quantlab.errors import (
    ConfigError,
    ModelError,
    QuantlabError,
    in_words,
    is_device_lost,
    is_of_the_machine,
    is_out_of_memory,
)
from quantlab.modules.device import answers, current, give_back, kind_of, let_go, uncollected
from quantlab.modules.kept import Damaged, read_tree, write_tree
from quantlab.modules.memory import measure_stage
from quantlab.stages.calibrate import in_smaller_batches
from tests.support.fake_cuda import fake_cuda


class AcceleratorError(RuntimeError):
    """As torch's, which only a build for a GPU raises."""


ASSERT = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("HIP out of memory. Tried to allocate 64.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000000 bytes."),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
LOST = [
    AcceleratorError(ASSERT),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    AcceleratorError("CUDA error: unspecified launch failure"),
    AcceleratorError("CUDA error: misaligned address"),
    AcceleratorError("CUDA error: an illegal instruction was encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: CUDA_ERROR_ILLEGAL_ADDRESS"),
    AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    AcceleratorError("CUDA error: invalid configuration argument"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    ConfigError("model.path=/data/out of memory: there is no such folder"),
    ValueError("device-side assert"),
    OSError(errno.ENOENT, "No such file or directory: 'out of memory'"),
]


def wrapped(error, how):
    """As somebody else's error that came from it: said so, or raised while it was handled."""
    try:
        try:
            raise error
        except type(error) as inner:
            if how == "from":
                raise ModelError("model.path: it cannot be loaded") from inner
            raise ModelError("model.path: it cannot be loaded")  # noqa: B904
    except ModelError as outer:
        return outer


@pytest.mark.parametrize("how", ["", "from", "while"])
@pytest.mark.parametrize("error", [*NO_MEMORY, *LOST, *OTHERS], ids=lambda e: f"{type(e).__name__}: {e}"[:60])
def test_each_spelling_is_known_also_where_another_error_tells_of_it(error, how):
    told = wrapped(error, how) if how else error
    assert is_out_of_memory(told) == (error in NO_MEMORY)
    assert is_device_lost(told) == (error in LOST)
    assert is_of_the_machine(told) == (error not in OTHERS)


def test_an_error_that_another_is_raised_instead_of_is_not_its_origin():
    def refuse():
        try:
            raise MemoryError
        except MemoryError:
            raise ConfigError("device=cuda: no room") from None

    with pytest.raises(ConfigError) as caught:
        refuse()
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", NO_MEMORY[:4], ids=str)
def test_a_whole_file_is_not_called_damaged_where_memory_is_short(error, tmp_path, monkeypatch):
    import safetensors

    file = tmp_path / "calls.safetensors"
    write_tree({"x": torch.ones(3)}, file)

    def scarce(*_, **__):
        raise error

    monkeypatch.setattr(safetensors, "safe_open", scarce)
    with pytest.raises(type(error)):
        read_tree(file)
    monkeypatch.undo()
    file.write_bytes(b"no tensors")
    with pytest.raises(Damaged):
        read_tree(file)


# -- giving back


class Node:
    """Holds itself, as a module whose ``forward`` is bound does."""

    def __init__(self, tensor):
        self.tensor, self.me = tensor, self


@pytest.mark.parametrize("error", [NO_MEMORY[0], NO_MEMORY[2], NO_MEMORY[3]], ids=str)
def test_the_next_attempt_begins_with_nothing_of_the_last_one(error, monkeypatch):
    """Frames of the error hold a half-made copy, and so does a cycle."""
    cuda = fake_cuda(monkeypatch)
    alive, kept = [], []

    def attempt(batch_size):
        assert not any(ref() is not None for ref in alive)
        in_a_frame, in_a_cycle = torch.ones(4), Node(torch.ones(4))
        alive.extend([weakref.ref(in_a_frame), weakref.ref(in_a_cycle.tensor)])
        if batch_size > 1:
            kept.append(error)  # somebody keeps it, as a library's log may
            raise error
        return batch_size

    assert in_smaller_batches(attempt, 4, "cuda") == 1
    assert len(alive) == 6
    assert [name for name, _ in cuda.calls] == ["empty_cache"] * 2


def test_a_gpu_that_answers_no_more_is_no_error_of_giving_back(monkeypatch):
    cuda = fake_cuda(monkeypatch)
    assert answers("cuda")
    cuda.lost = LOST[0]
    give_back("cuda")
    assert not answers("cuda:1")
    assert answers("cpu")


def test_running_frames_stay_as_they_are():
    here = torch.ones(2)
    try:
        raise ValueError
    except ValueError as error:
        let_go(error)
    assert here.sum() == 2


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_the_kind_of_a_device(device, kind):
    assert kind_of(device) == kind


def test_on_a_cpu_no_gpu_is_asked_to_be_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda *_: pytest.fail("asked"))
    with current("cpu"):
        pass


# -- stages


def test_a_peak_has_a_baseline_and_both_are_of_the_models_own_device(monkeypatch):
    cuda = fake_cuda(monkeypatch, num_devices=2)
    cuda.allocate(700)  # the reference
    with measure_stage("evaluate", "cuda:1") as stage:
        cuda.allocate(300)
        cuda.allocate(-300)
    assert (stage.report.baseline_alloc_bytes, stage.report.peak_alloc_bytes) == (700, 1000)
    assert {device for name, device in cuda.calls if name != "empty_cache"} == {"cuda:1"}
    with measure_stage("load", "cpu") as stage:
        pass
    assert stage.report.baseline_alloc_bytes is None
    assert 0 < stage.report.baseline_rss_bytes <= stage.report.peak_rss_bytes * 1.01


def test_a_model_on_several_devices_has_a_peak_on_each(monkeypatch):
    cuda = fake_cuda(monkeypatch, num_devices=2)
    there = {"cuda:0": [500, 800], "cuda:1": [70, 90]}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device="": there.get(device, [500])[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device="": there.get(device, [0, 800])[1])
    with measure_stage("evaluate", "cuda", ("cuda:0", "cuda:1")) as stage:
        pass
    assert stage.report.by_device == ((500, 800), (70, 90))
    assert ("reset_peak_memory_stats", "cuda:1") in cuda.calls
    with pytest.raises(KeyError), measure_stage("evaluate", "cuda", ("cuda:0", "cuda:1")) as stage:
        raise KeyError
    assert stage.report.by_device == ((500, 800), (70, 90))
    with measure_stage("evaluate", "cpu", ("cpu", "cpu")) as stage:
        pass
    assert stage.report.by_device == ()


def test_a_blocks_own_error_survives_a_lost_gpu(monkeypatch):
    cuda = fake_cuda(monkeypatch)

    def fail():
        cuda.lost = AcceleratorError(ASSERT)
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"), measure_stage("evaluate", "cuda") as stage:
        fail()
    assert (stage.report.name, stage.report.peak_alloc_bytes) == ("evaluate", None)


def test_an_error_that_shows_late_is_still_the_blocks(monkeypatch):
    cuda = fake_cuda(monkeypatch)
    with pytest.raises(AcceleratorError, match="device-side assert"), measure_stage("evaluate", "cuda") as stage:
        cuda.lost = AcceleratorError(ASSERT)
    assert stage.report.seconds >= 0


@pytest.mark.parametrize("error", [*NO_MEMORY, *LOST, *OTHERS], ids=lambda e: f"{type(e).__name__}: {e}"[:60])
def test_lack_of_memory_is_told_with_the_way_out(error):
    text = in_words(error)
    kind = "" if isinstance(error, QuantlabError) else type(error).__name__
    assert text.startswith(": ".join(filter(None, (kind, str(error)))))
    assert ("set a smaller evaluation.batch_size" in text) == (error in NO_MEMORY)


def test_what_was_there_is_set_aside_and_garbage_is_not(freezing):
    class Held:
        pass

    old, new = Held(), None
    gone = weakref.ref(old)
    old.itself = old
    del old
    with uncollected():
        assert gone() is None, "what nobody holds goes before"
        before = gc.get_freeze_count()
        assert before > 1000
        new = Held()
        new.itself, gone = new, weakref.ref(new)
        del new
        give_back("cpu")
        assert gone() is None, "as does what was made inside"
    assert gc.get_freeze_count() == 0


def test_what_a_caller_froze_stays_frozen_and_nothing_more(freezing):
    """By objects of its own: the count of frozen ones falls when any library lets go of one."""

    def frozen(one: object) -> bool:
        return not any(each is one for each in gc.get_objects())

    callers = [None]
    gc.freeze()
    later = [None]
    assert (frozen(callers), frozen(later)) == (True, False)
    with uncollected():
        assert (frozen(callers), frozen(later)) == (True, False)
    assert (frozen(callers), frozen(later)) == (True, False)
