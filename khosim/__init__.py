"""A simulator of Linux Kexec HandOver (KHO): the machine survives, the kernels don't.

:class:`Machine` is the place to begin. Names are loaded when they are first asked for, so that
``import khosim`` costs next to nothing; numpy arrives with the first machine.

What lies where, from the bottom up: ``machine`` (what survives a kexec) and ``abi`` (bytes only);
``kernel`` (one generation); ``checks`` (invariants, seen from outside) and ``capture`` (what real
kernels left behind); ``cli``.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own constant, without the cost of importing typing
if TYPE_CHECKING:
    from khosim.errors import InputError, KernelError, KernelPanic, KhoSimError
    from khosim.simulator import Machine

__all__ = (
    "InputError",
    "KernelError",
    "KernelPanic",
    "KhoSimError",
    "Machine",
    "__version__",
)

__version__ = "0.1.0"

_HOME = {
    "InputError": "khosim.errors",
    "KernelError": "khosim.errors",
    "KernelPanic": "khosim.errors",
    "KhoSimError": "khosim.errors",
    "Machine": "khosim.simulator",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module, once."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what the module has, and what it would load."""
    return sorted({*globals(), *_HOME})
