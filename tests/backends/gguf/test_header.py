"""Headers of GGUF files that lie: a ValueError in words, quickly, and nothing allocated by what they claim."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from quantlab.backends.gguf.header import check_header

F32, Q8_0 = 0, 8


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(name=b"t", sizes=(32,), kind=F32, offset=0, num_dimensions=None):
    count = len(sizes) if num_dimensions is None else num_dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def alignment(value, kind=4, form="<I"):
    return text(b"general.alignment") + struct.pack("<I", kind) + struct.pack(form, value)


def file_of(folder, *entries, keys=(), data=256, version=3, num_tensors=None, num_keys=None):
    counts = len(entries) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    path = folder / "x.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * data)
    return path


def test_one_that_does_not(tmp_path):
    check_header(file_of(tmp_path, entry(b"a"), entry(b"b", (32, 2), Q8_0, 128), keys=[alignment(64)]))
    check_header(file_of(tmp_path, entry(b"a", ()), data=32))  # a number alone


LIES = {
    "past the end": ([entry(offset=256)], {}, "does not lie in the file"),
    "far past the end": ([entry(offset=2**63)], {}, "does not lie in the file"),
    "sizes that wrap around": ([entry(sizes=(2**32, 2**32))], {}, "does not lie in the file"),
    "a negative size": ([entry(sizes=(2**64 - 32,))], {}, "does not lie in the file"),
    "no values": ([entry(sizes=(0, 32))], {}, "a size of 0"),
    "no values behind others": ([entry(sizes=(32, 0))], {}, "a size of 0"),
    "two of one name": ([entry(b"a"), entry(b"a", offset=128)], {}, "two tensors have one name"),
    "one in another": ([entry(b"a"), entry(b"b", offset=64)], {}, "begins in the one before it"),
    "between two places": ([entry(offset=16)], {}, "does not lie in the file"),
    "an alignment of 0": ([entry()], {"keys": [alignment(0)]}, "an alignment of 0 bytes"),
    "an alignment of 3": ([entry()], {"keys": [alignment(3)]}, "an alignment of 3 bytes"),
    "a large alignment": ([entry()], {"keys": [alignment(2**31)]}, "an alignment of"),
    "an alignment of another type": ([entry()], {"keys": [alignment(32, 10, "<Q")]}, "general.alignment is of type 10"),
    "an alignment in words": ([entry()], {"keys": [alignment(0, 8, "<Q")]}, "general.alignment is of type 8"),
    "two alignments": ([entry()], {"keys": [alignment(32), alignment(64)]}, "two keys are called general.alignment"),
    "many tensors": ([entry()], {"num_tensors": 2**62}, "tensors do not fit"),
    "many keys": ([entry()], {"num_keys": 2**62}, "keys do not fit"),
    "many dimensions": ([entry(num_dimensions=2**31)], {}, "dimensions"),
    "a long name": ([struct.pack("<Q", 2**62)], {}, "a name of"),
    "a name of no letters": ([entry(b"\xff\xfe")], {}, "can't decode"),
    "a format that is not there": ([entry(kind=999)], {}, "999"),
    "a version that is not there": ([entry()], {"version": 0x03000000}, "version"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path, lie):
    entries, more, told = LIES[lie]
    path = file_of(tmp_path, *entries, **more)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, KeyError), match=told):
            check_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [2**62, 2**40, 10**6])
def test_a_list_that_is_longer_than_the_file(tmp_path, length):
    for inner in (4, 8, 9):
        key = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, inner, length)
        with pytest.raises(ValueError, match="items of an array do not fit"):
            check_header(file_of(tmp_path, entry(), keys=[key]))


def test_lists_in_lists_without_end(tmp_path):
    key = text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 12
    with pytest.raises(ValueError, match=r"a value of type|do not fit|ends early"):
        check_header(file_of(tmp_path, entry(), keys=[key]))
