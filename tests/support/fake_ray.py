"""A Ray in this process: what engines use of it. A task runs when it is waited for, on a node that sees no folder of ours."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_VALUES: dict[int, Any] = {}


class RayError(Exception):
    """Of Ray's."""


class RayActorError(RayError):
    """The keeper's node is gone."""


class GetTimeoutError(RayError):
    """The cluster does not answer."""


class ObjectLostError(RayError):
    """What was sent did not arrive."""


class NodeDiedError(RayError):
    """What ran there is lost."""


class Ref:
    """An object of the store."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return hash(self.number)

    def __eq__(self, other):
        return isinstance(other, Ref) and other.number == self.number


def _copied(value):
    return pickle.loads(pickle.dumps(value))


class FakeRay:
    """Nodes named in ``nodes`` take tasks in turn, each with a temporary folder of its own below ``place``."""

    __version__ = "2.60.0"
    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=RayActorError,
        GetTimeoutError=GetTimeoutError,
        ObjectLostError=ObjectLostError,
    )

    def __init__(self, place: Path, hidden: Path, nodes=("a", "b"), refuses: Exception | None = None):
        self.place, self.hidden, self.names, self.refuses = place, hidden, nodes, refuses
        self.tasks: dict[int, tuple[Any, tuple, int]] = {}
        self.actors: dict[str, Any] = {}
        self.puts: list[Any] = []
        self.dies: list[str] = []
        self.num = self.num_run = 0
        self.is_initialized = lambda: False
        self._actor: Any = None
        _VALUES.clear()

    # -- what engines call

    def init(self, **settings):
        self.settings, self.called_in = settings, os.getcwd()
        if self.refuses is not None:
            raise self.refuses

    def shutdown(self):
        pass

    def cluster_resources(self):
        return {"CPU": 1.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}} for _ in self.names]

    def get_runtime_context(self):
        return SimpleNamespace(current_actor=self._actor)

    def put(self, value):
        self.puts.append(value)
        return self._made(_copied(value))

    def get(self, ref, timeout=None):
        if isinstance(ref, list):
            return [self.get(one) for one in ref]
        value = _VALUES[ref.number]
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, refs, num_returns, timeout):
        for number in [n for n in self.tasks if any(ref.number == n for ref in refs)][:1]:
            self._run(number)
        return [ref for ref in refs if ref.number in _VALUES], []

    def cancel(self, ref, force):
        self.tasks.pop(ref.number, None)

    def remote(self, what):
        return SimpleNamespace(options=functools.partial(self._options, what))

    # -- how

    def _options(self, what, **options):
        if isinstance(what, type):
            return SimpleNamespace(remote=lambda: self._handle(what, options["name"]))

        def remote(*args):
            refs = [self._made() for _ in range(options["num_returns"])]
            self.tasks[refs[0].number] = (what, args, refs[1].number)
            return refs

        return SimpleNamespace(remote=remote)

    def _handle(self, kind, name):
        actor = self.actors.setdefault(name, kind())
        handle = SimpleNamespace()
        for method in (m for m in vars(kind) if not m.startswith("_")):
            setattr(handle, method, SimpleNamespace(remote=functools.partial(self._call, handle, actor, method)))
        return handle

    def _call(self, handle, actor, method, *args):
        outer, self._actor = self._actor, handle
        try:
            return self._made(getattr(actor, method)(*_copied(args)))
        finally:
            self._actor = outer

    def _made(self, *value):
        self.num += 1
        if value:
            _VALUES[self.num] = value[0]
        return Ref(self.num)

    def _run(self, number):
        what, (keeper, job_id, *args), second = self.tasks.pop(number)
        node = self.names[self.num_run % len(self.names)]
        self.num_run += 1
        args = [self.get(one) if isinstance(one, Ref) else one for one in _copied(args)]
        if self.dies:
            keeper.begun.remote(job_id, {"attempt": 1, "quantlab.host": node})
            _VALUES[number] = _VALUES[second] = NodeDiedError(self.dies.pop())
            return
        with self._on(node):
            try:
                _VALUES[number], _VALUES[second] = _copied(what(keeper, job_id, *args))
            except Exception as error:  # noqa: BLE001  the task's own, as Ray keeps it
                _VALUES[number] = _VALUES[second] = error

    @contextlib.contextmanager
    def _on(self, node):
        away, outer = self.hidden.with_name("away"), tempfile.tempdir
        self.hidden.rename(away)
        (self.place / node).mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(self.place / node)
        try:
            yield
        finally:
            tempfile.tempdir = outer
            assert not self.hidden.exists(), "a node wrote to a folder that it does not see"
            away.rename(self.hidden)
