"""Modules, as far as others refer to them.

Models ``kernel/module/main.c:try_module_get`` and ``module_put`` @ 7.3: who uses a module's code
counts on it, and a module that is going away gives no new references. Code that is built in has no
module: None. Left out: loading and unloading itself.
"""

from __future__ import annotations

__all__ = ("Module", "module_put", "try_module_get")


class Module:
    """``struct module``: ``refcnt`` are the references that others hold.

    ``live`` is False from the moment somebody begins to unload it.
    """

    __slots__ = ("live", "name", "refcnt")

    def __init__(self, name: str) -> None:
        self.name = name
        self.refcnt = 0
        self.live = True

    def __repr__(self) -> str:
        return f"Module({self.name!r}, refcnt={self.refcnt})"


def try_module_get(module: Module | None) -> bool:
    """``try_module_get``: whether there is a reference to be had."""
    if module is None:
        return True
    if not module.live:
        return False
    module.refcnt += 1
    return True


def module_put(module: Module | None) -> None:
    """``module_put``: give a reference back."""
    if module is not None:
        module.refcnt -= 1
