"""The lab with a real kernel, where somebody has one: set KHOSIM_LAB_BZIMAGE to its path."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from khosim.cli.main import main

KERNEL = os.environ.get("KHOSIM_LAB_BZIMAGE", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not KERNEL or shutil.which("qemu-system-x86_64") is None,
        reason="no kernel in KHOSIM_LAB_BZIMAGE, or no QEMU",
    ),
]


@pytest.mark.parametrize("predecessor", ["linux", "khosim"])
def test_a_real_kernel_hands_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], predecessor: str
) -> None:
    """Every item holds, and khosim replays the capture without a difference."""
    out = str(tmp_path / "capture")
    call = ["lab", KERNEL, "--out", out, "--predecessor", predecessor, "--json"]
    assert main([*call, "--append", "reserve_mem=2M:4096:oops"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["generations"] == ["gen0", "gen1", "gen2"]
    assert {"root FDT received", "preserved blocks reserved"} <= {i["name"] for i in said["items"]}
    assert ("region oops" in {i["name"] for i in said["items"]}) == (predecessor == "khosim")
    assert main(["replay", out, "--json"]) == 0
    assert main(["inspect", out, "--json"]) == 0
