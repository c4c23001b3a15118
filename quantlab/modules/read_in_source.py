"""Which layers' weights the code of a module reads, found without running it; and a word where running it fails.

A part whose code says ``self.proj.weight`` multiplies by that weight, or asks it for its dtype. Code that only makes,
loads or merges weights is not looked at. What is read through another name is not seen: there the first forward fails,
and its error gets a note.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from quantlab.modules.layers import linear_layers

if TYPE_CHECKING:
    from torch import nn

_MAKES_OR_MOVES = re.compile(
    r"_*(init|reset|tie|load|save|merge|unmerge|fuse|unfuse|prune|resize|extra_repr|post_init)"
)
_EVERY = "[*]"
_MAX_NAMED = 5


def reads_in_source(module: nn.Module) -> tuple[str, ...]:
    """Paths of the Linear layers below ``module`` whose weight the code of a part reads."""
    names = {id(layer): name for name, layer in linear_layers(module).items()}
    return tuple(dict.fromkeys(names[id(part)] for part in asked_of(module, "weight") if id(part) in names))


def asked_of(module: nn.Module, attribute: str) -> Iterator[nn.Module]:
    """The parts below ``module`` of which the code of a part looks at this attribute."""
    for part in module.modules():
        for chain in _chains_of(cast(Any, type(part)), attribute):
            yield from _at(part, chain)


def _at(part: Any, chain: Sequence[str]) -> Iterator[Any]:
    """What ``part.a.b[...]`` is, for a chain ``("a", "b", "[*]")``."""
    found = [part]
    for name in chain:
        found = [inner for owner in found for inner in _below(getattr(owner, "_modules", {}), name)]
    yield from found


def _below(children: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The part of this name; of an index such as ``[-1]``, every one where none is called so."""
    index = name.strip("[]")
    if re.fullmatch(r"-\d+", index):
        index = str(len(children) + int(index))
    if index in children:
        yield children[index]
    elif name.startswith("["):
        yield from children.values()


def changes_in_source(module: nn.Module) -> str:
    """``Class.method`` of the first part whose code changes a weight in place; empty where none does."""
    return next(filter(None, (_changing_method(cast(Any, type(part))) for part in module.modules())), "")


@functools.cache
def _changing_method(kind: type) -> str:
    for base, method in _methods_of(kind, "weight"):
        if _changes(method):
            return f"{base.__name__}.{method.name}"
    return ""


def _changes(node: ast.AST) -> bool:
    """Whether there is ``x.weight.op_(...)`` or ``x.weight.data.op_(...)`` that is not of training alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test).startswith("self.training"):
        return any(map(_changes, node.orelse))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, value = node.func.attr, node.func.value
        if isinstance(value, ast.Attribute) and value.attr == "data":
            value = value.value
        of_weight = isinstance(value, ast.Attribute) and value.attr == "weight"
        if of_weight and name.endswith("_") and not name.startswith("_") and name not in ("requires_grad_", "detach_"):
            return True
    return any(map(_changes, ast.iter_child_nodes(node)))


@functools.cache
def _chains_of(kind: type, attribute: str) -> tuple[tuple[str, ...], ...]:
    """Chains ``c`` such that a method of the class reads ``self.c.attribute``; an empty one is ``self.attribute``."""
    found: dict[tuple[str, ...], None] = {}
    for _, method in _methods_of(kind, attribute):
        chains = (_chain(node, attribute) for node in ast.walk(method))
        found |= dict.fromkeys(chain for chain in chains if chain is not None)
    return tuple(found)


def _methods_of(kind: type, attribute: str) -> Iterator[tuple[type, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The methods of a class and its bases, but for torch's, that do more than make, load or merge weights."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for method in (m for made in _definitions(base, attribute) for m in ast.walk(made)):
            if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _MAKES_OR_MOVES.match(method.name):
                yield base, method


def _definitions(kind: type, attribute: str) -> Sequence[ast.AST]:
    """The class's definitions; none in a file that never says the attribute, and none that was made at run time."""
    try:
        file = inspect.getsourcefile(kind) or ""
        lines = linecache.getlines(file, vars(sys.modules.get(kind.__module__, sys)))
        is_said = any(f".{attribute}" in line for line in lines)
        return _classes_in(file, len(lines)).get(kind.__qualname__, ()) if is_said else ()
    except (OSError, TypeError, SyntaxError):  # made at run time, or in another language
        return ()


@functools.lru_cache(maxsize=4)  # a syntax tree of thousands of lines takes megabytes
def _classes_in(file: str, num_lines: int) -> dict[str, list[ast.AST]]:
    """Qualified name -> definitions, of a file of ``num_lines``: ``inspect`` reads the whole file for each class."""
    found: dict[str, list[ast.AST]] = {}

    def look(node: ast.AST, above: str) -> None:
        for inner in ast.iter_child_nodes(node):
            name = f"{above}{getattr(inner, 'name', '')}"
            if isinstance(inner, ast.ClassDef):
                found.setdefault(name, []).append(inner)
                look(inner, f"{name}.")
            elif isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                look(inner, f"{name}.<locals>.")
            elif isinstance(inner, ast.stmt):
                look(inner, above)

    look(ast.parse("".join(linecache.getlines(file))), "")
    return found


def _chain(node: ast.AST, attribute: str) -> tuple[str, ...] | None:
    """The names between ``self`` and the attribute of an expression that reads it; None for any other."""
    if not (isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Load)):
        return None
    names: list[str] = []
    inner: ast.expr = node.value
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        names.append(inner.attr if isinstance(inner, ast.Attribute) else _index(inner))
        inner = inner.value
    return tuple(reversed(names)) if isinstance(inner, ast.Name) and inner.id == "self" else None


def _index(node: ast.Subscript) -> str:
    """The name of the part at an index that is written out; else of every one."""
    try:
        index = ast.literal_eval(node.slice)
    except (ValueError, TypeError):  # not written out
        return _EVERY
    return f"[{index}]" if isinstance(index, (int, str)) else _EVERY


def note_failures(module: nn.Module, quantized: Sequence[str]) -> None:
    """From now on an error of the module's forward says in which part it arose, and what is quantized there."""
    note = functools.partial(_note, quantized=tuple(quantized))
    module.register_forward_hook(note, always_call=True)


def _note(module: nn.Module, _args: object, _result: object, quantized: Sequence[str]) -> None:
    error = sys.exc_info()[1]
    if error is None or not quantized:
        return
    paths = {id(part): path for path, part in module.named_modules()}
    trace, where = error.__traceback__, ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        where = paths.get(id(owner), where)
        trace = trace.tb_next
    near = [name for name in quantized if name == where or name.rpartition(".")[0] == where] or list(quantized)
    listed = ", ".join(near[:_MAX_NAMED]) + (", ..." if len(near) > _MAX_NAMED else "")
    kind = type(module.get_submodule(where)).__name__
    told = (
        f"quantlab: it arose in {where or 'the module itself'} ({kind}), near the quantized {listed}: "
        "if a part reads such a weight instead of calling the layer, pass inputs=[batch] to quantlab.quantize, or "
        f"leave the layer out by modules_to_not_convert={near[:_MAX_NAMED]}"
    )
    if told not in getattr(error, "__notes__", ()):
        error.add_note(told)
