"""What there is to reach in the modelled kernel, read from khosim's own source with ``ast``.

A function models a kernel symbol where its docstring begins with one, or where it bears the name of
one: a name that a module's docstring quotes, that an event or an error goes by, or that begins as
the kernel's own do. A :class:`Site` is a statement that speaks: it refuses with an errno, writes to
the log, warns, or panics. An errno that is computed (``error = -errno.EINVAL if ... else 0``) is no
site.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ("KINDS", "Function", "Module", "Site", "modules", "package_path")

KINDS = ("refusal", "panic", "warning", "log")
"""The kinds of sites."""

_LAYERS = ("abi", "kernel")
_PREFIXES = ("fdt_", "kho_", "liveupdate_", "luo_", "memblock_")
_HEAD = re.compile(r"``(\w+)(?:\(\))?``")
_TELLS = {"printk": "log", "warn": "warning", "warn_once": "warning"}
_ALARMS = ("WARNING", "BUG", "kernel BUG", "refcount_t")


class Function(NamedTuple):
    """A function: ``name`` as in ``Class.method``, the kernel symbol it models or "", its lines."""

    name: str
    symbol: str
    lines: range


class Site(NamedTuple):
    """A statement that speaks: its kind (:data:`KINDS`), its function, its words, its lines."""

    kind: str
    where: str
    what: str
    lines: range


class Module(NamedTuple):
    """A module of the modelled kernel, by its path below the package (``kernel/kho.py``)."""

    path: str
    functions: tuple[Function, ...]
    sites: tuple[Site, ...]


def package_path() -> Path:
    """Where the package lies."""
    return Path(__file__).resolve().parent.parent


@cache
def modules() -> tuple[Module, ...]:
    """All modules of :mod:`khosim.abi` and :mod:`khosim.kernel`, by path."""
    root = package_path()
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for layer in _LAYERS
        for path in sorted((root / layer).rglob("*.py"))
    }
    known = {name for tree in trees.values() for name in _named(tree)}
    return tuple(_module(path, tree, known) for path, tree in trees.items())


def _named(tree: ast.Module) -> Iterator[str]:
    # Names in docstrings of modules, in events and in errors.
    yield from (x for x in _HEAD.findall(ast.get_docstring(tree) or "") if "_" in x)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = _called(node)
            at = {"emit": 0, "KernelError": 1}.get(called)
            if at is not None and len(node.args) > at:
                symbol = node.args[at]
                if isinstance(symbol, ast.Constant) and isinstance(symbol.value, str):
                    yield symbol.value
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "symbol":
                yield str(node.value.value)


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _module(path: str, tree: ast.Module, known: set[str]) -> Module:
    functions: list[Function] = []
    sites: list[Site] = []
    for scope, node in _functions(tree, ()):
        name = ".".join((*scope, node.name))
        symbol = _symbol_of(node, known)
        lines = range(node.body[0].lineno, _lines(node).stop)
        functions.append(Function(name, symbol, lines))
        sites += _sites(node, symbol or name)
    return Module(path, tuple(functions), tuple(sites))


def _lines(statement: ast.stmt) -> range:
    return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def _functions(
    node: ast.AST, scope: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            if not _is_stub(child):
                yield scope, child
            yield from _functions(child, (*scope, child.name))
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, (*scope, child.name))
        else:
            yield from _functions(child, scope)


def _is_stub(node: ast.FunctionDef) -> bool:
    # What a protocol or an abstract class only declares.
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return not body or (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and body[0].value.value is ...
    )


def _symbol_of(node: ast.FunctionDef, known: set[str]) -> str:
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return ""
    head = _HEAD.match(ast.get_docstring(node) or "")
    arguments = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
    if head is not None and "_" in head[1] and head[1] not in arguments:
        return head[1]
    return node.name if node.name in known or node.name.startswith(_PREFIXES) else ""


# -- statements that speak -----------------------------------------------------------------------


def _sites(function: ast.FunctionDef, where: str) -> Iterator[Site]:
    for statement in _statements(function):
        if isinstance(statement, (ast.Raise, ast.Return)):
            yield from _refusals(statement, where)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            kind = _TELLS.get(_called(statement.value), "")
            if kind and statement.value.args:
                text = _text(statement.value.args[0])
                alarm = "warning" if text.startswith(_ALARMS) else kind
                yield Site(alarm, where, text, _lines(statement))


def _statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    # Those of nested functions are theirs.
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting += reversed(list(ast.iter_child_nodes(node)))


def _refusals(statement: ast.Raise | ast.Return, where: str) -> Iterator[Site]:
    parts = list(ast.walk(statement))
    if isinstance(statement, ast.Raise):
        for call in parts:
            if isinstance(call, ast.Call) and _called(call) == "KernelPanic" and call.args:
                yield Site("panic", where, _text(call.args[0]), _lines(statement))
                return
    if any(isinstance(part, ast.IfExp) for part in parts):
        return
    for part in parts:
        if (
            isinstance(part, ast.Attribute)
            and isinstance(part.value, ast.Name)
            and part.value.id == "errno"
            and part.attr.startswith("E")
        ):
            yield Site("refusal", where, f"-{part.attr}", _lines(statement))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    return f"{{{ast.unparse(node)}}}"
