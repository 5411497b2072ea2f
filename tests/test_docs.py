"""The documentation: every program in it runs, every page is reachable, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OWN_TESTS = {"handlers.md", "testing.md", "view.md", "devices.md", "drivers.md"}
"""Pages whose programs have a test of their own."""

PAGES = sorted(path.name for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _programs() -> list[str]:
    return [
        name
        for name in PAGES
        if name not in OWN_TESTS and BLOCK.search((DOCS / name).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("name", _programs())
def test_every_program_in_a_page_runs(name: str) -> None:
    """The blocks of a page are one program, one behind the other."""
    text = (DOCS / name).read_text(encoding="utf-8")
    program = "\n".join(BLOCK.findall(text))
    exec(compile(program, f"docs/{name}", "exec"), {"__name__": "docs"})


def test_every_page_is_in_the_site() -> None:
    """A page that the navigation does not name is one that nobody finds."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in PAGES if f" {name}\n" not in text] == []


@pytest.mark.parametrize("path", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link to a file of the repository names one that is there."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.slow  # the generator reads every module
@pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="no generator: khosim[docs]"
)
def test_the_site_builds(tmp_path: Path) -> None:
    """The generator warns of nothing, and each page and the reference come out."""
    config, site = tmp_path / "mkdocs.yml", tmp_path / "site"
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shutil.copytree(DOCS, tmp_path / "docs")
    config.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(config)]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    assert "kho_preserve_folio" in (site / "reference" / "index.html").read_text("utf-8")
    names = [name.removesuffix(".md") for name in PAGES if name != "index.md"]
    assert [name for name in names if not (site / name / "index.html").is_file()] == []
