"""The layers point one way, and the command line stays light.

Imports are read from the source with ``ast``, wherever they stand (also inside functions and under
``TYPE_CHECKING``): a layer that is named at all is a layer that is leaned on.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "khosim"

BASE = {"errors", "units", "plugins", "printable", "program_text"}
"""What every layer may use."""

MAY_USE: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "plugins": {"errors"},
    "printable": set(),
    "program_text": set(),
    "machine": BASE,
    "abi": BASE,
    "kernel": BASE | {"machine", "abi"},
    "checks": BASE | {"machine", "abi"},
    "capture": BASE | {"machine", "abi"},
    "inspect": BASE | {"machine", "abi", "checks", "capture"},
    "conform": BASE | {"machine", "abi", "kernel", "checks", "capture", "inspect"},
    "drivers": BASE | {"machine", "abi", "kernel"},
    "simulator": BASE | {"machine", "abi", "kernel", "drivers", "checks", "capture", "conform"},
    "plan": BASE | {"machine", "kernel", "capture", "conform"},
    "lab": BASE | {"machine", "abi", "kernel", "checks", "capture", "inspect", "__init__"},
    "scenario": BASE
    | {"machine", "abi", "kernel", "drivers", "checks", "capture", "simulator"},
    "matrix": BASE
    | {"machine", "abi", "kernel", "checks", "capture", "simulator", "scenario", "__init__"},
    "blackout": BASE | {"kernel", "scenario"},
    "bugs": BASE | {"machine", "abi", "kernel", "checks", "capture", "simulator"},
    "faults": BASE | {"machine", "abi", "kernel", "checks"},
    "explore": BASE
    | {"machine", "abi", "kernel", "drivers", "checks", "capture", "simulator", "faults"},
    "testing": BASE | {"machine", "abi", "kernel", "checks", "capture", "simulator", "faults"},
    "view": BASE
    | {"machine", "abi", "kernel", "checks", "capture", "simulator", "scenario", "matrix", "bugs"}
    | {"__init__"},
    "cli": BASE
    | {"machine", "abi", "kernel", "drivers", "checks", "capture", "simulator", "explore"}
    | {"testing", "view", "inspect", "conform", "plan", "lab", "scenario", "bugs", "matrix"}
    | {"blackout", "__init__"},
    "__main__": {"cli"},
    "__init__": {"errors", "simulator"},
}
"""Each layer, a folder or a module right under khosim/, and the others that it may import."""

LIGHT = ("khosim", "khosim.errors", "khosim.units", "khosim.cli", "khosim.cli.main")
"""Modules that must not pull in numpy, nor any layer that does work."""


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def _layers_imported(tree: ast.AST) -> set[tuple[int, str]]:
    """Return line number and layer of each import of a part of khosim."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            names = [node.module or ""]
            if names == ["khosim"]:  # either a layer, or a name that the package itself offers
                layers = [alias.name for alias in node.names]
                names = [f"khosim.{x}" if _is_module(x) else "khosim" for x in layers]
        else:
            continue
        for name in names:
            head, *parts = name.split(".")
            if head == "khosim":
                found.add((node.lineno, parts[0] if parts else "__init__"))
    return found


def _breaches(layer: str, source: str) -> list[str]:
    allowed = MAY_USE[layer] | {layer}
    return [
        f"line {line}: {layer} must not import {used}"
        for line, used in sorted(_layers_imported(ast.parse(source)))
        if used not in allowed
    ]


def _layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_its_place() -> None:
    """Each folder and module right under khosim/ stands in the table of layers above."""
    parts = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
    }
    assert parts - set(MAY_USE) == set()


def test_the_layers_have_no_circle() -> None:
    """The table itself points one way: the layers can be put in a row."""
    placed: set[str] = set()
    waiting = {layer: uses - {"__init__"} for layer, uses in MAY_USE.items()}
    while waiting:
        ready = {layer for layer, uses in waiting.items() if uses <= placed}
        assert ready, f"these use each other: {sorted(waiting)}"
        placed |= ready
        waiting = {layer: uses for layer, uses in waiting.items() if layer not in ready}


def test_checks_and_capture_never_see_the_kernel() -> None:
    """What judges or records a kernel may not share code with it, and it not with them."""
    for layer in ("checks", "capture"):
        assert MAY_USE[layer] == BASE | {"machine", "abi"}
        assert layer not in MAY_USE["kernel"]
    assert "kernel" not in MAY_USE["machine"] | MAY_USE["abi"]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """No module imports a layer that its own may not use."""
    assert _breaches(_layer_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("checks", "import khosim.kernel.kho"),
        ("checks", "from khosim.kernel import kho"),
        ("checks", "from khosim import kernel"),
        ("capture", "def f():\n    from khosim.kernel.kho import kho_init"),
        ("kernel", "import typing\nif typing.TYPE_CHECKING:\n    import khosim.checks.budget"),
        ("machine", "from khosim.abi import fdt"),
        ("abi", "from khosim.machine.ram import Ram"),
        ("kernel", "from khosim import Machine"),
        ("kernel", "import khosim"),
        ("units", "import khosim.machine"),
    ],
)
def test_a_breach_is_seen(layer: str, source: str) -> None:
    """The reader of imports above does notice every way of writing a forbidden one."""
    assert len(_breaches(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("checks", "import numpy\nfrom khosim.machine.ram import Ram\nfrom khosim import errors"),
        ("kernel", "from khosim.kernel.arch import X86_64\nimport khosim.abi.fdt as fdt"),
        ("cli", "from khosim import __version__\nimport khosim.kernel"),
        ("errors", "import errno\nimport khosimilar"),
    ],
)
def test_a_lawful_import_passes(layer: str, source: str) -> None:
    """Imports of lower layers, of the own layer and of other packages are nobody's business."""
    assert _breaches(layer, source) == []


def test_light_modules_stay_light() -> None:
    """``import khosim`` and the command's entry load neither numpy nor any working layer."""
    code = (
        f"import sys, {', '.join(LIGHT)}\n"
        "khosim.cli.main.main(['--version']); khosim.KernelError\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert [name for name in loaded if name.split(".")[0] in ("numpy", "fdt", "typing")] == []
    assert {name for name in loaded if name.split(".")[0] == "khosim"} == set(LIGHT)


def test_public_names_are_what_they_say() -> None:
    """The package's lazy names are the objects of the modules they live in."""
    import khosim
    from khosim import errors

    for name in ("InputError", "KernelError", "KernelPanic", "KhoSimError"):
        assert getattr(khosim, name) is getattr(errors, name)
    assert set(khosim.__all__) <= set(dir(khosim))
    with pytest.raises(AttributeError, match="no attribute 'Machin'"):
        _ = khosim.Machin
