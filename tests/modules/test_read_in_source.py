"""What the source of a class says, wherever the class is defined; a file is read once for all its classes."""

from __future__ import annotations

import ast
import functools
import linecache

import pytest
from torch import nn

from quantlab.modules import read_in_source
from quantlab.modules.read_in_source import asked_of, reads_in_source


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.proj.weight.T


class Calls(Reads):
    def forward(self, x):
        return self.proj(x)


class CallsAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def load_weights(self):
        self.proj.weight.data.zero_()

    def forward(self, x):
        return self.proj(x)


class Outer:
    class Inner(Reads):
        """Nested."""

    @functools.total_ordering
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def __lt__(self, other):
            return self.parts[0].weight.shape < other.parts[0].weight.shape


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.parts(x) @ self.parts[-1].weight.T


class Named(nn.Module):
    """A container whose parts are called otherwise than they are asked for."""

    def __init__(self):
        super().__init__()
        self.layer_0, self.layer_1 = nn.Linear(4, 4), nn.Linear(4, 4)

    def __getitem__(self, i):
        return getattr(self, f"layer_{i}")


class OfNamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = Named()

    def forward(self, x):
        return x @ self.parts[0].weight.T


def local(*, reads):
    if reads:

        class Made(nn.Module):
            proj = None

            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(4, 4)

            async def forward(self, x):
                return self.proj.weight

    else:

        class Made(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(4, 4)

    return Made


CASES = {
    "method": (Reads, ("proj",)),
    "base": (Calls, ("proj",)),
    "calls": (CallsAlone, ()),
    "nested": (Outer.Inner, ("proj",)),
    "decorated": (Outer.Decorated, ("parts.0",)),
    "the last of a list": (Last, ("parts.2",)),
    "an index that is no name": (OfNamed, ("parts.layer_0", "parts.layer_1")),
    "local": (local(reads=True), ("proj",)),
    "made at run time": (type("Anew", (CallsAlone,), {}), ()),
    "made of one that reads": (type("Anew", (Reads,), {}), ("proj",)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_class_reads(case):
    kind, names = CASES[case]
    assert reads_in_source(kind()) == names


def test_a_file_is_parsed_once_for_all_its_classes(monkeypatch):
    parsed = []
    real = ast.parse
    monkeypatch.setattr(read_in_source.ast, "parse", lambda text, *more: parsed.append(text) or real(text, *more))
    read_in_source._chains_of.cache_clear()
    read_in_source._classes_in.cache_clear()
    whole = nn.ModuleList([kind() for kind, _ in CASES.values()])
    found = list(asked_of(whole, "weight"))
    assert len(found) == sum(len(names) for _, names in CASES.values())
    assert len([text for text in parsed if len(text.splitlines()) > 50]) == 1


def test_a_file_that_never_says_it_is_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "quiet_part.py").write_text(
        "from torch import nn\nclass Quiet(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import quiet_part

    monkeypatch.setattr(read_in_source.ast, "parse", lambda *words: pytest.fail("parsed"))
    assert not list(asked_of(quiet_part.Quiet(), "weight"))
    linecache.clearcache()
