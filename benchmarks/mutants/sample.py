"""Mutants of code: made with cosmic-ray's operators, drawn from a seed, put into live functions.

A mutant is one operator at one place of one module. Places are drawn evenly, then one of the
operators for a place, so that an operator with many variants is no more frequent than others. What
does not change a function's code (annotations, docstrings) is no mutant.

A mutant is not imported. The code object of the one function that it changes is put into the
function that is already there (``__code__``), which whoever imported it by name sees as well.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from khosim.explore.coverage import clear_caches

__all__ = ("Mutant", "draw", "install")

_LEFT_OUT = ("RemoveDecorator", "VariableInserter", "VariableReplacer")
"""They change a module's code, or need to be told names."""


class Mutant(NamedTuple):
    """``function`` of ``module`` as ``source`` has it; ``was`` and ``now`` are the changed lines.

    ``line`` is their number, ``first`` that of the function's heading.
    """

    module: str
    function: str
    first: int
    line: int
    was: str
    now: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.function}\n    - {self.was}\n    + {self.now}"


def _path(module: str) -> Path:
    file = import_module(module).__file__
    assert file is not None
    return Path(file)


@cache
def _operators() -> dict[str, list[Any]]:
    # By family: all replacements of a binary operator are one.
    from cosmic_ray.plugins import get_operator, operator_names

    found: dict[str, list[Any]] = defaultdict(list)
    for name in sorted(operator_names()):
        family = name.split("/")[-1].split("_")[0]
        if family not in _LEFT_OUT:
            found[family].append(get_operator(name)())
    return found


@cache
def _places(module: str) -> list[tuple[str, tuple[int, int], list[tuple[str, int, int]]]]:
    # (family, where, [(family, operator's number in it, occurrence)]), in the order of the source.
    from cosmic_ray.ast import ast_nodes, get_ast

    tree = get_ast(_path(module).read_text(encoding="utf-8"))
    nodes = list(ast_nodes(tree))
    found: dict[tuple[tuple[int, int], str], list[tuple[str, int, int]]] = defaultdict(list)
    for family, operators in _operators().items():
        for number, operator in enumerate(operators):
            occurrence = 0
            for node in nodes:
                for start, _ in operator.mutation_positions(node):
                    found[start, family].append((family, number, occurrence))
                    occurrence += 1
    return [(family, where, found[where, family]) for where, family in sorted(found)]


def draw(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """``count`` different mutants of ``modules``, fewer where there are not so many."""
    random = Random(f"{seed}/{'/'.join(modules)}")
    places = [(module, place) for module in modules for place in _places(module)]
    random.shuffle(places)
    found: list[Mutant] = []
    for module, (_, _, choices) in places:
        if len(found) == count:
            break
        mutant = _make(module, *random.choice(choices))
        if mutant is not None:
            found.append(mutant)
    return found


def _make(module: str, family: str, number: int, occurrence: int) -> Mutant | None:
    from cosmic_ray.mutating import mutate_code

    path = _path(module)
    before = path.read_text(encoding="utf-8")
    after = mutate_code(before, _operators()[family][number], occurrence)
    if after is None or after == before:
        return None
    try:
        changed = _changed(compile(before, str(path), "exec"), compile(after, str(path), "exec"))
    except SyntaxError:
        return None
    if changed is None:
        return None
    old, new = before.splitlines(), after.splitlines()
    same = next(i for i in range(len(old)) if i >= len(new) or old[i] != new[i])
    was, now = old[same].strip(), new[same].strip() if same < len(new) else ""
    function = changed[0]
    return Mutant(module, function.co_qualname, function.co_firstlineno, same + 1, was, now, after)


def _changed(before: CodeType, after: CodeType) -> tuple[CodeType, CodeType] | None:
    """The outermost functions that differ, of two code objects of a module or a class."""
    for one, other in zip(_inner(before), _inner(after), strict=True):
        if one.co_flags & inspect.CO_OPTIMIZED:
            if not _is_same(one, other):
                return one, other
        else:
            found = _changed(one, other)
            if found is not None:
                return found
    return None


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _is_same(one: CodeType, other: CodeType) -> bool:
    def key(code: CodeType) -> tuple[Any, ...]:
        consts = [(type(c), c) for c in code.co_consts if not isinstance(c, CodeType)]
        return code.co_code, repr(consts), code.co_names, code.co_varnames

    mine, theirs = _inner(one), _inner(other)
    return (
        key(one) == key(other)
        and len(mine) == len(theirs)
        and all(_is_same(a, b) for a, b in zip(mine, theirs, strict=True))
    )


# -- into the running program --------------------------------------------------------------------


def install(mutant: Mutant) -> None:
    """Make the function that is there do what the mutant says, for the rest of this process."""
    path = _path(mutant.module)
    before = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    changed = _changed(before, compile(mutant.source, str(path), "exec"))
    assert changed is not None
    was, now = changed
    functions = list(_live(sys.modules[mutant.module], was))
    assert functions, f"{mutant.module}.{was.co_qualname} is not there"
    for function in functions:
        function.__code__ = now
    clear_caches()  # what was remembered is what another code said


def _live(owner: Any, code: CodeType) -> Iterator[FunctionType]:
    *outer, name = code.co_qualname.split(".")
    for part in outer:
        owner = vars(owner)[part]
    waiting = [vars(owner)[name]]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, FunctionType) and thing.__code__.co_firstlineno == code.co_firstlineno:
            yield thing
        for attribute in ("fget", "fset", "__func__", "__wrapped__"):
            inner = getattr(thing, attribute, None)
            if inner is not None:
                waiting.append(inner)
